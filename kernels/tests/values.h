// Random numbers of each type, what they are exactly, and comparing with that.
//
// Bounds: an error is measured against the sum of the magnitudes that were added, as rounding is.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "mlx_llama_kernels/table.h"

namespace mlk {

constexpr double EPSILON = 1.0 / (1 << 24);
inline std::mt19937 random_bits(20);
inline long checks = 0;

inline int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_bits); }
inline float normal() { return std::normal_distribution<float>()(random_bits); }
inline std::vector<float> normals(size_t n) {
  std::vector<float> values(n);
  for (float& v : values) v = normal();
  return values;
}

inline void require(double found, double expected, double bound, const char* what) {
  ++checks;
  if (std::abs(found - expected) <= bound) return;
  std::fprintf(stderr, "%s: found %.9g, expected %.9g within %.3g\n", what, found, expected, bound);
  std::exit(1);
}

// Numbers of a type, and what they are exactly.
struct Values {
  Type type;
  std::vector<char> bytes;
  std::vector<double> exact;

  Values(Type type, const std::vector<float>& from) : type(type), bytes(from.size() * size_of(type)) {
    for (size_t i = 0; i < from.size(); ++i) {
      float value = from[i];
      if (type == Type::f32) std::memcpy(&bytes[i * 4], &value, 4);
      if (type == Type::f16) {
        f16 half = f16(value);
        std::memcpy(&bytes[i * 2], &half, 2);
        value = float(half);
      }
      if (type == Type::bf16) {
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        bits &= 0xffff0000;
        uint16_t high = bits >> 16;
        std::memcpy(&bytes[i * 2], &high, 2);
        std::memcpy(&value, &bits, 4);
      }
      exact.push_back(value);
    }
  }
};

inline double read(Type type, const std::vector<char>& bytes, size_t i) {
  if (type == Type::f32) return reinterpret_cast<const float*>(bytes.data())[i];
  if (type == Type::f16) return float(reinterpret_cast<const f16*>(bytes.data())[i]);
  uint32_t bits = uint32_t(reinterpret_cast<const uint16_t*>(bytes.data())[i]) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// What writing a number in a type may change.
inline double rounding(Type type, double value) {
  double step = type == Type::f32 ? EPSILON : type == Type::f16 ? 1.0 / (1 << 11) : 1.0 / (1 << 8);
  return step * std::abs(value) + (type == Type::f16 ? 6e-8 : 1e-37);
}

inline Type any_type() { return Type(between(0, 2)); }

}  // namespace mlk
