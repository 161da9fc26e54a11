// Products of packed matrices with few rows of activations, counted in whole numbers.
//
// A processor that adds products of bytes takes packed numbers as they are. An
// activation is taken as a whole number of 24 bits, in three digits of a byte, times a power of two
// that a group shares: what it loses is at most 2^-23 of the largest in its group. All sums of one
// lane are exact; floats come in once a block, with the group's scale. Where it may be coarse, one
// digit is all.
#pragma once

#include "mlx_llama_kernels/matrix.h"

#if defined(MLK_HAS_DOTS)
namespace mlk::MLK_ISA::digits {

#if (MLK_LANES == 16 && defined(__AVX512VNNI__)) || (MLK_LANES == 8 && defined(__AVXVNNI__)) || \
    defined(__ARM_FEATURE_MATMUL_INT8)
constexpr bool HAS_VNNI = true;
#else
constexpr bool HAS_VNNI = false;
#endif

// To each lane of sums the products of its four bytes, without a sign, and its four signed digits.
// Without VNNI the bytes must be below 128.
static inline I dots(I sums, U bytes, U digits) {
#if MLK_LANES == 16 && defined(__AVX512VNNI__)
  return (I)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)bytes, (__m512i)digits);
#elif MLK_LANES == 8 && defined(__AVXVNNI__)
  return (I)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)bytes, (__m256i)digits);
#elif defined(__ARM_FEATURE_MATMUL_INT8)
  return (I)vusdotq_s32((int32x4_t)sums, (uint8x16_t)bytes, (int8x16_t)digits);
#elif defined(__ARM_FEATURE_DOTPROD)
  return (I)vdotq_s32((int32x4_t)sums, (int8x16_t)bytes, (int8x16_t)digits);
#elif MLK_LANES == 16
  __m512i pairs = _mm512_maddubs_epi16((__m512i)bytes, (__m512i)digits);
  return sums + (I)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#else
  __m256i pairs = _mm256_maddubs_epi16((__m256i)bytes, (__m256i)digits);
  return sums + (I)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
}

// Packed numbers as vectors of bytes: part(raw, i) holds in byte k the number k * PARTS + i. The
// numbers of one lane share a group. `raw` reads the first n of BYTES bytes, zero behind them.
template <int BITS>
struct Bytes {
  static constexpr int PARTS = 8 / BITS;
  static constexpr int BYTES = 4 * W;
  static constexpr int BLOCK = BYTES * PARTS;
  static constexpr uint32_t MASK = ((1u << BITS) - 1) * 0x01010101u;
  static constexpr bool IS_LARGE = BITS == 8;  // sums of three digits would leave 32 bits
  static inline U raw(const char* from, size_t n) { return n == BYTES ? load_bits(from) : load_bits(from, n); }
  static inline U part(U raw, int i) { return BITS == 8 ? raw : raw >> (BITS * i) & MASK; }
};

// Numbers that cross words.
template <int BITS>
struct Stream {
  static constexpr int PARTS = 1;
  static constexpr int BLOCK = 4 * W;
  static constexpr int BYTES = BLOCK / 8 * BITS;
  static constexpr bool IS_LARGE = false;
#if MLK_LANES == 16 && defined(__AVX512VBMI__)
  static inline U raw(const char* from, size_t n) { return (U)unpack64<BITS>(from, n / BITS * 8); }
#endif
  static inline U part(U raw, int) { return raw; }
};

#if MLK_LANES == 16 && defined(__AVX512VBMI__)
constexpr bool HAS_STREAMS = true;
#else
constexpr bool HAS_STREAMS = false;
#endif

static inline bool takes(const Matrix& a) {
  return a.bits == 2 || a.bits == 4 || (a.bits == 8 && HAS_VNNI) || (a.bits && HAS_STREAMS);
}

// A layout, and how many digits an activation has.
template <class L, int N>
struct With : L {
  static constexpr int DIGITS = N;
  static constexpr size_t X_BYTES = size_t(L::PARTS) * N * 4 * W;  // a block's activations
};

template <class Fn>
static inline void by_layout(const Matrix& a, Fn f) {
  auto with = [&](auto layout) {
    using L = decltype(layout);
    // Longer vectors wait for the memory, and one digit does not make it faster.
    if constexpr (W == 8) {
      if (a.is_coarse) return f(With<L, 1>{});
    }
    return f(With<L, 3>{});
  };
  if constexpr (HAS_STREAMS) {
    if (a.bits == 3) return with(Stream<3>{});
    if (a.bits == 5) return with(Stream<5>{});
    if (a.bits == 6) return with(Stream<6>{});
  }
  if (a.bits == 2) return with(Bytes<2>{});
  if (a.bits == 4) return with(Bytes<4>{});
  with(Bytes<8>{});
}

