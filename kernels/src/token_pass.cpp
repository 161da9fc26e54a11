#include "token_pass.h"

#include <algorithm>
#include <cmath>

#include "in_place.h"
#include "token.h"

namespace mlk::graph {

// A model over the arrays that it holds.
class Weights {
 public:
  Weights(const Packed& embeddings, const std::vector<Layer>& layers, const array& norm,
          const std::vector<Packed>& output, const array& periods, int n_heads, int n_kv_heads, float eps,
          float scale) {
    if (n_heads <= 0 || n_kv_heads <= 0 || n_heads % n_kv_heads) {
      refuse("heads: found ", n_heads, " and ", n_kv_heads, ", expected a multiple");
    }
    if (periods.dtype() != mx::float32 || periods.ndim() != 1 || periods.shape(0) == 0 ||
        2 * size_t(periods.shape(0)) > most_dim) {
      refuse("periods: expected at most ", most_dim / 2, " numbers in float32");
    }
    int head_dim = 2 * periods.shape(0);
    model_.embeddings = {matrix("tok_embeddings", embeddings, 0)};
    dim_ = int(model_.embeddings[0].columns);
    for (const auto& [attention_norm, wqkv, wo, ffn_norm, w13, w2] : layers) {
      Block block{norm_of(attention_norm), side("wqkv", wqkv, dim_, (n_heads + 2 * n_kv_heads) * head_dim),
                  side("wo", wo, n_heads * head_dim, dim_), norm_of(ffn_norm), {}, {}};
      int gates = 0;
      for (const auto& [arrays, group, bits] : w13) gates += arrays.empty() ? 0 : arrays[0].shape(0);
      if (gates == 0 || gates % 2) refuse("w13: ", gates, " rows, expected gates and as many others");
      block.w13 = side("w13", w13, dim_, gates);
      block.w2 = side("w2", w2, gates / 2, dim_);
      if (!model_.blocks.empty() && gates != gates_) refuse("w13: ", gates, " rows, expected ", gates_);
      gates_ = gates;
      model_.blocks.push_back(std::move(block));
    }
    model_.norm = norm_of(norm);
    for (const auto& [arrays, group, bits] : output) n_vocab_ += arrays.empty() ? 0 : arrays[0].shape(0);
    model_.output = side("output", output, dim_, n_vocab_);
    model_.periods = static_cast<const float*>(hold(periods));
    model_.n_heads = n_heads, model_.n_kv_heads = n_kv_heads, model_.head_dim = head_dim;
    model_.eps = eps, model_.scale = scale;
  }

  const Model& model() const { return model_; }
  int n_vocab() const { return n_vocab_; }

 private:
  const void* hold(const array& a) {
    array& held = held_.emplace_back(mx::contiguous(a, false, cpu()));
    held.eval();
    return held.data<char>();
  }

  Norm norm_of(const array& weight) {
    require_float("norm", weight);
    if (weight.ndim() != 1 || weight.shape(0) != dim_) refuse("norm: expected ", dim_, " numbers");
    return {hold(weight), type_of(weight)};
  }

  // columns: 0 where any will do.
  Matrix matrix(const char* name, const Packed& packed, int columns) {
    const auto& [arrays, group, bits] = packed;
    if (arrays.size() != (bits ? 3 : 1)) {
      refuse(name, ": found ", arrays.size(), " arrays, expected ", bits ? 3 : 1);
    }
    const array& a = arrays[0];
    if (a.ndim() != 2 || a.shape(0) == 0 || a.shape(1) == 0) refuse(name, ": expected (out, in)");
    if (!bits) {
      require_float(name, a);
      if (columns && a.shape(1) != columns) refuse(name, ": expected (out, ", columns, ")");
      return {hold(a), type_of(a), size_t(a.shape(0)), size_t(a.shape(1))};
    }
    if (!columns) columns = int(a.shape(1) * int64_t(32) / bits);
    require_packed(columns, a, arrays[1], arrays[2], group, bits);
    return {hold(a), type_of(arrays[1]), size_t(a.shape(0)), size_t(columns), bits, group, hold(arrays[1]),
            hold(arrays[2])};
  }

  // Matrices of one input, with so many rows together.
  Matrices side(const char* name, const std::vector<Packed>& parts, int columns, int rows) {
    Matrices matrices;
    size_t found = 0;
    for (const Packed& part : parts) found += matrices.emplace_back(matrix(name, part, columns)).rows;
    if (parts.empty() || found != size_t(rows)) refuse(name, ": ", found, " rows, expected ", rows);
    return matrices;
  }

