#include <algorithm>
#include <limits>

#include "checks.h"
#include "values.h"

namespace mlk {

namespace {

// MLX's own steps, one number at a time.
struct Expected {
  std::vector<int> numbers;
  float scale, bias;

  Expected(const double* x, int group, int bits) {
    float low = std::numeric_limits<float>::infinity(), high = -low, most = float((1 << bits) - 1);
    for (int k = 0; k < group; ++k) {
      high = std::max(high, float(x[k])), low = std::min(low, float(x[k]));
    }
    bool is_low = std::abs(low) > std::abs(high);
    scale = std::max((high - low) / most, 1e-7f);
    scale = is_low ? scale : -scale;
    float edge = is_low ? low : high, steps = std::rint(edge / scale);
    bias = 0;
    if (steps != 0) scale = edge / steps, bias = edge;
    for (int k = 0; k < group; ++k) {
      float number = std::rint((float(x[k]) - bias) / scale);
      numbers.push_back(std::isnan(number) ? 0 : int(std::min(std::max(number, 0.0f), most)));
    }
  }
};

bool same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

// Groups of normal numbers, some of them of one value, of zeros, denormal, or with what is no number.
std::vector<float> draw(size_t groups, int group) {
  std::vector<float> x = normals(groups * group);
  const float odd[] = {std::nanf(""), HUGE_VALF, -HUGE_VALF, 0.0f, -0.0f, 3e38f, -3e38f, 1e-40f};
  for (size_t g = 0; g < groups; ++g) {
    float* own = &x[g * group];
    float factor = between(0, 3) ? 1.0f : std::exp(normal() * 20), shift = between(0, 3) ? 0 : 9;
    for (int k = 0; k < group; ++k) own[k] = own[k] * factor + shift;
    if (!between(0, 5)) std::fill(own, own + group, own[0]);
    if (!between(0, 9)) std::fill(own, own + group, odd[between(0, 7)]);
    if (!between(0, 5)) own[between(0, group - 1)] = odd[between(0, 7)];
  }
  return x;
}

// As the type holds it: to nearest, ties to even.
float kept(Type type, float value) {
  if (type == Type::f32 || std::isnan(value)) return value;
  if (type == Type::f16) return float(f16(value));
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
  std::memcpy(&value, &bits, 4);
  return value;
}

}  // namespace

void check_packing(Pool& pool, const Table& table) {
  const int widths[] = {2, 3, 4, 5, 6, 8};
  int bits = widths[between(0, 5)], group = 32 << between(0, 2);
  size_t groups = between(1, 700);
  Type type = any_type();
  Values x(type, draw(groups, group));
  std::vector<uint32_t> words(groups * group / 32 * bits);
  std::vector<char> scales(groups * size_of(type)), biases(scales), back(x.bytes.size());
  quantize(pool, table, {x.bytes.data(), type, groups, group, bits},
           {words.data(), scales.data(), biases.data()});
  Matrix a{words.data(), type, groups, size_t(group), bits, group};
  a.scales = scales.data(), a.biases = biases.data();
  dequantize(pool, table, a, back.data());
  for (size_t i = 0; i < groups; ++i) {
    Expected expected(&x.exact[i * group], group, bits);
    float scale = kept(type, expected.scale), bias = kept(type, expected.bias);
    require(same(read(type, scales, i), scale), 1, 0, "scales");
    require(same(read(type, biases, i), bias), 1, 0, "biases");
    for (int k = 0; k < group; ++k) {
      size_t bit = (i * group + k) * bits;
      uint64_t both = words[bit / 32];
      if (bit / 32 + 1 < words.size()) both |= uint64_t(words[bit / 32 + 1]) << 32;
      int found = int(both >> bit % 32 & ((1u << bits) - 1));
      require(found, expected.numbers[k], 0, "packed numbers");
      volatile float product =  // not joined with the sum
          kept(type, scale * float(found));
      require(same(read(type, back, i * group + k), kept(type, product + bias)), 1, 0,
              "unpacked numbers");
    }
  }
}

}  // namespace mlk
