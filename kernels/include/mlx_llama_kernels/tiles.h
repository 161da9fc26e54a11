// Activations and matrices as tiles of bfloat16, for AMX.
//
// Nothing is rounded to bfloat16 for good. A float32 number is three terms, the nearest bfloat16, that
// of what it leaves, and of what both leave; a float16 number is two. Terms are multiplied where
// their product is not below what float32 keeps. Packed numbers, less the middle of their range, are
// whole and one term: their sums are taken out of the tiles group by group, to be scaled in float32.
// Biases are a dense product of their own, with each group's sum of activations.
//
// A tile of the matrix is 16 rows of 32 columns; one of activations 16 rows of x, pair of columns
// after pair. So results stand transposed, (16 matrix rows, 16 rows of x), until they are written.
#pragma once

#include <immintrin.h>

#include "mlx_llama_kernels/matrix.h"

namespace mlk::MLK_ISA::tiles {

constexpr size_t SIDE = 16;       // rows of a tile
constexpr size_t STEP = 32;       // columns of a tile
constexpr size_t TILE = 512;      // bfloat16 numbers in a tile
constexpr size_t SUMS = 256;      // floats in a tile
constexpr size_t PANEL = 2 * SIDE;
constexpr size_t BLOCK = 2 * SIDE;  // rows of x that are multiplied at once
constexpr size_t DEPTH = 512;       // columns of a panel that are unpacked at once
constexpr size_t MOST_PANELS = 4;
constexpr size_t LEAST_GROUP = 32;

static inline size_t up(size_t n, size_t step) { return (n + step - 1) / step; }
static size_t row_blocks(const Rows& x) { return up(x.m, BLOCK); }
static inline size_t steps_of(const Matrix& a) { return up(a.columns, STEP); }
static constexpr size_t MOST_TERMS = 3;
static inline size_t terms_of(Type type) {
  return type == Type::bf16 ? 1 : type == Type::f16 ? 2 : MOST_TERMS;
}
static inline size_t groups_of(const Matrix& a) { return a.bits ? a.columns / a.group : 0; }

// Tiles of one step stand together, two for each of its terms; a line lies
// between steps, so that the same row of all steps does not fall on one set of the cache.
static constexpr size_t step_size(size_t terms) { return terms * 2 * TILE + STEP; }

// Packed: for each block of x its steps, then those of the sums of each group.
static inline size_t block_floats(const Matrix& a, const Rows& x) {
  return (steps_of(a) * step_size(terms_of(x.type)) + up(groups_of(a), STEP) * step_size(MOST_TERMS)) / 2;
}
static size_t packed_floats(const Matrix& a, const Rows& x) {
  return row_blocks(x) * block_floats(a, x) + SIDE;
}

// What a thread works with: numbers of MOST_PANELS panels, their scales, and all their sums.
static size_t panel_floats(const Matrix&, const Rows& x, size_t panels) {
  size_t numbers = panels * DEPTH / STEP * step_size(MOST_TERMS) / 2;
  size_t scales = panels * PANEL * DEPTH / LEAST_GROUP;
  return numbers + scales + panels * row_blocks(x) * 4 * SUMS + SIDE;
}

static inline float* aligned(float* p) {
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(p) + 63) / 64 * 64);
}
static inline const float* aligned(const float* p) { return aligned(const_cast<float*>(p)); }

static inline __m512i nearest(__m512 first, __m512 second) {
  return (__m512i)_mm512_cvtne2ps_pbh(second, first);
}
static inline __m512 first_half(__m512i pairs) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(pairs)), 16));
}
static inline __m512 second_half(__m512i pairs) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(pairs, 1)), 16));
}

// Takes the next term off 32 numbers.
static inline __m512i next_term(__m512& first, __m512& second) {
  __m512i term = nearest(first, second);
  first -= first_half(term), second -= second_half(term);
  return term;
}

// Writes 16 rows of 32 numbers, pair of columns after pair.
static inline void put_turned(__m512i rows[16], uint16_t* tile) {
  F words[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) words[i] = (F)rows[i];
  turn(words);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) _mm512_store_si512(tile + i * STEP, (__m512i)words[i]);
}

