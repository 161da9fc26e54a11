// What the primitives share: arrays as plain memory, and running on the CPU's stream.
#pragma once

#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"
#include "mlx/scheduler.h"
#include "operations.h"
#include "primitives.h"
#include "untransformed.h"

namespace mlk::graph {

namespace mx = mlx::core;

using mx::array;

constexpr size_t MANY = 8;  // tokens from which the memory of their outputs matters

inline Type type_of(const array& a) {
  // Words are moved as numbers of their size.
  if (a.dtype() == mx::float32 || a.dtype() == mx::uint32) return Type::f32;
  return a.dtype() == mx::bfloat16 ? Type::bf16 : Type::f16;
}

// Whether packed matrices take activations as whole numbers of 8 bits: where this thread puts products
// into a graph, which keep it.
inline thread_local bool takes_bytes = false;

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

inline void require_float(const char* name, const array& a) {
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

inline Rows rows_of(const array& x, const Straight& straight) {
  size_t n = x.shape(-1);
  return {straight.data(), type_of(x), n ? x.size() / n : 0, n};
}

// One output, on the CPU, computed by `run` on the stream's thread.
class OnCpu : public Untransformed<mx::UnaryPrimitive> {
 public:
  explicit OnCpu(mx::Stream stream) : Untransformed(stream) {}

  void eval_cpu(const std::vector<array>& inputs, array& out) override {
    // MLX allocates arrays when they are queued, and gives back what an operation read when the
    // stream has done it. What a prompt's operations need at once would be a matter of which thread
    // is faster; so each waits until all before is done and given back.
    if (tokens(out) >= MANY) mx::synchronize(stream());
    allocate(inputs, out);
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
    mx::scheduler::enqueue(
        stream(), [over = std::move(over), task = std::move(task)]() mutable { task(); });
  }

  void eval_gpu(const std::vector<array>&, array&) override {
    throw std::runtime_error("these kernels run on a CPU alone");
  }

 protected:
  using Work = std::function<void(const std::vector<array>&, array&)>;
  virtual Work work() const = 0;
  virtual bool reads_cache() const { return false; }
  virtual void allocate(const std::vector<array>&, array& out) const {
    out.set_data(mx::allocator::malloc(out.nbytes()));
  }
  // How many tokens an output holds.
  virtual size_t tokens(const array& out) const {
    return out.shape(-1) ? out.size() / out.shape(-1) : 0;
  }
};

// How a matrix, keys or values stand among a primitive's inputs: one array, or where there are bits
// words, scales and biases.
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

// What attention reads, from inputs[at] on: q, the parts of keys and values, and who sees them.
// heads: of q, its first ones. rows: of each part, its first ones.
struct Cached {
  float scale;
  int heads;
  Storage keys, values;
  std::vector<int> rows;
  bool has_sight;
  bool operator==(const Cached&) const = default;
  size_t arrays() const { return 1 + rows.size() * (keys.arrays() + values.arrays()) + has_sight; }
};

template <class Fn>
void with_attention(const Cached& how, const std::vector<array>& in, Fn f) {
  Headed q(in[0]);
  std::vector<std::unique_ptr<Rowed>> held;
  std::vector<Stored> keys, values;
  size_t at = 1, rows = 0;
  auto take = [&](const Storage& stored, size_t n_rows, std::vector<Stored>& into) {
    into.push_back(held.emplace_back(std::make_unique<Rowed>(stored, in, at))->get());
    into.back().numbers.m = n_rows;
    at += stored.arrays();
  };
  for (size_t n_rows : how.rows) {
    take(how.keys, n_rows, keys);
    take(how.values, n_rows, values);
    rows += n_rows;
  }
  Heads queries = q.get();
  queries.heads = how.heads;
  std::unique_ptr<Straight> sight;
  if (how.has_sight) sight = std::make_unique<Straight>(in[at]);
  f(Attention{queries, keys.data(), values.data(), how.rows.size(), rows,
              sight ? static_cast<const int32_t*>(sight->data()) : nullptr, how.scale, nullptr});
}

// The inputs of attention of q's first heads, refused where they do not fit, and how they stand.
Cached take_cached(const array& q, int heads, const Parts& parts, float scale,
                   const std::optional<array>& sight, std::vector<array>& inputs);

// Refuses a packed matrix that rows of so many columns cannot be multiplied by.
void require_packed(int columns, const array& weight, const array& scales, const array& biases,
                    int group_size, int bits);

inline mx::Stream cpu() { return mx::default_stream(mx::Device::cpu); }

}  // namespace mlk::graph
