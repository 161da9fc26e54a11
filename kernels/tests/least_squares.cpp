#include "checks.h"
#include "grids.h"

namespace mlk {

namespace {

// The search of one group, one number after the other, each operation rounded by itself.
struct Searched {
  const double* x;
  int group, rounds;
  float most, low, high, total = 0;
  Type type;

  Searched(const double* x, int group, int bits, Type type, int rounds)
      : x(x), group(group), rounds(rounds), most(float((1 << bits) - 1)), low(float(x[0])), high(low), type(type) {
    for (int k = 0; k < group; ++k) {
      low = std::min(low, float(x[k])), high = std::max(high, float(x[k]));
      total += float(x[k]);
    }
  }

  // A place among the steps that there are.
  float within(float place) const { return place > 0 ? std::min(place, most) : 0; }

  Steps cut(float missing) const {
    float scale = (high - low) / (most + missing);
    return Steps{scale, apart((low + high) * 0.5f) - apart(scale * (most * 0.5f))}.kept_in(type);
  }

  std::vector<float> numbers(const Steps& from) const {
    std::vector<float> found;
    float factor = from.scale == 0 ? 0 : 1 / from.scale;
    for (int k = 0; k < group; ++k) found.push_back(std::rint(within((float(x[k]) - from.bias) * factor)));
    return found;
  }

  Steps solved(const Steps& from) const {
    float sum = 0, squares = 0, products = 0, n = float(group);
    std::vector<float> codes = numbers(from);
    for (int k = 0; k < group; ++k) {
      sum += codes[k];
      squares += apart(codes[k] * codes[k]);
      products += apart(codes[k] * float(x[k]));
    }
    float mean = sum / n, spread = squares - apart(apart(n * mean) * mean);
    float shared = products - apart(mean * total), scale = spread < 0.5f ? 0 : shared / spread;
    return Steps{scale, total / n - apart(scale * mean)}.kept_in(type);
  }

  float error(const Steps& steps) const {
    float factor = 1 / steps.scale, sum = 0;
    for (int k = 0; k < group; ++k) {
      float place = apart((float(x[k]) - steps.bias) * factor), rest = place - std::rint(within(place));
      sum += apart(rest * rest);
    }
    return sum;
  }

  Steps best(float missing) const {
    Steps steps = cut(missing), known = Steps::met(low, high, most).kept_in(type);
    for (int round = 0; round < rounds; ++round) steps = solved(steps);
    if (steps.scale == 0) return known;
    float ratio = steps.scale / known.scale;
    return apart(error(steps) * ratio) * ratio < error(known) ? steps : known;
  }
};

// Groups as weights are, some heavy at the ends, of one value, of zeros, tiny or huge.
std::vector<float> draw(size_t groups, int group, Type type) {
  std::vector<float> x = normals(groups * group);
  const float factors[] = {1, 0.02f, 1e-30f, 1e-40f, type == Type::f16 ? 100.0f : 1e30f};
  for (size_t g = 0; g < groups; ++g) {
    float *own = &x[g * group], factor = between(0, 2) ? 0.02f : factors[between(0, 4)];
    float shift = between(0, 3) ? 0 : 5;
    for (int k = 0; k < group; ++k) own[k] = (own[k] + shift) * factor;
    if (!between(0, 3)) own[between(0, group - 1)] *= 30;
    if (!between(0, 7)) std::fill(own, own + group, own[0]);
    if (!between(0, 15)) std::fill(own, own + group, 0.0f);
  }
  return x;
}

}  // namespace

void check_least_squares(const Table& table) {
  const int widths[] = {2, 3, 4, 5, 6, 8};
  int bits = widths[between(0, 5)], group = 32 << between(0, 2), rounds = between(0, 3);
  float missing = between(0, 2) ? 0.1f * float(between(0, 12)) : 0;
  size_t groups = between(1, 70);
  Type type = any_type();
  Values x(type, draw(groups, group, type));
  std::vector<uint32_t> words(groups * group / 32 * bits);
  std::vector<char> scales(groups * size_of(type)), biases(scales);
  table.least_squares({x.bytes.data(), type, groups, group, bits}, {missing, rounds},
                      {words.data(), scales.data(), biases.data()});
  for (size_t i = 0; i < groups; ++i) {
    Searched search(&x.exact[i * group], group, bits, type, rounds);
    Steps expected = search.best(missing), known = Steps::met(search.low, search.high, search.most).kept_in(type);
    Steps found{float(read(type, scales, i)), float(read(type, biases, i))};
    require(same(found.scale, expected.scale), 1, 0, "searched scales");
    require(same(found.bias, expected.bias), 1, 0, "searched biases");
    std::vector<float> numbers = search.numbers(expected);
    for (int k = 0; k < group; ++k) {
      require(number_at(words, i * group + k, bits), numbers[k], 0, "numbers of a searched grid");
    }
    // In the end what was searched for errs no more than what MLX takes.
    double errors[2] = {};
    for (int which = 0; which < 2; ++which) {
      const Steps& steps = which ? known : found;
      std::vector<float> codes = search.numbers(steps);
      for (int k = 0; k < group; ++k) {
        double rest = double(steps.scale) * codes[k] + steps.bias - search.x[k];
        errors[which] += rest * rest;
      }
    }
    require(errors[0] <= errors[1] * (1 + 1e-4), 1, 0, "errors of a searched grid");
  }
}

}  // namespace mlk
