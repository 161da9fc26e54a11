// The rows of a matrix side by side, as a panel of PANEL: how they are turned, and asked for.
#pragma once

#include "mlx_llama_kernels/matrix.h"
#include "mlx_llama_kernels/multiply.h"

namespace mlk::MLK_ISA {

// Rows behind the last one repeat it.
static inline size_t row_at(const Matrix& a, size_t first, int lane) {
  return first + lane < a.rows ? first + lane : a.rows - 1;
}

// Writes n columns of W rows that each hold `stride` numbers, turned: to (n, PANEL).
template <class T>
static inline void spread(const Matrix& a, const T* from, size_t stride, size_t row, size_t n, float* to) {
  for (size_t k = 0; k < n; k += W) {
    F rows[W];
    for (int lane = 0; lane < W; ++lane) {
      rows[lane] = load_some(from + row_at(a, row, lane) * stride + k, n - k);
    }
    turn(rows);
    for (size_t i = k; i < n && i < k + W; ++i) store(to + i * PANEL, rows[i - k]);
  }
}

// Asks the memory for `depth` columns of a panel's rows. Always inline: GCC drops calls of functions
// that do nothing else.
__attribute__((always_inline)) static inline void ask(const Matrix& a, size_t row, size_t start, size_t depth) {
  const size_t bits = a.bits ? size_t(a.bits) : 8 * size_of(a.type), bytes = depth * bits / 8;
  for (size_t r = row; r < row + PANEL && r < a.rows; ++r) {
    const char* from = row_of(a, r) + start * bits / 8;
    for (size_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at);
    __builtin_prefetch(from + bytes - 1);  // lines need not begin where rows do
  }
}

}  // namespace mlk::MLK_ISA
