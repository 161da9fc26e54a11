#include "primitives.h"

#include <cstring>
#include <functional>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"
#include "mlx/scheduler.h"
#include "operations.h"

namespace mlk::graph {

namespace {

using mx::array;

constexpr size_t MANY = 8;  // tokens from which the memory of their outputs matters

Type type_of(const array& a) {
  if (a.dtype() == mx::float32) return Type::f32;
  return a.dtype() == mx::bfloat16 ? Type::bf16 : Type::f16;
}

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

void require_float(const char* name, const array& a) {
  if (a.dtype() != mx::float32 && a.dtype() != mx::bfloat16 && a.dtype() != mx::float16) {
    refuse(name, ": found ", a.dtype(), ", expected float32, bfloat16 or float16");
  }
}

// An array's numbers row after row, copied only where they do not stand so.
class Straight {
 public:
  explicit Straight(const array& a) : data_(a.data<char>()) {
    if (a.flags().row_contiguous || a.size() == 0) return;
    size_t each = a.itemsize(), last = a.ndim() - 1;
    copy_.resize(a.size() * each);
    char* to = copy_.data();
    std::vector<int> index(a.ndim(), 0);
    for (size_t row = 0; row < a.size() / a.shape(last); ++row) {
      int64_t from = 0;
      for (size_t d = 0; d < last; ++d) from += index[d] * a.strides(d);
      for (int i = 0; i < a.shape(last); ++i, to += each) {
        std::memcpy(to, data_ + (from + i * a.strides(last)) * int64_t(each), each);
      }
      for (size_t d = last; d-- > 0;) {
        if (++index[d] < a.shape(d)) break;
        index[d] = 0;
      }
    }
    data_ = copy_.data();
  }
  const void* data() const { return data_; }

 private:
  const char* data_;
  std::vector<char> copy_;
};

// Four dimensions with unbroken rows; the numbers are copied where rows are broken.
class Headed {
 public:
  explicit Headed(const array& a) {
    heads_ = {a.data<char>(),      type_of(a),          size_t(a.shape(0)),
              size_t(a.shape(1)),  size_t(a.shape(2)),  size_t(a.shape(3)),
              a.strides(0),        a.strides(1),        a.strides(2)};
    if (a.strides(3) == 1 || a.size() == 0) return;
    copy_ = std::make_unique<Straight>(a);
    heads_.data = copy_->data();
    heads_.stride_row = a.shape(3);
    heads_.stride_head = heads_.stride_row * a.shape(2);
    heads_.stride_batch = heads_.stride_head * a.shape(1);
  }
  const Heads& get() const { return heads_; }

 private:
  Heads heads_;
  std::unique_ptr<Straight> copy_;
};

Rows rows_of(const array& x, const Straight& straight) {
  size_t n = x.shape(-1);
  return {straight.data(), type_of(x), n ? x.size() / n : 0, n};
}

// One output, on the CPU, computed by `run` on the stream's thread.
class OnCpu : public mx::UnaryPrimitive {
 public:
  explicit OnCpu(mx::Stream stream) : UnaryPrimitive(stream) {}

  void eval_cpu(const std::vector<array>& inputs, array& out) override {
    // MLX allocates arrays when they are queued, and gives back what an operation read when the
    // stream has done it. What a prompt's operations need at once would be a matter of which thread
    // is faster; so each waits until all before is done and given back.
    if (tokens(out) >= MANY) mx::synchronize(stream());
    out.set_data(mx::allocator::malloc(out.nbytes()));
    std::vector<array> held;
    for (const array& input : inputs) held.push_back(array::unsafe_weak_copy(input));
    // The lambda must not need this primitive: it may be gone before the stream runs it.
    auto task = [work = work(), held = std::move(held),
                 out = array::unsafe_weak_copy(out)]() mutable { work(held, out); };
    if (!reads_cache()) {
      mx::cpu::get_command_encoder(stream()).dispatch(std::move(task));
      return;
    }
    // A task of its own, which the next waits for: the next token's write would copy a cache that
    // waits to be read.
    while (mx::scheduler::n_active_tasks() > 1) mx::scheduler::wait_for_one();
    mx::scheduler::notify_new_task(stream());
    // Told by a destructor: MLX drops the tasks behind one that failed, and they are over, too.
    std::shared_ptr<void> over(nullptr, [s = stream()](void*) {
      mx::scheduler::notify_task_completion(s);
    });
    mx::scheduler::enqueue(stream(), [over = std::move(over), task = std::move(task)]() mutable { task(); });
  }

