#include "caches.h"
#include "checks.h"
#include "matrices.h"

namespace mlk {

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

}  // namespace mlk
