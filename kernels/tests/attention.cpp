#include <algorithm>
#include <atomic>

#include "caches.h"
#include "checks.h"

namespace mlk {

namespace {

// A random case: queries, the parts of a cache, and who sees its rows.
struct Case {
  size_t batch, shared, group, dim, m, heads, rows = 0;
  std::vector<size_t> lengths;
  Type type;
  Values q{Type::f32, {}};
  Heads qs;
  std::vector<Cached> keys, values;
  std::vector<Stored> stored_keys, stored_values;
  std::vector<int32_t> sight;
  float scale;

  Case() {
    const int kinds[] = {0, 0, 8, 4};
    int key_bits = kinds[between(0, 3)], value_bits = kinds[between(0, 3)];
    batch = between(1, 2), shared = between(1, 3), group = between(1, 5);
    dim = key_bits || value_bits ? 32 * between(1, 4) : between(1, 70);
    m = between(0, 2) ? between(1, 20) : between(1, 3), heads = shared * group;
    lengths.push_back(between(1, 200));
    if (!between(0, 9)) lengths[0] += 2500;
    if (between(0, 1)) lengths.push_back(between(1, 90));
    for (size_t length : lengths) rows += length;
    m = std::min(m, rows);
    scale = 1 / std::sqrt(float(dim));
    type = any_type();
    Type cached = any_type();
    q = Values(type, normals(batch * heads * m * dim));
    qs = heads_of(q, batch, heads, m, dim, between(0, 1));
    fill_cache(cached, key_bits, value_bits);
    if (between(0, 1)) draw_sight();
  }

  void fill_cache(Type cached, int key_bits, int value_bits) {
    int groups[2] = {32, 32};
    for (int& size : groups) {
      for (int other : {64, 128}) {
        if (dim % other == 0 && between(0, 1)) size = other;
      }
    }
    for (size_t length : lengths) {
      keys.reserve(2), values.reserve(2);
      bool by_row = between(0, 1);
      keys.emplace_back(cached, key_bits, batch, shared, length, dim, groups[0], by_row);
      values.emplace_back(cached, value_bits, batch, shared, length, dim, groups[1], false);
      stored_keys.push_back(keys.back().stored), stored_values.push_back(values.back().stored);
    }
  }

  void draw_sight() {
    sight.resize(2 * rows);
    for (size_t r = 0; r < rows; ++r) {
      sight[r] = between(-3, int(m) + 3), sight[rows + r] = sight[r] + between(-2, int(m));
    }
    sight[0] = 0, sight[rows] = int(m);  // each query sees something
  }

  bool sees(size_t query, size_t row) const {
    if (sight.empty()) return row <= rows - m + query;
    return sight[row] <= int(query) && sight[rows + row] >= int(query);
  }

  // Calls f(part, row of it, row of all).
  template <class Fn>
  void each_row(Fn f) const {
    size_t row = 0;
    for (size_t part = 0; part < lengths.size(); ++part) {
      for (size_t r = 0; r < lengths[part]; ++r, ++row) f(part, r, row);
    }
  }

  void compare(size_t b, size_t h, size_t query, const std::vector<char>& y) const {
    std::vector<double> weights, columns(dim), sizes(dim);
    double total = 0, most = -1e300, largest = 0;
    size_t from = b * qs.stride_batch + h * qs.stride_head + query * qs.stride_row;
    each_row([&](size_t part, size_t r, size_t row) {
      double score = 0, size = 0;
      for (size_t d = 0; d < dim; ++d) {
        score += q.exact[from + d] * keys[part].at(b, h / group, r, d) * scale;
        size += std::abs(q.exact[from + d]) * keys[part].size(b, h / group, r, d) * scale;
      }
      bool is_seen = sees(query, row);
      weights.push_back(is_seen ? score : -HUGE_VAL);
      if (is_seen) most = std::max(most, score), largest = std::max(largest, size);
    });
    for (double& w : weights) total += w = std::exp(w - most);
    each_row([&](size_t part, size_t r, size_t row) {
      for (size_t d = 0; d < dim; ++d) {
        columns[d] += weights[row] / total * values[part].at(b, h / group, r, d);
        sizes[d] += weights[row] / total * values[part].size(b, h / group, r, d);
      }
    });
    for (size_t d = 0; d < dim; ++d) {
      double found = read(type, y, ((b * m + query) * heads + h) * dim + d);
      double bound = (rows / 64.0 + 64 + 8 * largest) * EPSILON * sizes[d];
      require(found, columns[d], bound + rounding(type, columns[d]), "attention");
    }
  }
};

std::atomic<int> n_ranges;

}  // namespace

void check_attention(Pool& pool, const Table& table) {
  Case c;
  std::vector<char> y(c.q.bytes.size());
  attention(pool, table,
            {c.qs, c.stored_keys.data(), c.stored_values.data(), c.lengths.size(), c.rows,
             c.sight.empty() ? nullptr : c.sight.data(), c.scale, y.data()});
  for (size_t b = 0; b < c.batch; ++b) {
    for (size_t h = 0; h < c.heads; ++h) {
      for (size_t i = 0; i < c.m; ++i) c.compare(b, h, i, y);
    }
  }
}

void check_sharing(const Table& table) {
  Table counting = table;
  counting.attention = [](const Attention&, float*, float*, size_t, size_t) { ++n_ranges; };
  counting.attention_join = [](const Attention&, float*, size_t, size_t) {};
  Pool pool(3);
  for (size_t rows : {1024, 1025, 4096, 4097, 16384, 131072}) {
    for (size_t heads : {8, 32}) {
      Stored stored{{nullptr, Type::f32, 1, 8, rows, 64, 0, 0, 64}, 0, {}, {}};
      Heads q{nullptr, Type::f32, 1, heads, 1, 64, 0, 64, 64};
      n_ranges = 0;
      attention(pool, counting, {q, &stored, &stored, 1, rows, nullptr, 1, nullptr});
      require(n_ranges >= 3, 1, 0, "ranges of a long cache");
    }
  }
}

}  // namespace mlk
