// One token's way through a whole model, over plain memory. Knows nothing of MLX.
#pragma once

#include <vector>

#include "operations.h"

namespace mlk {

struct Norm {
  const void* weight;
  Type type;
};

// Matrices of one input; their products stand side by side. One, but where their bits differ.
using Matrices = std::vector<Matrix>;

struct Block {
  Norm attention_norm;
  Matrices wqkv, wo;
  Norm ffn_norm;
  Matrices w13, w2;
};

struct Model {
  Matrices embeddings;  // one
  std::vector<Block> blocks;
  Norm norm;
  Matrices output;
  const float* periods;  // (head_dim / 2), 1 over the frequency
  size_t n_heads, n_kv_heads, head_dim;
  float eps, scale;  // of the norms, and of attention's scores
};

// A cache's buffers (1, n_kv_heads, rows, ·) of a layer's keys or values, row after row.
struct Kept {
  Buffer numbers;  // head_dim plain ones, or packed: head_dim * bits / 32 words, as float32
  int bits = 0, group = 0;  // 0 where plain
  Buffer scales{}, biases{};  // head_dim / group
};

// What one token meets: it takes `row` of each buffer, at a RoPE position, and sees the first n_rows.
struct Token {
  size_t id;
  int position;
  size_t row, n_rows;
  const int32_t* sight;  // as Attention has it
  const Kept *keys, *values;  // of each block
};

// Scores (output's rows) of what follows the token, which must be a row of the embeddings. is_coarse:
// whether packed matrices may take activations as whole numbers of 8 bits.
void pass_token(Pool&, const Table&, const Model&, const Token&, bool is_coarse, float* logits);

}  // namespace mlk
