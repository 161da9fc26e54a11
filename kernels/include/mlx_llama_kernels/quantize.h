// Packing numbers in groups, and unpacking them, to the very bits of MLX's affine quantization on a
// CPU.
//
// A group's end of larger magnitude is met, and so is 0: scale is that end over a whole number of
// steps. Everything is rounded as MLX rounds it: divided, not multiplied by an inverse; products and
// sums are each rounded to the type, never joined. Numbers that are none become 0 steps.
//
// Eight numbers of BITS bits take BITS bytes: they are taken apart and put together in 64-bit words.
#pragma once

#include "mlx_llama_kernels/groups.h"

namespace mlk::MLK_ISA {

typedef uint8_t Octets __attribute__((vector_size(MLK_LANES)));

// The least and the largest of a group's numbers; a NaN is passed over.
template <class T>
static inline void ends(const T* x, int group, float& low, float& high) {
  F lows = all(__builtin_inff()), highs = all(-__builtin_inff());
  for (int k = 0; k < group; k += W) {
    F v = load(x + k);
    lows = v < lows ? v : lows, highs = v > highs ? v : highs;
  }
  float least[W], most[W];
  store(least, lows), store(most, highs);
#pragma GCC unroll 4
  for (int half = W / 2; half; half /= 2) {
    for (int lane = 0; lane < half; ++lane) {
      least[lane] = least[lane + half] < least[lane] ? least[lane + half] : least[lane];
      most[lane] = most[lane + half] > most[lane] ? most[lane + half] : most[lane];
    }
  }
  low = least[0], high = most[0];
}

// --- eight bytes, each a number of BITS bits, and BITS bytes

template <int BITS>
static inline uint64_t joined(uint64_t eight) {
  constexpr uint64_t ones = 0x00ff00ff00ff00ff, twos = 0x0000ffff0000ffff, fours = 0x00000000ffffffff;
  eight = (eight & ones) | (eight & ~ones) >> (8 - BITS);
  eight = (eight & twos) | (eight & ~twos) >> (16 - 2 * BITS);
  return (eight & fours) | (eight & ~fours) >> (32 - 4 * BITS);
}

template <int BITS>
static inline uint64_t parted(uint64_t bits) {
  constexpr uint64_t fours = (uint64_t(1) << 4 * BITS) - 1;
  constexpr uint64_t twos = ((uint64_t(1) << 2 * BITS) - 1) * 0x0000000100000001;
  constexpr uint64_t ones = ((uint64_t(1) << BITS) - 1) * 0x0001000100010001;
  bits = (bits & fours) | (bits & ~fours) << (32 - 4 * BITS);
  bits = (bits & twos) | (bits & ~twos) << (16 - 2 * BITS);
  return (bits & ones) | (bits & ~ones) << (8 - BITS);
}

template <int BITS>
static inline void join(const uint8_t* numbers, int n, char* to) {
  uint64_t words[most_group / 8];
  __builtin_memcpy(words, numbers, n);
  for (int i = 0; i < n / 8; ++i) words[i] = joined<BITS>(words[i]);
  for (int i = 0; i < n / 8; ++i) __builtin_memcpy(to + i * BITS, &words[i], BITS);
}

template <int BITS>
static inline void part(const char* from, int n, uint8_t* numbers) {
  uint64_t words[most_group / 8] = {};
  for (int i = 0; i < n / 8; ++i) __builtin_memcpy(&words[i], from + i * BITS, BITS);
  for (int i = 0; i < n / 8; ++i) words[i] = parted<BITS>(words[i]);
  __builtin_memcpy(numbers, words, n);
}

// --- groups

template <int BITS, class T>
static inline void pack_group(const T* x, int group, float scale, float bias, char* words) {
  constexpr float most = (1 << BITS) - 1;
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds, and leaves the number below
  uint8_t numbers[most_group];
  for (int k = 0; k < group; k += W) {
    F v = (load(x + k) - bias) / scale;
    v = v > 0.0f ? v : F{};
    v = v < most ? v : all(most);
    Octets low = __builtin_convertvector((U)(v + magic) & 0xff, Octets);
    __builtin_memcpy(numbers + k, &low, sizeof low);
  }
  join<BITS>(numbers, group, words);
}

// Packs n groups, a vector of them at most; the numbers of the i-th stand at from(i).
template <int BITS, class T, class From>
static inline void pack_some(size_t n, int group, From from, char* words, T* scales, T* biases) {
  float lows[W] = {}, highs[W] = {}, each_scale[W], each_bias[W];
  T held[2][W];
  for (size_t i = 0; i < n; ++i) ends(from(i), group, lows[i], highs[i]);
  Grid grid = met_ends(load(lows), load(highs), (1 << BITS) - 1);
  store(each_scale, grid.scale), store(each_bias, grid.bias);
  put(held[0], grid.scale), put(held[1], grid.bias);
  __builtin_memcpy(scales, held[0], n * sizeof(T));
  __builtin_memcpy(biases, held[1], n * sizeof(T));
  for (size_t i = 0; i < n; ++i) {
    pack_group<BITS>(from(i), group, each_scale[i], each_bias[i], words + i * group / 8 * BITS);
  }
}

template <int BITS, class T>
static inline void pack_nearest(const Groups& g, const PackedGroups& to, size_t first, size_t last) {
  for (; first < last; first += W) {
    const T* numbers = static_cast<const T*>(g.values) + first * g.group;
    pack_some<BITS>(least(last - first, W), g.group, [=](size_t i) { return numbers + i * g.group; },
                    reinterpret_cast<char*>(to.words) + first * g.group / 8 * BITS,
                    static_cast<T*>(to.scales) + first, static_cast<T*>(to.biases) + first);
  }
}

template <int BITS, class T>
static inline void unpack(const Matrix& a, void* y, size_t first, size_t last) {
  uint8_t numbers[most_group];
  for (; first < last; ++first) {
    size_t at = first * a.group;
    part<BITS>(static_cast<const char*>(a.data) + at / 8 * BITS, a.group, numbers);
    F scale = all(widen(static_cast<const T*>(a.scales)[first]));
    F bias = all(widen(static_cast<const T*>(a.biases)[first]));
    T* to = static_cast<T*>(y) + at;
    for (int k = 0; k < a.group; k += W) {
      Octets low;
      __builtin_memcpy(&low, numbers + k, sizeof low);
      F v = __builtin_convertvector(__builtin_convertvector(low, I), F);
      put(to + k, apart(kept<T>(v * scale)) + bias);
    }
  }
}

// Calls f with the bits, a constant, and a null pointer of the element type.
template <class Fn>
static inline void by_format(int bits, Type type, Fn f) {
  typed(type, [&](auto* t) {
    switch (bits) {
      case 2: return f(std::integral_constant<int, 2>{}, t);
      case 3: return f(std::integral_constant<int, 3>{}, t);
      case 4: return f(std::integral_constant<int, 4>{}, t);
      case 5: return f(std::integral_constant<int, 5>{}, t);
      case 6: return f(std::integral_constant<int, 6>{}, t);
      default: return f(std::integral_constant<int, 8>{}, t);
    }
  });
}

static void quantize_groups(const Groups& g, const PackedGroups& to, size_t first, size_t last) {
  by_format(g.bits, g.type, [&](auto bits, auto* t) {
    pack_nearest<decltype(bits)::value, std::remove_pointer_t<decltype(t)>>(g, to, first, last);
  });
}

static void dequantize_groups(const Matrix& a, void* y, size_t first, size_t last) {
  by_format(a.bits, a.type, [&](auto bits, auto* t) {
    unpack<decltype(bits)::value, std::remove_pointer_t<decltype(t)>>(a, y, first, last);
  });
}

}  // namespace mlk::MLK_ISA
