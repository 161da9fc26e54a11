#include "token.h"

#include <memory>

namespace mlk {

namespace {

size_t rows_of(const Matrices& matrices) {
  size_t rows = 0;
  for (const Matrix& a : matrices) rows += a.rows;
  return rows;
}

// Numbers of one row in another type.
void convert(const Table& table, const void* from, Type type, size_t n, const Buffer& to) {
  table.append({from, type, 1, 1, 1, n, 0, 0, 0}, to, 0, 1);
}

// A row of a matrix as float32.
void look_up(const Table& table, const Matrix& a, size_t row, float* y) {
  auto start = [&](const void* data, size_t bytes) { return static_cast<const char*>(data) + row * bytes; };
  if (!a.bits) {
    convert(table, start(a.data, a.columns * size_of(a.type)), a.type, a.columns, {y, Type::f32, 1, 0});
    return;
  }
  size_t groups = a.columns / a.group, each = groups * size_of(a.type);
  std::vector<float> scales(groups), biases(groups);
  convert(table, start(a.scales, each), a.type, groups, {scales.data(), Type::f32, 1, 0});
  convert(table, start(a.biases, each), a.type, groups, {biases.data(), Type::f32, 1, 0});
  Matrix one{start(a.data, a.columns * a.bits / 8), Type::f32, 1, a.columns, a.bits, a.group,
             scales.data(), biases.data()};
  table.dequantize(one, y, 0, groups);
}

class Pass {
 public:
  Pass(Pool& pool, const Table& table, const Model& model, const Token& token, bool is_coarse)
      : pool_(pool), table_(table), model_(model), token_(token), is_coarse_(is_coarse) {
    size_t dim = model.embeddings[0].columns, half = model.head_dim / 2;
    size_t heads = (model.n_heads + 2 * model.n_kv_heads) * model.head_dim;
    size_t gates = model.blocks.empty() ? 0 : rows_of(model.blocks[0].w13);
    size_t attended = model.n_heads * model.head_dim;
    memory_ = std::make_unique_for_overwrite<float[]>(3 * dim + 2 * half + heads + attended + 2 * gates);
    float* at = memory_.get();
    for (auto [part, n] : {std::pair(&h_, dim), {&normed_, dim}, {&added_, dim}, {&angles_, 2 * half},
                           {&heads_, heads}, {&attended_, attended}, {&gates_, gates}, {&gated_, gates}}) {
      *part = at;
      at += n;
    }
  }

  void run(float* logits) {
    look_up(table_, model_.embeddings[0], token_.id, h_);
    size_t half = model_.head_dim / 2;  // all layers turn by the same angles
    turn_of(model_.periods, half, token_.position, angles_, angles_ + half);
    for (size_t layer = 0; layer < model_.blocks.size(); ++layer) {
      auto held = pool_.lock();  // between two jobs nobody else's begins
      const Block& block = model_.blocks[layer];
      attend(block, token_.keys[layer], token_.values[layer]);
      feed_forward(block);
    }
    auto held = pool_.lock();
    norm(model_.norm);
    multiply(model_.output, normed_, logits);
  }

 private:
  size_t dim() const { return model_.embeddings[0].columns; }

  void norm(const Norm& by) {
    table_.rms_norm({h_, Type::f32, 1, dim()}, by.weight, by.type, model_.eps, normed_, 0, 1);
  }

  void multiply(const Matrices& matrices, const float* x, float* y) {
    for (Matrix a : matrices) {
      a.is_coarse = is_coarse_;
      matrix_product(pool_, table_, a, {x, Type::f32, 1, a.columns}, y);
      y += a.rows;
    }
  }

  // h plus the product.
  void add(const Matrices& matrices, const float* x) {
    multiply(matrices, x, added_);
    for (size_t i = 0; i < dim(); ++i) h_[i] += added_[i];
  }

  Heads heads_at(const float* data, size_t n) const {
    auto d = ptrdiff_t(model_.head_dim);
    return {data, Type::f32, 1, n, 1, model_.head_dim, ptrdiff_t(n) * d, d, d};
  }

  void attend(const Block& block, const Kept& keys, const Kept& values) {
    size_t n_heads = model_.n_heads, n_kv_heads = model_.n_kv_heads;
    norm(block.attention_norm);
    multiply(block.wqkv, normed_, heads_);
    size_t n_turned = n_heads + n_kv_heads;
    // A head is read as a whole before it is written.
    table_.rotate(heads_at(heads_, n_turned), angles_, heads_, 0, n_turned);
    keep(heads_ + n_heads * model_.head_dim, keys);
    keep(heads_ + n_turned * model_.head_dim, values);
    Stored stored[] = {seen(keys), seen(values)};
    attention(pool_, table_, {heads_at(heads_, n_heads), stored, stored + 1, 1, token_.n_rows, token_.sight,
                              model_.scale, attended_});
    add(block.wo, attended_);
  }

  void feed_forward(const Block& block) {
    norm(block.ffn_norm);
    multiply(block.w13, normed_, gates_);
    table_.swiglu({gates_, Type::f32, 1, rows_of(block.w13)}, gated_, 0, 1);
    add(block.w2, gated_);
  }

  // Puts a row of keys or values where the cache has it.
  void keep(const float* rows, const Kept& to) {
    Heads x = heads_at(rows, model_.n_kv_heads);
    if (to.bits) {
      PackedBuffer packed{static_cast<uint32_t*>(to.numbers.data), to.scales.data, to.biases.data,
                          to.scales.type, to.numbers.rows, token_.row, to.group, to.bits};
      table_.append_packed(x, packed, 0, x.heads);
    } else {
      table_.append(x, {to.numbers.data, to.numbers.type, to.numbers.rows, token_.row}, 0, x.heads);
    }
  }

  Stored seen(const Kept& kept) const {
    auto rows = [&](const Buffer& buffer, size_t n) {
      auto step = ptrdiff_t(n), head = ptrdiff_t(buffer.rows) * step;
      return Heads{buffer.data, buffer.type, 1, model_.n_kv_heads, token_.n_rows, n,
                   ptrdiff_t(model_.n_kv_heads) * head, head, step};
    };
    size_t dim = model_.head_dim;
    if (!kept.bits) return {rows(kept.numbers, dim), 0, {}, {}};
    return {rows(kept.numbers, dim * kept.bits / 32), kept.bits, rows(kept.scales, dim / kept.group),
            rows(kept.biases, dim / kept.group)};
  }

  Pool& pool_;
  const Table& table_;
  const Model& model_;
  const Token& token_;
  bool is_coarse_;
  std::unique_ptr<float[]> memory_;
  float *h_, *normed_, *added_, *angles_, *heads_, *attended_, *gates_, *gated_;
};

}  // namespace

void pass_token(Pool& pool, const Table& table, const Model& model, const Token& token, bool is_coarse,
                float* logits) {
  Pass(pool, table, model, token, is_coarse).run(logits);
}

}  // namespace mlk
