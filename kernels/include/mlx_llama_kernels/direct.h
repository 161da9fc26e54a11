// Attention of few queries: every key and value is read once, from where it is stored, and widened
// in registers. Packed rows are multiplied by their numbers alone; scales and biases come in once a
// group: q (s n + b) = s (q n) + b (sum of q), and the weights take the values' scales.
#pragma once

#include <utility>

#include "mlx_llama_kernels/stored.h"

namespace mlk::MLK_ISA {

constexpr size_t STRIP = 128;               // rows at once
constexpr int AT_ONCE = W == 16 ? 4 : 2;    // queries whose sums fit into registers
constexpr size_t most_groups = most_dim / 32;

// Where lane `lane` of the next round comes from: each block of K lanes belongs to one sum, and
// becomes half as long.
template <int K>
constexpr int origin(int lane) {
  int half = K / 2, block = lane / half;
  return block / 2 * K + lane % half + (block % 2 ? W : 0);
}
template <int K, int... LANES>
static inline F halved(F a, F b, std::integer_sequence<int, LANES...>) {
  return __builtin_shufflevector(a, b, origin<K>(LANES)...) +
         __builtin_shufflevector(a, b, (origin<K>(LANES) + K / 2)...);
}

// Lane i of the result is the sum of the lanes of v[i], for W vectors, which are used up.
template <int K = W>
static inline F sums_of(F* v) {
  if constexpr (K == 1) {
    return v[0];
  } else {
    constexpr int half = K / 2;
    for (int i = 0; i < half; ++i) v[i] = halved<K>(v[i], v[i + half], std::make_integer_sequence<int, W>{});
    return sums_of<half>(v);
  }
}

// Calls f with the number of queries as a constant, AT_ONCE at most, until all rows had their turn.
template <class Fn>
static inline void by_few(size_t rows, Fn f) {
  for (size_t r = 0; r < rows;) {
    size_t n = least(rows - r, AT_ONCE);
    if (n == 1) f(r, std::integral_constant<int, 1>{});
    else if (n == 2) f(r, std::integral_constant<int, 2>{});
    else if (n == 3) f(r, std::integral_constant<int, AT_ONCE < 3 ? 1 : 3>{});
    else f(r, std::integral_constant<int, AT_ONCE>{});
    r += n;
  }
}

// scores (rows, STRIP) of the rows [first, first + n) with the queries (rows, dim), whose numbers
// stand as the keys' do. totals (rows, groups): sums of a query's numbers.
template <class Reader>
static inline void direct_scores(const Reader& keys, const Stored& x, size_t batch, size_t head,
                                 size_t first, size_t n, const float* queries, const float* totals,
                                 size_t rows, size_t dim, float* scores) {
  size_t groups = groups_of(x), group = Reader::is_packed ? group_of(x) : dim;
  float scales[STRIP], biases[STRIP];
  for (size_t g = 0; g < groups; ++g) {
    if constexpr (Reader::is_packed) {
      for (size_t i = n; i < up(n, W); ++i) scales[i] = biases[i] = 0;
      widen_column(x.scales, batch, head, first, n, g, scales);
      widen_column(x.biases, batch, head, first, n, g, biases);
    }
    for (size_t key = 0; key < n; key += W) {
      by_few(rows, [&](size_t r, auto count) __attribute__((always_inline)) {
        constexpr int R = count;
        const float* q = queries + r * dim + g * group;
        F parts[R][W];
        for (int i = 0; i < W; ++i) {
          size_t row = first + least(key + i, n - 1);  // behind the last one it is read again
          F dots[R] = {};
          for (size_t d = 0; d < group; d += W) {
            F numbers = keys.vector(row, g * group + d);
            for (int j = 0; j < R; ++j) dots[j] += load(q + j * dim + d) * numbers;
          }
          for (int j = 0; j < R; ++j) parts[j][i] = dots[j];
        }
        for (int j = 0; j < R; ++j) {
          F score = sums_of(parts[j]);
          float* to = scores + (r + j) * STRIP + key;
          if constexpr (Reader::is_packed) {
            score = score * load(scales + key) + load(biases + key) * totals[(r + j) * groups + g];
            if (g) score += load(to);
          }
          store(to, score);
        }
      });
    }
  }
}

// C vectors of the weighted sums of R queries, from number d on: sums = sums * fade + this strip's.
template <int R, int C, class Reader>
static inline void direct_columns(const Reader& values, size_t first, size_t n, size_t d,
                                  const float* weights, const float* shifts, const float* fades,
                                  size_t dim, float* sums) {
  F total[R][C] = {};
  for (size_t key = 0; key < n; ++key) {
    F numbers[C];
    for (int c = 0; c < C; ++c) numbers[c] = values.vector(first + key, d + c * W);
    for (int j = 0; j < R; ++j) {
      F weight = all(weights[j * STRIP + key]);
      for (int c = 0; c < C; ++c) total[j][c] += weight * numbers[c];
    }
  }
  for (int j = 0; j < R; ++j) {
    for (int c = 0; c < C; ++c) {
      float* to = sums + j * dim + d + c * W;
      store(to, load(to) * fades[j] + (total[j][c] + shifts[j]));
    }
  }
}

// sums (rows, dim) = sums * fades + the weights (rows, STRIP) times the rows [first, first + n).
template <class Reader>
static inline void direct_sums(const Reader& values, const Stored& x, size_t batch, size_t head,
                               size_t first, size_t n, const float* weights, const float* fades,
                               size_t rows, size_t dim, float* sums) {
  size_t groups = groups_of(x), group = Reader::is_packed ? group_of(x) : dim;
  float scales[STRIP], biases[STRIP], scaled[AT_ONCE * STRIP], shifts[AT_ONCE] = {};
  for (size_t g = 0; g < groups; ++g) {
    if constexpr (Reader::is_packed) {
      for (size_t i = n; i < up(n, W); ++i) scales[i] = biases[i] = 0;
      widen_column(x.scales, batch, head, first, n, g, scales);
      widen_column(x.biases, batch, head, first, n, g, biases);
    }
    by_few(rows, [&](size_t r, auto count) __attribute__((always_inline)) {
      constexpr int R = count;
      const float* own = weights + r * STRIP;
      if constexpr (Reader::is_packed) {
        for (int j = 0; j < R; ++j) {
          F shift = {};
          for (size_t i = 0; i < n; i += W) {
            F weight = load(weights + (r + j) * STRIP + i);
            store(scaled + j * STRIP + i, weight * load(scales + i));
            shift += weight * load(biases + i);
          }
          shifts[j] = sum(shift);
        }
        own = scaled;
      }
      size_t d = g * group, end = d + group;
      float* to = sums + r * dim;
      for (; d + 4 * W <= end; d += 4 * W) {
        direct_columns<R, 4>(values, first, n, d, own, shifts, fades + r, dim, to);
      }
      if (d + 2 * W <= end) {
        direct_columns<R, 2>(values, first, n, d, own, shifts, fades + r, dim, to);
        d += 2 * W;
      }
      if (d < end) direct_columns<R, 1>(values, first, n, d, own, shifts, fades + r, dim, to);
    });
  }
}

}  // namespace mlk::MLK_ISA
