#include "on_cpu.h"
#include "primitives.h"
#include "sampling.h"

namespace mlk::graph {

namespace {

class Weights {
 public:
  Weights(const Storage& how, const std::vector<array>& in, size_t at) : words_(in[at]) {
    size_t rows = in[at].shape(0), stored = in[at].shape(1);
    if (!how.bits) {
      matrix_ = {words_.data(), type_of(in[at]), rows, stored};
      return;
    }
    scales_ = std::make_unique<Straight>(in[at + 1]);
    biases_ = std::make_unique<Straight>(in[at + 2]);
    matrix_ = {words_.data(), type_of(in[at + 1]), rows,           stored * 32 / how.bits,
               how.bits,      how.group,           scales_->data(), biases_->data(),
               takes_bytes};
  }
  const Matrix& get() const { return matrix_; }

 private:
  Straight words_;
  std::unique_ptr<Straight> scales_, biases_;
  Matrix matrix_;
};

// h and the norm's weight, a primitive's first two inputs.
struct Normed {
  Straight h, weight;
  Rows rows;
  Norm norm;
  Normed(const std::vector<array>& in, float eps)
      : h(in[0]), weight(in[1]), rows(rows_of(in[0], h)), norm{weight.data(), type_of(in[1]), eps} {}
};

class TurnedHeads : public OnCpu {
 public:
  TurnedHeads(mx::Stream stream, float eps, Storage wqkv, int offset, int n_turned)
      : OnCpu(stream), eps_(eps), wqkv_(wqkv), offset_(offset), n_turned_(n_turned) {}
  const char* name() const override { return "MlxLlamaTurnedHeads"; }
  size_t tokens(const array&) const override { return 1; }
  bool is_equivalent(const Primitive& other) const override {
    const auto& o = static_cast<const TurnedHeads&>(other);
    return eps_ == o.eps_ && wqkv_ == o.wqkv_ && offset_ == o.offset_ && n_turned_ == o.n_turned_;
  }

 protected:
  Work work() const override {
    return [eps = eps_, wqkv = wqkv_, offset = offset_, turned = n_turned_](
               const std::vector<array>& in, array& out) {
      Normed h(in, eps);
      Straight periods(in[2]);
      Weights weights(wqkv, in, 3);
      float* y = out.data<float>();
      normed_product(Pool::shared(), chosen(), h.rows, h.norm, weights.get(), y);
      size_t dim = out.shape(3), heads = turned;
      // A head is read as a whole before it is written.
      mlk::rotate(Pool::shared(), chosen(),
                  {y, Type::f32, 1, heads, 1, dim, ptrdiff_t(heads * dim), ptrdiff_t(dim), ptrdiff_t(dim)},
                  static_cast<const float*>(periods.data()), offset, y);
    };
  }

 private:
  float eps_;
  Storage wqkv_;
  int offset_, n_turned_;
};

class Attended : public OnCpu {
 public:
  Attended(mx::Stream stream, const Cached& cached, Storage wo)
      : OnCpu(stream), cached_(cached), wo_(wo) {}
  const char* name() const override { return "MlxLlamaAttended"; }
  bool reads_cache() const override { return true; }
  bool is_equivalent(const Primitive& other) const override {
    const auto& o = static_cast<const Attended&>(other);
    return cached_ == o.cached_ && wo_ == o.wo_;
  }

 protected:
  Work work() const override {
    return [cached = cached_, wo = wo_](const std::vector<array>& in, array& out) {
      size_t at = cached.arrays();
      Straight h(in[at]);
      Weights weights(wo, in, at + 1);
      with_attention(cached, in, [&](const Attention& a) {
        attended_product(Pool::shared(), chosen(), a, weights.get(),
                         static_cast<const float*>(h.data()), out.data<float>());
      });
    };
  }

 private:
  Cached cached_;
  Storage wo_;
};

class FeedForward : public OnCpu {
 public:
  FeedForward(mx::Stream stream, float eps, Storage packing)
      : OnCpu(stream), eps_(eps), packing_(packing) {}
  const char* name() const override { return "MlxLlamaFeedForward"; }
  bool is_equivalent(const Primitive& other) const override {
    const auto& o = static_cast<const FeedForward&>(other);
    return eps_ == o.eps_ && packing_ == o.packing_;
  }

 protected:
  Work work() const override {
    return [eps = eps_, packing = packing_](const std::vector<array>& in, array& out) {
      Normed h(in, eps);
      Weights w13(packing, in, 2), w2(packing, in, 2 + packing.arrays());
      mlk::feed_forward(Pool::shared(), chosen(), h.rows, h.norm, w13.get(), w2.get(),
                        out.data<float>());
    };
  }

 private:
  float eps_;
  Storage packing_;
};

class Likeliest : public OnCpu {
 public:
  Likeliest(mx::Stream stream, const Choice& choice) : OnCpu(stream), choice_(choice) {}
  const char* name() const override { return "MlxLlamaLikeliest"; }
  bool is_equivalent(const Primitive& other) const override {
    const Choice &a = choice_, &b = static_cast<const Likeliest&>(other).choice_;
    return a.top_k == b.top_k && a.top_p == b.top_p && a.min_p == b.min_p;
  }

