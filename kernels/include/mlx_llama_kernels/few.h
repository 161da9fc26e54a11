// Products with few rows of activations: each row of the matrix is read once, and is all the time
// that it takes where memory is the limit.
//
// Scales are applied once for each block, biases once for each group, to the sum of its activations.
#pragma once

#include "mlx_llama_kernels/digits.h"

namespace mlk::MLK_ISA {

template <class L>
static inline size_t blocks_of(const Matrix& a) {
  return (a.columns + L::BLOCK - 1) / L::BLOCK;
}

// Groups of a packed row, up to a whole vector.
static inline size_t padded_groups(const Matrix& a) {
  return a.bits ? (a.columns / a.group + W - 1) / W * W : 0;
}

// Prepared: for each row of x its blocks, PER vectors of activations each, then the sum of each group.
template <class L>
static inline size_t prepared_row(const Matrix& a) {
  return blocks_of<L>(a) * size_t(L::PER) * W + padded_groups(a);
}
static size_t prepared_floats(const Matrix& a, size_t m) {
#if defined(MLK_HAS_DOTS)
  if (digits::takes(a)) return digits::floats(a, m);
#endif
  size_t floats = 0;
  by_layout(a, [&](auto layout) { floats = m * prepared_row<decltype(layout)>(a); });
  return floats;
}

// The sum of each group of the m-th row; zero behind the last one.
static inline void sum_groups(const Matrix& a, const Rows& x, size_t m, float* to) {
  float values[128];
  for (size_t g = 0, groups = a.columns / a.group; g < padded_groups(a); ++g) {
    F total = {};
    if (g < groups) {
      widen_row(x.type, x.data, m * x.n + g * a.group, values, a.group);
      for (int k = 0; k < a.group; k += W) total += load(values + k);
    }
    to[g] = sum(total);
  }
}

static void prepare(const Matrix& a, const Rows& x, float* prepared) {
#if defined(MLK_HAS_DOTS)
  if (digits::takes(a)) return digits::prepare(a, x, prepared);
#endif
  by_layout(a, [&](auto layout) {
    using L = decltype(layout);
    for (size_t m = 0; m < x.m; ++m, prepared += padded_groups(a)) {
      for (size_t start = 0; start < a.columns; start += L::BLOCK, prepared += L::PER * W) {
        float values[L::BLOCK] = {};
        size_t n = x.n - start < size_t(L::BLOCK) ? x.n - start : size_t(L::BLOCK);
        widen_row(x.type, x.data, m * x.n + start, values, n);
        for (int i = 0; i < L::PER; ++i) {
          for (int lane = 0; lane < W; ++lane) {
            prepared[i * W + lane] = values[L::place(i, lane)] * L::weight_of(i);
          }
        }
      }
      if constexpr (L::IS_PACKED) sum_groups(a, x, m, prepared);
    }
  });
}

// R rows of the matrix times M rows of x. Scales stay in registers for a vector of groups.
template <class L, int M, int R>
struct FewProducts {
  const Matrix& a;
  const float* x;
  size_t row, bytes = row_bytes(a), stride = prepared_row<L>(a);
  size_t whole = bytes < size_t(L::BEHIND) ? 0 : (bytes - L::BEHIND) / L::BYTES;  // blocks
  const char* ahead = row_of(a, row) + far_ahead(R * bytes);
  F total[R][M] = {}, scale[R] = {};