  Model model_{};
  int dim_ = 0, gates_ = 0, n_vocab_ = 0;
  std::vector<array> held_;
};

namespace {

// How the buffers of a cache come among the inputs: of each layer keys, then values.
struct Caches {
  Storage keys, values;
  size_t arrays() const { return keys.arrays() + values.arrays(); }
};

Kept kept_of(const Storage& how, std::vector<array>& buffers, size_t at) {
  auto buffer = [&](size_t i) {
    array& a = buffers[at + i];
    return Buffer{a.data<char>(), type_of(a), size_t(a.shape(2)), 0};
  };
  if (!how.bits) return {buffer(0)};
  return {buffer(0), how.bits, how.group, buffer(1), buffer(2)};
}

class PassedToken : public Untransformed<mx::Primitive> {
 public:
  PassedToken(mx::Stream stream, std::shared_ptr<const Weights> weights, const Caches& caches, Token token,
              bool has_sight, bool is_coarse)
      : Untransformed(stream), weights_(std::move(weights)), caches_(caches), token_(token),
        has_sight_(has_sight), is_coarse_(is_coarse) {}
  const char* name() const override { return "MlxLlamaToken"; }

  // inputs: the token, the buffers, perhaps sight, and perhaps what is to be over before. outputs:
  // logits, what says that it is over, and the buffers where they are not written as they are.
  void eval_cpu(const std::vector<array>& inputs, std::vector<array>& outputs) override {
    const size_t n = weights_->model().blocks.size() * caches_.arrays();
    for (size_t i : {0, 1}) outputs[i].set_data(mx::allocator::malloc(outputs[i].nbytes()));
    if (outputs.size() > 2) take_over(stream(), inputs, 1, outputs, n);
    std::vector<array> in, buffers;
    for (const array& a : inputs) in.push_back(array::unsafe_weak_copy(a));
    for (size_t i = 0; i < n; ++i) {
      buffers.push_back(array::unsafe_weak_copy(outputs.size() > 2 ? outputs[2 + i] : inputs[1 + i]));
    }
    auto task = [weights = weights_, caches = caches_, token = token_, has_sight = has_sight_,
                 is_coarse = is_coarse_, in = std::move(in), buffers = std::move(buffers),
                 logits = array::unsafe_weak_copy(outputs[0])]() mutable {
      copy_apart(in, 1, buffers);
      std::vector<Kept> keys, values;
      for (size_t at = 0; at < buffers.size(); at += caches.arrays()) {
        keys.push_back(kept_of(caches.keys, buffers, at));
        values.push_back(kept_of(caches.values, buffers, at + caches.keys.arrays()));
      }
      token.id = *in[0].data<uint32_t>(), token.keys = keys.data(), token.values = values.data();
      const Model& model = weights->model();
      if (token.id >= model.embeddings[0].rows) {
        // An error of this thread would meet whoever waits next.
        std::fill_n(logits.data<float>(), logits.size(), std::nanf(""));
        return;
      }
      std::unique_ptr<Straight> sight;
      if (has_sight) sight = std::make_unique<Straight>(in[1 + buffers.size()]);
      if (has_sight) token.sight = static_cast<const int32_t*>(sight->data());
      pass_token(Pool::shared(), chosen(), model, token, is_coarse, logits.data<float>());
    };
    mx::cpu::get_command_encoder(stream()).dispatch(std::move(task));
  }

  void eval_gpu(const std::vector<array>&, std::vector<array>&) override {
    throw std::runtime_error("these kernels run on a CPU alone");
  }

