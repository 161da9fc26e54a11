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
        _Float16 half = _Float16(value);
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
  if (type == Type::f16) return float(reinterpret_cast<const _Float16*>(bytes.data())[i]);
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

void check_affine(Pool& pool, const Table& table) {
  int bits = 1 << between(1, 3), group = 32 << between(0, 2);
  size_t rows = between(1, 70), columns = size_t(group) * between(1, 1 + 1400 / group);
  size_t m = between(0, 3) ? between(1, 8) : between(9, 40);
  int per = 32 / bits;
  std::vector<uint32_t> words(rows * columns / per);
  for (auto& word : words) word = random_bits();
  Type type = any_type(), x_type = any_type();
  Values scales(type, normals(rows * columns / group)), biases(type, normals(rows * columns / group));
  Values x(x_type, normals(m * columns));
  std::vector<char> y(m * rows * size_of(x_type));
  affine_product(pool, table,
                 {words.data(), scales.bytes.data(), biases.bytes.data(), type, rows, columns, group, bits},
                 {x.bytes.data(), x_type, m, columns}, y.data());
  for (size_t i = 0; i < m; ++i) {
    for (size_t r = 0; r < rows; ++r) {
      double expected = 0, size = 0;
      for (size_t k = 0; k < columns; ++k) {
        uint32_t q = words[r * columns / per + k / per] >> (bits * (k % per)) & ((1u << bits) - 1);
        size_t g = r * columns / group + k / group;
        double a = x.exact[i * columns + k];
        expected += a * (scales.exact[g] * q + biases.exact[g]);
        size += std::abs(a) * (std::abs(scales.exact[g]) * q + std::abs(biases.exact[g]));
      }
      double bound = std::sqrt(double(columns)) * EPSILON * size + rounding(x_type, expected);
      require(read(x_type, y, i * rows + r), expected, bound, "affine product");
    }
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

void check_attention(Pool& pool, const Table& table) {
  size_t batch = between(1, 2), shared = between(1, 3), group = between(1, 5), dim = between(1, 70);
  size_t m = between(1, 20), rows = m + between(0, 200);
  Type type = any_type(), cached = any_type();
  size_t heads = shared * group;
  Values q(type, normals(batch * heads * m * dim));
  Values k(cached, normals(batch * shared * rows * dim)), v(cached, normals(batch * shared * rows * dim));
  std::vector<char> y(q.bytes.size());
  Heads qs = heads_of(q, batch, heads, m, dim, between(0, 1));
  Heads ks = heads_of(k, batch, shared, rows, dim, between(0, 1));
  Heads vs = heads_of(v, batch, shared, rows, dim, false);
  float scale = 1 / std::sqrt(float(dim));
  attention(pool, table, {qs, ks, vs, scale, y.data()});
  auto at = [](const Values& x, const Heads& h, size_t b, size_t head, size_t row, size_t d) {
    return x.exact[b * h.stride_batch + head * h.stride_head + row * h.stride_row + d];
  };
  for (size_t b = 0; b < batch; ++b)
    for (size_t h = 0; h < heads; ++h)
      for (size_t i = 0; i < m; ++i) {
        size_t sees = rows - m + i + 1;
        std::vector<double> weights(sees);
        double total = 0, most = -1e300;
        for (size_t r = 0; r < sees; ++r) {
          for (size_t d = 0; d < dim; ++d) weights[r] += at(q, qs, b, h, i, d) * at(k, ks, b, h / group, r, d);
          weights[r] *= scale;
          most = std::max(most, weights[r]);
        }
        for (double& w : weights) total += w = std::exp(w - most);
        for (size_t d = 0; d < dim; ++d) {
          double expected = 0, size = 0;
          for (size_t r = 0; r < sees; ++r) {
            double value = at(v, vs, b, h / group, r, d);
            expected += weights[r] / total * value;
            size += weights[r] / total * std::abs(value);
          }
          double found = read(type, y, ((b * m + i) * heads + h) * dim + d);
          require(found, expected, 5e-6 * size + rounding(type, expected), "attention");
        }
      }
}

// What is not finite stays in its row of activations, and shows there.
void check_not_finite(Pool& pool, const Table& table, float bad) {
  for (size_t m : {3, 20}) {
    size_t rows = 40, columns = 96;
    std::vector<uint32_t> words(rows * columns / 8, 0x76543210u);
    std::vector<float> ones(rows * 3, 1.0f), x = normals(m * columns), y(m * rows);
    x[columns + 5] = bad;
    affine_product(pool, table, {words.data(), ones.data(), ones.data(), Type::f32, rows, columns, 32, 4},
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
  for (int round = 0; round < 20; ++round) left(check_affine), left(check_rows);
  for (int round = 0; round < 20; ++round) left(check_rotation), left(check_attention);
}

}  // namespace

int main(int argc, char** argv) {
  int rounds = argc > 1 ? std::atoi(argv[1]) : 40;
  check_pool();
  for (const char* name : {"baseline", "avx2", "avx512"}) {
    if (!choose(name)) {
      std::printf("%s: not on this processor\n", name);
      continue;
    }
    for (size_t threads : {1, 3}) {
      Pool pool(threads);
      for (int round = 0; round < rounds; ++round) {
        check_affine(pool, chosen());
        check_rows(pool, chosen());
        check_rotation(pool, chosen());
        check_attention(pool, chosen());
      }
      for (float bad : {std::nanf(""), HUGE_VALF, -HUGE_VALF}) check_not_finite(pool, chosen(), bad);
    }
    check_registers(chosen());
    std::printf("%s: as float64 says\n", name);
  }
  std::printf("%ld numbers checked\n", checks);
}