 protected:
  Work work() const override {
    return [choice = choice_](const std::vector<array>& in, array& out) {
      Straight scores(in[0]);
      mlk::keep_likeliest(static_cast<const float*>(scores.data()), in[0].size(), choice,
                          out.data<float>());
    };
  }

 private:
  Choice choice_;
};

// Refuses what is not one token's row, (1, 1, dim) float32; returns dim.
int require_row(const array& h) {
  if (h.dtype() != mx::float32 || h.ndim() != 3 || h.shape(0) != 1 || h.shape(1) != 1 ||
      h.shape(2) == 0) {
    refuse("h: expected (1, 1, dim) float32, dim above 0");
  }
  return h.shape(2);
}

void require_norm(const array& h, const array& norm) {
  require_float("norm", norm);
  if (norm.ndim() != 1 || norm.shape(0) != h.shape(-1)) {
    refuse("norm: expected one number for each of a row of h");
  }
}

// Adds a matrix, which must fit rows of so many columns, to the inputs; returns its rows.
int take_matrix(const Arrays& matrix, int columns, const Storage& packing, std::vector<array>& in) {
  if (matrix.size() != packing.arrays()) {
    refuse("matrix: found ", matrix.size(), " arrays, expected ", packing.arrays());
  }
  if (packing.bits) {
    require_packed(columns, matrix[0], matrix[1], matrix[2], packing.group, packing.bits);
  } else {
    require_float("weight", matrix[0]);
    if (matrix[0].ndim() != 2 || matrix[0].shape(1) != columns) {
      refuse("weight: expected (out, ", columns, ")");
    }
  }
  in.insert(in.end(), matrix.begin(), matrix.end());
  return matrix[0].shape(0);
}

}  // namespace

array turned_heads(const array& h, const array& norm, float eps, const Arrays& wqkv, int group_size,
                   int bits, const array& periods, int offset, int n_turned) {
  int dim = require_row(h);
  require_norm(h, norm);
  if (periods.dtype() != mx::float32 || periods.ndim() != 1 || periods.shape(0) == 0 ||
      2 * size_t(periods.shape(0)) > most_dim) {
    refuse("periods: expected at most ", most_dim / 2, " numbers in float32");
  }
  Storage packing{bits, group_size};
  std::vector<array> inputs{h, norm, periods};
  int rows = take_matrix(wqkv, dim, packing, inputs), head_dim = 2 * periods.shape(0);
  if (rows % head_dim || n_turned < 0 || n_turned > rows / head_dim) {
    refuse("wqkv: ", rows, " rows, expected heads of ", head_dim, ", at least n_turned of them");
  }
  return array({1, rows / head_dim, 1, head_dim}, mx::float32,
               std::make_shared<TurnedHeads>(cpu(), eps, packing, offset, n_turned), inputs);
}

array attended(const array& h, const array& q, int heads, const std::vector<Arrays>& keys,
               const std::vector<Arrays>& values, const std::vector<int>& rows, float scale,
               const std::optional<array>& sight, const Arrays& wo, int group_size, int bits) {
  int dim = require_row(h);
  if (q.dtype() != mx::float32 || q.ndim() != 4 || q.shape(0) != 1 || q.shape(2) != 1) {
    refuse("q: expected (1, heads, 1, head_dim) float32");
  }
  Storage packing{bits, group_size};
  std::vector<array> inputs;
  Cached cached = take_cached(q, heads, {keys, values, rows}, scale, sight, inputs);
  inputs.push_back(h);
  int n_rows = take_matrix(wo, heads * q.shape(3), packing, inputs);
  if (n_rows != dim) refuse("wo: ", n_rows, " rows, expected ", dim, " as h is long");
  return array(h.shape(), mx::float32, std::make_shared<Attended>(cpu(), cached, packing), inputs);
}

array feed_forward(const array& h, const array& norm, float eps, const Arrays& w13, const Arrays& w2,
                   int group_size, int bits) {
  int dim = require_row(h);
  require_norm(h, norm);
  Storage packing{bits, group_size};
  std::vector<array> inputs{h, norm};
  int gates = take_matrix(w13, dim, packing, inputs);
  if (gates == 0 || gates % 2) refuse("w13: ", gates, " rows, expected gates and as many others");
  int rows = take_matrix(w2, gates / 2, packing, inputs);
  if (rows != dim) refuse("w2: ", rows, " rows, expected ", dim, " as h is long");
  return array(h.shape(), mx::float32, std::make_shared<FeedForward>(cpu(), eps, packing), inputs);
}

array keep_likeliest(const array& scores, int top_k, double top_p, double min_p) {
  if (scores.dtype() != mx::float32 || scores.ndim() != 1) refuse("scores: expected (V,) float32");
  Choice choice{size_t(std::max(0, top_k)), top_p, min_p};
  return array(scores.shape(), mx::float32, std::make_shared<Likeliest>(cpu(), choice), {scores});
}

}  // namespace mlk::graph
