#include "token.h"

#include "checks.h"
#include "matrices.h"

namespace mlk {

namespace {

// One layer's keys or values: buffers of random rows, plain or packed, and a copy to compare with.
struct Buffers {
  size_t heads, rows, dim;
  int bits, group;
  std::vector<Values> held;

  Buffers(Type type, int bits, size_t heads, size_t rows, size_t dim)
      : heads(heads), rows(rows), dim(dim), bits(bits), group(32) {
    size_t all = heads * rows;
    if (!bits) held.emplace_back(type, normals(all * dim));
    else {
      held.emplace_back(Type::f32, normals(all * dim * bits / 32));
      for (int i = 0; i < 2; ++i) held.emplace_back(type, normals(all * dim / group));
    }
  }
  Kept kept() {
    auto buffer = [&](size_t i) { return Buffer{held[i].bytes.data(), held[i].type, rows, 0}; };
    if (!bits) return {buffer(0)};
    return {buffer(0), bits, group, buffer(1), buffer(2)};
  }
  Stored stored(size_t n_rows) {
    auto heads_at = [&](size_t i, size_t n) {
      auto step = ptrdiff_t(n), head = ptrdiff_t(rows) * step;
      return Heads{held[i].bytes.data(), held[i].type, 1, heads, n_rows, n, ptrdiff_t(heads) * head, head, step};
    };
    if (!bits) return {heads_at(0, dim), 0, {}, {}};
    return {heads_at(0, dim * bits / 32), bits, heads_at(1, dim / group), heads_at(2, dim / group)};
  }
  // Puts a row of all heads in its place by the operations of their own.
  void put(Pool& pool, const Table& table, const float* from, size_t row) {
    auto append_all = [&](const float* x, size_t n, size_t i) {
      auto step = ptrdiff_t(n);
      append(pool, table, {x, Type::f32, 1, heads, 1, n, step, step, step},
             {held[i].bytes.data(), held[i].type, rows, row});
    };
    if (!bits) return append_all(from, dim, 0);
    size_t words = dim * bits / 32, groups = dim / group;
    std::vector<float> packed(heads * words), scales(heads * groups), biases(heads * groups);
    quantize(pool, table, {from, Type::f32, heads * groups, group, bits},
             {reinterpret_cast<uint32_t*>(packed.data()), scales.data(), biases.data()});
    append_all(packed.data(), words, 0);
    append_all(scales.data(), groups, 1);
    append_all(biases.data(), groups, 2);
  }
};

struct Layer {
  Values attention_norm, ffn_norm;
  Numbers wq, wkv, wo, w13, w2;
};

// A row of a matrix as float32.
void look_up(Pool& pool, const Table& table, const Numbers& numbers, size_t row, std::vector<float>& h) {
  Matrix a = numbers.matrix;
  std::vector<float> all(a.rows * a.columns);
  for (size_t i = 0; i < all.size(); ++i) all[i] = float(numbers.exact[i]);
  if (a.bits) {
    std::vector<float> scales(numbers.scales.exact.begin(), numbers.scales.exact.end());
    std::vector<float> biases(numbers.biases.exact.begin(), numbers.biases.exact.end());
    a.type = Type::f32, a.scales = scales.data(), a.biases = biases.data();
    dequantize(pool, table, a, all.data());
  }
  h.assign(all.begin() + row * a.columns, all.begin() + (row + 1) * a.columns);
}

// h plus a product.
void add(Pool& pool, const Table& table, const Matrix& a, const std::vector<float>& x, std::vector<float>& h) {
  std::vector<float> y(a.rows);
  matrix_product(pool, table, a, {x.data(), Type::f32, 1, a.columns}, y.data());
  for (size_t i = 0; i < h.size(); ++i) h[i] += y[i];
}

}  // namespace

void check_token(Pool& pool, const Table& table) {
  size_t n_heads = 2 * between(1, 3), n_kv_heads = n_heads / 2, head_dim = 32 * between(1, 2);
  size_t dim = 64 * between(1, 3), hidden = 64 * between(1, 3), n_vocab = between(5, 40);
  size_t rows = between(1, 60), row = between(0, int(rows) - 1), n_rows = between(int(row) + 1, int(rows));
  Type type = any_type();
  auto matrix = [&](size_t out, size_t in) {
    return Numbers(BITS[between(0, 6)], 32 << between(0, 1), type, out, in);
  };
  Numbers embeddings = matrix(n_vocab, dim), output = matrix(n_vocab, dim);
  Values norm(type, normals(dim));
  std::vector<float> periods(head_dim / 2);
  for (float& period : periods) period = float(between(1, 1000));
  std::vector<Layer> layers;
  std::vector<Buffers> keys, values;
  int key_bits = 4 * between(0, 2), value_bits = 4 * between(0, 2);
  for (int layer = between(1, 3); layer > 0; --layer) {
    layers.push_back({Values(type, normals(dim)), Values(type, normals(dim)), matrix(n_heads * head_dim, dim),
                      matrix(2 * n_kv_heads * head_dim, dim), matrix(dim, n_heads * head_dim),
                      matrix(2 * hidden, dim), matrix(dim, hidden)});
    keys.emplace_back(type, key_bits, n_kv_heads, rows, head_dim);
    values.emplace_back(type, value_bits, n_kv_heads, rows, head_dim);
  }
  // By operations of their own, over copies of the caches.
  auto keys_apart = keys, values_apart = values;
  size_t id = between(0, int(n_vocab) - 1);
  int position = between(0, 5000);
  std::vector<float> h(dim), normed(dim), heads((n_heads + 2 * n_kv_heads) * head_dim), out(n_heads * head_dim);
  std::vector<float> gates(2 * hidden), gated(hidden), expected(n_vocab), found(n_vocab);
  look_up(pool, table, embeddings, id, h);
  auto normalize = [&](const Values& by) {
    rms_norm(pool, table, {h.data(), Type::f32, 1, dim}, by.bytes.data(), type, 1e-5f, normed.data());
  };
  auto multiply = [&](const Numbers& by, float* y) {
    matrix_product(pool, table, by.matrix, {normed.data(), Type::f32, 1, dim}, y);
  };
  auto heads_at = [&](size_t first, size_t n) {
    auto d = ptrdiff_t(head_dim);
    return Heads{heads.data() + first * head_dim, Type::f32, 1, n, 1, head_dim, ptrdiff_t(n) * d, d, d};
  };
  for (size_t l = 0; l < layers.size(); ++l) {
    const Layer& layer = layers[l];
    normalize(layer.attention_norm);
    multiply(layer.wq, heads.data());
    multiply(layer.wkv, heads.data() + n_heads * head_dim);
    rotate(pool, table, heads_at(0, n_heads + n_kv_heads), periods.data(), position, heads.data());
    keys_apart[l].put(pool, table, heads.data() + n_heads * head_dim, row);
    values_apart[l].put(pool, table, heads.data() + (n_heads + n_kv_heads) * head_dim, row);
    Stored k = keys_apart[l].stored(n_rows), v = values_apart[l].stored(n_rows);
    attention(pool, table, {heads_at(0, n_heads), &k, &v, 1, n_rows, nullptr, 0.1f, out.data()});
    add(pool, table, layer.wo.matrix, out, h);
    normalize(layer.ffn_norm);
    multiply(layer.w13, gates.data());
    swiglu(pool, table, {gates.data(), Type::f32, 1, 2 * hidden}, gated.data());
    add(pool, table, layer.w2.matrix, gated, h);
  }
  normalize(norm);
  multiply(output, expected.data());

  Model model{{embeddings.matrix}, {}, {norm.bytes.data(), type}, {output.matrix}, periods.data(), n_heads,
              n_kv_heads, head_dim, 1e-5f, 0.1f};
  std::vector<Kept> kept_keys, kept_values;
  for (size_t l = 0; l < layers.size(); ++l) {
    const Layer& layer = layers[l];
    model.blocks.push_back({{layer.attention_norm.bytes.data(), type}, {layer.wq.matrix, layer.wkv.matrix},
                            {layer.wo.matrix}, {layer.ffn_norm.bytes.data(), type}, {layer.w13.matrix},
                            {layer.w2.matrix}});
    kept_keys.push_back(keys[l].kept());
    kept_values.push_back(values[l].kept());
  }
  pass_token(pool, table, model, {id, position, row, n_rows, nullptr, kept_keys.data(), kept_values.data()}, false,
             found.data());
  for (size_t i = 0; i < n_vocab; ++i) require(found[i], expected[i], 0, "a token's pass");
  for (size_t l = 0; l < layers.size(); ++l) {
    for (auto [a, b] : {std::pair(&keys[l], &keys_apart[l]), {&values[l], &values_apart[l]}}) {
      for (size_t i = 0; i < a->held.size(); ++i) {
        require(a->held[i].bytes == b->held[i].bytes, true, 0, "the cache after a token's pass");
      }
    }
  }
}

}  // namespace mlk
