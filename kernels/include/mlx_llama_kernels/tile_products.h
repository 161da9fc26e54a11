// Products with many rows of activations on AMX: tiles of bfloat16, sums in float32.
//
// Sums 0 to 3 are a panel's halves times a block's halves.
#pragma once

#include "mlx_llama_kernels/tiles.h"

namespace mlk::MLK_ISA::tiles {

static inline void configure() {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int tile = 0; tile < 8; ++tile) config.bytes[tile] = 64, config.rows[tile] = SIDE;
  _tile_loadconfig(&config);
}

template <bool IS_WIDE>
static inline void clear() {
  _tile_zero(0);
  _tile_zero(2);
  if constexpr (IS_WIDE) {
    _tile_zero(1);
    _tile_zero(3);
  }
}
template <bool IS_WIDE>
static inline void take(float* sums) {
  _tile_stored(0, sums, 64);
  _tile_stored(2, sums + 2 * SUMS, 64);
  if constexpr (IS_WIDE) {
    _tile_stored(1, sums + SUMS, 64);
    _tile_stored(3, sums + 3 * SUMS, 64);
  }
}

// Tiles 4 and 5, the matrix's, times two of x.
template <bool IS_WIDE>
static inline void times(const uint16_t* x) {
  _tile_loadd(6, x, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(2, 5, 6);
  if constexpr (IS_WIDE) {
    _tile_loadd(7, x + TILE, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// One step: all terms whose products float32 keeps.
template <bool IS_WIDE>
static inline void step(const uint16_t* w, size_t w_terms, const uint16_t* x, size_t x_terms) {
  for (size_t i = 0; i < w_terms; ++i) {
    _tile_loadd(4, w + i * 2 * TILE, 64);
    _tile_loadd(5, w + i * 2 * TILE + TILE, 64);
    for (size_t j = 0; j < x_terms && i + j < MOST_TERMS; ++j) times<IS_WIDE>(x + j * 2 * TILE);
  }
}

struct Side {
  const uint16_t* numbers;
  size_t terms;
};

template <bool IS_WIDE>
static inline void dense_block(Side w, Side x, size_t steps, float* c) {
  alignas(64) float sums[4 * SUMS];
  clear<IS_WIDE>();
  for (size_t s = 0; s < steps; ++s) {
    step<IS_WIDE>(w.numbers + s * step_size(w.terms), w.terms, x.numbers + s * step_size(x.terms),
                  x.terms);
  }
  take<IS_WIDE>(sums);
  for (size_t i = 0; i < 4; i += IS_WIDE ? 1 : 2) {
    for (size_t at = i * SUMS; at < (i + 1) * SUMS; at += W) {
      store(c + at, load(c + at) + load(sums + at));
    }
  }
}

// c += scale * sums.
template <bool IS_WIDE>
static inline void scaled(const float* sums, const float* scales, size_t groups, float* c) {
#pragma GCC unroll 4
  for (size_t r = 0; r < PANEL; ++r) {
    F scale = all(scales[r * groups]);
    size_t at = r / SIDE * 2 * SUMS + r % SIDE * W;
    store(c + at, load(c + at) + scale * load(sums + at));
    if constexpr (IS_WIDE) store(c + at + SUMS, load(c + at + SUMS) + scale * load(sums + at + SUMS));
  }
}

template <bool IS_WIDE>
static inline void packed_block(const uint16_t* w, Side x, size_t steps, const float* scales,
                                size_t groups, float* c) {
  alignas(64) float sums[2][4 * SUMS];
  size_t each = steps / groups;
  for (size_t g = 0; g < groups; ++g) {
    clear<IS_WIDE>();
    for (size_t s = g * each; s < (g + 1) * each; ++s) {
      step<IS_WIDE>(w + s * step_size(1), 1, x.numbers + s * step_size(x.terms), x.terms);
    }
    // The group before is scaled while the tiles are busy.
    if (g) scaled<IS_WIDE>(sums[(g - 1) % 2], scales + g - 1, groups, c);
    take<IS_WIDE>(sums[g % 2]);
  }
  scaled<IS_WIDE>(sums[(groups - 1) % 2], scales + groups - 1, groups, c);
}

// Writes one panel's sums of one block where they belong.
static inline void write(const Matrix& a, const Rows& x, size_t row, size_t block, const float* c,
                         void* y) {
  for (size_t i = 0; i < 4; ++i) {
    size_t m = block * BLOCK + i % 2 * SIDE, r = row + i / 2 * SIDE;
    if (m >= x.m || r >= a.rows) continue;
    F turned[W];
    for (int k = 0; k < W; ++k) turned[k] = load(c + i * SUMS + k * W);
    turn(turned);
    size_t n = a.rows - r < SIDE ? a.rows - r : SIDE;
    for (size_t k = 0; k < SIDE && m + k < x.m; ++k) {
      float values[SIDE];
      store(values, turned[k]);
      narrow_row(x.type, values, y, (m + k) * a.rows + r, n);
    }
  }
}

// Some panels, and what one thread needs for them.
class Work {
 public:
  Work(const Matrix& a, const Rows& x, const float* packed, float* scratch, size_t first, size_t last)
      : a_(a), x_(x), packed_(aligned(packed)), first_(first), n_(last - first),
        blocks_(row_blocks(x)) {
    scratch = aligned(scratch);
    numbers_ = reinterpret_cast<uint16_t*>(scratch);
    scales_ = scratch + MOST_PANELS * NUMBERS / 2;
    sums_ = scales_ + MOST_PANELS * SCALES;
  }

  void clear_sums() {
    for (size_t i = 0; i < n_ * blocks_ * 4 * SUMS; i += W) store(sums_ + i, F{});
  }

  void columns(size_t start) {
    const size_t depth = a_.columns - start < DEPTH ? a_.columns - start : DEPTH;
    const size_t steps = up(depth, STEP), groups = a_.bits ? depth / a_.group : 0;
    for (size_t p = 0; p < n_; ++p) {
      fill(a_, row(p), start, depth, numbers(p));
      if (a_.bits) fill_scales(a_, row(p), start / a_.group, groups, scales_ + p * SCALES);
    }
    each_block([&](auto wide, size_t p, size_t block, float* sums) {
      constexpr bool IS_WIDE = decltype(wide)::value;
      const size_t terms = terms_of(x_.type);
      Side x{packed(block) + start / STEP * step_size(terms), terms};
      if (!a_.bits) dense_block<IS_WIDE>({numbers(p), terms_of(a_.type)}, x, steps, sums);
      else packed_block<IS_WIDE>(numbers(p), x, steps, scales_ + p * SCALES, groups, sums);
    });
  }

  void biases(size_t group) {
    const size_t left = groups_of(a_) - group, groups = left < DEPTH ? left : DEPTH;
    for (size_t p = 0; p < n_; ++p) fill_biases(a_, row(p), group, groups, numbers(p));
    each_block([&](auto wide, size_t p, size_t block, float* sums) {
      const uint16_t* totals = packed(block) + steps_of(a_) * step_size(terms_of(x_.type));
      Side x{totals + group / STEP * step_size(MOST_TERMS), MOST_TERMS};
      dense_block<decltype(wide)::value>({numbers(p), MOST_TERMS}, x, up(groups, STEP), sums);
    });
  }

  void write_to(void* y) const {
    for (size_t p = 0; p < n_; ++p) {
      for (size_t block = 0; block < blocks_; ++block) {
        write(a_, x_, row(p), block, sums_ + (p * blocks_ + block) * 4 * SUMS, y);
      }
    }
  }

 private:
  static constexpr size_t NUMBERS = DEPTH / STEP * step_size(MOST_TERMS);
  static constexpr size_t SCALES = PANEL * DEPTH / LEAST_GROUP;

  size_t row(size_t p) const { return (first_ + p) * PANEL; }
  uint16_t* numbers(size_t p) const { return numbers_ + p * NUMBERS; }
  const uint16_t* packed(size_t block) const {
    return reinterpret_cast<const uint16_t*>(packed_ + block * block_floats(a_, x_));
  }
  template <class Fn>
  void each_block(Fn f) const {
    for (size_t block = 0; block < blocks_; ++block) {
      for (size_t p = 0; p < n_; ++p) {
        float* sums = sums_ + (p * blocks_ + block) * 4 * SUMS;
        if (block * BLOCK + SIDE < x_.m) f(std::true_type{}, p, block, sums);
        else f(std::false_type{}, p, block, sums);
      }
    }
  }

  const Matrix& a_;
  const Rows& x_;
  const float* packed_;
  size_t first_, n_, blocks_;
  uint16_t* numbers_;
  float *scales_, *sums_;
};

static void panels(const Matrix& a, const Rows& x, const float* packed, float* scratch, void* y,
                   size_t first, size_t last) {
  Work work(a, x, packed, scratch, first, last);
  work.clear_sums();
  configure();
  for (size_t start = 0; start < a.columns; start += DEPTH) work.columns(start);
  for (size_t group = 0; group < groups_of(a); group += DEPTH) work.biases(group);
  _tile_release();
  work.write_to(y);
}

}  // namespace mlk::MLK_ISA::tiles
