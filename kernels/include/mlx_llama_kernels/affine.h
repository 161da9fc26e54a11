// Products with MLX's affine quantized matrices of 2, 4 and 8 bits.
//
// A vector of words holds, in each lane, 32 / bits numbers of one group. They are taken out by a
// mask without a shift: a number that stands b bits up is 2^b times too large, its activation was
// made 2^b times smaller before, and both are exact. Scales are applied once for each vector of
// words; biases through the lane's sum of activations.
#pragma once

#include "mlx_llama_kernels/lanes.h"

namespace mlk::MLK_ISA {

// How the words of a row fall into vectors.
template <int BITS>
struct Layout {
  static constexpr int BITS_EACH = BITS;
  static constexpr int PER = 32 / BITS;  // numbers in a word
  static constexpr uint32_t MASK = (1u << BITS) - 1;
  static constexpr int BLOCK = PER * W;  // numbers in a vector

  static constexpr bool shifted(int i) { return BITS * (i + 1) > 31; }  // would touch the sign
  static float weight_of(int i) { return shifted(i) ? 1.0f : 1.0f / float(1u << (BITS * i)); }
  static inline F number(U words, int i) {
    U bits = shifted(i) ? words >> (BITS * i) : words & (MASK << (BITS * i));
    return __builtin_convertvector((I)bits, F);
  }
};

static inline size_t blocks_of(const Affine& a) {
  size_t block = size_t(32 / a.bits) * W;
  return (a.columns + block - 1) / block;
}

template <class Fn>
static inline void by_bits(int bits, Fn f) {
  if (bits == 4) f(Layout<4>{});
  else if (bits == 8) f(Layout<8>{});
  else f(Layout<2>{});
}

// Prepared: for each row of x its blocks, each PER vectors of activations and one of lane sums.
static size_t prepared_floats(const Affine& a, size_t m) {
  return m * blocks_of(a) * size_t(32 / a.bits + 1) * W;
}

static void prepare(const Affine& a, const Rows& x, float* prepared) {
  by_bits(a.bits, [&](auto layout) {
    using L = decltype(layout);
    size_t blocks = blocks_of(a);
    for (size_t m = 0; m < x.m; ++m) {
      for (size_t b = 0; b < blocks; ++b, prepared += (L::PER + 1) * W) {
        float values[L::BLOCK] = {};
        size_t start = b * L::BLOCK;
        size_t n = x.n - start < size_t(L::BLOCK) ? x.n - start : size_t(L::BLOCK);
        widen_row(x.type, x.data, m * x.n + start, values, n);
        for (int lane = 0; lane < W; ++lane) {
          float total = 0;
          for (int i = 0; i < L::PER; ++i) {
            float value = values[lane * L::PER + i];
            prepared[i * W + lane] = value * L::weight_of(i);
            total += value;
          }
          prepared[L::PER * W + lane] = total;
        }
      }
    }
  });
}

constexpr size_t MOST_GROUPS = 4096;  // of a row, held on the stack: 131072 columns at least

// Widens the scales of one row; what a vector reads behind them is zero.
static inline void widen_scales(const Affine& a, const void* from, size_t row, float* to) {
  size_t groups = a.columns / a.group;
  widen_row(a.type, from, row * groups, to, groups);
  for (int lane = 0; lane < 2 * W; ++lane) to[groups + lane] = 0;
}

template <class L, int M>
static inline void row_product(const Affine& a, const float* prepared, size_t row, size_t blocks,
                               I lanes, float* out) {
  float scales[MOST_GROUPS + 2 * W], biases[MOST_GROUPS + 2 * W];
  widen_scales(a, a.scales, row, scales);
  widen_scales(a, a.biases, row, biases);
  size_t n_words = a.columns / L::PER;
  const uint32_t* words = a.words + row * n_words;
  const size_t stride = blocks * (L::PER + 1) * W;
  F total[M] = {};
  auto block = [&](U w, size_t b) __attribute__((always_inline)) {
    const float* x = prepared + b * (L::PER + 1) * W;
    F dot[M] = {};
#pragma GCC unroll 16
    for (int i = 0; i < L::PER; ++i) {
      F q = L::number(w, i);
      for (int m = 0; m < M; ++m) dot[m] += q * load(x + m * stride + i * W);
    }
    size_t group = b * L::BLOCK / a.group;
    F scale = __builtin_shuffle(load(scales + group), lanes);
    F bias = __builtin_shuffle(load(biases + group), lanes);
    for (int m = 0; m < M; ++m) {
      total[m] += scale * dot[m];
      total[m] += bias * load(x + m * stride + L::PER * W);
    }
  };
  size_t whole = n_words / W;
  for (size_t b = 0; b < whole; ++b) {
    __builtin_prefetch(words + b * W + 512);
    block(load(words + b * W), b);
  }
  if (whole < blocks) {
    uint32_t rest[W] = {};
    __builtin_memcpy(rest, words + whole * W, (n_words - whole * W) * 4);
    block(load(rest), whole);
  }
  for (int m = 0; m < M; ++m) out[m] = sum(total[m]);
}

static void affine_few(const Affine& a, const Rows& x, const float* prepared, void* y, size_t first,
                       size_t last) {
  by_bits(a.bits, [&](auto layout) {
    using L = decltype(layout);
    I lanes;
    for (int lane = 0; lane < W; ++lane) lanes[lane] = lane * L::PER / a.group;
    size_t blocks = blocks_of(a);
    for (size_t row = first; row < last; ++row) {
      float out[few_rows];
      switch (x.m) {
        case 1: row_product<L, 1>(a, prepared, row, blocks, lanes, out); break;
        case 2: row_product<L, 2>(a, prepared, row, blocks, lanes, out); break;
        case 3: row_product<L, 3>(a, prepared, row, blocks, lanes, out); break;
        case 4: row_product<L, 4>(a, prepared, row, blocks, lanes, out); break;
        default: row_product<L, 5>(a, prepared, row, blocks, lanes, out); break;
      }
      for (size_t m = 0; m < x.m; ++m) narrow_row(x.type, out + m, y, m * a.rows + row, 1);
    }
  });
}

// --- many rows: panels of PANEL matrix rows, as floats, times blocks of MR rows of x -------------

constexpr int MR = W == 16 ? 12 : 6;
constexpr int PANEL = 2 * W;
constexpr size_t DEPTH = 512;  // columns of a panel that are dequantized at once

static size_t row_blocks(const Rows& x) { return (x.m + MR - 1) / MR; }
static size_t packed_floats(const Rows& x) { return row_blocks(x) * MR * x.n; }
static size_t panel_floats(const Rows& x) { return DEPTH * PANEL + row_blocks(x) * MR * PANEL; }

// Packed: blocks of MR rows, each (n, MR).
static void pack(const Rows& x, float* packed, size_t first, size_t last) {
  float piece[64];
  for (size_t block = first; block < last; ++block) {
    float* to = packed + block * MR * x.n;
    for (int r = 0; r < MR; ++r) {
      size_t m = block * MR + r;
      for (size_t k = 0; k < x.n; k += 64) {
        size_t n = x.n - k < 64 ? x.n - k : 64;
        if (m < x.m) widen_row(x.type, x.data, m * x.n + k, piece, n);
        else for (size_t i = 0; i < n; ++i) piece[i] = 0;
        for (size_t i = 0; i < n; ++i) to[(k + i) * MR + r] = piece[i];
      }
    }
  }
}

// c (MR, PANEL) += x (depth, MR) transposed times panel (depth, PANEL). Summed by itself first, so
// that errors grow with the depth and with the number of calls, not with their product.
static inline void multiply(const float* x, const float* panel, size_t depth, float* c) {
  F sums[MR][2] = {};
  for (size_t k = 0; k < depth; ++k) {
    F left = load(panel + k * PANEL), right = load(panel + k * PANEL + W);
#pragma GCC unroll 12
    for (int r = 0; r < MR; ++r) {
      F value = all(x[k * MR + r]);
      sums[r][0] += value * left;
      sums[r][1] += value * right;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < MR; ++r) {
    store(c + r * PANEL, load(c + r * PANEL) + sums[r][0]);
    store(c + r * PANEL + W, load(c + r * PANEL + W) + sums[r][1]);
  }
}

static inline float one_scale(const Affine& a, const void* from, size_t at) {
  float value;
  widen_row(a.type, from, at, &value, 1);
  return value;
}

// Writes the columns from start on, depth of them, of PANEL rows as (depth, PANEL) floats; rows
// behind the last one repeat it.
template <class L>
static inline void dequantize(const Affine& a, size_t row, size_t start, size_t depth,
                              float* panel) {
  size_t n_words = a.columns / L::PER, groups = a.columns / a.group;
  for (int half = 0; half < 2; ++half) {
    size_t at[W];
    for (int lane = 0; lane < W; ++lane) {
      size_t r = row + half * W + lane;
      at[lane] = r < a.rows ? r : a.rows - 1;
    }
    for (size_t k = start; k < start + depth; k += a.group) {
      F scale, bias;
      for (int lane = 0; lane < W; ++lane) {
        scale[lane] = one_scale(a, a.scales, at[lane] * groups + k / a.group);
        bias[lane] = one_scale(a, a.biases, at[lane] * groups + k / a.group);
      }
      for (size_t word = k / L::PER; word < (k + a.group) / L::PER; ++word) {
        U words;
        for (int lane = 0; lane < W; ++lane) words[lane] = a.words[at[lane] * n_words + word];
        float* to = panel + (word * L::PER - start) * PANEL + half * W;
#pragma GCC unroll 16
        for (int i = 0; i < L::PER; ++i) {
          F q = __builtin_convertvector((I)((words >> (L::BITS_EACH * i)) & L::MASK), F);
          store(to + i * PANEL, q * scale + bias);
        }
      }
    }
  }
}

static void affine_panels(const Affine& a, const Rows& x, const float* packed, float* scratch,
                          void* y, size_t first, size_t last) {
  float* panel = scratch;
  float* c = scratch + DEPTH * PANEL;
  size_t blocks = row_blocks(x);
  for (size_t part = first; part < last; ++part) {
    size_t row = part * PANEL;
    for (size_t i = 0; i < blocks * MR * PANEL; ++i) c[i] = 0;
    for (size_t start = 0; start < a.columns; start += DEPTH) {
      size_t depth = a.columns - start < DEPTH ? a.columns - start : DEPTH;
      by_bits(a.bits, [&](auto layout) {
        dequantize<decltype(layout)>(a, row, start, depth, panel);
      });
      for (size_t block = 0; block < blocks; ++block) {
        multiply(packed + (block * x.n + start) * MR, panel, depth, c + block * MR * PANEL);
      }
    }
    size_t n = a.rows - row < size_t(PANEL) ? a.rows - row : size_t(PANEL);
    for (size_t m = 0; m < x.m; ++m) narrow_row(x.type, c + m * PANEL, y, m * a.rows + row, n);
  }
}

}  // namespace mlk::MLK_ISA
