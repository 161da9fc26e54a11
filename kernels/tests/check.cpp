// Every operation of every instruction set against float64, over random shapes; prints what it did.
//
// Bounds: an error is measured against the sum of the magnitudes that were added, as rounding is.
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "operations.h"
#include "sampling.h"

using namespace mlk;

namespace {

constexpr double EPSILON = 1.0 / (1 << 24);
std::mt19937 random_bits(20);
long checks = 0;

int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_bits); }
float normal() { return std::normal_distribution<float>()(random_bits); }
std::vector<float> normals(size_t n) {
  std::vector<float> values(n);
  for (float& v : values) v = normal();
  return values;
}

void require(double found, double expected, double bound, const char* what) {
  ++checks;
  if (std::abs(found - expected) <= bound) return;
  std::fprintf(stderr, "%s: found %.9g, expected %.9g within %.3g\n", what, found, expected, bound);
  std::exit(1);
}

// Numbers of a type, and what they are exactly.
struct Values {
  Type type;
  std::vector<char> bytes;
  std::vector<double> exact;

  Values(Type type, const std::vector<float>& from) : type(type), bytes(from.size() * size_of(type)) {
    for (size_t i = 0; i < from.size(); ++i) {
      float value = from[i];
      if (type == Type::f32) std::memcpy(&bytes[i * 4], &value, 4);
      if (type == Type::f16) {
        f16 half = f16(value);
        std::memcpy(&bytes[i * 2], &half, 2);
        value = float(half);
      }
      if (type == Type::bf16) {
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        bits &= 0xffff0000;
        uint16_t high = bits >> 16;
        std::memcpy(&bytes[i * 2], &high, 2);
        std::memcpy(&value, &bits, 4);
      }
      exact.push_back(value);
    }
  }
};

