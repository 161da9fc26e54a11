// New rows of keys and values into a cache's buffer, in its element type.
#pragma once

#include <cfloat>

#include "mlx_llama_kernels/rows.h"

namespace mlk::MLK_ISA {

constexpr float MOST_HALF = 65504.0f;  // the largest finite number of half precision

static inline void store_some(F v, float* to, size_t n) { __builtin_memcpy(to, &v, n * sizeof *to); }
static inline void store_some(F v, bf16* to, size_t n) {
  for (size_t i = 0; i < n; ++i) narrow(v[i], to[i]);
}
// What is finite stays finite: half precision ends where float32 has far to go.
static inline void store_some(F v, f16* to, size_t n) {
  F high = v <= FLT_MAX ? all(MOST_HALF) : v, low = v >= -FLT_MAX ? all(-MOST_HALF) : v;
  v = v > MOST_HALF ? high : v;
  v = v < -MOST_HALF ? low : v;
#if MLK_LANES == 16
  __m256i halves = _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
  __builtin_memcpy(to, &halves, n * sizeof *to);
#elif MLK_LANES == 8
  __m128i halves = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
  __builtin_memcpy(to, &halves, n * sizeof *to);
#else
  for (size_t i = 0; i < n; ++i) narrow(v[i], to[i]);
#endif
}

// Rows [row, row + x.m) of a buffer (batch, heads, rows, dim). Parts are (batch, head) pairs.
static void append(const Heads& x, const Buffer& to, size_t first, size_t last) {
  for (size_t part = first; part < last; ++part) {
    size_t begin = (part * to.rows + to.row) * x.dim;
    for (size_t m = 0; m < x.m; ++m) {
      size_t from = place(x, part / x.heads, part % x.heads, m);
      typed(to.type, [&](auto* t) {
        auto* row = static_cast<decltype(t)>(to.data) + begin + m * x.dim;
        typed(x.type, [&](auto* s) {
          auto* numbers = static_cast<const std::remove_pointer_t<decltype(s)>*>(x.data) + from;
          if constexpr (std::is_same_v<decltype(s), decltype(t)>) {
            __builtin_memcpy(row, numbers, x.dim * sizeof *row);
          } else {
            for (size_t d = 0; d < x.dim; d += W) {
              size_t n = x.dim - d < size_t(W) ? x.dim - d : W;
              store_some(load_some(numbers + d, n), row + d, n);
            }
          }
        });
      });
    }
  }
}

}  // namespace mlk::MLK_ISA
