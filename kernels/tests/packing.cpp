#include <algorithm>
#include <limits>

#include "checks.h"
#include "grids.h"

namespace mlk {

namespace {

// MLX's own steps, one number at a time.
struct Expected {
  std::vector<int> numbers;
  Steps steps;

  Expected(const double* x, int group, int bits) {
    float low = std::numeric_limits<float>::infinity(), high = -low, most = float((1 << bits) - 1);
    for (int k = 0; k < group; ++k) {
      high = std::max(high, float(x[k])), low = std::min(low, float(x[k]));
    }
    steps = Steps::met(low, high, most);
    for (int k = 0; k < group; ++k) {
      float number = std::rint((float(x[k]) - steps.bias) / steps.scale);
      numbers.push_back(std::isnan(number) ? 0 : int(std::min(std::max(number, 0.0f), most)));
    }
  }
};

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
    auto [scale, bias] = expected.steps.kept_in(type);
    require(same(read(type, scales, i), scale), 1, 0, "scales");
    require(same(read(type, biases, i), bias), 1, 0, "biases");
    for (int k = 0; k < group; ++k) {
      int found = number_at(words, i * group + k, bits);
      require(found, expected.numbers[k], 0, "packed numbers");
      float product = apart(kept(type, scale * float(found)));
      require(same(read(type, back, i * group + k), kept(type, product + bias)), 1, 0,
              "unpacked numbers");
    }
  }
}

}  // namespace mlk
