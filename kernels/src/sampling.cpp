#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#define MLK_ISA sampling
#define MLK_LANES 4
#include "mlx_llama_kernels/lanes.h"

namespace mlk {

namespace {

using namespace sampling;

constexpr size_t BINS = 4096;
constexpr float LEAST = -87;  // logarithm of what is taken for nothing beside the likeliest

// weights: how likely each is beside the likeliest, 0 below e^LEAST.
void weigh(const float* scores, size_t n, float largest, float* weights) {
  for (size_t i = 0; i < n; i += W) {
    float some[W] = {};
    size_t count = std::min<size_t>(n - i, W);
    if (count < W) std::copy_n(scores + i, count, some);
    F below = load(count < W ? some : scores + i) - largest;
    F weight = below >= LEAST ? exponential(below) : F{};
    store(some, weight);
    std::copy_n(some, count, weights + i);
  }
}

// Falling scores are kept while `keeps` what lies above them, a sum of `weight(i)`, which holds for
// nothing. Returns the least one that is kept; scores below `least` are not there.
template <class Weight, class Keeps>
float least_kept(const float* scores, size_t n, float largest, float least, Weight weight, Keeps keeps) {
  float lowest = largest;
  for (size_t i = 0; i < n; ++i) lowest = scores[i] >= least && scores[i] < lowest ? scores[i] : lowest;
  float scale = float(BINS - 1) / (largest - lowest);
  if (!(largest - lowest > 0) || !std::isfinite(scale)) return lowest;
  auto bin_of = [&](float score) { return size_t((largest - score) * scale); };
  std::vector<double> sums(BINS + 1);  // rounding may lead one bin too far
  for (size_t i = 0; i < n; ++i) {
    if (scores[i] >= least) sums[bin_of(scores[i])] += weight(i);
  }
  double above = 0;
  size_t bin = 0;
  for (; bin <= BINS && keeps(above + sums[bin]); ++bin) above += sums[bin];
  if (bin > BINS) return lowest;
  std::vector<std::pair<float, double>> inside;
  for (size_t i = 0; i < n; ++i) {
    if (scores[i] >= least && bin_of(scores[i]) == bin) inside.emplace_back(scores[i], weight(i));
  }
  std::sort(inside.begin(), inside.end(), std::greater<>());
  float last = largest;
  for (auto [score, its] : inside) {
    if (score != last && !keeps(above)) break;
    last = score, above += its;
  }
  return last;
}

}  // namespace

void keep_likeliest(const float* scores, size_t n, const Choice& choice, float* kept) {
  float largest = -INFINITY, least = -INFINITY;
  bool is_number = true;
  for (size_t i = 0; i < n; ++i) {
    largest = scores[i] > largest ? scores[i] : largest;
    is_number &= scores[i] == scores[i];
  }
  if (!is_number || !std::isfinite(largest)) {
    std::copy_n(scores, n, kept);
    return;
  }
  float near = largest + LEAST;
  if (choice.top_k > 0 && choice.top_k < n) {
    size_t n_near = size_t(std::count_if(scores, scores + n, [&](float s) { return s >= near; }));
    float from = n_near >= choice.top_k ? near : std::numeric_limits<float>::lowest();
    least = least_kept(scores, n, largest, from, [](size_t) { return 1.0; },
                       [&](double above) { return above < double(choice.top_k); });
  }
  if (choice.top_p < 1) {
    auto weights = std::make_unique_for_overwrite<float[]>(n);
    weigh(scores, n, largest, weights.get());
    auto weight = [&](size_t i) { return double(weights[i]); };
    float from = std::max(least, near);
    double total = 0;
    for (size_t i = 0; i < n; ++i) total += scores[i] >= from ? weight(i) : 0;
    double most = choice.top_p * total;
    least = least_kept(scores, n, largest, from, weight, [&](double above) { return above <= most; });
  }
  if (choice.min_p > 0) least = std::max(least, largest + float(std::log(choice.min_p)));
  for (size_t i = 0; i < n; ++i) kept[i] = scores[i] >= least ? scores[i] : -INFINITY;
}

}  // namespace mlk
