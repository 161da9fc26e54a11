// New rows of keys and values into a cache's buffer: in its element type, or packed.
#pragma once

#include <cfloat>

#include "mlx_llama_kernels/quantize.h"
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

// Writes n numbers in another element type.
template <class S, class T>
static inline void store_all(const S* from, size_t n, T* to) {
  if constexpr (std::is_same_v<S, T>) {
    __builtin_memcpy(to, from, n * sizeof *to);
  } else {
    for (size_t d = 0; d < n; d += W) {
      size_t some = n - d < size_t(W) ? n - d : W;
      store_some(load_some(from + d, some), to + d, some);
    }
  }
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
          store_all(static_cast<const std::remove_pointer_t<decltype(s)>*>(x.data) + from, x.dim, row);
        });
      });
    }
  }
}

// The rows of one part, whose first group is the buffer's at-th: scales and biases are found and rounded
// in their own type, then converted.
template <int BITS, class T>
static inline void append_packed_rows(const T* x, const Heads& like, const PackedBuffer& to, size_t at) {
  const size_t in_row = like.dim / to.group, all = like.m * in_row;
  T scales[W], biases[W];
  for (size_t g = 0; g < all; g += W) {
    auto from = [&](size_t i) {
      return x + ptrdiff_t((g + i) / in_row) * like.stride_row + (g + i) % in_row * to.group;
    };
    size_t n = least(all - g, W), word = (at + g) * to.group * BITS / 32;
    pack_some<BITS>(n, to.group, from, reinterpret_cast<char*>(to.words + word), scales, biases);
    typed(to.type, [&](auto* t) {
      store_all(scales, n, static_cast<decltype(t)>(to.scales) + at + g);
      store_all(biases, n, static_cast<decltype(t)>(to.biases) + at + g);
    });
  }
}

// The same rows of a packed buffer, of 8 or 4 bits.
static void append_packed(const Heads& x, const PackedBuffer& to, size_t first, size_t last) {
  for (size_t part = first; part < last; ++part) {
    size_t at = (part * to.rows + to.row) * (x.dim / to.group);
    typed(x.type, [&](auto* t) {
      auto* numbers = static_cast<const std::remove_pointer_t<decltype(t)>*>(x.data) +
                      place(x, part / x.heads, part % x.heads, 0);
      if (to.bits == 8) append_packed_rows<8>(numbers, x, to, at);
      else append_packed_rows<4>(numbers, x, to, at);
    });
  }
}

}  // namespace mlk::MLK_ISA
