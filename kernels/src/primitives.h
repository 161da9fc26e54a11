// The operations as MLX primitives: they stay in the lazy graph, and run on the CPU's stream.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "mlx/array.h"
#include "mlx/utils.h"

namespace mlk::graph {

namespace mx = mlx::core;

mx::array quantized_matmul(const mx::array& x, const mx::array& weight, const mx::array& scales,
                           const mx::array& biases, int group_size, int bits);
// For all products with packed matrices that this thread puts into a graph from then on.
void use_byte_activations(bool asked);
mx::array matmul(const mx::array& x, const mx::array& weight);
mx::array rms_norm(const mx::array& x, const mx::array& weight, float eps);
mx::array swiglu(const mx::array& x);
mx::array rotate(const mx::array& x, const mx::array& periods, int offset);
// The buffer (batch, heads, rows, dim) with x (batch, heads, L, dim) in its rows from `row` on, in its
// dtype; in place where nobody else holds it. Numbers of float types, or words.
mx::array append(const mx::array& buffer, const mx::array& x, int row);

// The same, packed to words, scales and biases, 8 or 4 bits a number: the bits that `quantize` and three
// appends give.
std::vector<mx::array> append_packed(const std::vector<mx::array>& buffers, const mx::array& x, int row,
                                     int group_size, int bits);

// A matrix, keys or values: one array, or words, scales and biases where packed.
using Arrays = std::vector<mx::array>;
// The parts of a cache, of which the first `rows` of each hold something.
struct Parts {
  const std::vector<Arrays>&keys, &values;
  const std::vector<int>& rows;
};
// sight (2, rows): the first and the last query that see a row; without it, each query sees the
// rows up to its own.
mx::array attention(const mx::array& q, const std::vector<Arrays>& keys,
                    const std::vector<Arrays>& values, const std::vector<int>& rows, float scale,
                    const std::optional<mx::array>& sight);

// x (..., in) packed to words (..., in * bits / 32), scales and biases (..., in / group_size), and back:
// the bits of MLX's own operations on a CPU.
std::vector<mx::array> quantize(const mx::array& x, int group_size, int bits);
mx::array dequantize(const mx::array& weight, const mx::array& scales, const mx::array& biases,
                     int group_size, int bits);
// scores (V,) float32, minus infinity for what is not among the likeliest.
mx::array keep_likeliest(const mx::array& scores, int top_k, double top_p, double min_p);
// The first of the largest scores (V,) float32, and the one that MLX's random.categorical draws with a
// key (2,) uint32: (1,) uint32.
mx::array likeliest(const mx::array& scores);
mx::array draw(const mx::array& scores, const mx::array& key);
// Packs values (out, in) with scales and biases of less squared error than the nearest: words, scales,
// biases. Done at once, by the calling thread.
std::vector<mx::array> least_squares(mx::array values, int group_size, int bits, float cut, int rounds);

// What an operation of such sizes holds beside MLX's arrays: for all threads together, and for each.
using ScratchBytes = std::pair<size_t, size_t>;
// Of `tokens` rows times a matrix, packed where it has bits.
ScratchBytes product_scratch(size_t rows, size_t columns, size_t tokens, mx::Dtype dtype, int group_size,
                             int bits);
// Of so many queries over a cache, and of their rotation.
ScratchBytes attention_scratch(size_t heads, size_t kv_heads, size_t head_dim, size_t tokens, size_t rows);
// What is held so now.
size_t scratch_bytes();

// A tensor at an offset of a file, rows unbroken, read when it is evaluated.
mx::array file_array(const std::string& path, size_t offset, const std::vector<int>& shape, mx::Dtype dtype);
// The arrays one below another; those of files that were not read yet are read into one.
mx::array join_rows(const std::vector<mx::array>& arrays);

}  // namespace mlk::graph
