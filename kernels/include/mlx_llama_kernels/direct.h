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

// The rows of a head that are asked of the memory while others are worked on.
struct Ahead {
  const char* data;
  ptrdiff_t stride, bytes;
  size_t rows;

  Ahead(const Stored& x, size_t batch, size_t head)
      : data(static_cast<const char*>(x.numbers.data) +
             place(x.numbers, batch, head, 0) * size_of(x.numbers.type)),
        stride(x.numbers.stride_row * ptrdiff_t(size_of(x.numbers.type))),
        bytes(ptrdiff_t(x.numbers.dim * size_of(x.numbers.type))),
        rows(x.numbers.m) {}
  void ask(size_t row) const {
    if (row >= rows) return;
    const char* from = data + ptrdiff_t(row) * stride;
    for (ptrdiff_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at);
  }
};

// C vectors of a stored row.
template <int C, class Reader>
static inline void read_vectors(const Reader& rows, size_t row, size_t d, bool is_whole, F* numbers) {
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) numbers[c] = is_whole ? rows.whole(row, d + c * W) : rows.vector(row, d + c * W);
}

// Calls f with a number of vectors, 4 at most, as a constant, until all up to `end` had their turn.
template <class Fn>
static inline void by_vectors(size_t d, size_t end, Fn f) {
  for (; d + 4 * W <= end; d += 4 * W) f(d, std::integral_constant<int, 4>{});
  if (d + 2 * W <= end) {
    f(d, std::integral_constant<int, 2>{});
    d += 2 * W;
  }
  if (d < end) f(d, std::integral_constant<int, 1>{});
}

// Products of C vectors from number d on: of R queries, whose numbers stand q_dim apart, with W keys
// from `key` on; behind the last one it is read again. adds: to those before.
template <int R, int C, class Reader>
static inline void direct_dots(const Reader& keys, size_t first, size_t key, size_t n, size_t d,
                               const float* q, size_t q_dim, bool adds, F (*parts)[W]) {
  F own[R][C];
  for (int j = 0; j < R; ++j) {
    for (int c = 0; c < C; ++c) own[j][c] = load(q + j * q_dim + c * W);
  }
  bool is_whole = keys.has(d, C * W);
  for (int i = 0; i < W; ++i) {
    F numbers[C];
    read_vectors<C>(keys, first + least(key + i, n - 1), d, is_whole, numbers);
#pragma GCC unroll 4
    for (int j = 0; j < R; ++j) {
      F dots = own[j][0] * numbers[0];
#pragma GCC unroll 4
      for (int c = 1; c < C; ++c) dots += own[j][c] * numbers[c];
      parts[j][i] = adds ? parts[j][i] + dots : dots;
    }
  }
}

// scores (rows, STRIP) of the rows [first, first + n) with the queries (rows, dim), whose numbers
// stand as the keys' do. totals (rows, groups): sums of a query's numbers.
template <class Reader>
static inline void direct_scores(const Reader& keys, const Stored& x, size_t batch, size_t head,
                                 size_t first, size_t n, const float* queries, const float* totals,
                                 size_t rows, size_t dim, const Ahead& ahead, float* scores) {
  size_t groups = groups_of(x), group = Reader::is_packed ? group_of(x) : dim;
  float scales[STRIP], biases[STRIP];
  for (size_t g = 0; g < groups; ++g) {
    if constexpr (Reader::is_packed) {
      for (size_t i = n; i < up(n, W); ++i) scales[i] = biases[i] = 0;
      widen_column(x.scales, batch, head, first, n, g, scales);
      widen_column(x.biases, batch, head, first, n, g, biases);
    }
    for (size_t key = 0; key < n; key += W) {
      for (size_t i = key; g == 0 && i < least(key + W, n); ++i) ahead.ask(first + i);
      by_few(rows, [&](size_t r, auto count) __attribute__((always_inline)) {
        constexpr int R = count;
        const float* q = queries + r * dim + g * group;
        F parts[R][W];
        by_vectors(0, group, [&](size_t d, auto vectors) __attribute__((always_inline)) {
          direct_dots<R, vectors>(keys, first, key, n, g * group + d, q + d, dim, d > 0, parts);
        });
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
                                  size_t dim, const Ahead* ahead, float* sums) {
  F total[R][C] = {};
  bool is_whole = values.has(d, C * W);
  for (size_t key = 0; key < n; ++key) {
    if (ahead) ahead->ask(first + STRIP + key);
    F numbers[C];
    read_vectors<C>(values, first + key, d, is_whole, numbers);
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
                               size_t rows, size_t dim, const Ahead& ahead, float* sums) {
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
      by_vectors(g * group, (g + 1) * group, [&](size_t d, auto vectors) __attribute__((always_inline)) {
        direct_columns<R, vectors>(values, first, n, d, own, shifts, fades + r, dim,
                                   d || r ? nullptr : &ahead, sums + r * dim);
      });
    });
  }
}

}  // namespace mlk::MLK_ISA
