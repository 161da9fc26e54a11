// Products with many rows of activations: panels of PANEL matrix rows times blocks of MR rows of x,
// so that a number is unpacked once for all of them.
#pragma once

#include "mlx_llama_kernels/counted.h"
#include "mlx_llama_kernels/floats.h"

namespace mlk::MLK_ISA {

// Panels at once, as many as share what is near of x: all of x is read once for them.
constexpr size_t MOST_PANELS = 2;

// Calls f with what knows how a matrix's panels and the blocks of x are laid out and multiplied.
template <class Fn>
static inline void by_kind([[maybe_unused]] const Matrix& a, Fn f) {
#if MLK_LANES >= 8
  // Without VNNI the sum of two products of 8 bits each may leave 16.
  if (a.is_coarse && a.bits && (digits::HAS_VNNI || a.bits < 8)) return f(Counted<4>{});
  if (a.bits) return f(Counted<2>{});
#endif
  f(Floats{});
}

static size_t row_blocks(const Rows& x) { return (x.m + MR - 1) / MR; }
static size_t packed_floats(const Matrix& a, const Rows& x) {
  size_t floats = 0;
  by_kind(a, [&](auto kind) { floats = row_blocks(x) * kind.block_floats(a); });
  return floats;
}
static size_t panel_floats(const Matrix& a, const Rows& x, size_t panels) {
  size_t floats = 0;
  by_kind(a, [&](auto kind) { floats = kind.PANEL_FLOATS + panels * row_blocks(x) * MR * PANEL; });
  return floats;
}

static void pack(const Matrix& a, const Rows& x, float* packed, size_t first, size_t last) {
  by_kind(a, [&](auto kind) {
    for (; first < last; ++first) kind.pack(a, x, first, packed + first * kind.block_floats(a));
  });
}

// n panels from a row on, into c: (n, rows of x up to whole blocks, PANEL).
template <class Kind>
static inline void some_panels(const Matrix& a, const Rows& x, const float* packed, size_t row, size_t n,
                               float* panel, float* c) {
  const size_t blocks = row_blocks(x), size = blocks * MR * PANEL;
  for (size_t i = 0; i < n * size; ++i) c[i] = 0;
  for (size_t start = 0; start < a.columns; start += Kind::DEPTH) {
    size_t left = a.columns - start, depth = left < Kind::DEPTH ? left : Kind::DEPTH;
    for (size_t p = 0; p < n; ++p) {
      Kind::fill(a, row + p * PANEL, start, depth, panel);
      // What comes next is on its way while this one is multiplied.
      if (p + 1 < n) ask(a, row + (p + 1) * PANEL, start, depth);
      else if (left > depth) ask(a, row, start + depth, least(left - depth, Kind::DEPTH));
      else ask(a, row + n * PANEL, 0, least(a.columns, Kind::DEPTH));
      for (size_t block = 0; block < blocks; ++block) {
        const float* of_x = packed + block * Kind::block_floats(a);
        Kind::multiply(a, of_x, panel, start, depth, c + p * size + block * MR * PANEL);
      }
    }
  }
}

static void panels(const Matrix& a, const Rows& x, const float* packed, float* scratch, void* y,
                   size_t first, size_t last) {
  by_kind(a, [&](auto kind) {
    const float* c = scratch + kind.PANEL_FLOATS;
    some_panels<decltype(kind)>(a, x, packed, first * PANEL, last - first, scratch, scratch + kind.PANEL_FLOATS);
    for (; first < last; ++first, c += row_blocks(x) * MR * PANEL) {
      size_t row = first * PANEL, n = a.rows - row < size_t(PANEL) ? a.rows - row : size_t(PANEL);
      for (size_t m = 0; m < x.m; ++m) narrow_row(x.type, c + m * PANEL, y, m * a.rows + row, n);
    }
  });
}

}  // namespace mlk::MLK_ISA