// One row of activations: its digits by blocks, parts and their three places, highest first; and
// of each group the power of two and the sum of its activations, zero behind the last one.
struct Prepared {
  size_t blocks, groups, padded;  // padded: groups up to a whole vector
  char* digits;
  float *units, *sums;

  Prepared() = default;
  template <class L>
  Prepared(L, const Matrix& a, float* memory, size_t m) {
    blocks = (a.columns + L::BLOCK - 1) / L::BLOCK;
    groups = a.columns / a.group;
    padded = (groups + W - 1) / W * W;
    uintptr_t aligned = (uintptr_t(memory) + 63) & ~uintptr_t(63);
    digits = reinterpret_cast<char*>(aligned) + m * bytes<L>();
    units = reinterpret_cast<float*>(digits + blocks * L::X_BYTES);
    sums = units + padded;
  }
  template <class L>
  size_t bytes() const { return blocks * L::X_BYTES + 2 * padded * sizeof(float); }
};

static inline size_t floats(const Matrix& a, size_t m) {
  size_t bytes = 0;
  by_layout(a, [&](auto layout) { bytes = Prepared(layout, a, nullptr, 0).template bytes<decltype(layout)>(); });
  return m * bytes / sizeof(float) + 16;
}

// The power of two that leaves the largest activation of a group a whole number of three digits,
// at most 127 * 65793; zero for a group of zeros, NaN where one is not finite.
static inline float unit_of(float largest) {
  if (!(largest <= 3.4e38f)) return __builtin_nanf("");
  if (largest == 0) return 0;
  uint32_t bits;
  float bounded = largest * 1.004f;
  if (bounded < 0x1p-100f) bounded = 0x1p-100f;
  __builtin_memcpy(&bits, &bounded, 4);
  bits = ((bits >> 23) + 1 - 23) << 23;
  float unit;
  __builtin_memcpy(&unit, &bits, 4);
  return unit;
}

// Takes a group's values, which `values` holds, into whole numbers; returns its unit.
static inline float count(const float* values, size_t n, int32_t* whole, float* sum_of) {
  F largest = {}, total = {};
  for (size_t i = 0; i < n; i += W) {
    F value = load(values + i);
    F size = (F)((U)value & 0x7fffffffu);
    largest = size > largest ? size : largest;
    total += value;
  }
  float most = 0;
  for (int lane = 0; lane < W; ++lane) most = largest[lane] > most ? largest[lane] : most;
  *sum_of = sum(total);
  // A NaN is larger than nothing, but it shows in the sum.
  float unit = unit_of(*sum_of - *sum_of == 0 ? most : *sum_of);
  float inverse = unit > 0 ? 1.0f / unit : 0;
  for (size_t i = 0; i < n; i += W) {
    I number = rounded(load(values + i) * inverse);
    __builtin_memcpy(whole + i, &number, sizeof number);
  }
  return unit;
}

// The same with whole numbers of at most `most`, in place, as bits, and a unit that need not be a
// power of two. `total` is the sum of what the whole numbers stand for.
static inline float count_within(float* values, size_t n, float most, float* total) {
  F largest = {}, finite = {};
  for (size_t i = 0; i < n; i += W) {
    F value = load(values + i);
    largest = larger((F)((U)value & 0x7fffffffu), largest);
    finite += value - value;  // NaN where it is not
  }
  float size = 1e-30f;
  for (int lane = 0; lane < W; ++lane) size = largest[lane] > size ? largest[lane] : size;
  float unit = size / most + sum(finite), inverse = most / size;
  U numbers = {};  // what is no number may overflow
  for (size_t i = 0; i < n; i += W) {
    I number = rounded(load(values + i) * inverse);
    numbers += (U)number;
    store(values + i, (F)number);
  }
  *total = unit * sum(__builtin_convertvector((I)numbers, F));
  return unit;
}

template <class L>
static inline void place_digits(const int32_t* whole, int8_t* to) {
  for (int i = 0; i < L::PARTS; ++i, to += L::DIGITS * 4 * W) {
    for (int k = 0; k < 4 * W; ++k) {
      int32_t low = whole[k * L::PARTS + i], middle = (low + 128) >> 8, high = (middle + 128) >> 8;
      if (L::DIGITS == 1) to[k] = int8_t(low);
      else to[k] = int8_t(high), to[4 * W + k] = int8_t(middle), to[2 * 4 * W + k] = int8_t(low);
    }
  }
}

