// Vectors of MLK_LANES floats in GCC's and Clang's own notation, and conversions of element types.
//
// Included once for each instruction set, into the namespace MLK_ISA, so that the linker never
// takes code of one set for another. Nothing of the standard library is used in here but types.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "mlx_llama_kernels/table.h"

namespace mlk::MLK_ISA {

constexpr int W = MLK_LANES;

typedef float F __attribute__((vector_size(4 * MLK_LANES)));
typedef int32_t I __attribute__((vector_size(4 * MLK_LANES)));
typedef uint32_t U __attribute__((vector_size(4 * MLK_LANES)));

static inline size_t least(size_t a, size_t b) { return a < b ? a : b; }

static inline F load(const float* p) {
  F v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
static inline U load(const uint32_t* p) {
  U v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
static inline U load_bits(const void* p) {
  U v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
// The first n bytes, a whole vector's at most, zero behind them.
static inline U load_bits(const void* p, size_t n) {
#if MLK_LANES == 16
  return (U)_mm512_maskz_loadu_epi8(n < 64 ? (uint64_t(1) << n) - 1 : ~uint64_t(0), p);
#else
  U v = {};
  __builtin_memcpy(&v, p, n);
  return v;
#endif
}
static inline void store(float* p, F v) { __builtin_memcpy(p, &v, sizeof v); }

static inline F load(const bf16* p) {
  typedef uint16_t H __attribute__((vector_size(2 * MLK_LANES)));
  H v;
  __builtin_memcpy(&v, p, sizeof v);
  return (F)(__builtin_convertvector(v, U) << 16);
}
static inline F load(const f16* p) {
#if MLK_LANES == 16
  return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif MLK_LANES == 8
  return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(__aarch64__)
  return (F)vcvt_f32_f16(vld1_f16(p));
#else
  F v;
  for (int lane = 0; lane < W; ++lane) {
    f16 half;
    __builtin_memcpy(&half, p + lane, sizeof half);
    v[lane] = float(half);
  }
  return v;
#endif
}

// The first n numbers, a whole vector's at most, zero behind them.
template <class T>
static inline F load_some(const T* p, size_t n) {
#if MLK_LANES == 16
  __mmask16 there = n < size_t(W) ? __mmask16((1u << n) - 1) : __mmask16(0xffff);
  if constexpr (sizeof(T) == 4) return (F)_mm512_maskz_loadu_ps(there, p);
  __m256i halves = _mm256_maskz_loadu_epi16(there, p);
  if constexpr (std::is_same_v<T, bf16>) {
    return (F)((U)_mm512_maskz_cvtepu16_epi32(0xffff, halves) << 16);
  }
  return (F)_mm512_maskz_cvtph_ps(0xffff, halves);
#else
  if (n >= size_t(W)) return load(p);
  T rest[W] = {};
  __builtin_memcpy(rest, p, n * sizeof(T));
  return load(rest);
#endif
}

// a and b taken in turns: their lower halves, their upper ones.
static inline F mixed_low(F a, F b) {
#if MLK_LANES == 16
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif MLK_LANES == 8
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#endif
}
static inline F mixed_high(F a, F b) {
#if MLK_LANES == 16
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif MLK_LANES == 8
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

// Turns W rows of W numbers: each round doubles the run of numbers that come from one column.
static inline void turn(F rows[W]) {
#pragma GCC unroll 4
  for (int run = 1; run < W; run *= 2) {
    F mixed[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      mixed[2 * i] = mixed_low(rows[i], rows[i + W / 2]);
      mixed[2 * i + 1] = mixed_high(rows[i], rows[i + W / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) rows[i] = mixed[i];
  }
}

// Lane i of the result is lane lanes[i] of v.
static inline F pick(F v, I lanes) {
#if MLK_LANES == 16
  return (F)_mm512_permutexvar_ps((__m512i)lanes, (__m512)v);
#elif MLK_LANES == 8
  return (F)_mm256_permutevar8x32_ps((__m256)v, (__m256i)lanes);
#elif defined(__aarch64__)
  U bytes = (U)lanes * 0x04040404u + 0x03020100u;
  return (F)vqtbl1q_u8((uint8x16_t)v, (uint8x16_t)bytes);
#else
  F picked;
  for (int lane = 0; lane < W; ++lane) picked[lane] = v[lanes[lane]];
  return picked;
#endif
}

#if MLK_LANES == 16 && defined(__AVX512VBMI__)
// n numbers (a multiple of 8, at most 64) of a stream of bits, lowest first, as bytes.
template <int BITS>
static inline __m512i unpack64(const void* from, size_t n) {
  size_t bytes = n * BITS / 8;
  __mmask64 there = bytes < 64 ? (__mmask64(1) << bytes) - 1 : ~__mmask64(0);
  __m512i packed = _mm512_maskz_loadu_epi8(there, from);
  if constexpr (BITS == 8) return packed;
  struct alignas(64) Bytes { uint8_t at[64]; };
  // Eight numbers take BITS bytes: first to eight bytes of their own, then to a byte each.
  static constexpr Bytes places = [] {
    Bytes b{};
    for (int i = 0; i < 64; ++i) b.at[i] = uint8_t(i % 8 < BITS ? i / 8 * BITS + i % 8 : 63);
    return b;
  }();
  static constexpr Bytes shifts = [] {
    Bytes b{};
    for (int i = 0; i < 64; ++i) b.at[i] = uint8_t(i % 8 * BITS);
    return b;
  }();
  __m512i eights = _mm512_permutexvar_epi8(_mm512_load_si512(&places), packed);
  __m512i bytes64 = _mm512_multishift_epi64_epi8(_mm512_load_si512(&shifts), eights);
  return _mm512_and_si512(bytes64, _mm512_set1_epi8((1 << BITS) - 1));
}
#endif

// x - 0 is x, minus zero and NaN included.
static inline F all(float x) { return x - F{}; }

static inline float sum(F v) {
  // Halves are added, not lane by lane, each of which would wait for the one before.
  float lanes[W];
  store(lanes, v);
#pragma GCC unroll 4
  for (int half = W / 2; half; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

static inline F larger(F a, F b) { return a > b ? a : b; }

// Whether sums of products of bytes are at hand.
#if MLK_LANES >= 8 || defined(__ARM_FEATURE_DOTPROD)
#define MLK_HAS_DOTS
#endif

#if defined(MLK_HAS_DOTS)
// To the nearest whole number.
static inline I rounded(F x) {
#if MLK_LANES == 16
  return (I)_mm512_cvtps_epi32((__m512)x);
#elif defined(__aarch64__)
  return (I)vcvtnq_s32_f32((float32x4_t)x);
#else
  return (I)_mm256_cvtps_epi32((__m256)x);
#endif
}
#endif

static inline float widen(float x) { return x; }
static inline float widen(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
static inline float widen(f16 x) { return float(x); }

static inline void narrow(float x, float& out) { out = x; }
static inline void narrow(float x, bf16& out) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  // A NaN stays one: rounding its last bits could carry into an infinity.
  out.bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}
static inline void narrow(float x, f16& out) { out = f16(x); }

template <class T>
static inline void widen_row(const T* from, float* to, size_t n) {
  size_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(from + i));
  for (; i < n; ++i) to[i] = widen(from[i]);
}
template <class T>
static inline void narrow_row(const float* from, T* to, size_t n) {
  for (size_t i = 0; i < n; ++i) narrow(from[i], to[i]);
}

// Calls f with a null pointer of the element type.
template <class Fn>
static inline void typed(Type type, Fn f) {
  if (type == Type::f32) f((float*)nullptr);
  else if (type == Type::bf16) f((bf16*)nullptr);
  else f((f16*)nullptr);
}

static inline void widen_row(Type type, const void* from, size_t first, float* to, size_t n) {
  typed(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    widen_row(static_cast<const T*>(from) + first, to, n);
  });
}
static inline void narrow_row(Type type, const float* from, void* to, size_t first, size_t n) {
  typed(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    narrow_row(from, static_cast<T*>(to) + first, n);
  });
}

// e to the x, relative error below 2e-7 from -87 to 88; clamped outside, NaN stays NaN.
static inline F exponential(F x) {
  x = x < -87.0f ? all(-87.0f) : x;
  x = x > 88.0f ? all(88.0f) : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  F shifted = x * 1.44269504088896341f + magic;
  F n = shifted - magic;
  F r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  F p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  U power = (((U)shifted) - 0x4B400000u + 127u) << 23;
  return p * (F)power;
}

}  // namespace mlk::MLK_ISA
