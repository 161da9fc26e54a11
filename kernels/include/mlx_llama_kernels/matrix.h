// How the numbers of a matrix's row lie in memory, and fall into vectors.
//
// A layout takes BLOCK numbers at once, PER vectors of W: number(raw, i) is the i-th vector, whose
// lane holds the number that stands at place(i, lane), WEIGHT_OF(i) times too large. Numbers of one
// lane share a group. BEHIND bytes behind a block may be read too.
#pragma once

#include "mlx_llama_kernels/lanes.h"

namespace mlk::MLK_ISA {

// How many bytes ahead the memory is asked where rows take turns that have so many bytes together: line
// after line, which it gives a fifth faster than in the order of use. So far that of the next rows, which
// all begin at once, the last one's first line has come.
static inline size_t far_ahead(size_t rows) { return (rows > 8192 ? rows : 8192) + 2048; }

// Packed numbers, of which each 32-bit word holds a whole number: 2, 4 and 8 bits. They are taken
// out by a mask without a shift: a number that stands b bits up is 2^b times too large, its
// activation was made 2^b times smaller before, and both are exact.
template <int BITS>
struct Words {
  static constexpr bool IS_PACKED = true;
  static constexpr int PER = 32 / BITS;
  static constexpr int BLOCK = PER * W;
  static constexpr int BYTES = 4 * W;
  static constexpr int BEHIND = 0;
  static constexpr uint32_t MASK = (1u << BITS) - 1;
  using Raw = U;

  static constexpr int place(int i, int lane) { return lane * PER + i; }
  static constexpr bool shifted(int i) { return BITS * (i + 1) > 31; }  // would touch the sign
  static float weight_of(int i) { return shifted(i) ? 1.0f : 1.0f / float(1u << (BITS * i)); }
  static inline Raw raw(const char* from) { return load_bits(from); }
  static inline F number(Raw words, int i) {
    U bits = shifted(i) ? words >> (BITS * i) : words & (MASK << (BITS * i));
    return __builtin_convertvector((I)bits, F);
  }
};

// Packed numbers that cross words, as 3, 5 and 6 bits do: one stream of bits, lowest first, in which
// eight numbers take as many bytes as a number has bits.
#if MLK_LANES == 16 && defined(__AVX512VBMI__)
template <int BITS>
struct Stream : Words<8> {
  static constexpr int BYTES = 8 * BITS;
  static inline Raw raw(const char* from) { return (U)unpack64<BITS>(from, 64); }
};
#else
template <int BITS>
struct Stream {
  static constexpr bool IS_PACKED = true;
  static constexpr int PER = 32 / W;
  static constexpr int BLOCK = 32;
  static constexpr int BYTES = 4 * BITS;
  static constexpr int BEHIND = 8 - BITS;
  using Raw = const char*;

  static constexpr int place(int i, int lane) { return i * W + lane; }
  static float weight_of(int) { return 1; }
  static inline Raw raw(const char* from) { return from; }
  static inline F number(Raw from, int i) {
    U bits = windows(from + i * W / 8 * BITS, i * W % 8) & ((1u << BITS) - 1);
    return __builtin_convertvector((I)bits, F);
  }

 private:
  // In each lane the bits from its number's first on; lane 0 holds number `first` of the bytes.
  static inline U windows(const char* from, int first) {
#if MLK_LANES >= 8
    struct alignas(64) Bytes { uint8_t at[4 * W]; };
    static constexpr Bytes places = [] {
      Bytes b{};
      for (int i = 0; i < 4 * W; ++i) b.at[i] = uint8_t(i / 4 % 8 * BITS / 8 + i % 4);
      return b;
    }();
    struct alignas(64) Shifts { uint32_t at[W]; };
    static constexpr Shifts shifts = [] {
      Shifts s{};
      for (int i = 0; i < W; ++i) s.at[i] = uint32_t(i % 8 * BITS % 8);
      return s;
    }();
    (void)first;
    __m256i eight = _mm256_set1_epi64x(*(const Unaligned*)from);
#if MLK_LANES == 16
    __m256i next = _mm256_set1_epi64x(*(const Unaligned*)(from + BITS));
    __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(eight), next, 1);
    return (U)_mm512_shuffle_epi8(both, (__m512i)load_bits(&places)) >> load_bits(&shifts);
#else
    return (U)_mm256_shuffle_epi8(eight, (__m256i)load_bits(&places)) >> load_bits(&shifts);
#endif
#else
    uint64_t eight = 0;
    __builtin_memcpy(&eight, from, BITS);
    uint32_t each[W];
    for (int lane = 0; lane < W; ++lane) each[lane] = uint32_t(eight >> (first + lane) * BITS);
    return load_bits(each);
#endif
  }
  typedef int64_t Unaligned __attribute__((aligned(1), may_alias));
};
#endif

// Dense numbers, in their order.
template <class T>
struct Numbers {
  static constexpr bool IS_PACKED = false;
  static constexpr int PER = 4;
  static constexpr int BLOCK = PER * W;
  static constexpr int BYTES = BLOCK * sizeof(T);
  static constexpr int BEHIND = 0;
  using Raw = const char*;

  static constexpr int place(int i, int lane) { return i * W + lane; }
  static float weight_of(int) { return 1; }
  static inline Raw raw(const char* from) { return from; }
  static inline F number(Raw from, int i) {
    return load(reinterpret_cast<const T*>(from) + i * W);
  }
};

// Calls f with the layout of a matrix.
template <class Fn>
static inline void by_layout(const Matrix& a, Fn f) {
  switch (a.bits) {
    case 0: return typed(a.type, [&](auto* t) { f(Numbers<std::remove_pointer_t<decltype(t)>>{}); });
    case 2: return f(Words<2>{});
    case 3: return f(Stream<3>{});
    case 4: return f(Words<4>{});
    case 5: return f(Stream<5>{});
    case 6: return f(Stream<6>{});
    default: return f(Words<8>{});
  }
}

static inline size_t row_bytes(const Matrix& a) {
  return a.bits ? a.columns / 8 * size_t(a.bits) : a.columns * size_of(a.type);
}
static inline const char* row_of(const Matrix& a, size_t row) {
  return static_cast<const char*>(a.data) + row * row_bytes(a);
}

}  // namespace mlk::MLK_ISA
