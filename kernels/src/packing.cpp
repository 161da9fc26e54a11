// Packing of weights, at once: what quantizes has threads of its own.
#include "on_cpu.h"
#include "primitives.h"

namespace mlk::graph {

std::vector<array> least_squares(array values, int group_size, int bits, float cut, int rounds) {
  require_float("values", values);
  if (values.ndim() != 2 || (group_size != 32 && group_size != 64 && group_size != 128) ||
      values.shape(1) % group_size != 0) {
    refuse("values: found ", values.shape(), ", expected two dimensions, rows of groups of ",
           group_size, ", which is 32, 64 or 128");
  }
  if (bits < 2 || bits > 8 || bits == 7) refuse("bits: found ", bits, ", expected 2, 3, 4, 5, 6 or 8");
  values.eval();
  auto made = [&](int columns, mx::Dtype dtype) {
    mx::Shape shape{values.shape(0), columns};
    size_t nbytes = size_t(values.shape(0)) * columns * mx::size_of(dtype);
    return array(mx::allocator::malloc(nbytes), shape, dtype);
  };
  int groups = values.shape(1) / group_size;
  array words = made(groups * (group_size * bits / 32), mx::uint32);
  array scales = made(groups, values.dtype()), biases = made(groups, values.dtype());
  Straight straight(values);
  chosen().least_squares(
      {straight.data(), type_of(values), size_t(values.shape(0)) * groups, group_size, bits},
      {cut, rounds}, {words.data<uint32_t>(), scales.data<void>(), biases.data<void>()});
  return {words, scales, biases};
}

}  // namespace mlk::graph
