// Packing of weights, and of a cache's new rows; and unpacking.
#include "in_place.h"
#include "primitives.h"

namespace mlk::graph {

namespace {

void require_groups(const char* name, const array& x, int64_t columns, int group_size, int bits) {
  if (x.ndim() < 1) refuse(name, ": found 0 dimensions, expected at least 1");
  if (bits < 2 || bits > 8 || bits == 7) refuse("bits: found ", bits, ", expected 2, 3, 4, 5, 6 or 8");
  if (group_size != 32 && group_size != 64 && group_size != 128) {
    refuse("group_size: found ", group_size, ", expected 32, 64 or 128");
  }
  if (columns % group_size) {
    refuse(name, ": found rows of ", columns, ", expected groups of ", group_size);
  }
}

mx::Shape with_last(mx::Shape shape, int64_t last) {
  shape.back() = int(last);
  return shape;
}

// The shapes of words, and of scales and biases; refuses what is no rows of groups.
std::vector<mx::Shape> packed_shapes(const array& x, int group_size, int bits) {
  require_float("values", x);
  require_groups("values", x, x.ndim() ? x.shape(-1) : 0, group_size, bits);
  mx::Shape groups = with_last(x.shape(), x.shape(-1) / group_size);
  return {with_last(x.shape(), x.shape(-1) * int64_t(bits) / 32), groups, groups};
}

Groups groups_of(const array& x, const Straight& straight, int group_size, int bits) {
  return {straight.data(), type_of(x), x.size() / group_size, group_size, bits};
}

PackedGroups packed_groups(std::vector<array>& to) {
  return {to[0].data<uint32_t>(), to[1].data<void>(), to[2].data<void>()};
}

// What makes words, scales and biases: three outputs, so not one of OnCpu's.
class ToPacked : public Untransformed<mx::Primitive> {
 public:
  ToPacked(mx::Stream stream, int group, int bits) : Untransformed(stream), group_(group), bits_(bits) {}
  bool is_equivalent(const Primitive& other) const override {
    const auto& o = dynamic_cast<const ToPacked&>(other);
    return group_ == o.group_ && bits_ == o.bits_;
  }
  void eval_gpu(const std::vector<array>&, std::vector<array>&) override {
    throw std::runtime_error("these kernels run on a CPU alone");
  }

 protected:
  int group_, bits_;
};

class Packing : public ToPacked {
 public:
  using ToPacked::ToPacked;
  const char* name() const override { return "MlxLlamaQuantize"; }

  void eval_cpu(const std::vector<array>& inputs, std::vector<array>& outputs) override {
    std::vector<array> to;
    for (array& out : outputs) {
      out.set_data(mx::allocator::malloc(out.nbytes()));
      to.push_back(array::unsafe_weak_copy(out));
    }
    auto task = [group = group_, bits = bits_, in = array::unsafe_weak_copy(inputs[0]),
                 to = std::move(to)]() mutable {
      Straight straight(in);
      mlk::quantize(Pool::shared(), chosen(), groups_of(in, straight, group, bits), packed_groups(to));
    };
    mx::cpu::get_command_encoder(stream()).dispatch(std::move(task));
  }
};

// Words, scales and biases of a cache's buffer, each written in place where nobody else holds it.
class PackedAppend : public ToPacked {
 public:
  PackedAppend(mx::Stream stream, int row, int group, int bits)
      : ToPacked(stream, group, bits), row_(row) {}
  const char* name() const override { return "MlxLlamaAppendPacked"; }
  bool is_equivalent(const Primitive& other) const override {
    return ToPacked::is_equivalent(other) && row_ == dynamic_cast<const PackedAppend&>(other).row_;
  }

  void eval_cpu(const std::vector<array>& inputs, std::vector<array>& outputs) override {
    take_over(stream(), inputs, 0, outputs, outputs.size());
    std::vector<array> in, to;
    for (const array& out : outputs) to.push_back(array::unsafe_weak_copy(out));
    for (const array& input : inputs) in.push_back(array::unsafe_weak_copy(input));
    auto task = [row = size_t(row_), group = group_, bits = bits_, in = std::move(in),
                 to = std::move(to)]() mutable {
      copy_apart(in, 0, to);
      Headed x(in.back());
      mlk::append_packed(Pool::shared(), chosen(), x.get(),
                         {to[0].data<uint32_t>(), to[1].data<void>(), to[2].data<void>(), type_of(to[1]),
                          size_t(to[0].shape(2)), row, group, bits});
    };
    mx::cpu::get_command_encoder(stream()).dispatch(std::move(task));
  }

