// Products with few rows of activations: each row of the matrix is read once, and is all the time
// that it takes where memory is the limit.
//
// Scales are applied once for each block; biases through the lane's sum of activations.
#pragma once

#include "mlx_llama_kernels/digits.h"

namespace mlk::MLK_ISA {

template <class L>
static inline size_t blocks_of(const Matrix& a) {
  return (a.columns + L::BLOCK - 1) / L::BLOCK;
}

// Prepared: for each row of x its blocks, each PER vectors of activations and one of lane sums.
static size_t prepared_floats(const Matrix& a, size_t m) {
#if defined(MLK_HAS_DOTS)
  if (digits::takes(a)) return digits::floats(a, m);
#endif
  size_t floats = 0;
  by_layout(a, [&](auto layout) {
    using L = decltype(layout);
    floats = m * blocks_of<L>(a) * size_t(L::PER + 1) * W;
  });
  return floats;
}

static void prepare(const Matrix& a, const Rows& x, float* prepared) {
#if defined(MLK_HAS_DOTS)
  if (digits::takes(a)) return digits::prepare(a, x, prepared);
#endif
  by_layout(a, [&](auto layout) {
    using L = decltype(layout);
    size_t blocks = blocks_of<L>(a);
    for (size_t m = 0; m < x.m; ++m) {
      for (size_t b = 0; b < blocks; ++b, prepared += (L::PER + 1) * W) {
        float values[L::BLOCK] = {};
        size_t start = b * L::BLOCK;
        size_t n = x.n - start < size_t(L::BLOCK) ? x.n - start : size_t(L::BLOCK);
        widen_row(x.type, x.data, m * x.n + start, values, n);
        for (int lane = 0; lane < W; ++lane) {
          float total = 0;
          for (int i = 0; i < L::PER; ++i) {
            float value = values[L::place(i, lane)];
            prepared[i * W + lane] = value * L::weight_of(i);
            total += value;
          }
          prepared[L::PER * W + lane] = total;
        }
      }
    }
  });
}

// Widens the scales of one row; what a vector reads behind them is zero.
static inline void widen_scales(const Matrix& a, const void* from, size_t row, float* to) {
  size_t groups = a.columns / a.group;
  widen_row(a.type, from, row * groups, to, groups);
  for (int lane = 0; lane < 2 * W; ++lane) to[groups + lane] = 0;
}

template <class L, int M>
static inline void row_product(const Matrix& a, const float* prepared, size_t row, size_t blocks,
                               I lanes, float* out) {
  constexpr size_t held = L::IS_PACKED ? most_row_groups + 2 * W : 1;
  float scales[held], biases[held];
  if constexpr (L::IS_PACKED) {
    widen_scales(a, a.scales, row, scales);
    widen_scales(a, a.biases, row, biases);
  }
  const char* data = row_of(a, row);
  const size_t stride = blocks * (L::PER + 1) * W;
  F total[M] = {};
  auto block = [&](const char* from, size_t b) __attribute__((always_inline)) {
    const float* x = prepared + b * (L::PER + 1) * W;
    auto raw = L::raw(from);
    F dot[M] = {};
#pragma GCC unroll 16
    for (int i = 0; i < L::PER; ++i) {
      F q = L::number(raw, i);
      for (int m = 0; m < M; ++m) dot[m] += q * load(x + m * stride + i * W);
    }
    if constexpr (L::IS_PACKED) {
      size_t group = b * L::BLOCK / a.group;
      F scale = pick(load(scales + group), lanes);
      F bias = pick(load(biases + group), lanes);
      for (int m = 0; m < M; ++m) {
        total[m] += scale * dot[m];
        total[m] += bias * load(x + m * stride + L::PER * W);
      }
    } else {
      for (int m = 0; m < M; ++m) total[m] += dot[m];
    }
  };
  size_t bytes = row_bytes(a), whole = bytes < size_t(L::BEHIND) ? 0 : (bytes - L::BEHIND) / L::BYTES;
  for (size_t b = 0; b < whole; ++b) {
    const char* from = data + b * L::BYTES;
    for (int line = 0; line < L::BYTES; line += 64) __builtin_prefetch(from + AHEAD + line);
    block(from, b);
  }
  if (whole < blocks) {
    char rest[L::BYTES + L::BEHIND] = {};
    __builtin_memcpy(rest, data + whole * L::BYTES, bytes - whole * L::BYTES);
    block(rest, whole);
  }
  for (int m = 0; m < M; ++m) out[m] = sum(total[m]);
}

static void few(const Matrix& a, const Rows& x, const float* prepared, void* y, size_t first,
                size_t last) {
#if defined(MLK_HAS_DOTS)
  if (digits::takes(a)) return digits::few(a, x, prepared, y, first, last);
#endif
  by_layout(a, [&](auto layout) {
    using L = decltype(layout);
    I lanes = {};
    if constexpr (L::IS_PACKED) {
      for (int lane = 0; lane < W; ++lane) lanes[lane] = L::place(0, lane) / a.group;
    }
    size_t blocks = blocks_of<L>(a);
    for (size_t row = first; row < last; ++row) {
      float out[few_rows];
      switch (x.m) {
        case 1: row_product<L, 1>(a, prepared, row, blocks, lanes, out); break;
        case 2: row_product<L, 2>(a, prepared, row, blocks, lanes, out); break;
        case 3: row_product<L, 3>(a, prepared, row, blocks, lanes, out); break;
        case 4: row_product<L, 4>(a, prepared, row, blocks, lanes, out); break;
        default: row_product<L, 5>(a, prepared, row, blocks, lanes, out); break;
      }
      for (size_t m = 0; m < x.m; ++m) narrow_row(x.type, out + m, y, m * a.rows + row, 1);
    }
  });
}

}  // namespace mlk::MLK_ISA
