// The operations as MLX primitives: they stay in the lazy graph, and run on the CPU's stream.
#pragma once

#include <optional>
#include <vector>

#include "mlx/array.h"
#include "mlx/utils.h"

namespace mlk::graph {

namespace mx = mlx::core;

mx::array quantized_matmul(const mx::array& x, const mx::array& weight, const mx::array& scales,
                           const mx::array& biases, int group_size, int bits);
mx::array matmul(const mx::array& x, const mx::array& weight);
mx::array rms_norm(const mx::array& x, const mx::array& weight, float eps);
mx::array swiglu(const mx::array& x);
mx::array rotate(const mx::array& x, const mx::array& periods, int offset);
// keys, values: the parts of a cache, one array each, or words, scales and biases where packed.
// sight (2, rows): the first and the last query that see a row; without it, each query sees the
// rows up to its own.
mx::array attention(const mx::array& q, const std::vector<std::vector<mx::array>>& keys,
                    const std::vector<std::vector<mx::array>>& values, float scale,
                    const std::optional<mx::array>& sight);

}  // namespace mlk::graph
