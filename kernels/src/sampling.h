// Which tokens may be drawn, found without sorting their scores. Knows nothing of MLX.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mlk {

// top_k 0, top_p 1 and min_p 0 leave all.
struct Choice {
  size_t top_k;  // the likeliest so many, and those as likely as the last of them
  double top_p;  // of those, the ones with at most so much of their probability above them
  double min_p;  // of those, the ones at least so likely as the likeliest times this
};

// kept: the scores that are chosen, minus infinity for the others. The likeliest always stays; where
// one is not a number, or the largest not finite, all do.
void keep_likeliest(const float* scores, size_t n, const Choice& choice, float* kept);

// The first of the largest scores; those that are no numbers are passed over. n is at least 1.
size_t likeliest(const float* scores, size_t n);

// Draws by the scores as logarithms of weights: with a uniform number of the key, the first token up to
// which so much of all weights stands, as MLX's random.categorical does, but for rounding.
size_t draw(const float* scores, size_t n, const uint32_t key[2]);

}  // namespace mlk