double read(Type type, const std::vector<char>& bytes, size_t i) {
  if (type == Type::f32) return reinterpret_cast<const float*>(bytes.data())[i];
  if (type == Type::f16) return float(reinterpret_cast<const f16*>(bytes.data())[i]);
  uint32_t bits = uint32_t(reinterpret_cast<const uint16_t*>(bytes.data())[i]) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// What writing a number in a type may change.
double rounding(Type type, double value) {
  double step = type == Type::f32 ? EPSILON : type == Type::f16 ? 1.0 / (1 << 11) : 1.0 / (1 << 8);
  return step * std::abs(value) + (type == Type::f16 ? 6e-8 : 1e-37);
}

Type any_type() { return Type(between(0, 2)); }

constexpr int BITS[] = {0, 2, 3, 4, 5, 6, 8};

// Random numbers of a matrix, packed or dense, and what they are exactly.
struct Numbers {
  Matrix matrix{};
  Values dense, scales, biases;
  std::vector<uint32_t> words;
  std::vector<double> exact, size;  // of the second: scale and bias without their signs

  Numbers(int bits, int group, Type type, size_t rows, size_t columns)
      : dense(type, normals(bits ? 0 : rows * columns)),
        scales(type, normals(bits ? rows * columns / group : 0)),
        biases(type, normals(bits ? rows * columns / group : 0)),
        words(bits ? rows * columns * bits / 32 : 0) {
    for (auto& word : words) word = random_bits();
    matrix = {bits ? (void*)words.data() : dense.bytes.data(), type, rows, columns};
    if (bits) {
      matrix.bits = bits, matrix.group = group;
      matrix.scales = scales.bytes.data(), matrix.biases = biases.bytes.data();
    }
    for (size_t i = 0; i < rows * columns; ++i) {
      if (!bits) {
        exact.push_back(dense.exact[i]);
        size.push_back(std::abs(dense.exact[i]));
        continue;
      }
      uint32_t q = 0;
      for (int b = 0; b < bits; ++b) q |= (words[(i * bits + b) / 32] >> (i * bits + b) % 32 & 1) << b;
      double scale = scales.exact[i / group], bias = biases.exact[i / group];
      exact.push_back(scale * q + bias);
      size.push_back(std::abs(scale) * q + std::abs(bias));
    }
  }
};

void check_product(Pool& pool, const Table& table) {
  int bits = BITS[between(0, 6)], group = 32 << between(0, 2);
  size_t rows = between(1, 70);
  size_t columns = bits ? size_t(group) * between(1, 1 + 1400 / group) : between(1, 1400);
  size_t m = between(0, 3) ? between(1, 8) : between(9, 70);
  Type x_type = any_type();
  Numbers a(bits, group, any_type(), rows, columns);
  a.matrix.is_coarse = between(0, 2) == 0;
  Values x(x_type, normals(m * columns));
  std::vector<char> y(m * rows * size_of(x_type));
  matrix_product(pool, table, a.matrix, {x.bytes.data(), x_type, m, columns}, y.data());
  // Few rows may be counted in steps of 2^-23 of the largest activation of a group, many in steps of
  // a 32767th, both coarsely of a 127th: these move a sum by no more than weights times half a step.
  const bool is_fine = m <= few_rows && !a.matrix.is_coarse;
  const double step = is_fine ? 2.02 * EPSILON : a.matrix.is_coarse ? 0.505 / 127 : 0.505 / 32767;
  std::vector<double> steps(m * columns, 0.0);
  for (size_t i = 0; bits && i < m * columns; i += group) {
    double largest = 0;
    for (int k = 0; k < group; ++k) largest = std::max(largest, std::abs(x.exact[i + k]));
    for (int k = 0; k < group; ++k) steps[i + k] = largest * step / EPSILON;
  }
  for (size_t i = 0; i < m; ++i) {
    for (size_t r = 0; r < rows; ++r) {
      double expected = 0, size = 0, stepped = 0;
      for (size_t k = 0; k < columns; ++k) {
        expected += x.exact[i * columns + k] * a.exact[r * columns + k];
        size += std::abs(x.exact[i * columns + k]) * a.size[r * columns + k];
        double weight = is_fine ? a.size[r * columns + k] : std::abs(a.exact[r * columns + k]);
        stepped += steps[i * columns + k] * weight;
      }
      double bound = ((std::sqrt(double(columns)) + 4) * size + stepped) * EPSILON;
      require(read(x_type, y, i * rows + r), expected, bound + rounding(x_type, expected), "product");
    }
  }
}

void check_likeliest() {
  for (int round = 0; round < 300; ++round) {
    size_t n = between(0, 1) ? between(1, 40) : between(41, 9000);
    std::vector<float> scores = normals(n), kept(n);
    float spread = std::exp(3 * normal());
    bool is_tied = between(0, 1);
    for (float& s : scores) s = is_tied ? std::round(s * 2) : s * spread;
    for (float& s : scores) if (!between(0, 9)) s = -INFINITY;
    scores[between(0, int(n) - 1)] = 3;
    Choice choice{size_t(between(0, 50)), between(0, 1) ? 1.0 : between(0, 99) / 100.0,
                  between(0, 1) ? 0.0 : between(0, 100) / 100.0};
    keep_likeliest(scores.data(), n, choice, kept.data());
    auto falling = scores;
    std::sort(falling.begin(), falling.end(), std::greater<>());
    double largest = falling[0], least = -INFINITY;
    if (choice.top_k > 0 && choice.top_k < n) least = falling[choice.top_k - 1];
    auto likely = [&](float score) { return score >= least ? std::exp(score - largest) : 0.0; };
    double total = 0, above = 0, from = falling[0];
    for (float s : falling) total += likely(s);
    double bounds[2];  // rounding may move a token over the edge
    for (int side : {0, 1}) {
      double most = choice.top_p * total * (side ? 1 + 1e-6 : 1 - 1e-6);
      above = 0, from = falling[0];
      for (size_t i = 0; i < n; ++i) {
        if (i && falling[i] != falling[i - 1] && above > most) break;
        if (falling[i] >= least) from = falling[i];
        above += likely(falling[i]);
      }
      bounds[side] = choice.top_p < 1 ? from : least;
      if (choice.min_p > 0) bounds[side] = std::max(bounds[side], largest + std::log(choice.min_p) + (side ? -1e-6 : 1e-6) * (1 + largest));
    }
    for (size_t i = 0; i < n; ++i) {
      bool is_kept = kept[i] == scores[i] && std::isfinite(kept[i]);
      if (scores[i] >= bounds[0] && std::isfinite(scores[i])) require(is_kept, 1, 0, "a likely token kept");
      if (scores[i] < bounds[1] && scores[i] > largest - 80) require(is_kept, 0, 0, "an unlikely token dropped");
    }
    require(*std::max_element(kept.begin(), kept.end()), largest, 0, "the likeliest token");
  }
}

void check_rows(Pool& pool, const Table& table) {
  size_t m = between(1, 9), n = between(1, 1500);
  Type type = any_type(), weight_type = any_type();
  Values x(type, normals(m * n)), weight(weight_type, normals(n));
  std::vector<char> y(m * n * size_of(type));
  rms_norm(pool, table, {x.bytes.data(), type, m, n}, weight.bytes.data(), weight_type, 1e-5f, y.data());
  for (size_t i = 0; i < m; ++i) {
    double squares = 0;
    for (size_t k = 0; k < n; ++k) squares += x.exact[i * n + k] * x.exact[i * n + k];
    double scale = 1 / std::sqrt(squares / n + 1e-5);
    for (size_t k = 0; k < n; ++k) {
      double expected = x.exact[i * n + k] * scale * weight.exact[k];
      require(read(type, y, i * n + k), expected, 1e-6 * std::abs(expected) + rounding(type, expected),
              "RMSNorm");
    }
  }
  Values pairs(type, normals(m * 2 * n));
  swiglu(pool, table, {pairs.bytes.data(), type, m, 2 * n}, y.data());
  for (size_t i = 0; i < m * n; ++i) {
    double gate = pairs.exact[i / n * 2 * n + i % n], up = pairs.exact[i / n * 2 * n + n + i % n];
    double expected = gate / (1 + std::exp(-gate)) * up;
    require(read(type, y, i), expected, 1e-6 * std::abs(expected) + rounding(type, expected), "SwiGLU");
  }
}

Heads heads_of(const Values& x, size_t batch, size_t heads, size_t m, size_t dim, bool by_row) {
  ptrdiff_t row = by_row ? heads * dim : dim, head = by_row ? dim : m * dim;
  return {x.bytes.data(), x.type, batch, heads, m, dim, ptrdiff_t(heads * m * dim), head, row};
}

void check_rotation(Pool& pool, const Table& table) {
  size_t batch = between(1, 2), heads = between(1, 5), m = between(1, 9), dim = 2 * between(1, 70);
  Type type = any_type();
  Values x(type, normals(batch * heads * m * dim));
  Heads in = heads_of(x, batch, heads, m, dim, between(0, 1));
  std::vector<float> periods(dim / 2);
  for (float& p : periods) p = std::exp(std::abs(normal()) * 3);
  int offset = between(0, 1000);
  std::vector<char> y(x.bytes.size());
  rotate(pool, table, in, periods.data(), offset, y.data());
  for (size_t part = 0; part < batch * heads; ++part) {
    for (size_t i = 0; i < m * dim; ++i) {
      size_t row = i / dim, d = i % dim, pair = d % (dim / 2);
      size_t from = part / heads * in.stride_batch + part % heads * in.stride_head + row * in.stride_row;
      double a = x.exact[from + pair], b = x.exact[from + pair + dim / 2];
      double angle = double(float(offset + int(row)) * (1.0f / periods[pair]));
      double expected = d < dim / 2 ? a * std::cos(angle) - b * std::sin(angle)
                                    : a * std::sin(angle) + b * std::cos(angle);
      double bound = 4 * EPSILON * (std::abs(a) + std::abs(b)) + rounding(type, expected);
      require(read(type, y, part * m * dim + i), expected, bound, "rotation");
    }
  }
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

void check_attention(Pool& pool, const Table& table) {
  const int kinds[] = {0, 0, 8, 4};
  int key_bits = kinds[between(0, 3)], value_bits = kinds[between(0, 3)];
  size_t batch = between(1, 2), shared = between(1, 3), group = between(1, 5);
  size_t dim = key_bits || value_bits ? 32 * between(1, 4) : between(1, 70);
  size_t m = between(0, 2) ? between(1, 20) : between(1, 3), heads = shared * group;
  std::vector<size_t> lengths{size_t(between(1, 200))};
  if (!between(0, 9)) lengths[0] += 2500;
  if (between(0, 1)) lengths.push_back(between(1, 90));
  size_t rows = 0;
  for (size_t length : lengths) rows += length;
  m = std::min(m, rows);
  Type type = any_type(), cached = any_type();
  Values q(type, normals(batch * heads * m * dim));
  Heads qs = heads_of(q, batch, heads, m, dim, between(0, 1));
  std::vector<Cached> keys, values;
  std::vector<Stored> stored_keys, stored_values;
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
  std::vector<int32_t> sight;
  if (between(0, 1)) {
    sight.resize(2 * rows);
    for (size_t r = 0; r < rows; ++r) {
      sight[r] = between(-3, int(m) + 3), sight[rows + r] = sight[r] + between(-2, int(m));
    }
    sight[0] = 0, sight[rows] = int(m);  // each query sees something
  }
  std::vector<char> y(q.bytes.size());
  float scale = 1 / std::sqrt(float(dim));
  attention(pool, table,
            {qs, stored_keys.data(), stored_values.data(), lengths.size(), rows,
             sight.empty() ? nullptr : sight.data(), scale, y.data()});
  for (size_t b = 0; b < batch; ++b)
    for (size_t h = 0; h < heads; ++h)
      for (size_t i = 0; i < m; ++i) {
        std::vector<double> weights, columns(dim), sizes(dim);
        double total = 0, most = -1e300, largest = 0;
        size_t row = 0, from = b * qs.stride_batch + h * qs.stride_head + i * qs.stride_row;
        for (size_t part = 0; part < lengths.size(); ++part)
          for (size_t r = 0; r < lengths[part]; ++r, ++row) {
            bool is_seen = sight.empty() ? row <= rows - m + i
                                         : sight[row] <= int(i) && sight[rows + row] >= int(i);
            double score = 0, size = 0;
            for (size_t d = 0; d < dim; ++d) {
              score += q.exact[from + d] * keys[part].at(b, h / group, r, d) * scale;
              size += std::abs(q.exact[from + d]) * keys[part].size(b, h / group, r, d) * scale;
            }
            weights.push_back(is_seen ? score : -HUGE_VAL);
            if (is_seen) most = std::max(most, score), largest = std::max(largest, size);
          }
        for (double& w : weights) total += w = std::exp(w - most);
        row = 0;
        for (size_t part = 0; part < lengths.size(); ++part)
          for (size_t r = 0; r < lengths[part]; ++r, ++row)
            for (size_t d = 0; d < dim; ++d) {
              columns[d] += weights[row] / total * values[part].at(b, h / group, r, d);
              sizes[d] += weights[row] / total * values[part].size(b, h / group, r, d);
            }
        for (size_t d = 0; d < dim; ++d) {
          double found = read(type, y, ((b * m + i) * heads + h) * dim + d);
          double bound = (rows / 64.0 + 64 + 8 * largest) * EPSILON * sizes[d];
          require(found, columns[d], bound + rounding(type, columns[d]), "attention");
        }
      }
}

std::atomic<int> n_ranges;

// One query over a long cache keeps every thread busy, however many parts the rows are cut into.
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

// What lies between two products, at once: the same numbers as one after the other.
void check_joined(Pool& pool, const Table& table) {
  int bits = BITS[between(0, 6)], group = 32 << between(0, 1);
  size_t dim = 64 * between(1, 5), hidden = 64 * between(1, 5);
  Type type = any_type();
  Numbers w13(bits, group, type, 2 * hidden, dim), w2(bits, group, type, dim, hidden);
  std::vector<float> h = normals(dim), normed(dim), gates(2 * hidden), gated(hidden), y(dim), found(dim);
  Values weight(type, normals(dim));
  Rows row{h.data(), Type::f32, 1, dim};
  Norm norm{weight.bytes.data(), type, 1e-5f};
  rms_norm(pool, table, row, norm.weight, type, norm.eps, normed.data());
  matrix_product(pool, table, w13.matrix, {normed.data(), Type::f32, 1, dim}, gates.data());
  std::vector<float> at_once(2 * hidden);
  normed_product(pool, table, row, norm, w13.matrix, at_once.data());
  for (size_t i = 0; i < 2 * hidden; ++i) require(at_once[i], gates[i], 0, "norm and product at once");
  swiglu(pool, table, {gates.data(), Type::f32, 1, 2 * hidden}, gated.data());
  matrix_product(pool, table, w2.matrix, {gated.data(), Type::f32, 1, hidden}, y.data());
  feed_forward(pool, table, row, norm, w13.matrix, w2.matrix, found.data());
  for (size_t i = 0; i < dim; ++i) require(found[i], y[i] + h[i], 0, "feed-forward at once");

  size_t heads = between(1, 4), head_dim = dim / 64 * 16, rows = between(1, 300);
  Numbers wo(0, 0, type, dim, heads * head_dim);
  Values q(Type::f32, normals(heads * head_dim));
  Cached keys(type, 0, 1, heads, rows, head_dim, 0, true), values(type, 0, 1, heads, rows, head_dim, 0, false);
  std::vector<float> out(heads * head_dim);
  Attention a{heads_of(q, 1, heads, 1, head_dim, false), &keys.stored, &values.stored, 1, rows, nullptr,
              0.1f, out.data()};
  attention(pool, table, a);
  matrix_product(pool, table, wo.matrix, {out.data(), Type::f32, 1, heads * head_dim}, y.data());
  attended_product(pool, table, a, wo.matrix, h.data(), found.data());
  for (size_t i = 0; i < dim; ++i) require(found[i], y[i] + h[i], 0, "attention at once");
}

// What is not finite stays in its row of activations, and shows there.
void check_not_finite(Pool& pool, const Table& table, float bad) {
  for (size_t m : {3, 20}) {
    size_t rows = 40, columns = 96;
    std::vector<uint32_t> words(rows * columns / 8, 0x76543210u);
    std::vector<float> ones(rows * 3, 1.0f), x = normals(m * columns), y(m * rows);
    x[columns + 5] = bad;
    matrix_product(pool, table, {words.data(), Type::f32, rows, columns, 4, 32, ones.data(), ones.data()},
                   {x.data(), Type::f32, m, columns}, y.data());
    for (size_t i = 0; i < m * rows; ++i) {
      require(std::isfinite(y[i]), i / rows != 1, 0, "products of what is not finite");
    }
  }
}

void check_pool() {
  for (size_t threads : {1, 2, 5}) {
    Pool pool(threads);
    for (int round = 0; round < 300; ++round) {
      size_t n = between(0, 200), grain = between(1, 9);
      std::vector<int> met(n, 0);
      pool.each(n, grain, [&](size_t first, size_t last, size_t thread) {
        if (thread >= threads) std::abort();
        for (size_t i = first; i < last; ++i) ++met[i];
      });
      for (int times : met) require(times, 1, 0, "parts of a job");
      if (round % 100 == 99) {
        pool.resize(threads);
        std::this_thread::sleep_for(std::chrono::milliseconds(2));  // until the workers sleep
      }
    }
    std::vector<std::thread> callers;
    std::atomic<size_t> total{0};
    for (int caller = 0; caller < 3; ++caller) {
      callers.emplace_back([&] {
        for (int i = 0; i < 100; ++i) {
          pool.each(37, 2, [&](size_t first, size_t last, size_t) { total += last - first; });
        }
      });
    }
    for (auto& caller : callers) caller.join();
    require(double(total), 3 * 100 * 37, 0, "parts of jobs of several callers");
  }
}

// Whether the upper parts of vector registers are in use, where the processor tells.
bool is_wide_in_use() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return false;
  if (!__get_cpuid_count(0xd, 1, &a, &b, &c, &d) || !(a & 4)) return false;
  asm volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(1));
  return a & (1 << 2 | 1 << 6);  // upper halves of ymm0-15, of zmm0-15
#else
  return false;
#endif
}

