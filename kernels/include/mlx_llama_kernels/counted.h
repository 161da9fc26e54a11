// Panels and blocks counted in whole numbers: of packed matrices.
//
// A lane holds PER numbers of a row, two of 16 bits or four of 8, and one instruction adds all their
// products: twice or four times what it does with floats. An activation is taken as a whole number
// times a unit that its group shares: with 16 bits it loses at most 1.6e-5 of the largest in its
// group, with 8 at most 0.4 %. Sums of a group are exact; floats come in once a group, with the
// matrix's scale. Biases are multiplied by the sum of what the whole numbers stand for, so that what
// is lost weighs as much as the weight, not as its number.
#pragma once

#include "mlx_llama_kernels/digits.h"
#include "mlx_llama_kernels/panel.h"

#if MLK_LANES >= 8
namespace mlk::MLK_ISA {

// To each lane of sums the products of its numbers. Written out for VNNI: GCC 12 moves the sums of
// its intrinsic to and fro.
template <int PER>
static inline I add_products(I sums, U numbers, U x) {
  if constexpr (PER == 4) {
#if MLK_LANES == 16 && defined(__AVX512VNNI__)
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(numbers), "v"(x));
    return sums;
#elif MLK_LANES == 8 && defined(__AVXVNNI__)
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(numbers), "x"(x));
    return sums;
#else
    return digits::dots(sums, numbers, x);
#endif
  }
#if MLK_LANES == 16 && defined(__AVX512VNNI__)
  asm("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(numbers), "v"(x));
  return sums;
#elif MLK_LANES == 8 && defined(__AVXVNNI__)
  asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sums) : "x"(numbers), "x"(x));
  return sums;
#elif MLK_LANES == 16
  return sums + (I)_mm512_madd_epi16((__m512i)numbers, (__m512i)x);
#else
  return sums + (I)_mm256_madd_epi16((__m256i)numbers, (__m256i)x);
#endif
}

// How far apart stand the numbers of a lane: so that one shift and one mask take all out of a word
// where numbers fill words; within 32 where they cross them.
template <int PER>
static inline size_t apart(int bits) { return size_t(32 % bits ? 32 : 32 / bits) / PER; }

// Ones at the lowest bits of each of a lane's numbers.
template <int PER>
static constexpr uint32_t mask_of(int bits) {
  return ((1u << bits) - 1) * (PER == 2 ? 0x00010001u : 0x01010101u);
}

// Writes what stands in words of each row, BITS of them where numbers cross words, as lanes.
template <int PER, int BITS>
static inline void write_lanes(const F* words, float* to) {
  if constexpr (32 % BITS == 0) {
#pragma GCC unroll 8
    for (int i = 0; i < 32 / BITS / PER; ++i) {
      store(to + i * PANEL, (F)((U)words[0] >> (i * BITS) & mask_of<PER>(BITS)));
    }
  } else {
    auto number = [&](int i) __attribute__((always_inline)) {
      int word = i * BITS / 32, up = i * BITS % 32;
      U bits = (U)words[word] >> up;
      if (up + BITS > 32) bits |= (U)words[(word + 1) % BITS] << (32 - up) % 32;
      return bits & ((1u << BITS) - 1);
    };
#pragma GCC unroll 16
    for (int i = 0; i < 32 / PER; ++i) {
      U lane = {};
#pragma GCC unroll 4
      for (int k = 0; k < PER; ++k) lane |= number(i + k * 32 / PER) << (k * 32 / PER);
      store(to + i * PANEL, (F)lane);
    }
  }
}

// Writes the lanes of `depth` columns from start on of W rows: (depth / PER, PANEL).
template <int PER, int BITS>
static inline void unpack(const Matrix& a, size_t row, size_t start, size_t depth, float* to) {
  constexpr size_t UNIT = 32 % BITS ? BITS : 1, LANES = 32 * UNIT / BITS / PER, AT_ONCE = W / UNIT * UNIT;
  const size_t words = depth * BITS / 32;
  for (size_t w = 0; w < words; w += AT_ONCE) {
    size_t n = words - w < AT_ONCE ? words - w : AT_ONCE;
    F rows[W];
    for (int lane = 0; lane < W; ++lane) {
      auto* from = reinterpret_cast<const float*>(row_of(a, row_at(a, row, lane)) + start * BITS / 8);
      rows[lane] = load_some(from + w, n);
    }
    turn(rows);
    for (size_t i = 0; i < n; i += UNIT, to += LANES * PANEL) write_lanes<PER, BITS>(rows + i, to);
  }
}

// Packs 32 columns of up to MR rows, (W, stride) whole numbers, as lanes: (32 / PER, MR).
template <int PER>
static inline void pack_columns(const float* whole, size_t stride, size_t apart, float* to) {
  F columns[32];
  for (int k = 0; k < 32; k += W) {
    for (int r = 0; r < W; ++r) columns[k + r] = load(whole + r * stride + k);
    turn(columns + k);
  }
  for (size_t k = 0; k < 32; k += PER * apart) {
    for (size_t i = k; i < k + apart; ++i, to += MR) {
      U lane = {};
#pragma GCC unroll 4
      for (int n = 0; n < PER; ++n) {
        lane |= ((U)columns[i + n * apart] & (~0u >> (32 - 32 / PER))) << (n * 32 / PER);
      }
      store(to, (F)lane);  // what is behind MR is overwritten by the next column's
    }
  }
}