 private:
  std::shared_ptr<const Weights> weights_;
  Caches caches_;
  Token token_;
  bool has_sight_, is_coarse_;
};

// Adds the buffers of one layer's keys or values to the inputs; returns how they are stored.
Storage take_buffers(const char* name, const Arrays& arrays, const Model& model, int row, int n_rows,
                     std::vector<array>& inputs) {
  auto heads = int(model.n_kv_heads), dim = int(model.head_dim);
  if (arrays.size() != 1 && arrays.size() != 3) {
    refuse(name, ": found ", arrays.size(), " arrays, expected the numbers, or words, scales and biases");
  }
  for (const array& a : arrays) {
    if (a.ndim() != 4 || a.shape(0) != 1 || a.shape(1) != heads || a.shape(2) != arrays[0].shape(2) ||
        row >= a.shape(2) || n_rows > a.shape(2)) {
      refuse(name, ": expected (1, ", heads, ", S, dim), S above row ", row, " and at least ", n_rows);
    }
    inputs.push_back(a);
  }
  if (arrays.size() == 1) {
    require_float(name, arrays[0]);
    if (arrays[0].shape(3) != dim) refuse(name, ": rows of ", arrays[0].shape(3), ", expected ", dim);
    return {0, 0};
  }
  require_float(name, arrays[1]);
  int words = arrays[0].shape(3), groups = arrays[1].shape(3), group = groups ? dim / groups : 0;
  if (arrays[0].dtype() != mx::uint32 || arrays[2].dtype() != arrays[1].dtype()) {
    refuse(name, ": expected words in uint32, scales and biases in one dtype");
  }
  if ((words * 32 != dim * 8 && words * 32 != dim * 4) || arrays[2].shape(3) != groups ||
      group * groups != dim || (group != 32 && group != 64 && group != 128)) {
    refuse(name, ": rows of ", words, " words and ", groups, " scales for ", dim, " numbers");
  }
  return {words * 32 / dim, group};
}

}  // namespace

TokenPass::TokenPass(const Packed& embeddings, const std::vector<Layer>& layers, const array& norm,
                     const std::vector<Packed>& output, const array& periods, int n_heads, int n_kv_heads,
                     float eps, float scale)
    : weights_(std::make_shared<Weights>(embeddings, layers, norm, output, periods, n_heads, n_kv_heads,
                                         eps, scale)) {}

std::tuple<array, array, std::vector<Arrays>, std::vector<Arrays>> TokenPass::operator()(
    const array& token, const std::vector<Arrays>& keys, const std::vector<Arrays>& values, int row,
    int n_rows, int position, const std::optional<array>& sight, const std::optional<array>& after,
    bool is_coarse) const {
  const Model& model = weights_->model();
  if (token.dtype() != mx::uint32 || token.size() != 1) refuse("token: expected (1, 1) uint32");
  if (keys.size() != model.blocks.size() || values.size() != keys.size()) {
    refuse("keys and values: found ", keys.size(), " and ", values.size(), ", expected one for each of ",
           model.blocks.size(), " layers");
  }
  if (row < 0 || n_rows <= 0) refuse("rows: found row ", row, " of ", n_rows);
  std::vector<array> inputs{token};
  Caches caches{};
  for (size_t layer = 0; layer < keys.size(); ++layer) {
    Caches found{take_buffers("keys", keys[layer], model, row, n_rows, inputs),
                 take_buffers("values", values[layer], model, row, n_rows, inputs)};
    if (layer && !(found.keys == caches.keys && found.values == caches.values)) {
      refuse("keys and values: expected layers stored alike");
    }
    caches = found;
  }
  std::vector<mx::Shape> shapes{{1, 1, weights_->n_vocab()}, {}};
  std::vector<mx::Dtype> dtypes{mx::float32, mx::uint32};
  for (size_t i = 1; i < inputs.size() && !after; ++i) {
    shapes.push_back(inputs[i].shape());
    dtypes.push_back(inputs[i].dtype());
  }
  if (sight) {
    if (sight->dtype() != mx::int32 || sight->shape() != mx::Shape{2, n_rows}) {
      refuse("sight: expected (2, ", n_rows, ") int32");
    }
    inputs.push_back(*sight);
  }
  if (after) inputs.push_back(*after);
  Token how{0, position, size_t(row), size_t(n_rows), nullptr, nullptr, nullptr};
  auto outputs = array::make_arrays(
      shapes, dtypes,
      std::make_shared<PassedToken>(cpu(), weights_, caches, how, sight.has_value(), is_coarse), inputs);
  std::vector<Arrays> new_keys, new_values;
  auto next = outputs.begin() + 2;
  for (size_t layer = 0; layer < keys.size() && !after; ++layer) {
    for (auto [stored, into] : {std::pair(caches.keys, &new_keys), {caches.values, &new_values}}) {
      into->emplace_back(next, next + stored.arrays());
      next += stored.arrays();
    }
  }
  return {outputs[0], outputs[1], new_keys, new_values};
}

}  // namespace mlk::graph
