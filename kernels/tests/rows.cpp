#include <algorithm>

#include "caches.h"
#include "checks.h"

namespace mlk {

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

// New rows in a buffer of another type, and all others as they were; what is finite stays so.
void check_append(Pool& pool, const Table& table) {
  size_t batch = between(1, 2), heads = between(1, 5), m = between(1, 9), dim = between(1, 70);
  size_t row = between(0, 5), rows = row + m + between(0, 5);
  std::vector<float> numbers = normals(batch * heads * m * dim);
  for (float& x : numbers) x *= std::pow(10.0f, float(between(-9, 9)));
  Values x(between(0, 3) ? Type::f32 : Type::bf16, numbers);
  Heads in = heads_of(x, batch, heads, m, dim, between(0, 1));
  Values buffer(any_type(), normals(batch * heads * rows * dim));
  append(pool, table, in, {buffer.bytes.data(), buffer.type, rows, row});
  for (size_t i = 0; i < buffer.exact.size(); ++i) {
    size_t d = i % dim, at = i / dim % rows, part = i / dim / rows;
    double expected = buffer.exact[i], bound = 0;
    if (at >= row && at < row + m) {
      expected = x.exact[part / heads * in.stride_batch + part % heads * in.stride_head +
                         (at - row) * in.stride_row + d];
      if (buffer.type == Type::f16) expected = std::clamp(expected, -65504.0, 65504.0);
      bound = buffer.type == x.type ? 0 : rounding(buffer.type, expected);
    }
    require(read(buffer.type, buffer.bytes, i), expected, bound, "appending");
  }
}

// What `quantize` makes of the rows alone, its scales and biases in the buffer's type.
void check_append_packed(Pool& pool, const Table& table) {
  size_t batch = between(1, 2), heads = between(1, 5), m = between(1, 9), row = between(0, 5);
  size_t rows = row + m + between(0, 5);
  int bits = between(0, 1) ? 8 : 4, group = 32 << between(0, 2);
  size_t groups = between(1, 20), dim = groups * group, words = dim * bits / 32;
  Values x(any_type(), normals(batch * heads * m * dim));
  Heads in = heads_of(x, batch, heads, m, dim, between(0, 1));
  std::vector<uint32_t> found(batch * heads * rows * words), before, expected(words);
  for (auto& word : found) word = random_bits();
  before = found;
  Type type = any_type();
  std::vector<float> old = normals(batch * heads * rows * groups);
  Values scales(type, old), biases(type, old);
  append_packed(pool, table, in, {found.data(), scales.bytes.data(), biases.bytes.data(), type, rows, row, group, bits});
  std::vector<char> steps(groups * size_of(x.type)), starts(steps);
  for (size_t i = 0; i < batch * heads * rows; ++i) {
    size_t at = i % rows, part = i / rows;
    bool is_new = at >= row && at < row + m;
    if (is_new) {
      size_t from = part / heads * in.stride_batch + part % heads * in.stride_head + (at - row) * in.stride_row;
      quantize(pool, table, {x.bytes.data() + from * size_of(x.type), x.type, groups, group, bits},
               {expected.data(), steps.data(), starts.data()});
    }
    for (size_t k = 0; k < words; ++k) {
      require(found[i * words + k], is_new ? expected[k] : before[i * words + k], 0, "appended words");
    }
    for (size_t g = 0; g < groups; ++g) {
      for (auto [to, made] : {std::pair(&scales, &steps), std::pair(&biases, &starts)}) {
        double number = is_new ? read(x.type, *made, g) : to->exact[i * groups + g];
        double bound = is_new && x.type != type ? rounding(type, number) : 0;
        require(read(type, to->bytes, i * groups + g), number, bound, "appended scales and biases");
      }
    }
  }
}

}  // namespace mlk