static inline void prepare(const Matrix& a, const Rows& x, float* memory) {
  by_layout(a, [&](auto layout) {
    using L = decltype(layout);
    constexpr size_t AT_ONCE = L::BLOCK < 128 ? 128 : L::BLOCK;  // whole blocks and groups
    float values[AT_ONCE];
    int32_t whole[AT_ONCE];
    for (size_t m = 0; m < x.m; ++m) {
      Prepared p(layout, a, memory, m);
      for (size_t g = 0; g < p.padded; ++g) p.units[g] = p.sums[g] = 0;
      int8_t* to = reinterpret_cast<int8_t*>(p.digits);
      for (size_t start = 0, b = 0; start < x.n; start += AT_ONCE) {
        size_t n = x.n - start < AT_ONCE ? x.n - start : AT_ONCE;
        widen_row(x.type, x.data, m * x.n + start, values, n);
        for (size_t i = 0, g = start / a.group; i < n; i += a.group, ++g) {
          if constexpr (L::DIGITS == 1) {
            p.units[g] = count_within(values + i, a.group, 127, p.sums + g);
            __builtin_memcpy(whole + i, values + i, a.group * sizeof(float));
          } else {
            p.units[g] = count(values + i, a.group, whole + i, p.sums + g);
          }
        }
        for (size_t i = n; i < AT_ONCE; ++i) whole[i] = 0;
        for (size_t i = 0; i < AT_ONCE && b < p.blocks; i += L::BLOCK, ++b) {
          place_digits<L>(whole + i, to + b * L::X_BYTES);
        }
      }
    }
  });
}

// R rows of the matrix times one row of activations. Scales stay in registers for a vector of groups.
template <class L, int R>
static inline void row_products(const Matrix& a, const Prepared& x, size_t row, float out[R]) {
  size_t bytes = row_bytes(a), whole = bytes / L::BYTES, in_vector = W * a.group / L::BLOCK;
  const char* data = row_of(a, row);
  const char* ahead = data + far_ahead(R * bytes);
  I lanes;
  for (int lane = 0; lane < W; ++lane) lanes[lane] = lane * 4 * L::PARTS / a.group;
  F total[R] = {}, scale[R];
  auto block = [&](const char* from, size_t n, size_t b, I lanes) __attribute__((always_inline)) {
    const char* digits = x.digits + b * L::X_BYTES;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      U raw = L::raw(from + r * bytes, n);
      auto place = [&](I sums, int which) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int i = 0; i < L::PARTS; ++i) {
          sums = dots(sums, L::part(raw, i), load_bits(digits + (i * L::DIGITS + which) * 4 * W));
        }
        return sums;
      };
      F dot;
      if constexpr (L::DIGITS == 1) {
        dot = __builtin_convertvector(place(I{}, 0), F);
      } else if constexpr (L::IS_LARGE) {
        I high = place(I{}, 0), low = place(place(I{}, 1) << 8, 2);
        dot = __builtin_convertvector(high, F) * 65536.0f + __builtin_convertvector(low, F);
      } else {
        dot = __builtin_convertvector(place(place(place(I{}, 0) << 8, 1) << 8, 2), F);
      }
      total[r] += pick(scale[r], lanes) * dot;
    }
  };
  for (size_t g = 0, b = 0; g < x.groups; g += W) {
    F units = load(x.units + g), sums = load(x.sums + g);
    typed(a.type, [&](auto* t) __attribute__((always_inline)) {
      using T = std::remove_pointer_t<decltype(t)>;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        size_t at = (row + r) * x.groups + g;
        const T *scales = static_cast<const T*>(a.scales) + at, *biases = static_cast<const T*>(a.biases) + at;
        __builtin_prefetch(scales + R * x.groups);
        __builtin_prefetch(biases + R * x.groups);
        scale[r] = load_some(scales, x.groups - g) * units;
        total[r] += load_some(biases, x.groups - g) * sums;
      }
    });
    I at = lanes;
    for (size_t end = b + in_vector < x.blocks ? b + in_vector : x.blocks; b < end; ++b) {
      const char* from = data + b * L::BYTES;
      if (b < whole) {
#pragma GCC unroll 8
        for (int line = 0; line < R * L::BYTES; line += 64) __builtin_prefetch(ahead + line);
        ahead += R * L::BYTES;
        block(from, L::BYTES, b, at);
      } else {
        block(from, bytes - b * L::BYTES, b, at);
      }
      at = lanes + int((b + 1) * L::BLOCK / a.group - g);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) out[r] = sum(total[r]);
}

constexpr size_t ROWS = W == 16 ? 8 : 4;  // of the matrix at once, as registers allow

static inline void few(const Matrix& a, const Rows& x, const float* memory, void* y, size_t first,
                       size_t last) {
  by_layout(a, [&](auto layout) {
    using L = decltype(layout);
    for (; first < last; first += ROWS) {
      size_t n = last - first < ROWS ? last - first : ROWS;
      for (size_t m = 0; m < x.m; ++m) {  // the matrix's rows are near from the second time on
        Prepared p(layout, a, const_cast<float*>(memory), m);
        float out[ROWS];
        if (n == ROWS) row_products<L, ROWS>(a, p, first, out);
        else for (size_t r = 0; r < n; ++r) row_products<L, 1>(a, p, first + r, out + r);
        narrow_row(x.type, out, y, m * a.rows + first, n);
      }
    }
  });
}

}  // namespace mlk::MLK_ISA::digits
#endif
