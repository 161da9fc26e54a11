// Panels and blocks as floats: of dense matrices, and of packed ones where nothing counts faster.
#pragma once

#include "mlx_llama_kernels/panel.h"

namespace mlk::MLK_ISA {

static inline float one_scale(const Matrix& a, const void* from, size_t at) {
  float value;
  widen_row(a.type, from, at, &value, 1);
  return value;
}

// Writes the columns from start on, depth of them, of W rows as (depth, PANEL) floats: 32 numbers,
// which are BITS words, of each row at once.
template <int BITS>
static inline void dequantize(const Matrix& a, size_t row, size_t start, size_t depth,
                              float* panel) {
  constexpr uint32_t MASK = (1u << BITS) - 1;
  size_t groups = a.columns / a.group;
  const char* rows[W];
  for (int lane = 0; lane < W; ++lane) rows[lane] = row_of(a, row_at(a, row, lane));
  for (size_t k = start; k < start + depth; k += a.group) {
    F scale = {}, bias = {};
    for (int lane = 0; lane < W; ++lane) {
      scale[lane] = one_scale(a, a.scales, row_at(a, row, lane) * groups + k / a.group);
      bias[lane] = one_scale(a, a.biases, row_at(a, row, lane) * groups + k / a.group);
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

// A panel is (DEPTH, PANEL), a block of x (n, MR).
struct Floats {
  static constexpr size_t DEPTH = 512;  // columns of a panel at once
  static constexpr size_t PANEL_FLOATS = DEPTH * PANEL;
  static size_t block_floats(const Matrix& a) { return a.columns * MR; }

  static inline void pack(const Matrix&, const Rows& x, size_t block, float* to) {
    constexpr size_t AT_ONCE = 64;
    float rows[MR * AT_ONCE];
    const size_t m = block * MR, n_rows = x.m - m < size_t(MR) ? x.m - m : MR;
    for (size_t k = 0; k < x.n; k += AT_ONCE, to += MR * AT_ONCE) {
      size_t n = x.n - k < AT_ONCE ? x.n - k : AT_ONCE;
      for (size_t r = 0; r < n_rows; ++r) {
        widen_row(x.type, x.data, (m + r) * x.n + k, rows + r * AT_ONCE, n);
      }
      interleave(rows, AT_ONCE, n_rows, n, to);
    }
  }

  static inline void fill(const Matrix& a, size_t row, size_t start, size_t depth, float* panel) {
    for (int half = 0; half < 2; ++half, row += W, panel += W) {
      switch (W < 8 ? a.bits : 0) {  // longer vectors count packed numbers, see counted.h
        case 0:
          typed(a.type, [&](auto* t) {
            using T = std::remove_pointer_t<decltype(t)>;
            spread(a, static_cast<const T*>(a.data) + start, a.columns, row, depth, panel);
          });
          break;
        case 2: dequantize<2>(a, row, start, depth, panel); break;
        case 3: dequantize<3>(a, row, start, depth, panel); break;
        case 4: dequantize<4>(a, row, start, depth, panel); break;
        case 5: dequantize<5>(a, row, start, depth, panel); break;
        case 6: dequantize<6>(a, row, start, depth, panel); break;
        default: dequantize<8>(a, row, start, depth, panel); break;
      }
    }
  }

  static inline void multiply(const Matrix&, const float* x, const float* panel, size_t start,
                              size_t depth, float* c) {
    mlk::MLK_ISA::multiply(x + start * MR, panel, depth, c, PANEL);
  }
};

}  // namespace mlk::MLK_ISA
