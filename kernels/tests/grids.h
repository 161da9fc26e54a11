// Groups of numbers as they are packed: grids one number at a time, and reading what was packed.
#pragma once

#include <algorithm>

#include "values.h"

namespace mlk {

// A product that no sum is joined to: compilers may do that.
inline float apart(float product) {
  volatile float rounded = product;
  return rounded;
}

// As the type holds it: to nearest, ties to even.
inline float kept(Type type, float value) {
  if (type == Type::f32 || std::isnan(value)) return value;
  if (type == Type::f16) return float(f16(value));
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline bool same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

// Scale and bias of a group, and the number that is nearest to another.
struct Steps {
  float scale, bias;

  // MLX's own, from a group's least and largest number: the end of larger magnitude is met, and so is 0.
  static Steps met(float low, float high, float most) {
    bool is_low = std::abs(low) > std::abs(high);
    float scale = std::max((high - low) / most, 1e-7f);
    scale = is_low ? scale : -scale;
    float edge = is_low ? low : high, steps = std::rint(edge / scale);
    return steps == 0 ? Steps{scale, 0} : Steps{edge / steps, edge};
  }
  Steps kept_in(Type type) const { return {kept(type, scale), kept(type, bias)}; }
};

// The i-th of numbers of so many bits.
inline int number_at(const std::vector<uint32_t>& words, size_t i, int bits) {
  size_t bit = i * bits;
  uint64_t both = words[bit / 32];
  if (bit / 32 + 1 < words.size()) both |= uint64_t(words[bit / 32 + 1]) << 32;
  return int(both >> bit % 32 & ((1u << bits) - 1));
}

}  // namespace mlk
