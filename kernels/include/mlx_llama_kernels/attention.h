// Causal attention with a running softmax over tiles of keys (arXiv 2205.14135, algorithm 1).
//
// One part is one key head and a run of queries; the query heads that share the key head are taken
// together, so that a tile of keys and values is widened once for all of them. Scores and weighted
// sums are the same register-blocked product, with keys transposed.
#pragma once

#include "mlx_llama_kernels/affine.h"
#include "mlx_llama_kernels/rows.h"

namespace mlk::MLK_ISA {

constexpr size_t TILE = 2 * PANEL;       // keys at once
constexpr size_t QUERIES = 8 * MR;       // rows of queries at once, of all heads together
constexpr float LOWEST = -1e30f;         // below every score, finite: hidden minus hidden is no NaN
constexpr size_t most_dim = 512;

static inline size_t up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct Shape {
  size_t group, positions, runs, dim, rows;
  explicit Shape(const Attention& a) {
    group = a.q.heads / a.k.heads;
    size_t fits = QUERIES / group;
    positions = fits < 1 ? 1 : fits > a.q.m ? a.q.m : fits;
    runs = positions ? (a.q.m + positions - 1) / positions : 0;
    dim = up(a.q.dim, PANEL);
    rows = up(group * positions, MR);
  }
};

static size_t attention_parts(const Attention& a) {
  return a.q.batch * a.k.heads * Shape(a).runs;
}

static size_t attention_floats(const Attention& a) {
  Shape s(a);
  // Packed queries, sums, scores, packed weights, keys, values, largest and total.
  return s.rows * (2 * s.dim + 2 * TILE + 2) + 2 * TILE * s.dim;
}

// keys (n, dim) -> PANEL keys after one another, each panel (dim, PANEL); absent keys are zero.
static inline void transpose_keys(const Heads& k, size_t base, size_t n, float* to) {
  float row[most_dim];
  for (size_t key = 0; key < TILE; ++key) {
    float* column = to + key / PANEL * k.dim * PANEL + key % PANEL;
    if (key < n) widen_row(k.type, k.data, base + key * k.stride_row, row, k.dim);
    else for (size_t d = 0; d < k.dim; ++d) row[d] = 0;
    for (size_t d = 0; d < k.dim; ++d) column[d * PANEL] = row[d];
  }
}

// values (n, dim) -> panels of PANEL numbers, each (TILE, PANEL).
static inline void place_values(const Heads& v, size_t base, size_t n, size_t dim, float* to) {
  float row[most_dim + PANEL];
  for (size_t key = 0; key < n; ++key) {
    widen_row(v.type, v.data, base + key * v.stride_row, row, v.dim);
    for (size_t d = v.dim; d < dim; ++d) row[d] = 0;
    for (size_t d = 0; d < dim; d += W) {
      store(to + (d / PANEL * TILE + key) * PANEL + d % PANEL, load(row + d));
    }
  }
}

// Turns one row of scores into weights, and returns by how much what was summed before shrinks.
static inline float soften(float* scores, size_t seen, size_t n, float& largest, float& total) {
  F most = all(largest);
  for (size_t i = seen; i < up(n, W); ++i) scores[i] = LOWEST;
  for (size_t i = 0; i < n; i += W) most = larger(load(scores + i), most);
  float now = largest;
  for (int lane = 0; lane < W; ++lane) now = most[lane] > now ? most[lane] : now;
  F weight = {};
  for (size_t i = 0; i < n; i += W) {
    F w = exponential(load(scores + i) - now);
    store(scores + i, w);
    weight += w;
  }
  for (size_t i = seen; i < up(n, W); ++i) {
    weight[i % W] -= scores[i];
    scores[i] = 0;
  }
  float fade = exponential(all(largest - now))[0];
  total = total * fade + sum(weight);
  largest = now;
  return fade;
}

// Few queries: each key is read once, its products with the queries are summed over the numbers.
static inline void direct_scores(const float* q, size_t rows, size_t dim, const Heads& k,
                                 size_t base, size_t n, float* scores) {
  float row[most_dim + PANEL];
  for (size_t key = 0; key < n; ++key) {
    widen_row(k.type, k.data, base + key * k.stride_row, row, k.dim);
    for (size_t d = k.dim; d < dim; ++d) row[d] = 0;
    for (size_t r = 0; r < rows; ++r) {
      F dot = {};
      for (size_t d = 0; d < dim; d += W) dot += load(q + r * dim + d) * load(row + d);
      scores[r * TILE + key] = sum(dot);
    }
  }
}

// tile: memory for rows * dim numbers; what one tile adds is summed there first.
static inline void direct_sums(const float* weights, size_t rows, size_t dim, const Heads& v,
                               size_t base, size_t n, float* tile, float* sums) {
  float row[most_dim + PANEL];
  for (size_t i = 0; i < rows * dim; ++i) tile[i] = 0;
  for (size_t key = 0; key < n; ++key) {
    widen_row(v.type, v.data, base + key * v.stride_row, row, v.dim);
    for (size_t d = v.dim; d < dim; ++d) row[d] = 0;
    for (size_t r = 0; r < rows; ++r) {
      F weight = all(weights[r * TILE + key]);
      for (size_t d = 0; d < dim; d += W) {
        store(tile + r * dim + d, load(tile + r * dim + d) + weight * load(row + d));
      }
    }
  }
  for (size_t i = 0; i < rows * dim; i += W) store(sums + i, load(sums + i) + load(tile + i));
}

// a (rows, depth), row after row -> blocks of MR rows, each (depth, MR).
static inline void interleave(const float* a, size_t stride, size_t rows, size_t depth, float* to) {
  for (size_t r = 0; r < up(rows, MR); ++r) {
    float* column = to + r / MR * depth * MR + r % MR;
    for (size_t k = 0; k < depth; ++k) column[k * MR] = r < rows ? a[r * stride + k] : 0;
  }
}

// out (rows, stride) = or += packed blocks times panels, depth numbers summed.
static inline void by_panels(const float* packed, size_t rows, const float* panels, size_t n_panels,
                             size_t panel_depth, size_t depth, float* out, size_t stride) {
  float c[MR * PANEL];
  for (size_t block = 0; block < rows / MR; ++block) {
    for (size_t p = 0; p < n_panels; ++p) {
      float* place = out + block * MR * stride + p * PANEL;
      for (int r = 0; r < MR; ++r) __builtin_memcpy(c + r * PANEL, place + r * stride, PANEL * 4);
      multiply(packed + block * panel_depth * MR, panels + p * panel_depth * PANEL, depth, c);
      for (int r = 0; r < MR; ++r) __builtin_memcpy(place + r * stride, c + r * PANEL, PANEL * 4);
    }
  }
}

static void attend_part(const Attention& a, const Shape& s, float* scratch, size_t part) {
  size_t run = part % s.runs, head = part / s.runs % a.k.heads, batch = part / s.runs / a.k.heads;
  size_t start = run * s.positions;
  size_t positions = a.q.m - start < s.positions ? a.q.m - start : s.positions;
  size_t rows = s.group * positions, dim = s.dim;
  float* queries = scratch;
  float* sums = queries + s.rows * dim;
  float* scores = sums + s.rows * dim;
  float* weights = scores + s.rows * TILE;
  float* keys = weights + s.rows * TILE;
  float* values = keys + TILE * dim;
  float* largest = values + TILE * dim;
  float* total = largest + s.rows;
  bool is_direct = rows < MR;
  for (size_t i = 0; i < s.rows * dim; ++i) queries[i] = sums[i] = 0;
  for (size_t r = 0; r < s.rows; ++r) largest[r] = LOWEST, total[r] = 0;
  for (size_t r = 0; r < rows; ++r) {
    float* to = sums + r * dim;
    size_t from = place(a.q, batch, head * s.group + r / positions, start + r % positions);
    widen_row(a.q.type, a.q.data, from, to, a.q.dim);
    for (size_t d = 0; d < a.q.dim; ++d) to[d] *= a.scale;
  }
  if (is_direct) __builtin_memcpy(queries, sums, s.rows * dim * sizeof(float));
  else interleave(sums, dim, rows, a.q.dim, queries);
  for (size_t i = 0; i < s.rows * dim; ++i) sums[i] = 0;

  size_t hidden_before = a.k.m - a.q.m;  // rows that every query sees, but its own and later ones
  size_t stop = hidden_before + start + positions;
  for (size_t tile = 0; tile < stop; tile += TILE) {
    size_t n = stop - tile < TILE ? stop - tile : TILE;
    size_t k_base = place(a.k, batch, head, tile), v_base = place(a.v, batch, head, tile);
    if (is_direct) {
      direct_scores(queries, rows, dim, a.k, k_base, n, scores);
    } else {
      transpose_keys(a.k, k_base, n, keys);
      place_values(a.v, v_base, n, dim, values);
      for (size_t i = 0; i < s.rows * TILE; ++i) scores[i] = 0;
      by_panels(queries, s.rows, keys, TILE / PANEL, a.q.dim, a.q.dim, scores, TILE);
    }
    for (size_t r = 0; r < rows; ++r) {
      size_t sees = hidden_before + start + r % positions + 1;
      size_t seen = sees <= tile ? 0 : sees - tile < n ? sees - tile : n;
      float fade = soften(scores + r * TILE, seen, n, largest[r], total[r]);
      if (fade != 1.0f) {
        for (size_t d = 0; d < dim; ++d) sums[r * dim + d] *= fade;
      }
    }
    if (is_direct) {
      direct_sums(scores, rows, dim, a.v, v_base, n, values, sums);
    } else {
      for (size_t block = 0; block < s.rows; block += MR) {
        size_t here = rows > block ? (rows - block < MR ? rows - block : MR) : 0;
        float* to = weights + block * TILE;
        for (size_t r = 0; r < MR; ++r) {
          for (size_t k = 0; k < n; ++k) to[k * MR + r] = r < here ? scores[(block + r) * TILE + k] : 0;
        }
      }
      by_panels(weights, s.rows, values, dim / PANEL, TILE, n, sums, dim);
    }
  }
  for (size_t r = 0; r < rows; ++r) {
    for (size_t d = 0; d < a.q.dim; ++d) sums[r * dim + d] /= total[r];
    size_t position = start + r % positions, out_head = head * s.group + r / positions;
    size_t at = ((batch * a.q.m + position) * a.q.heads + out_head) * a.q.dim;
    narrow_row(a.q.type, sums + r * dim, a.out, at, a.q.dim);
  }
}

static void attention(const Attention& a, float* scratch, size_t first, size_t last) {
  Shape shape(a);
  for (size_t part = first; part < last; ++part) attend_part(a, shape, scratch, part);
}

}  // namespace mlk::MLK_ISA