  void eval_gpu(const std::vector<array>&, array&) override {
    throw std::runtime_error("these kernels run on a CPU alone");
  }

 protected:
  using Work = std::function<void(const std::vector<array>&, array&)>;
  virtual Work work() const = 0;
  virtual bool reads_cache() const { return false; }
  // How many tokens an output holds.
  virtual size_t tokens(const array& out) const {
    return out.shape(-1) ? out.size() / out.shape(-1) : 0;
  }
};

class QuantizedProduct : public OnCpu {
 public:
  QuantizedProduct(mx::Stream stream, int group, int bits)
      : OnCpu(stream), group_(group), bits_(bits) {}
  const char* name() const override { return "MlxLlamaQuantizedProduct"; }
  bool is_equivalent(const Primitive& other) const override {
    const auto& o = dynamic_cast<const QuantizedProduct&>(other);
    return group_ == o.group_ && bits_ == o.bits_;
  }

 protected:
  Work work() const override {
    return [group = group_, bits = bits_](const std::vector<array>& in, array& out) {
      Straight x(in[0]), words(in[1]), scales(in[2]), biases(in[3]);
      Matrix a{words.data(), type_of(in[2]), size_t(in[1].shape(0)), size_t(in[0].shape(-1)),
               bits,         group,          scales.data(),          biases.data()};
      mlk::matrix_product(Pool::shared(), chosen(), a, rows_of(in[0], x), out.data<char>());
    };
  }

 private:
  int group_, bits_;
};

class Product : public OnCpu {
 public:
  explicit Product(mx::Stream stream) : OnCpu(stream) {}
  const char* name() const override { return "MlxLlamaProduct"; }
  bool is_equivalent(const Primitive&) const override { return true; }

 protected:
  Work work() const override {
    return [](const std::vector<array>& in, array& out) {
      Straight x(in[0]), weight(in[1]);
      Matrix a{weight.data(), type_of(in[1]), size_t(in[1].shape(0)), size_t(in[1].shape(1))};
      mlk::matrix_product(Pool::shared(), chosen(), a, rows_of(in[0], x), out.data<char>());
    };
  }
};

class RmsNorm : public OnCpu {
 public:
  RmsNorm(mx::Stream stream, float eps) : OnCpu(stream), eps_(eps) {}
  const char* name() const override { return "MlxLlamaRmsNorm"; }
  bool is_equivalent(const Primitive& other) const override {
    return eps_ == static_cast<const RmsNorm&>(other).eps_;
  }

 protected:
  Work work() const override {
    return [eps = eps_](const std::vector<array>& in, array& out) {
      Straight x(in[0]), weight(in[1]);
      mlk::rms_norm(Pool::shared(), chosen(), rows_of(in[0], x), weight.data(), type_of(in[1]), eps,
               out.data<char>());
    };
  }

 private:
  float eps_;
};

class SwiGlu : public OnCpu {
 public:
  explicit SwiGlu(mx::Stream stream) : OnCpu(stream) {}
  const char* name() const override { return "MlxLlamaSwiGlu"; }
  bool is_equivalent(const Primitive&) const override { return true; }