  // Adds a block's products; the matrix's rows stand `apart` bytes apart.
  __attribute__((always_inline)) void block(const char* from, size_t apart, size_t b, I lanes) {
    typename L::Raw raw[R];
    F dot[R][M] = {};
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) raw[r] = L::raw(from + r * apart);
#pragma GCC unroll 16
    for (int i = 0; i < L::PER; ++i) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        F number = L::number(raw[r], i);
        for (int m = 0; m < M; ++m) dot[r][m] += number * load(x + m * stride + (b * L::PER + i) * W);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      for (int m = 0; m < M; ++m) {
        if constexpr (L::IS_PACKED) total[r][m] += pick(scale[r], lanes) * dot[r][m];
        else total[r][m] += dot[r][m];
      }
    }
  }

  // Adds the blocks [b, end); lanes: which of the scales each lane takes, `step` more in each block.
  __attribute__((always_inline)) void blocks(size_t b, size_t end, I lanes) {
    const int shift = a.bits ? __builtin_ctz(unsigned(a.group)) : 0;
    const size_t first = b;
    for (const char* data = row_of(a, row); b < end; ++b) {
      I at = lanes + int((b - first) * L::BLOCK >> shift);
      const char* from = data + b * L::BYTES;
      if (b < whole) {
#pragma GCC unroll 8
        for (int line = 0; line < R * L::BYTES; line += 64) __builtin_prefetch(ahead + line);
        ahead += R * L::BYTES;
        block(from, bytes, b, at);
      } else {
        constexpr size_t held = L::BYTES + L::BEHIND;
        char rest[R][held] = {};
        for (int r = 0; r < R; ++r) __builtin_memcpy(rest[r], from + r * bytes, bytes - b * L::BYTES);
        block(rest[0], held, b, at);
      }
    }
  }

  __attribute__((always_inline)) void packed() {
    const size_t groups = a.columns / a.group, in_vector = W * a.group / L::BLOCK, all = blocks_of<L>(a);
    const float* sums = x + all * L::PER * W;
    I lanes;
    for (int lane = 0; lane < W; ++lane) lanes[lane] = L::place(0, lane) / a.group;
    for (size_t g = 0, b = 0; g < groups; g += W, b += in_vector) {
      typed(a.type, [&](auto* t) __attribute__((always_inline)) {
        using T = std::remove_pointer_t<decltype(t)>;
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          size_t at = (row + r) * groups + g;
          const T *scales = static_cast<const T*>(a.scales) + at, *biases = static_cast<const T*>(a.biases) + at;
          __builtin_prefetch(scales + R * groups);
          __builtin_prefetch(biases + R * groups);
          scale[r] = load_some(scales, groups - g);
          F bias = load_some(biases, groups - g);
          for (int m = 0; m < M; ++m) total[r][m] += bias * load(sums + m * stride + g);
        }
      });
      blocks(b, least(b + in_vector, all), lanes);
    }
  }

  __attribute__((always_inline)) void write(Type type, void* y) {
    if constexpr (L::IS_PACKED) packed();
    else blocks(0, blocks_of<L>(a), I{});
    for (int r = 0; r < R; ++r) {
      for (int m = 0; m < M; ++m) {
        float number = sum(total[r][m]);
        narrow_row(type, &number, y, m * a.rows + row + r, 1);
      }
    }
  }
};

template <class L, int M>
static inline void few_products(const Matrix& a, const Rows& x, const float* prepared, void* y, size_t first,
                                size_t last) {
  constexpr int TOGETHER = M > 1 ? 1 : W == 16 ? 4 : 2;  // as registers allow
  for (; first + TOGETHER <= last; first += TOGETHER) FewProducts<L, M, TOGETHER>{a, prepared, first}.write(x.type, y);
  for (; first < last; ++first) FewProducts<L, M, 1>{a, prepared, first}.write(x.type, y);
}

static void few(const Matrix& a, const Rows& x, const float* prepared, void* y, size_t first,
                size_t last) {
#if defined(MLK_HAS_DOTS)
  if (digits::takes(a)) return digits::few(a, x, prepared, y, first, last);
#endif
  by_layout(a, [&](auto layout) {
    using L = decltype(layout);
    switch (x.m) {
      case 1: return few_products<L, 1>(a, x, prepared, y, first, last);
      case 2: return few_products<L, 2>(a, x, prepared, y, first, last);
      case 3: return few_products<L, 3>(a, x, prepared, y, first, last);
      case 4: return few_products<L, 4>(a, x, prepared, y, first, last);
      default: return few_products<L, 5>(a, x, prepared, y, first, last);
    }
  });
}

}  // namespace mlk::MLK_ISA
