// One token's way through a whole model as one MLX primitive: what MLX and Python cost for each
// operation is a good part of a token's time otherwise.
#pragma once

#include <memory>
#include <tuple>

#include "primitives.h"

namespace mlk::graph {

// A matrix: its arrays, and the size of its groups and its bits, 0 where it is dense.
using Packed = std::tuple<Arrays, int, int>;
// attention_norm, wqkv, wo, ffn_norm, w13, w2; matrices of one input side by side.
using Layer = std::tuple<mx::array, std::vector<Packed>, std::vector<Packed>, mx::array,
                         std::vector<Packed>, std::vector<Packed>>;

class Weights;

class TokenPass {
 public:
  // Evaluates the arrays. Throws std::invalid_argument for what does not fit together.
  TokenPass(const Packed& embeddings, const std::vector<Layer>& layers, const mx::array& norm,
            const std::vector<Packed>& output, const mx::array& periods, int n_heads, int n_kv_heads,
            float eps, float scale);

  // token (1, 1) uint32; keys and values: of each layer the buffers (1, n_kv_heads, S, ·), plain, or
  // words, scales and biases. The token takes `row` of them and sees the first n_rows, or of these
  // what `sight` (2, n_rows) says. What is no row of the embeddings has no logits that are numbers.
  // Returns logits (1, 1, V) float32, what says that the pass is over, and all keys and values with the
  // new row, in place where nobody else holds them. after: what the last pass returned second; given it,
  // the very buffers are written, and none are returned. Nobody but the cache may hold them then.
  std::tuple<mx::array, mx::array, std::vector<Arrays>, std::vector<Arrays>> operator()(
      const mx::array& token, const std::vector<Arrays>& keys, const std::vector<Arrays>& values, int row,
      int n_rows, int position, const std::optional<mx::array>& sight,
      const std::optional<mx::array>& after, bool is_coarse) const;

 private:
  std::shared_ptr<const Weights> weights_;
};

}  // namespace mlk::graph