 protected:
  Work work() const override {
    return [](const std::vector<array>& in, array& out) {
      Straight x(in[0]);
      mlk::swiglu(Pool::shared(), chosen(), rows_of(in[0], x), out.data<char>());
    };
  }
};

class Rotation : public OnCpu {
 public:
  Rotation(mx::Stream stream, int offset) : OnCpu(stream), offset_(offset) {}
  const char* name() const override { return "MlxLlamaRotation"; }
  size_t tokens(const array& out) const override { return size_t(out.shape(0)) * out.shape(2); }
  bool is_equivalent(const Primitive& other) const override {
    return offset_ == static_cast<const Rotation&>(other).offset_;
  }

 protected:
  Work work() const override {
    return [offset = offset_](const std::vector<array>& in, array& out) {
      Headed x(in[0]);
      Straight periods(in[1]);
      mlk::rotate(Pool::shared(), chosen(), x.get(), static_cast<const float*>(periods.data()), offset,
             out.data<char>());
    };
  }

 private:
  int offset_;
};

// How keys or values stand among a primitive's inputs: one array, or words, scales and biases.
struct Storage {
  int bits, group;
  size_t arrays() const { return bits ? 3 : 1; }
  bool operator==(const Storage&) const = default;
};

// One part's keys or values, from inputs[at] on.
class Rowed {
 public:
  Rowed(const Storage& how, const std::vector<array>& in, size_t at) : numbers_(in[at]) {
    stored_ = {numbers_.get(), how.bits, {}, {}};
    if (!how.bits) return;
    scales_ = std::make_unique<Headed>(in[at + 1]);
    biases_ = std::make_unique<Headed>(in[at + 2]);
    stored_.scales = scales_->get(), stored_.biases = biases_->get();
  }
  const Stored& get() const { return stored_; }

 private:
  Headed numbers_;
  std::unique_ptr<Headed> scales_, biases_;
  Stored stored_;
};

class CacheAttention : public OnCpu {
 public:
  CacheAttention(mx::Stream stream, float scale, Storage keys, Storage values, size_t parts)
      : OnCpu(stream), scale_(scale), keys_(keys), values_(values), parts_(parts) {}
  const char* name() const override { return "MlxLlamaAttention"; }
  bool reads_cache() const override { return true; }
  size_t tokens(const array& out) const override { return size_t(out.shape(0)) * out.shape(1); }
  bool is_equivalent(const Primitive& other) const override {
    const auto& o = static_cast<const CacheAttention&>(other);
    return scale_ == o.scale_ && keys_ == o.keys_ && values_ == o.values_ && parts_ == o.parts_;
  }

 protected:
  Work work() const override {
    return [scale = scale_, k = keys_, v = values_, parts = parts_](const std::vector<array>& in,
                                                                   array& out) {
      Headed q(in[0]);
      std::vector<std::unique_ptr<Rowed>> held;
      std::vector<Stored> keys, values;
      size_t at = 1, rows = 0;
      auto take = [&](const Storage& how, std::vector<Stored>& into) {
        into.push_back(held.emplace_back(std::make_unique<Rowed>(how, in, at))->get());
        at += how.arrays();
      };
      for (size_t part = 0; part < parts; ++part) {
        take(k, keys);
        take(v, values);
        rows += keys.back().numbers.m;
      }
      std::unique_ptr<Straight> sight;
      if (at < in.size()) sight = std::make_unique<Straight>(in[at]);
      mlk::attention(Pool::shared(), chosen(),
                     {q.get(), keys.data(), values.data(), parts, rows,
                      sight ? static_cast<const int32_t*>(sight->data()) : nullptr, scale,
                      out.data<char>()});
    };
  }

