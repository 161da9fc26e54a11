// Keys and values as a cache stores them, read a vector at a time: plain numbers of any element
// type, or MLX's affine packing of 8 and 4 bits.
//
// A vector of packed numbers is read without its scale and bias, and for 4 bits in the order in
// which it is cheapest to unpack; `lane_of` tells where a number stands.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "mlx_llama_kernels/rows.h"

namespace mlk::MLK_ISA {

static inline size_t up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

static inline F load_wide(const float* from) { return load(from); }
#if MLK_LANES == 16
// The forms with a mask, as GCC 12 warns of its own header in the others.
static inline U widen_bytes(const char* from) {
  return (U)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128((const __m128i*)from));
}
static inline F load_wide(const bf16* from) {
  return (F)((U)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256((const __m256i*)from)) << 16);
}
static inline F load_wide(const f16* from) {
  return (F)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)from));
}
#elif MLK_LANES == 8
static inline U widen_bytes(const char* from) {
  return (U)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
}
static inline F load_wide(const bf16* from) {
  return (F)((U)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)) << 16);
}
static inline F load_wide(const f16* from) {
  return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
}
#else
template <class T>
static inline F load_wide(const T* from) {
  return load(from);
}
#endif

// The rows of one head.
template <class T>
struct StoredNumbers {
  static constexpr bool is_packed = false;
  const T* data;
  ptrdiff_t stride;
  size_t dim;

  StoredNumbers(const Stored& x, size_t batch, size_t head)
      : data(static_cast<const T*>(x.numbers.data) + place(x.numbers, batch, head, 0)),
        stride(x.numbers.stride_row),
        dim(x.numbers.dim) {}
  static size_t lane_of(size_t d) { return d; }
  // Whether n numbers from d on are all there.
  bool has(size_t d, size_t n) const { return d + n <= dim; }
  F whole(size_t row, size_t d) const { return load_wide(data + ptrdiff_t(row) * stride + d); }
  // The numbers from d on, a whole vector; zero behind the last one.
  F vector(size_t row, size_t d) const {
    const T* from = data + ptrdiff_t(row) * stride + d;
    if (has(d, W)) return load_wide(from);
    T rest[W] = {};
    if (d < dim) __builtin_memcpy(rest, from, (dim - d) * sizeof(T));
    return load_wide(rest);
  }
};

template <int BITS>
struct PackedNumbers {
  static constexpr bool is_packed = true;
  const char* data;
  ptrdiff_t stride;

  PackedNumbers(const Stored& x, size_t batch, size_t head)
      : data(static_cast<const char*>(x.numbers.data) + 4 * place(x.numbers, batch, head, 0)),
        stride(4 * x.numbers.stride_row) {}
  static size_t lane_of(size_t d) {
    if (BITS == 8 || W < 16) return d;
    size_t i = d % 16;
    return d - i + (i < 8 ? 2 * i : 2 * (i - 8) + 1);
  }
  static bool has(size_t, size_t) { return true; }
  F whole(size_t row, size_t d) const { return vector(row, d); }
  F vector(size_t row, size_t d) const {
    const char* from = data + ptrdiff_t(row) * stride + d * BITS / 8;
#if MLK_LANES == 16
    if (BITS == 8) return __builtin_convertvector((I)widen_bytes(from), F);
    typedef uint64_t Pairs __attribute__((vector_size(64)));
    uint64_t words;  // two of them, which take turns in the lanes
    __builtin_memcpy(&words, from, 8);
    const U shifts = {0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28};
    return __builtin_convertvector((I)((U)(words - Pairs{}) >> shifts & 15u), F);
#elif MLK_LANES == 8
    if (BITS == 8) return __builtin_convertvector((I)widen_bytes(from), F);
    uint32_t word;
    __builtin_memcpy(&word, from, 4);
    const U shifts = {0, 4, 8, 12, 16, 20, 24, 28};
    return __builtin_convertvector((I)((word - U{}) >> shifts & 15u), F);
#else
    float wide[W];
    for (int lane = 0; lane < W; ++lane) {
      uint8_t byte = from[lane * BITS / 8];
      wide[lane] = BITS == 8 ? byte : lane % 2 ? byte >> 4 : byte & 15;
    }
    return load(wide);
#endif
  }
};

// Calls f with the reader of one head's rows.
template <class Fn>
static inline void reading(const Stored& x, size_t batch, size_t head, Fn f) {
  if (x.bits == 8) f(PackedNumbers<8>(x, batch, head));
  else if (x.bits == 4) f(PackedNumbers<4>(x, batch, head));
  else typed(x.numbers.type, [&](auto* t) { f(StoredNumbers<std::remove_pointer_t<decltype(t)>>(x, batch, head)); });
}

// Where number d of a row stands in its vectors.
static inline size_t lane_of(const Stored& x, size_t d) {
  return x.bits == 4 ? PackedNumbers<4>::lane_of(d) : d;
}

static inline size_t dim_of(const Stored& x) {
  return x.bits ? x.numbers.dim * (32 / x.bits) : x.numbers.dim;
}
static inline size_t groups_of(const Stored& x) { return x.bits ? x.scales.dim : 1; }
static inline size_t group_of(const Stored& x) { return dim_of(x) / groups_of(x); }

// One group's scales or biases of the rows [first, first + n).
static inline void widen_column(const Heads& x, size_t batch, size_t head, size_t first, size_t n,
                                size_t group, float* to) {
  size_t from = place(x, batch, head, first) + group;
  if (x.stride_row == 1) return widen_row(x.type, x.data, from, to, n);
  for (size_t i = 0; i < n; ++i) {
    widen_row(x.type, x.data, size_t(ptrdiff_t(from) + ptrdiff_t(i) * x.stride_row), to + i, 1);
  }
}

// The numbers of one row in their own order, scaled; zero up to a whole vector.
template <class Reader>
static inline void unpack_row(const Reader& reader, const Stored& x, size_t batch, size_t head,
                              size_t row, float* to) {
  size_t dim = dim_of(x), group = group_of(x);
  if constexpr (!Reader::is_packed) {
    for (size_t d = 0; d < dim; d += W) store(to + d, reader.vector(row, d));
  } else {
    I order;
    for (int lane = 0; lane < W; ++lane) order[lane] = int(Reader::lane_of(lane));
    float scales[most_dim / 32], biases[most_dim / 32];
    widen_row(x.scales.type, x.scales.data, place(x.scales, batch, head, row), scales, groups_of(x));
    widen_row(x.biases.type, x.biases.data, place(x.biases, batch, head, row), biases, groups_of(x));
    for (size_t d = 0; d < dim; d += W) {
      F number = pick(reader.vector(row, d), order);
      store(to + d, number * scales[d / group] + biases[d / group]);
    }
  }
}

}  // namespace mlk::MLK_ISA
