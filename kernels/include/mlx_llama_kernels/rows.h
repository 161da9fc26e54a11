// Operations on rows: RMSNorm, SwiGLU, rotation.
#pragma once

#include "mlx_llama_kernels/lanes.h"

namespace mlk::MLK_ISA {

constexpr size_t PIECE = 512;  // numbers that are widened at once

static void rms_norm(const Rows& x, const void* weight, Type weight_type, float eps, void* y,
                     size_t first, size_t last) {
  float piece[PIECE], weights[PIECE];
  for (size_t m = first; m < last; ++m) {
    F squares = {};
    for (size_t k = 0; k < x.n; k += PIECE) {
      size_t n = x.n - k < PIECE ? x.n - k : PIECE;
      widen_row(x.type, x.data, m * x.n + k, piece, n);
      for (size_t i = n; i % (4 * W); ++i) piece[i] = 0;
      // Squares have one sign, so rounding adds up: short sums, then their sum.
      F parts[4] = {};
      for (size_t i = 0; i < n; i += 4 * W) {
        for (int p = 0; p < 4; ++p) parts[p] += load(piece + i + p * W) * load(piece + i + p * W);
      }
      squares += (parts[0] + parts[1]) + (parts[2] + parts[3]);
    }
    float scale = 1.0f / __builtin_sqrtf(sum(squares) / float(x.n) + eps);
    for (size_t k = 0; k < x.n; k += PIECE) {
      size_t n = x.n - k < PIECE ? x.n - k : PIECE;
      widen_row(x.type, x.data, m * x.n + k, piece, n);
      widen_row(weight_type, weight, k, weights, n);
      for (size_t i = 0; i < n; ++i) piece[i] *= scale * weights[i];
      narrow_row(x.type, piece, y, m * x.n + k, n);
    }
  }
}

static void swiglu(const Rows& x, void* y, size_t first, size_t last) {
  float gates[PIECE], ups[PIECE];
  size_t width = x.n / 2;
  for (size_t m = first; m < last; ++m) {
    for (size_t k = 0; k < width; k += PIECE) {
      size_t n = width - k < PIECE ? width - k : PIECE;
      widen_row(x.type, x.data, m * x.n + k, gates, n);
      widen_row(x.type, x.data, m * x.n + width + k, ups, n);
      for (size_t i = n; i % W; ++i) gates[i] = ups[i] = 0;
      for (size_t i = 0; i < n; i += W) {
        F gate = load(gates + i);
        store(gates + i, gate / (1.0f + exponential(-gate)) * load(ups + i));
      }
      narrow_row(x.type, gates, y, m * width + k, n);
    }
  }
}

static inline size_t place(const Heads& x, size_t batch, size_t head, size_t row) {
  return size_t(ptrdiff_t(batch) * x.stride_batch + ptrdiff_t(head) * x.stride_head +
                ptrdiff_t(row) * x.stride_row);
}

// Half-split pairs: number i turns with number i + dim / 2.
static void rotate(const Heads& x, const float* angles, void* y, size_t first, size_t last) {
  float row[most_dim];
  size_t half = x.dim / 2;
  for (size_t part = first; part < last; ++part) {
    for (size_t m = 0; m < x.m; ++m) {
      const float* cosine = angles + m * half;
      const float* sine = angles + (x.m + m) * half;
      widen_row(x.type, x.data, place(x, part / x.heads, part % x.heads, m), row, x.dim);
      for (size_t i = 0; i < half; ++i) {
        float a = row[i], b = row[i + half];
        row[i] = a * cosine[i] - b * sine[i];
        row[i + half] = a * sine[i] + b * cosine[i];
      }
      narrow_row(x.type, row, y, (part * x.m + m) * x.dim, x.dim);
    }
  }
}

}  // namespace mlk::MLK_ISA