 private:
  float scale_;
  Storage keys_, values_;
  size_t parts_;
};

mx::Stream cpu() { return mx::default_stream(mx::Device::cpu); }

}  // namespace

array quantized_matmul(const array& x, const array& weight, const array& scales,
                       const array& biases, int group_size, int bits) {
  require_float("x", x);
  require_float("scales", scales);
  if (weight.dtype() != mx::uint32) refuse("weight: found ", weight.dtype(), ", expected uint32");
  if (biases.dtype() != scales.dtype()) {
    refuse("biases: found ", biases.dtype(), ", expected the scales' ", scales.dtype());
  }
  if (bits < 2 || bits > 8 || bits == 7) {
    refuse("bits: found ", bits, ", expected 2, 3, 4, 5, 6 or 8");
  }
  if (group_size != 32 && group_size != 64 && group_size != 128) {
    refuse("group_size: found ", group_size, ", expected 32, 64 or 128");
  }
  if (x.ndim() < 1 || weight.ndim() != 2) {
    refuse("x and weight: found ", x.ndim(), " and ", weight.ndim(), " dimensions, expected at ",
           "least 1, and 2");
  }
  int columns = x.shape(-1), rows = weight.shape(0);
  if (columns % group_size || columns > 4096 * group_size) {
    refuse("x: rows of ", columns, ", expected a multiple of ", group_size, ", at most 4096 times");
  }
  if (weight.shape(1) != columns * int64_t(bits) / 32) {
    refuse("weight: rows of ", weight.shape(1), " words, expected ", columns * int64_t(bits) / 32);
  }
  mx::Shape groups{rows, columns / group_size};
  if (scales.shape() != groups || biases.shape() != groups) {
    refuse("scales and biases: expected ", rows, " rows of ", columns / group_size);
  }
  mx::Shape shape = x.shape();
  shape.back() = rows;
  if (columns == 0) return mx::zeros(shape, x.dtype(), cpu());
  return array(shape, x.dtype(), std::make_shared<QuantizedProduct>(cpu(), group_size, bits),
               {x, weight, scales, biases});
}

array matmul(const array& x, const array& weight) {
  require_float("x", x);
  require_float("weight", weight);
  if (x.ndim() < 1 || weight.ndim() != 2 || weight.shape(1) != x.shape(-1)) {
    refuse("weight: expected (out, in), and rows of x as long");
  }
  mx::Shape shape = x.shape();
  shape.back() = weight.shape(0);
  if (weight.shape(1) == 0) return mx::zeros(shape, x.dtype(), cpu());
  return array(shape, x.dtype(), std::make_shared<Product>(cpu()), {x, weight});
}

array rms_norm(const array& x, const array& weight, float eps) {
  require_float("x", x);
  require_float("weight", weight);
  if (x.ndim() < 1 || weight.ndim() != 1 || weight.shape(0) != x.shape(-1)) {
    refuse("weight: expected one number for each of a row of x");
  }
  return array(x.shape(), x.dtype(), std::make_shared<RmsNorm>(cpu(), eps), {x, weight});
}

array swiglu(const array& x) {
  require_float("x", x);
  if (x.ndim() < 1 || x.shape(-1) % 2) refuse("x: expected rows of gates and as many others");
  mx::Shape shape = x.shape();
  shape.back() /= 2;
  return array(shape, x.dtype(), std::make_shared<SwiGlu>(cpu()), {x});
}

array rotate(const array& x, const array& periods, int offset) {
  require_float("x", x);
  if (x.ndim() != 4 || x.shape(3) % 2 || x.shape(3) > 1024) {
    refuse("x: expected (batch, heads, rows, dim), dim even and at most 1024");
  }
  if (periods.dtype() != mx::float32 || periods.ndim() != 1 ||
      periods.shape(0) != x.shape(3) / 2) {
    refuse("periods: expected ", x.shape(3) / 2, " numbers in float32");
  }
  return array(x.shape(), x.dtype(), std::make_shared<Rotation>(cpu(), offset), {x, periods});
}

namespace {

// Refuses what is not (batch, heads, rows, dim) as a cache stores it; returns how it is stored.
Storage require_stored(const char* name, const std::vector<array>& arrays, const array& q) {
  if (arrays.size() != 1 && arrays.size() != 3) {
    refuse(name, ": found ", arrays.size(), " arrays, expected the numbers, or words, scales and ",
           "biases");
  }
  for (const array& a : arrays) {
    if (a.ndim() != 4 || q.shape(0) != a.shape(0) || a.shape(1) == 0 || q.shape(1) % a.shape(1)) {
      refuse(name, ": expected (batch, heads, rows, dim), of q's batch size, with heads that divide ",
             "q's");
    }
    if (a.shape(1) != arrays[0].shape(1) || a.shape(2) != arrays[0].shape(2)) {
      refuse(name, ": expected arrays of as many heads and rows");
    }
  }
  int dim = q.shape(3);
  if (arrays.size() == 1) {
    require_float(name, arrays[0]);
    if (arrays[0].shape(3) != dim) refuse(name, ": rows of ", arrays[0].shape(3), ", q's of ", dim);
    return {0, 0};
  }
  require_float(name, arrays[1]);
  int words = arrays[0].shape(3), groups = arrays[1].shape(3);
  if (arrays[0].dtype() != mx::uint32 || arrays[2].dtype() != arrays[1].dtype()) {
    refuse(name, ": expected words in uint32, scales and biases in one dtype");
  }
  if (words * 32 != dim * 8 && words * 32 != dim * 4) {
    refuse(name, ": rows of ", words, " words for ", dim, " numbers, expected 8 or 4 bits each");
  }
  if (groups == 0 || dim % groups || (dim / groups) % 32 || arrays[2].shape(3) != groups) {
    refuse(name, ": ", groups, " scales for rows of ", dim, ", expected groups of a multiple of 32");
  }
  return {words * 32 / dim, dim / groups};
}

}  // namespace

array attention(const array& q, const std::vector<std::vector<array>>& keys,
                const std::vector<std::vector<array>>& values, float scale,
                const std::optional<array>& sight) {
  require_float("q", q);
  if (q.ndim() != 4 || q.shape(3) > 512 || q.shape(3) == 0 || q.shape(1) == 0) {
    refuse("q: expected (batch, heads, rows, dim), with heads, dim up to 512");
  }
  if (keys.empty() || keys.size() != values.size()) {
    refuse("keys and values: found ", keys.size(), " and ", values.size(), " parts, expected as many");
  }
  std::vector<array> inputs{q};
  Storage stored[2];
  int rows = 0;
  for (size_t part = 0; part < keys.size(); ++part) {
    for (auto [which, arrays] : {std::pair(0, &keys[part]), std::pair(1, &values[part])}) {
      Storage found = require_stored(which ? "values" : "keys", *arrays, q);
      if (part && !(found == stored[which])) refuse("keys and values: expected parts stored alike");
      stored[which] = found;
      inputs.insert(inputs.end(), arrays->begin(), arrays->end());
    }
    const array &k = keys[part][0], &v = values[part][0];
    if (k.shape(2) != v.shape(2) || k.shape(1) != v.shape(1) || k.shape(1) != keys[0][0].shape(1)) {
      refuse("keys and values: expected as many rows and heads");
    }
    rows += k.shape(2);
  }
  if (rows == 0 && q.shape(2) > 0) refuse("keys: expected rows to look at, found none");
  if (sight) {
    if (sight->dtype() != mx::int32 || sight->shape() != mx::Shape{2, rows}) {
      refuse("sight: expected (2, ", rows, ") int32");
    }
    inputs.push_back(*sight);
  } else if (q.shape(2) > rows) {
    refuse("q: expected no more rows than keys");
  }
  // Written as the next product reads it, (batch, rows, heads, dim).
  mx::Shape shape{q.shape(0), q.shape(2), q.shape(1), q.shape(3)};
  auto primitive =
      std::make_shared<CacheAttention>(cpu(), scale, stored[0], stored[1], keys.size());
  array out(shape, q.dtype(), primitive, inputs);
  return mx::transpose(out, {0, 2, 1, 3}, cpu());
}

}  // namespace mlk::graph
