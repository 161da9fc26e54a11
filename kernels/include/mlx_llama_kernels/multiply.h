// The product of a panel of PANEL columns and a block of MR rows, both packed as floats; and how rows
// are packed.
#pragma once

#include "mlx_llama_kernels/lanes.h"

namespace mlk::MLK_ISA {

constexpr int MR = W == 16 ? 13 : 6;
constexpr int PANEL = 2 * W;

// c (MR, PANEL), its rows `stride` apart, += x (depth, MR) transposed times panel (depth, PANEL).
// Summed by itself first, so that errors grow with the depth and with the number of calls, not with
// their product.
static inline void multiply(const float* x, const float* panel, size_t depth, float* c, size_t stride) {
  F sums[MR][2] = {};
  for (size_t k = 0; k < depth; ++k) {
    F left = load(panel + k * PANEL), right = load(panel + k * PANEL + W);
#pragma GCC unroll 13
    for (int r = 0; r < MR; ++r) {
      F value = all(x[k * MR + r]);
      sums[r][0] += value * left;
      sums[r][1] += value * right;
    }
  }
#pragma GCC unroll 13
  for (int r = 0; r < MR; ++r) {
    store(c + r * stride, load(c + r * stride) + sums[r][0]);
    store(c + r * stride + W, load(c + r * stride + W) + sums[r][1]);
  }
}

// a (rows, stride), depth of each -> blocks of MR rows, each (depth, MR), the last one filled with zeros.
static inline void interleave(const float* a, size_t stride, size_t rows, size_t depth, float* to) {
  for (size_t first = 0; first < rows; first += MR, to += depth * MR) {
    for (size_t side = 0; side < size_t(MR); side += W) {  // a block may be wider than a vector
      const size_t n = MR - side < size_t(W) ? MR - side : W;
      for (size_t k = 0; k < depth; k += W) {
        F columns[W] = {};
        for (size_t r = 0; r < n && first + side + r < rows; ++r) {
          columns[r] = load_some(a + (first + side + r) * stride + k, depth - k);
        }
        turn(columns);
        for (size_t i = k; i < depth && i < k + W; ++i) {
          __builtin_memcpy(to + i * MR + side, columns + (i - k), n * sizeof(float));
        }
      }
    }
  }
}

}  // namespace mlk::MLK_ISA