// A panel holds lanes (DEPTH / PER, PANEL), then of each group its scales and its biases, (groups,
// PANEL) each. A block of x holds units and totals of each group, (groups, MR) each, then lanes
// (n / PER, MR).
template <int PER>
struct Counted {
  static constexpr float LARGEST = PER == 2 ? 32767 : 127;  // whole number
  static constexpr size_t DEPTH = 256;  // with a block of x it stays in the nearest cache
  static constexpr size_t NUMBERS = DEPTH / PER * PANEL, SCALES = DEPTH / 32 * PANEL;
  static constexpr size_t PANEL_FLOATS = NUMBERS + 2 * SCALES;
  static size_t block_floats(const Matrix& a) {
    return MR * (2 * (a.columns / a.group) + a.columns / PER) + W;  // the last column is written as a vector
  }

  static inline void pack(const Matrix& a, const Rows& x, size_t block, float* to) {
    constexpr size_t AT_ONCE = 128;  // whole groups
    float whole[W * AT_ONCE] = {};
    const size_t groups = a.columns / a.group, m = block * MR;
    float *units = to, *totals = units + groups * MR, *lanes = totals + groups * MR;
    for (size_t start = 0; start < x.n; start += AT_ONCE) {
      size_t n = x.n - start < AT_ONCE ? x.n - start : AT_ONCE;
      for (size_t r = 0; r < size_t(MR); ++r) {
        float* row = whole + r * AT_ONCE;
        if (m + r < x.m) widen_row(x.type, x.data, (m + r) * x.n + start, row, n);
        else for (size_t i = 0; i < n; ++i) row[i] = 0;
        for (size_t i = 0; i < n; i += a.group) {
          size_t at = (start + i) / a.group * MR + r;
          units[at] = digits::count_within(row + i, a.group, LARGEST, totals + at);
        }
      }
      for (size_t k = 0; k < n; k += 32) {
        pack_columns<PER>(whole + k, AT_ONCE, apart<PER>(a.bits), lanes + (start + k) / PER * MR);
      }
    }
  }

  static inline void fill(const Matrix& a, size_t row, size_t start, size_t depth, float* panel) {
    for (int half = 0; half < 2; ++half, row += W, panel += W) {
      switch (a.bits) {
        case 2: unpack<PER, 2>(a, row, start, depth, panel); break;
        case 3: unpack<PER, 3>(a, row, start, depth, panel); break;
        case 4: unpack<PER, 4>(a, row, start, depth, panel); break;
        case 5: unpack<PER, 5>(a, row, start, depth, panel); break;
        case 6: unpack<PER, 6>(a, row, start, depth, panel); break;
        default: unpack<PER, 8>(a, row, start, depth, panel); break;
      }
      typed(a.type, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        const size_t groups = a.columns / a.group, g = start / a.group, n = depth / a.group;
        spread(a, static_cast<const T*>(a.scales) + g, groups, row, n, panel + NUMBERS);
        spread(a, static_cast<const T*>(a.biases) + g, groups, row, n, panel + NUMBERS + SCALES);
      });
    }
  }

  static inline void multiply(const Matrix& a, const float* x, const float* panel, size_t start,
                              size_t depth, float* c) {
    const size_t groups = a.columns / a.group;
    const float *units = x + start / a.group * MR, *totals = units + groups * MR;
    const float *lanes = x + 2 * groups * MR + start / PER * MR, *numbers = panel;
    const float *scales = panel + NUMBERS, *biases = scales + SCALES;
    for (size_t g = 0; g < depth / a.group; ++g, units += MR, totals += MR, scales += PANEL, biases += PANEL) {
      I sums[MR][2] = {};
      for (int k = 0; k < a.group; k += PER, lanes += MR, numbers += PANEL) {
        U left = load_bits(numbers), right = load_bits(numbers + W);
#pragma GCC unroll 13
        for (int r = 0; r < MR; ++r) {
          uint32_t lane;  // as bits: a float's might be a NaN's
          __builtin_memcpy(&lane, lanes + r, sizeof lane);
          U value = lane - U{};
          sums[r][0] = add_products<PER>(sums[r][0], left, value);
          sums[r][1] = add_products<PER>(sums[r][1], right, value);
        }
      }
#pragma GCC unroll 2
      for (int side = 0; side < 2; ++side) {
        F scale = load(scales + side * W), bias = load(biases + side * W);
#pragma GCC unroll 13
        for (int r = 0; r < MR; ++r) {
          float* to = c + r * PANEL + side * W;
          F sum = load(to) + bias * totals[r];
          store(to, sum + scale * units[r] * __builtin_convertvector(sums[r][side], F));
        }
      }
      asm("" : : : "memory");  // or GCC keeps c in registers, and the whole numbers on the stack
    }
  }
};

}  // namespace mlk::MLK_ISA
#endif
