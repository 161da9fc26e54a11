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
    out.set_data(mx::allocator::malloc(out.nbytes()));
    std::vector<array> held;
    for (const array& input : inputs) held.push_back(array::unsafe_weak_copy(input));
    // The lambda must not need this primitive: it may be gone before the stream runs it.
    auto task = [work = work(), held = std::move(held),
                 out = array::unsafe_weak_copy(out)]() mutable { work(held, out); };
    if (tokens(out) < MANY && !reads_cache()) {
      mx::cpu::get_command_encoder(stream()).dispatch(std::move(task));
      return;
    }
    // Arrays are allocated when they are queued, and MLX lets ten tasks of ten dispatches wait: ten
    // layers of a prompt. So each of a prompt's is a task of its own, and waits for those before.
    // Attention does always: the next token's write would copy a cache that waits to be read.
    while (mx::scheduler::n_active_tasks() > 1) mx::scheduler::wait_for_one();
    mx::scheduler::notify_new_task(stream());
    mx::scheduler::enqueue(stream(), std::move(task));
    mx::scheduler::enqueue(stream(), [s = stream()] { mx::scheduler::notify_task_completion(s); });
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
      Affine a{static_cast<const uint32_t*>(words.data()),
               scales.data(),
               biases.data(),
               type_of(in[2]),
               size_t(in[1].shape(0)),
               size_t(in[0].shape(-1)),
               group,
               bits};
      mlk::affine_product(Pool::shared(), chosen(), a, rows_of(in[0], x), out.data<char>());
    };
  }

 private:
  int group_, bits_;
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

class CausalAttention : public OnCpu {
 public:
  CausalAttention(mx::Stream stream, float scale) : OnCpu(stream), scale_(scale) {}
  const char* name() const override { return "MlxLlamaAttention"; }
  bool reads_cache() const override { return true; }
  size_t tokens(const array& out) const override { return size_t(out.shape(0)) * out.shape(1); }
  bool is_equivalent(const Primitive& other) const override {
    return scale_ == static_cast<const CausalAttention&>(other).scale_;
  }

 protected:
  Work work() const override {
    return [scale = scale_](const std::vector<array>& in, array& out) {
      Headed q(in[0]), k(in[1]), v(in[2]);
      mlk::attention(Pool::shared(), chosen(), {q.get(), k.get(), v.get(), scale, out.data<char>()});
    };
  }

 private:
  float scale_;
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
  if (bits != 2 && bits != 4 && bits != 8) refuse("bits: found ", bits, ", expected 2, 4 or 8");
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

array attention(const array& q, const array& keys, const array& values, float scale) {
  for (const array& a : {q, keys, values}) {
    require_float("q, keys and values", a);
    if (a.ndim() != 4) refuse("q, keys and values: expected (batch, heads, rows, dim)");
  }
  if (keys.shape() != values.shape() || q.shape(0) != keys.shape(0) ||
      q.shape(3) != keys.shape(3) || q.shape(3) > 512 || q.shape(3) == 0) {
    refuse("q, keys and values: expected one batch size, one dim up to 512, keys like values");
  }
  if (keys.shape(1) == 0 || q.shape(1) % keys.shape(1) || q.shape(2) > keys.shape(2)) {
    refuse("q: expected a multiple of the keys' heads, and no more rows than keys");
  }
  // Written as the next product reads it, (batch, rows, heads, dim).
  mx::Shape shape{q.shape(0), q.shape(2), q.shape(1), q.shape(3)};
  array out(shape, q.dtype(), std::make_shared<CausalAttention>(cpu(), scale), {q, keys, values});
  return mx::transpose(out, {0, 2, 1, 3}, cpu());
}

}  // namespace mlk::graph
