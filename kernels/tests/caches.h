// Heads and caches of random numbers, plain or packed.
#pragma once

#include "values.h"

namespace mlk {

inline Heads heads_of(const Values& x, size_t batch, size_t heads, size_t m, size_t dim, bool by_row) {
  ptrdiff_t row = by_row ? heads * dim : dim, head = by_row ? dim : m * dim;
  return {x.bytes.data(), x.type, batch, heads, m, dim, ptrdiff_t(heads * m * dim), head, row};
}

// Keys or values as a cache stores them, and what they are exactly.
struct Cached {
  size_t heads, rows, dim;
  Values scales, biases, plain;
  std::vector<uint32_t> words;
  Stored stored;
  int group;

  Cached(Type type, int bits, size_t batch, size_t heads, size_t rows, size_t dim, int group,
         bool by_row)
      : heads(heads), rows(rows), dim(dim), scales(type, {}), biases(type, {}), plain(type, {}),
        group(group) {
    size_t all = batch * heads * rows;
    if (!bits) {
      plain = Values(type, normals(all * dim));
      stored = {heads_of(plain, batch, heads, rows, dim, by_row), 0, {}, {}};
      return;
    }
    words.resize(all * dim * bits / 32);
    for (auto& word : words) word = random_bits();
    auto small = normals(all * dim / group);
    for (float& value : small) value /= 1 << (bits - 1);
    scales = Values(type, small), biases = Values(type, normals(all * dim / group));
    stored.bits = bits;
    stored.numbers = heads_of(plain, batch, heads, rows, dim * bits / 32, by_row);
    stored.numbers.data = words.data();
    stored.scales = heads_of(scales, batch, heads, rows, dim / group, by_row);
    stored.biases = heads_of(biases, batch, heads, rows, dim / group, by_row);
  }

  double at(size_t batch, size_t head, size_t row, size_t d) const {
    auto from = [&](const Heads& x) {
      return batch * x.stride_batch + head * x.stride_head + row * x.stride_row;
    };
    int bits = stored.bits;
    if (!bits) return plain.exact[from(stored.numbers) + d];
    uint32_t q = words[from(stored.numbers) + d * bits / 32] >> (d * bits % 32) & ((1u << bits) - 1);
    size_t g = from(stored.scales) + d / group;
    return scales.exact[g] * q + biases.exact[g];
  }
  // The sum of magnitudes that `at` adds.
  double size(size_t batch, size_t head, size_t row, size_t d) const {
    if (!stored.bits) return std::abs(at(batch, head, row, d));
    const Heads& x = stored.scales;
    size_t g = batch * x.stride_batch + head * x.stride_head + row * x.stride_row + d / group;
    return std::abs(at(batch, head, row, d) - biases.exact[g]) + std::abs(biases.exact[g]);
  }
};

}  // namespace mlk