// Packs n columns of up to 16 rows; absent rows are zero.
template <class T>
static inline void pack_half(const T* rows, size_t n_rows, size_t stride, size_t n, size_t terms,
                             uint16_t* to) {
  for (size_t k = 0; k < n; k += STEP, to += step_size(terms)) {
    size_t here = n - k < STEP ? n - k : STEP, left = here < SIDE ? here : SIDE;
    __m512i parts[MOST_TERMS][16] = {};
    for (size_t r = 0; r < n_rows; ++r) {
      const T* row = rows + r * stride + k;
      __m512 one = load_some(row, left), other = load_some(row + left, here - left);
      for (size_t t = 0; t < terms; ++t) parts[t][r] = next_term(one, other);
    }
    for (size_t t = 0; t < terms; ++t) put_turned(parts[t], to + t * 2 * TILE);
  }
}

// Packs the sums of each group of the rows' activations.
template <class T>
static inline void pack_sums(const T* rows, size_t n_rows, size_t stride, size_t group,
                             size_t groups, uint16_t* to) {
  float sums[SIDE * STEP];
  for (size_t first = 0; first < groups; first += STEP, to += step_size(MOST_TERMS)) {
    size_t n = groups - first < STEP ? groups - first : STEP;
    for (size_t r = 0; r < n_rows; ++r) {
      for (size_t g = 0; g < n; ++g) {
        const T* from = rows + r * stride + (first + g) * group;
        F total = {};
        for (size_t k = 0; k < group; k += W) total += load(from + k);
        sums[r * STEP + g] = _mm512_reduce_add_ps((__m512)total);
      }
    }
    pack_half(sums, n_rows, STEP, n, MOST_TERMS, to);
  }
}

static void pack(const Matrix& a, const Rows& x, float* packed, size_t first, size_t last) {
  const size_t terms = terms_of(x.type);
  for (size_t half = 2 * first; half < 2 * last; ++half) {
    auto* to = reinterpret_cast<uint16_t*>(aligned(packed) + half / 2 * block_floats(a, x));
    to += half % 2 * TILE;
    size_t m = half * SIDE, n_rows = m >= x.m ? 0 : x.m - m < SIDE ? x.m - m : SIDE;
    typed(x.type, [&](auto* t) {
      auto* rows = static_cast<decltype(t)>(const_cast<void*>(x.data)) + m * x.n;
      pack_half(rows, n_rows, x.n, x.n, terms, to);
      if (a.bits) {
        pack_sums(rows, n_rows, x.n, a.group, groups_of(a), to + steps_of(a) * step_size(terms));
      }
    });
  }
}

// --- the matrix's numbers, as tiles: for each step two, of the first terms; dense ones then two more

// One row's packed numbers from start on, less the middle of their range.
template <int BITS>
static inline void unpack_row(const char* row, size_t start, size_t depth, uint16_t* to) {
  constexpr int MIDDLE = 1 << (BITS - 1);
  struct alignas(64) Floats { uint16_t at[32]; };
  static constexpr Floats table = [] {  // the upper halves of the floats of i - MIDDLE
    Floats t{};
    for (int i = 0; i < 32; ++i) t.at[i] = uint16_t(__builtin_bit_cast(uint32_t, float(i - MIDDLE)) >> 16);
    return t;
  }();
  for (size_t k = 0; k < depth; k += 64, to += 2 * step_size(1)) {
    size_t n = depth - k < 64 ? depth - k : 64;
    __m512i bytes = unpack64<BITS>(row + (start + k) / 8 * BITS, n);
    __m512i first, second;
    if constexpr (BITS <= 5) {
      __m512i values = _mm512_load_si512(&table);
      first = _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(_mm512_castsi512_si256(bytes)), values);
      second =
          _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(bytes, 1)), values);
    } else {
      __m512i whole = _mm512_sub_epi8(bytes, _mm512_set1_epi8(char(MIDDLE)));
      auto quarter = [&](auto place) {
        return _mm512_cvtepi32_ps(
            _mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(whole, decltype(place)::value)));
      };
      first = nearest(quarter(std::integral_constant<int, 0>{}),
                      quarter(std::integral_constant<int, 1>{}));
      second = nearest(quarter(std::integral_constant<int, 2>{}),
                       quarter(std::integral_constant<int, 3>{}));
    }
    _mm512_store_si512(to, first);
    if (n > STEP) _mm512_store_si512(to + step_size(1), second);
  }
}

