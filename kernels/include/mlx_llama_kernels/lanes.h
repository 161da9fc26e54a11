// Vectors of MLK_LANES floats in GCC's and Clang's own notation, and conversions of element types.
//
// Included once for each instruction set, into the namespace MLK_ISA, so that the linker never
// takes code of one set for another. Nothing of the standard library is used in here but types.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "mlx_llama_kernels/table.h"

namespace mlk::MLK_ISA {

constexpr int W = MLK_LANES;

typedef float F __attribute__((vector_size(4 * MLK_LANES)));
typedef int32_t I __attribute__((vector_size(4 * MLK_LANES)));
typedef uint32_t U __attribute__((vector_size(4 * MLK_LANES)));

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
static inline void store(float* p, F v) { __builtin_memcpy(p, &v, sizeof v); }

// x - 0 is x, minus zero and NaN included.
static inline F all(float x) { return x - F{}; }

static inline float sum(F v) {
  float total = 0;
  for (int lane = 0; lane < W; ++lane) total += v[lane];
  return total;
}

static inline F larger(F a, F b) { return a > b ? a : b; }

static inline float widen(float x) { return x; }
static inline float widen(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
static inline float widen(_Float16 x) { return float(x); }

static inline void narrow(float x, float& out) { out = x; }
static inline void narrow(float x, bf16& out) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  // A NaN stays one: rounding its last bits could carry into an infinity.
  out.bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}
static inline void narrow(float x, _Float16& out) { out = _Float16(x); }

template <class T>
static inline void widen_row(const T* from, float* to, size_t n) {
  for (size_t i = 0; i < n; ++i) to[i] = widen(from[i]);
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
  else f((_Float16*)nullptr);
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