// After each operation the thread's vector registers must be as narrow code expects them.
void check_registers(const Table& table) {
  Pool pool(1);
  auto left = [&](auto check) {
    check(pool, table);
    require(is_wide_in_use(), 0, 0, "wide registers in use");
  };
  for (int round = 0; round < 20; ++round) left(check_product), left(check_rows);
  for (int round = 0; round < 20; ++round) left(check_rotation), left(check_attention);
}

}  // namespace

int main(int argc, char** argv) {
  int rounds = argc > 1 ? std::atoi(argv[1]) : 40;
  check_pool();
  check_likeliest();
  for (const char* name :
       {"baseline", "neon", "avx2", "avxvnni", "avx512", "vnni", "vbmi", "amx"}) {
    if (!choose(name)) {
      std::printf("%s: not on this processor\n", name);
      continue;
    }
    for (size_t threads : {1, 3}) {
      Pool pool(threads);
      for (int round = 0; round < rounds; ++round) {
        check_product(pool, chosen());
        check_rows(pool, chosen());
        check_rotation(pool, chosen());
        check_attention(pool, chosen());
        check_joined(pool, chosen());
      }
      for (float bad : {std::nanf(""), HUGE_VALF, -HUGE_VALF}) check_not_finite(pool, chosen(), bad);
    }
    check_registers(chosen());
    check_sharing(chosen());
    std::printf("%s: as float64 says\n", name);
  }
  std::printf("%ld numbers checked\n", checks);
}
