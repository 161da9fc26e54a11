// The operations as MLX primitives: they stay in the lazy graph, and run on the CPU's stream.
#pragma once

#include "mlx/array.h"
#include "mlx/utils.h"

namespace mlk::graph {

namespace mx = mlx::core;

mx::array quantized_matmul(const mx::array& x, const mx::array& weight, const mx::array& scales,
                           const mx::array& biases, int group_size, int bits);
mx::array rms_norm(const mx::array& x, const mx::array& weight, float eps);
mx::array swiglu(const mx::array& x);
mx::array rotate(const mx::array& x, const mx::array& periods, int offset);
mx::array attention(const mx::array& q, const mx::array& keys, const mx::array& values,
                    float scale);

}  // namespace mlk::graph
