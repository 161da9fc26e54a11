// Numbers in groups, as MLX's affine quantization packs them: how a type holds them, and the grid of a
// group, all of it rounded as MLX rounds it on a CPU.
#pragma once

#include "mlx_llama_kernels/lanes.h"

namespace mlk::MLK_ISA {

typedef uint16_t Halves __attribute__((vector_size(2 * MLK_LANES)));

constexpr int most_group = 128;

// A product that is rounded before anything is added to it.
static inline F apart(F product) {
#if defined(__x86_64__)
  asm("" : "+v"(product));
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#endif
  return product;
}

static inline F magnitude(F x) { return (F)((U)x & 0x7fffffffu); }

// Whole numbers, ties to even: from 0 to 2^22, or any.
static inline F whole_small(F x) { return (x + 8388608.0f) - 8388608.0f; }
static inline F whole(F x) {
  F size = magnitude(x), near = whole_small(size);
  near = size < 8388608.0f ? near : size;
  return (F)((U)near | ((U)x & 0x80000000u));
}

// v written as the type holds it; a NaN becomes the one that MLX makes of it.
static inline void put(float* p, F v) { store(p, v); }
static inline void put(bf16* p, F v) {
  U bits = (U)v;
  U nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  Halves halves = __builtin_convertvector(v == v ? nearest : (U{} + 0x7fc0), Halves);
  __builtin_memcpy(p, &halves, sizeof halves);
}
static inline void put(f16* p, F v) {
  Halves halves;
#if MLK_LANES == 16
  __m256i packed = _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
  __builtin_memcpy(&halves, &packed, sizeof halves);
#elif MLK_LANES == 8
  halves = (Halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  halves = (Halves)vcvt_f16_f32((float32x4_t)v);
#else
  for (int lane = 0; lane < W; ++lane) {
    f16 half = f16(v[lane]);
    uint16_t bits;
    __builtin_memcpy(&bits, &half, 2);
    halves[lane] = bits;
  }
#endif
#if !defined(__aarch64__)  // where a processor's own conversion makes it
  Halves is_number = __builtin_convertvector((U)(v == v), Halves);
  halves = (halves & is_number) | (((halves & 0x8000) | 0x7d00) & ~is_number);
#endif
  __builtin_memcpy(p, &halves, sizeof halves);
}

// v as the type holds it.
template <class T>
static inline F kept(F v) {
  if constexpr (sizeof(T) == 4) return v;
  T held[W];
  put(held, v);
  return load(held);
}

struct Grid {
  F scale, bias;
};

// Of groups' least and largest numbers, before it is stored: the end of larger magnitude is met, and
// so is 0. steps: the largest code.
static inline Grid met_ends(F low, F high, float steps) {
  const F least = all(1e-7f);
  F scale = (high - low) / steps;
  scale = scale < least ? least : scale;
  I is_low = magnitude(low) > magnitude(high);
  scale = is_low ? scale : -scale;
  F edge = is_low ? low : high;
  F at = whole(edge / scale);
  I is_met = at != 0.0f;
  return {is_met ? edge / at : scale, is_met ? edge : F{}};
}

}  // namespace mlk::MLK_ISA
