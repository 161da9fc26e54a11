// Products with many rows of activations: panels of PANEL matrix rows, as floats, times blocks of MR
// rows of x, so that a number is unpacked once for all of them.
#pragma once

#include "mlx_llama_kernels/matrix.h"
#include "mlx_llama_kernels/multiply.h"

namespace mlk::MLK_ISA {

constexpr size_t MOST_PANELS = 1;
constexpr size_t DEPTH = 512;  // columns of a panel that are dequantized at once

static size_t row_blocks(const Rows& x) { return (x.m + MR - 1) / MR; }
static size_t packed_floats(const Matrix&, const Rows& x) { return row_blocks(x) * MR * x.n; }
static size_t panel_floats(const Matrix&, const Rows& x, size_t) {
  return DEPTH * PANEL + row_blocks(x) * MR * PANEL;
}

// Packed: blocks of MR rows, each (n, MR).
static void pack(const Matrix&, const Rows& x, float* packed, size_t first, size_t last) {
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

static inline float one_scale(const Matrix& a, const void* from, size_t at) {
  float value;
  widen_row(a.type, from, at, &value, 1);
  return value;
}

// The rows of half a panel; those behind the last one repeat it.
struct HalfPanel {
  size_t row[W];
  HalfPanel(const Matrix& a, size_t first) {
    for (int lane = 0; lane < W; ++lane) row[lane] = first + lane < a.rows ? first + lane : a.rows - 1;
  }
};

// Writes the columns from start on, depth of them, of W rows as (depth, PANEL) floats: 32 numbers,
// which are BITS words, of each row at once.
template <int BITS>
static inline void dequantize(const Matrix& a, const HalfPanel& half, size_t start, size_t depth,
                              float* panel) {
  constexpr uint32_t MASK = (1u << BITS) - 1;
  size_t groups = a.columns / a.group;
  const char* rows[W];
  for (int lane = 0; lane < W; ++lane) rows[lane] = row_of(a, half.row[lane]);
  for (size_t k = start; k < start + depth; k += a.group) {
    F scale, bias;
    for (int lane = 0; lane < W; ++lane) {
      scale[lane] = one_scale(a, a.scales, half.row[lane] * groups + k / a.group);
      bias[lane] = one_scale(a, a.biases, half.row[lane] * groups + k / a.group);
    }
    for (size_t at = k; at < k + a.group; at += 32) {
      U words[BITS];
#pragma GCC unroll 8
      for (int w = 0; w < BITS; ++w) {
        uint32_t column[W];
        for (int lane = 0; lane < W; ++lane) {
          __builtin_memcpy(column + lane, rows[lane] + at / 8 * BITS + 4 * w, 4);
        }
        words[w] = load_bits(column);
      }
      float* to = panel + (at - start) * PANEL;
#pragma GCC unroll 32
      for (int i = 0; i < 32; ++i) {
        int bit = i * BITS, word = bit / 32, up = bit % 32;
        U bits = words[word] >> up;
        if (up + BITS > 32) bits |= words[(word + 1) % BITS] << (32 - up) % 32;
        F q = __builtin_convertvector((I)(bits & MASK), F);
        store(to + i * PANEL, q * scale + bias);
      }
    }
  }
}

// The same of dense numbers.
template <class T>
static inline void spread(const Matrix& a, const HalfPanel& half, size_t start, size_t depth,
                          float* panel) {
  for (size_t k = 0; k < depth; k += W) {
    size_t n = depth - k < size_t(W) ? depth - k : W;
    F rows[W];
    for (int lane = 0; lane < W; ++lane) {
      const T* row = static_cast<const T*>(a.data) + half.row[lane] * a.columns + start + k;
      float some[W];
      if (n < size_t(W)) widen_row(row, some, n);
      rows[lane] = n < size_t(W) ? load(some) : load(row);
    }
    turn(rows);
    for (size_t i = 0; i < n; ++i) store(panel + (k + i) * PANEL, rows[i]);
  }
}

static inline void fill_panel(const Matrix& a, size_t row, size_t start, size_t depth, float* panel) {
  for (int side = 0; side < 2; ++side, row += W, panel += W) {
    HalfPanel half(a, row);
    switch (a.bits) {
      case 0:
        typed(a.type, [&](auto* t) {
          spread<std::remove_pointer_t<decltype(t)>>(a, half, start, depth, panel);
        });
        break;
      case 2: dequantize<2>(a, half, start, depth, panel); break;
      case 3: dequantize<3>(a, half, start, depth, panel); break;
      case 4: dequantize<4>(a, half, start, depth, panel); break;
      case 5: dequantize<5>(a, half, start, depth, panel); break;
      case 6: dequantize<6>(a, half, start, depth, panel); break;
      default: dequantize<8>(a, half, start, depth, panel); break;
    }
  }
}

static void panels(const Matrix& a, const Rows& x, const float* packed, float* scratch, void* y,
                   size_t first, size_t last) {
  float* panel = scratch;
  float* c = scratch + DEPTH * PANEL;
  size_t blocks = row_blocks(x);
  for (size_t part = first; part < last; ++part) {
    size_t row = part * PANEL;
    for (size_t i = 0; i < blocks * MR * PANEL; ++i) c[i] = 0;
    for (size_t start = 0; start < a.columns; start += DEPTH) {
      size_t depth = a.columns - start < DEPTH ? a.columns - start : DEPTH;
      fill_panel(a, row, start, depth, panel);
      for (size_t block = 0; block < blocks; ++block) {
        multiply(packed + (block * x.n + start) * MR, panel, depth, c + block * MR * PANEL);
      }
    }
    size_t n = a.rows - row < size_t(PANEL) ? a.rows - row : size_t(PANEL);
    for (size_t m = 0; m < x.m; ++m) narrow_row(x.type, c + m * PANEL, y, m * a.rows + row, n);
  }
}

}  // namespace mlk::MLK_ISA
