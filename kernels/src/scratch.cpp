// What operations of given sizes hold beside MLX's arrays, in bytes.
#include <algorithm>

#include "on_cpu.h"
#include "primitives.h"

namespace mlk::graph {

namespace {

Type type_of(mx::Dtype dtype) {
  if (dtype == mx::float32) return Type::f32;
  return dtype == mx::bfloat16 ? Type::bf16 : Type::f16;
}

ScratchBytes in_bytes(const Scratch& floats) {
  return {floats.common * sizeof(float), floats.each * sizeof(float)};
}

}  // namespace

ScratchBytes product_scratch(size_t rows, size_t columns, size_t tokens, mx::Dtype dtype, int group_size,
                             int bits) {
  Matrix a{nullptr, Type::f32, rows, columns, bits, group_size};
  return in_bytes(mlk::product_scratch(chosen(), a, {nullptr, type_of(dtype), tokens, columns}));
}

ScratchBytes attention_scratch(size_t heads, size_t kv_heads, size_t head_dim, size_t tokens, size_t rows) {
  Heads q{nullptr, Type::f32, 1, heads, tokens, head_dim, 0, 0, 0};
  Stored stored{{nullptr, Type::f32, 1, kv_heads, rows, head_dim, 0, 0, 0}, 0, {}, {}};
  Scratch found = mlk::attention_scratch(chosen(), {q, &stored, &stored, 1, rows, nullptr, 1, nullptr});
  found.common = std::max(found.common, rotation_scratch(q).common);
  return in_bytes(found);
}

size_t scratch_bytes() { return Pool::shared().held() * sizeof(float); }

}  // namespace mlk::graph