 private:
  int row_;
};

class Unpacking : public OnCpu {
 public:
  Unpacking(mx::Stream stream, int group, int bits) : OnCpu(stream), group_(group), bits_(bits) {}
  const char* name() const override { return "MlxLlamaDequantize"; }
  bool is_equivalent(const Primitive& other) const override {
    const auto& o = dynamic_cast<const Unpacking&>(other);
    return group_ == o.group_ && bits_ == o.bits_;
  }

 protected:
  Work work() const override {
    return [group = group_, bits = bits_](const std::vector<array>& in, array& out) {
      if (out.size() == 0) return;
      Straight words(in[0]), scales(in[1]), biases(in[2]);
      size_t columns = out.shape(-1);
      Matrix a{words.data(), type_of(out), out.size() / columns, columns, bits, group};
      a.scales = scales.data(), a.biases = biases.data();
      mlk::dequantize(Pool::shared(), chosen(), a, out.data<char>());
    };
  }

 private:
  int group_, bits_;
};

}  // namespace

std::vector<array> quantize(const array& x, int group_size, int bits) {
  return array::make_arrays(packed_shapes(x, group_size, bits), {mx::uint32, x.dtype(), x.dtype()},
                            std::make_shared<Packing>(cpu(), group_size, bits), {x});
}

std::vector<array> append_packed(const std::vector<array>& buffers, const array& x, int row, int group_size,
                                 int bits) {
  if (x.ndim() != 4) refuse("x: expected (batch, heads, rows, dim)");
  if (bits != 8 && bits != 4) refuse("bits: found ", bits, ", expected 8 or 4");
  std::vector<mx::Shape> shapes = packed_shapes(x, group_size, bits);
  if (buffers.size() != 3) refuse("buffers: found ", buffers.size(), ", expected words, scales and biases");
  require_float("scales", buffers[1]);
  if (buffers[0].dtype() != mx::uint32 || buffers[2].dtype() != buffers[1].dtype()) {
    refuse("buffers: expected words in uint32, scales and biases in one dtype");
  }
  std::vector<mx::Dtype> dtypes;
  for (size_t i = 0; i < 3; ++i) {
    mx::Shape& shape = shapes[i];
    if (buffers[i].ndim() == 4) shape[2] = buffers[0].shape(2);
    if (buffers[i].shape() != shape) {
      refuse("buffers: expected (batch, heads, rows, dim * bits / 32 or dim / group_size), all but the rows as x's");
    }
    dtypes.push_back(buffers[i].dtype());
  }
  if (row < 0 || x.shape(2) > shapes[0][2] - row) {
    refuse("x: ", x.shape(2), " rows from ", row, " on, in a buffer of ", shapes[0][2]);
  }
  if (x.size() == 0) return buffers;
  std::vector<array> inputs(buffers);
  inputs.push_back(x);
  return array::make_arrays(std::move(shapes), dtypes,
                            std::make_shared<PackedAppend>(cpu(), row, group_size, bits), inputs);
}

array dequantize(const array& weight, const array& scales, const array& biases, int group_size,
                 int bits) {
  require_float("scales", scales);
  if (weight.dtype() != mx::uint32) refuse("weight: found ", weight.dtype(), ", expected uint32");
  if (biases.dtype() != scales.dtype()) {
    refuse("biases: found ", biases.dtype(), ", expected the scales' ", scales.dtype());
  }
  int64_t columns = weight.ndim() && bits > 0 ? weight.shape(-1) * int64_t(32) / bits : 0;
  require_groups("weight", weight, columns, group_size, bits);
  mx::Shape groups = with_last(weight.shape(), columns / group_size);
  if (columns * bits != weight.shape(-1) * int64_t(32) || scales.shape() != groups ||
      biases.shape() != groups) {
    refuse("scales and biases: expected one for each ", group_size, " numbers of the weight's rows");
  }
  return array(with_last(weight.shape(), columns), scales.dtype(),
               std::make_shared<Unpacking>(cpu(), group_size, bits), {weight, scales, biases});
}

// At once: what quantizes has threads of its own.
std::vector<array> least_squares(array values, int group_size, int bits, float cut, int rounds) {
  auto shapes = packed_shapes(values, group_size, bits);
  if (!(cut >= 0) || rounds < 0) refuse("cut and rounds: found ", cut, " and ", rounds, ", expected 0 or more");
  values.eval();
  std::vector<array> made;
  for (size_t i = 0; i < 3; ++i) {
    mx::Dtype dtype = i ? values.dtype() : mx::uint32;
    size_t n = 1;
    for (int size : shapes[i]) n *= size;
    made.emplace_back(mx::allocator::malloc(n * mx::size_of(dtype)), shapes[i], dtype);
  }
  Straight straight(values);
  chosen().least_squares(groups_of(values, straight, group_size, bits), {cut, rounds},
                         packed_groups(made));
  return made;
}

}  // namespace mlk::graph
