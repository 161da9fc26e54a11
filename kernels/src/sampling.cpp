#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
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
    thread_local std::vector<float> weights;  // new memory for each token costs half of the time
    weights.resize(n);
    weigh(scores, n, largest, weights.data());
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

size_t likeliest(const float* scores, size_t n) {
  F some[4];
  for (F& most : some) most = all(-std::numeric_limits<float>::infinity());
  size_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    for (int k = 0; k < 4; ++k) {
      F score = load(scores + i + k * W);
      some[k] = score > some[k] ? score : some[k];
    }
  }
  float most = -std::numeric_limits<float>::infinity();
  for (; i < n; ++i) most = scores[i] > most ? scores[i] : most;
  for (const F& vector : some) {
    for (int lane = 0; lane < W; ++lane) most = vector[lane] > most ? vector[lane] : most;
  }
  const float* found = std::find(scores, scores + n, most);
  return found == scores + n ? 0 : size_t(found - scores);
}

namespace {

// Threefry 2x32 of 20 rounds (Salmon et al., 2011), which MLX draws by.
struct Pair {
  uint32_t first, second;
};
Pair threefry(const uint32_t key[2], uint32_t first, uint32_t second) {
  constexpr int TURNS[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  const uint32_t keys[] = {key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDAu};
  first += keys[0], second += keys[1];
  for (uint32_t round = 0; round < 5; ++round) {
    for (int turn : TURNS[round % 2]) {
      first += second;
      second = (second << turn | second >> (32 - turn)) ^ first;
    }
    first += keys[(round + 1) % 3], second += keys[(round + 2) % 3] + round + 1;
  }
  return {first, second};
}

}  // namespace

size_t draw(const float* scores, size_t n, const uint32_t key[2]) {
  const size_t best = likeliest(scores, n);
  if (!std::isfinite(scores[best])) return best;
  // Where few may be drawn, few are weighed.
  std::vector<uint32_t> tokens;
  std::vector<float> weights;
  for (size_t i = 0; i < n; ++i) {
    if (scores[i] > -INFINITY) tokens.push_back(uint32_t(i)), weights.push_back(scores[i]);
  }
  weigh(weights.data(), weights.size(), scores[best], weights.data());
  double total = 0, up_to = 0;
  for (float weight : weights) total += weight;
  double wanted = threefry(key, 0, 0).first * 0x1p-32 * total;
  size_t drawn = best;
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (weights[i] == 0) continue;
    drawn = tokens[i], up_to += weights[i];
    if (up_to >= wanted) break;
  }
  return drawn;
}

}  // namespace mlk
