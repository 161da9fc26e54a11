// Packing with scale and bias of each group searched for, after the arithmetic of mse.py in NumPy,
// operation by operation: the bytes are the same. So sums go from the first number of a group to the
// last, and no product and sum are rounded as one.
//
// A lane holds a group: W of them are turned into columns, and gone through five times.
#pragma once

#include "mlx_llama_kernels/groups.h"

namespace mlk::MLK_ISA {

// The range without as much at either end, `cut` steps together.
template <class T>
static inline Grid cut_range(F low, F high, float steps, float cut) {
  F scale = (high - low) / (steps + cut);
  F bias = apart((low + high) * 0.5f) - apart(scale * (steps * 0.5f));
  return {kept<T>(scale), kept<T>(bias)};
}

static inline F inverse(F scale) {
  F one = all(1.0f);
  return scale == 0.0f ? F{} : one / (scale == 0.0f ? one : scale);
}

static inline F clipped(F x, float steps) {
  x = x > 0.0f ? x : F{};
  return x < steps ? x : all(steps);
}

// The grid of least squared error for the codes nearest to another.
template <class T>
static inline Grid solved(const F* columns, size_t group, Grid from, F total, float steps) {
  F factor = inverse(from.scale), sum{}, squares{}, products{};
  for (size_t g = 0; g < group; ++g) {
    F code = whole_small(clipped((columns[g] - from.bias) * factor, steps));
    sum += code;
    squares += apart(code * code);
    products += apart(code * columns[g]);
  }
  F n = all(float(group)), mean = sum / n;
  F spread = squares - apart(n * mean * mean);
  F shared = products - apart(mean * total);
  I is_flat = spread < 0.5f;
  F scale = is_flat ? F{} : shared / (is_flat ? all(1.0f) : spread);
  F bias = total / n - apart(scale * mean);
  return {kept<T>(scale), kept<T>(bias)};
}

// Squared errors in squared steps.
static inline F error_of(const F* columns, size_t group, Grid grid, float steps) {
  F factor = all(1.0f) / grid.scale, error{};
  for (size_t g = 0; g < group; ++g) {
    F place = apart((columns[g] - grid.bias) * factor);
    F rest = place - whole_small(clipped(place, steps));
    error += apart(rest * rest);
  }
  return error;
}

template <class T>
static inline Grid searched(const F* columns, size_t group, F low, F high, F total, int bits,
                            const Search& how) {
  float steps = float((1 << bits) - 1);
  Grid grid = cut_range<T>(low, high, steps, how.cut);
  for (int round = 0; round < how.rounds; ++round) {
    grid = solved<T>(columns, group, grid, total, steps);
  }
  Grid known = met_ends(low, high, steps);  // MLX's own
  known = {kept<T>(known.scale), kept<T>(known.bias)};
  I is_usable = grid.scale != 0.0f;
  grid.scale = is_usable ? grid.scale : known.scale;
  F found = error_of(columns, group, grid, steps), error = error_of(columns, group, known, steps);
  F ratio = grid.scale / known.scale;
  I is_better = is_usable & (found * ratio * ratio < error);
  return {is_better ? grid.scale : known.scale, is_better ? grid.bias : known.bias};
}

// Writes `count` groups' words from their codes, one stream of bits for each.
static inline void write_words(const F* columns, size_t group, Grid grid, int bits, uint32_t* words,
                               size_t count) {
  F factor = inverse(grid.scale);
  float steps = float((1 << bits) - 1);
  size_t n_words = group * bits / 32;
  uint32_t turned[most_group / 4][W];
  U word{};
  int filled = 0;
  size_t at = 0;
  for (size_t g = 0; g < group; ++g) {
    // The last bits of what is rounded to whole numbers by its size.
    U number = (U)(clipped((columns[g] - grid.bias) * factor, steps) + 8388608.0f) & 0xffu;
    word |= number << filled;
    filled += bits;
    if (filled >= 32) {
      __builtin_memcpy(turned[at++], &word, sizeof word);
      filled -= 32;
      word = filled ? number >> (bits - filled) : U{};
    }
  }
  for (size_t lane = 0; lane < count; ++lane) {
    for (size_t i = 0; i < n_words; ++i) words[lane * n_words + i] = turned[i][lane];
  }
}

template <class T>
static void pack_groups(const Groups& p, const Search& how, const PackedGroups& to) {
  size_t group = size_t(p.group), n_words = group * p.bits / 32;
  const T* values = static_cast<const T*>(p.values);
  F columns[most_group];
  for (size_t first = 0; first < p.n; first += W) {
    size_t count = p.n - first < size_t(W) ? p.n - first : size_t(W);
    for (size_t g = 0; g < group; g += W) {
      for (size_t lane = 0; lane < size_t(W); ++lane) {  // lanes beyond repeat the last group
        size_t from = first + (lane < count ? lane : count - 1);
        columns[g + lane] = load(values + from * group + g);
      }
      turn(columns + g);
    }
    F low = columns[0], high = columns[0], total = columns[0];
    for (size_t g = 1; g < group; ++g) {
      low = columns[g] < low ? columns[g] : low;
      high = larger(columns[g], high);
      total += columns[g];
    }
    Grid grid = searched<T>(columns, group, low, high, total, p.bits, how);
    write_words(columns, group, grid, p.bits, to.words + first * n_words, count);
    float lanes[W];
    store(lanes, grid.scale);
    narrow_row(lanes, static_cast<T*>(to.scales) + first, count);
    store(lanes, grid.bias);
    narrow_row(lanes, static_cast<T*>(to.biases) + first, count);
  }
}

static void least_squares(const Groups& p, const Search& how, const PackedGroups& to) {
  typed(p.type, [&](auto* t) { pack_groups<std::remove_pointer_t<decltype(t)>>(p, how, to); });
}

}  // namespace mlk::MLK_ISA
