#include <algorithm>
#include <functional>

#include "checks.h"
#include "sampling.h"
#include "values.h"

namespace mlk {

void check_likeliest() {
  for (int round = 0; round < 300; ++round) {
    size_t n = between(0, 1) ? between(1, 40) : between(41, 9000);
    std::vector<float> scores = normals(n), kept(n);
    float spread = std::exp(3 * normal());
    bool is_tied = between(0, 1);
    for (float& s : scores) s = is_tied ? std::round(s * 2) : s * spread;
    for (float& s : scores) if (!between(0, 9)) s = -INFINITY;
    scores[between(0, int(n) - 1)] = 3;
    Choice choice{size_t(between(0, 50)), between(0, 1) ? 1.0 : between(0, 99) / 100.0,
                  between(0, 1) ? 0.0 : between(0, 100) / 100.0};
    keep_likeliest(scores.data(), n, choice, kept.data());
    auto falling = scores;
    std::sort(falling.begin(), falling.end(), std::greater<>());
    double largest = falling[0], least = -INFINITY;
    if (choice.top_k > 0 && choice.top_k < n) least = falling[choice.top_k - 1];
    auto likely = [&](float score) { return score >= least ? std::exp(score - largest) : 0.0; };
    double total = 0, above = 0, from = falling[0];
    for (float s : falling) total += likely(s);
    double bounds[2];  // rounding may move a token over the edge
    for (int side : {0, 1}) {
      double most = choice.top_p * total * (side ? 1 + 1e-6 : 1 - 1e-6);
      above = 0, from = falling[0];
      for (size_t i = 0; i < n; ++i) {
        if (i && falling[i] != falling[i - 1] && above > most) break;
        if (falling[i] >= least) from = falling[i];
        above += likely(falling[i]);
      }
      bounds[side] = choice.top_p < 1 ? from : least;
      if (choice.min_p > 0) bounds[side] = std::max(bounds[side], largest + std::log(choice.min_p) + (side ? -1e-6 : 1e-6) * (1 + largest));
    }
    for (size_t i = 0; i < n; ++i) {
      bool is_kept = kept[i] == scores[i] && std::isfinite(kept[i]);
      if (scores[i] >= bounds[0] && std::isfinite(scores[i])) require(is_kept, 1, 0, "a likely token kept");
      if (scores[i] < bounds[1] && scores[i] > largest - 80) require(is_kept, 0, 0, "an unlikely token dropped");
    }
    require(*std::max_element(kept.begin(), kept.end()), largest, 0, "the likeliest token");
    auto first = std::max_element(scores.begin(), scores.end()) - scores.begin();
    require(likeliest(scores.data(), n), first, 0, "the first of the likeliest");
    uint32_t key[] = {uint32_t(random_bits()), uint32_t(random_bits())};
    size_t drawn = draw(kept.data(), n, key);
    require(drawn < n && std::isfinite(kept[drawn]), 1, 0, "a token that may be drawn");
  }
}

}  // namespace mlk
