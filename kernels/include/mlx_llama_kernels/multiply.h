// The product of a panel of PANEL columns and a block of MR rows, both packed as floats.
#pragma once

#include "mlx_llama_kernels/lanes.h"

namespace mlk::MLK_ISA {

constexpr int MR = W == 16 ? 12 : 6;
constexpr int PANEL = 2 * W;

// c (MR, PANEL) += x (depth, MR) transposed times panel (depth, PANEL). Summed by itself first, so
// that errors grow with the depth and with the number of calls, not with their product.
static inline void multiply(const float* x, const float* panel, size_t depth, float* c) {
  F sums[MR][2] = {};
  for (size_t k = 0; k < depth; ++k) {
    F left = load(panel + k * PANEL), right = load(panel + k * PANEL + W);
#pragma GCC unroll 12
    for (int r = 0; r < MR; ++r) {
      F value = all(x[k * MR + r]);
      sums[r][0] += value * left;
      sums[r][1] += value * right;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < MR; ++r) {
    store(c + r * PANEL, load(c + r * PANEL) + sums[r][0]);
    store(c + r * PANEL + W, load(c + r * PANEL + W) + sums[r][1]);
  }
}

}  // namespace mlk::MLK_ISA