template <class T>
static inline void split_row(const T* row, size_t depth, uint16_t* to) {
  constexpr size_t TERMS = std::is_same_v<T, bf16> ? 1 : std::is_same_v<T, f16> ? 2 : MOST_TERMS;
  for (size_t k = 0; k < depth; k += STEP, to += step_size(TERMS)) {
    size_t n = depth - k < STEP ? depth - k : STEP, left = n < SIDE ? n : SIDE;
    if constexpr (TERMS == 1) {
      __mmask32 there = n < STEP ? (__mmask32(1) << n) - 1 : ~__mmask32(0);
      _mm512_store_si512(to, _mm512_maskz_loadu_epi16(there, row + k));
    } else {
      __m512 one = load_some(row + k, left), other = load_some(row + k + left, n - left);
      for (size_t t = 0; t < TERMS; ++t) _mm512_store_si512(to + t * 2 * TILE, next_term(one, other));
    }
  }
}

static inline void fill_row(const Matrix& a, size_t row, size_t start, size_t depth, uint16_t* to) {
  const char* data = row_of(a, row);
  switch (a.bits) {
    case 0:
      return typed(a.type, [&](auto* t) {
        split_row(static_cast<decltype(t)>(const_cast<void*>(a.data)) + row * a.columns + start,
                  depth, to);
      });
    case 2: return unpack_row<2>(data, start, depth, to);
    case 3: return unpack_row<3>(data, start, depth, to);
    case 4: return unpack_row<4>(data, start, depth, to);
    case 5: return unpack_row<5>(data, start, depth, to);
    case 6: return unpack_row<6>(data, start, depth, to);
    default: return unpack_row<8>(data, start, depth, to);
  }
}

static inline uint16_t* line_of(uint16_t* numbers, size_t r) {
  return numbers + r / SIDE * TILE + r % SIDE * STEP;
}

// One panel's numbers, columns from start on. What stands for rows behind the last one is not zero
// but finite or not as it likes: it is never written.
static inline void fill(const Matrix& a, size_t row, size_t start, size_t depth, uint16_t* to) {
  for (size_t r = 0; r < PANEL && row + r < a.rows; ++r) {
    fill_row(a, row + r, start, depth, line_of(to, r));
  }
}

// Up to 16 scales of a row, and biases of numbers less their middle.
struct Scales {
  __m512 scale, bias;
  Scales(const Matrix& a, size_t row, size_t group, size_t n) {
    typed(a.type, [&](auto* t) {
      using T = std::remove_pointer_t<decltype(t)>;
      size_t at = row * groups_of(a) + group;
      scale = load_some(static_cast<const T*>(a.scales) + at, n);
      bias = load_some(static_cast<const T*>(a.biases) + at, n) + scale * float(1 << (a.bits - 1));
    });
  }
};

// One panel's scales, (PANEL, groups), at most 16 groups.
static inline void fill_scales(const Matrix& a, size_t row, size_t group, size_t groups, float* to) {
  for (size_t r = 0; r < PANEL && row + r < a.rows; ++r) {
    Scales s(a, row + r, group, groups);
    _mm512_mask_storeu_ps(to + r * groups, __mmask16((1u << groups) - 1), s.scale);
  }
}

// One panel's biases as dense numbers of all terms, for groups from `group` on.
static inline void fill_biases(const Matrix& a, size_t row, size_t group, size_t groups,
                               uint16_t* to) {
  for (size_t r = 0; r < PANEL && row + r < a.rows; ++r) {
    uint16_t* line = line_of(to, r);
    for (size_t g = 0; g < groups; g += STEP, line += step_size(MOST_TERMS)) {
      size_t n = groups - g < STEP ? groups - g : STEP, left = n < SIDE ? n : SIDE;
      __m512 one = Scales(a, row + r, group + g, left).bias;
      __m512 other = Scales(a, row + r, group + g + left, n - left).bias;
      for (size_t t = 0; t < MOST_TERMS; ++t) {
        _mm512_store_si512(line + t * 2 * TILE, next_term(one, other));
      }
    }
  }
}

}  // namespace mlk::MLK_ISA::tiles
