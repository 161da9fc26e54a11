// Attention over a cache with a running softmax over tiles of its rows (arXiv 2205.14135,
// algorithm 1).
//
// One part is one key head and a run of queries; the query heads that share the key head are taken
// together, so that a tile of keys and values is widened once for all of them. Many queries are
// multiplied in register blocks; few go by `direct.h`, with the rows split over several parts.
#pragma once

#include "mlx_llama_kernels/direct.h"
#include "mlx_llama_kernels/multiply.h"
#include "mlx_llama_kernels/rows.h"

namespace mlk::MLK_ISA {

constexpr size_t TILE = 2 * PANEL;       // rows at once
constexpr size_t QUERIES = (128 + MR - 1) / MR * MR;  // queries at once, of all heads together
constexpr size_t SPLIT = 1024;           // stored rows of a part of few queries
constexpr float LOWEST = -1e30f;         // below every score, finite: hidden minus hidden is no NaN

struct Shape {
  size_t kv_heads, group, positions, runs, splits, width, dim, rows;
  explicit Shape(const Attention& a) {
    kv_heads = a.keys[0].numbers.heads;
    group = a.q.heads / kv_heads;
    size_t fits = QUERIES / group;
    positions = fits < 1 ? 1 : least(fits, a.q.m);
    runs = positions ? (a.q.m + positions - 1) / positions : 0;
    width = a.q.dim;
    dim = up(width, PANEL);
    rows = up(group * positions, MR);
    splits = is_direct(group * positions) ? up(a.rows, SPLIT) / SPLIT : 1;
  }
  static bool is_direct(size_t rows) { return rows < size_t(MR); }
  // What a part leaves: sums, and the largest score and the total of weights of each query.
  size_t partial() const { return rows * (dim + 2); }
};

static size_t attention_joins(const Attention& a) {
  Shape s(a);
  return a.q.batch * s.kv_heads * s.runs;
}
static size_t attention_parts(const Attention& a) { return attention_joins(a) * Shape(a).splits; }
static size_t attention_partial_floats(const Attention& a) {
  Shape s(a);
  return s.splits > 1 ? attention_parts(a) * s.partial() : 0;
}
static size_t attention_floats(const Attention& a) {
  Shape s(a);
  size_t scores = STRIP > TILE ? STRIP : TILE;
  // Packed queries, their sums, scores, packed weights, keys, values, fades, and what a part leaves.
  return s.rows * (s.dim + most_groups + scores + TILE + 1) + 2 * TILE * s.dim + s.partial();
}

// --- who sees what -------------------------------------------------------------------------------

// Whether one of the queries sees one of the rows [row, row + n).
static inline bool is_any_seen(const Attention& a, size_t row, size_t n, size_t query, size_t last) {
  if (!a.sight) return row <= a.rows - a.q.m + last;
  const int32_t *from = a.sight + row, *until = from + a.rows;
  bool found = false;
  for (size_t i = 0; i < n; ++i) found |= from[i] <= int32_t(last) && until[i] >= int32_t(query);
  return found;
}

// Hides the scores of the rows [row, row + n) that the query does not see.
static inline void hide(const Attention& a, size_t row, size_t n, size_t query, float* scores) {
  if (a.sight) {
    const int32_t *from = a.sight + row, *until = from + a.rows;
    for (size_t i = 0; i < n; ++i) {
      bool is_seen = from[i] <= int32_t(query) && until[i] >= int32_t(query);
      scores[i] = is_seen ? scores[i] : LOWEST;
    }
  } else {
    size_t sees = a.rows - a.q.m + query + 1;
    for (size_t i = sees <= row ? 0 : least(sees - row, n); i < n; ++i) scores[i] = LOWEST;
  }
}

// Turns one query's scores into weights, and returns by how much what was summed before shrinks.
// Up to a whole vector the weights behind n are zero.
static inline float soften(float* scores, size_t n, float& largest, float& total) {
  F most = all(largest);
  for (size_t i = n; i < up(n, W); ++i) scores[i] = LOWEST;
  for (size_t i = 0; i < n; i += W) most = larger(load(scores + i), most);
  float now = largest;
  for (int lane = 0; lane < W; ++lane) now = most[lane] > now ? most[lane] : now;
  F sums = {};
  for (size_t i = 0; i < n; i += W) {
    F score = load(scores + i);
    F weight = score <= LOWEST ? F{} : exponential(score - now);
    store(scores + i, weight);
    sums += weight;
  }
  float fade = now == largest ? 1.0f : exponential(all(largest - now))[0];
  total = total * fade + sum(sums);
  largest = now;
  return fade;
}

// --- many queries: panels ------------------------------------------------------------------------

// keys (n, dim) -> PANEL keys after one another, each panel (dim, PANEL); absent keys are zero.
template <class Reader>
static inline void transpose_keys(const Reader& reader, const Stored& k, size_t batch, size_t head,
                                  size_t first, size_t n, float* to) {
  float rows[W][most_dim + W];
  const size_t dim = dim_of(k);
  for (size_t key = 0; key < TILE; key += W) {
    for (size_t lane = 0; lane < size_t(W); ++lane) {
      if (key + lane < n) unpack_row(reader, k, batch, head, first + key + lane, rows[lane]);
      else for (size_t d = 0; d < dim; ++d) rows[lane][d] = 0;
    }
    float* panel = to + key / PANEL * dim * PANEL + key % PANEL;
    for (size_t d = 0; d < dim; d += W) {
      F columns[W];
      for (int lane = 0; lane < W; ++lane) columns[lane] = load_some(rows[lane] + d, dim - d);
      turn(columns);
      for (size_t i = d; i < dim && i < d + W; ++i) store(panel + i * PANEL, columns[i - d]);
    }
  }
}

// values (n, dim) -> panels of PANEL numbers, each (TILE, PANEL).
template <class Reader>
static inline void place_values(const Reader& reader, const Stored& v, size_t batch, size_t head,
                                size_t first, size_t n, size_t dim, float* to) {
  float row[most_dim + PANEL] = {};
  for (size_t key = 0; key < n; ++key) {
    unpack_row(reader, v, batch, head, first + key, row);
    for (size_t d = 0; d < dim; d += W) {
      store(to + (d / PANEL * TILE + key) * PANEL + d % PANEL, load(row + d));
    }
  }
}

// out (rows, stride) += packed blocks times panels, depth numbers summed.
static inline void by_panels(const float* packed, size_t rows, const float* panels, size_t n_panels,
                             size_t panel_depth, size_t depth, float* out, size_t stride) {
  for (size_t block = 0; block < rows / MR; ++block) {
    for (size_t p = 0; p < n_panels; ++p) {
      float* place = out + block * MR * stride + p * PANEL;
      multiply(packed + block * panel_depth * MR, panels + p * panel_depth * PANEL, depth, place, stride);
    }
  }
}

// --- a part --------------------------------------------------------------------------------------

// Which queries and which stored rows a part has, and where it works.
struct Part {
  size_t batch, head, start, positions, rows, first, last;
  bool is_direct;
  float *queries, *totals, *scores, *weights, *keys, *values, *fades;  // scratch
  float *sums, *largest, *total;                                      // what it leaves

  Part(const Attention& a, const Shape& s, float* scratch, float* partial, size_t part) {
    size_t split = part % s.splits, join = part / s.splits, run = join % s.runs;
    head = join / s.runs % s.kv_heads;
    batch = join / s.runs / s.kv_heads;
    start = run * s.positions;
    positions = least(a.q.m - start, s.positions);
    rows = s.group * positions;
    is_direct = Shape::is_direct(s.group * s.positions);
    first = split * SPLIT;
    last = s.splits > 1 ? least(first + SPLIT, a.rows) : a.rows;
    queries = scratch;
    totals = queries + s.rows * s.dim;
    scores = totals + s.rows * most_groups;
    weights = scores + s.rows * (STRIP > TILE ? STRIP : TILE);
    keys = weights + s.rows * TILE;
    values = keys + TILE * s.dim;
    fades = values + TILE * s.dim;
    sums = s.splits > 1 ? partial + part * s.partial() : fades + s.rows;
    largest = sums + s.rows * s.dim;
    total = largest + s.rows;
  }
};

// The part's queries times the scale: one after another as the keys' numbers stand, with the sum of
// each group; or packed by `interleave`.
static inline void take_queries(const Attention& a, const Shape& s, const Part& p) {
  float row[most_dim];
  const Stored& like = a.keys[0];
  size_t groups = groups_of(like), group = s.width / groups;
  float* to = p.is_direct ? p.queries : p.sums;
  for (size_t i = 0; i < s.rows * s.dim; ++i) to[i] = 0;
  for (size_t r = 0; r < p.rows; ++r) {
    size_t from = place(a.q, p.batch, p.head * s.group + r / p.positions, p.start + r % p.positions);
    widen_row(a.q.type, a.q.data, from, row, s.width);
    for (size_t d = 0; d < s.width; ++d) {
      to[r * s.dim + (p.is_direct ? lane_of(like, d) : d)] = row[d] * a.scale;
    }
    for (size_t g = 0; g < groups; ++g) {
      double sum = 0;
      for (size_t d = g * group; d < (g + 1) * group; ++d) sum += row[d] * a.scale;
      p.totals[r * groups + g] = float(sum);
    }
  }
  if (!p.is_direct) interleave(p.sums, s.dim, p.rows, s.width, p.queries);
}

// Softens the part's scores, which stand `stride` apart, of the rows [row, row + n).
static inline void soften_all(const Attention& a, const Part& p, size_t row, size_t n, size_t stride) {
  for (size_t r = 0; r < p.rows; ++r) {
    hide(a, row, n, p.start + r % p.positions, p.scores + r * stride);
    p.fades[r] = soften(p.scores + r * stride, n, p.largest[r], p.total[r]);
  }
}

// One strip of the rows of a cache's part: `row` counts all parts' rows, `first` this one's. While
// keys are worked on the values are asked of the memory, and the next strip's keys meanwhile.
static inline void attend_strip(const Attention& a, const Shape& s, const Part& p, size_t part,
                                size_t row, size_t first, size_t n) {
  const Stored &k = a.keys[part], &v = a.values[part];
  Ahead next_keys(k, p.batch, p.head), own_values(v, p.batch, p.head);
  reading(k, p.batch, p.head, [&](const auto& keys) {
    direct_scores(keys, k, p.batch, p.head, first, n, p.queries, p.totals, p.rows, s.dim, own_values,
                  p.scores);
  });
  soften_all(a, p, row, n, STRIP);
  reading(v, p.batch, p.head, [&](const auto& values) {
    direct_sums(values, v, p.batch, p.head, first, n, p.scores, p.fades, p.rows, s.dim, next_keys, p.sums);
  });
}

static inline void attend_tile(const Attention& a, const Shape& s, const Part& p, size_t part,
                               size_t row, size_t first, size_t n) {
  const Stored &k = a.keys[part], &v = a.values[part];
  const size_t rows = up(p.rows, MR);  // the last run of queries may be shorter
  reading(k, p.batch, p.head, [&](const auto& keys) {
    transpose_keys(keys, k, p.batch, p.head, first, n, p.keys);
  });
  for (size_t i = 0; i < rows * TILE; ++i) p.scores[i] = 0;
  by_panels(p.queries, rows, p.keys, TILE / PANEL, s.width, s.width, p.scores, TILE);
  soften_all(a, p, row, n, TILE);
  for (size_t r = 0; r < p.rows; ++r) {
    if (p.fades[r] == 1.0f) continue;
    for (size_t d = 0; d < s.dim; ++d) p.sums[r * s.dim + d] *= p.fades[r];
  }
  reading(v, p.batch, p.head, [&](const auto& values) {
    place_values(values, v, p.batch, p.head, first, n, s.dim, p.values);
  });
  for (size_t block = 0; block < rows; block += MR) {
    interleave(p.scores + block * TILE, TILE, least(p.rows - block, MR), n, p.weights + block * TILE);
  }
  by_panels(p.weights, rows, p.values, s.dim / PANEL, TILE, n, p.sums, s.dim);
}

static void attend_part(const Attention& a, const Shape& s, const Part& p) {
  take_queries(a, s, p);
  for (size_t i = 0; i < s.rows * s.dim; ++i) p.sums[i] = 0;
  for (size_t r = 0; r < s.rows; ++r) p.largest[r] = LOWEST, p.total[r] = 0;
  size_t step = p.is_direct ? STRIP : TILE, before = 0;
  for (size_t part = 0; part < a.parts; before += a.keys[part++].numbers.m) {
    size_t stop = least(p.last, before + a.keys[part].numbers.m);
    for (size_t row = before > p.first ? before : p.first; row < stop; row += step) {
      size_t n = least(step, stop - row);
      if (!is_any_seen(a, row, n, p.start, p.start + p.positions - 1)) continue;
      if (p.is_direct) attend_strip(a, s, p, part, row, row - before, n);
      else attend_tile(a, s, p, part, row, row - before, n);
    }
  }
}

static inline void write_outputs(const Attention& a, const Shape& s, const Part& p) {
  float row[most_dim];
  for (size_t r = 0; r < p.rows; ++r) {
    const float* sums = p.sums + r * s.dim;
    for (size_t d = 0; d < s.width; ++d) {
      row[d] = sums[p.is_direct ? lane_of(a.values[0], d) : d] / p.total[r];
    }
    size_t position = p.start + r % p.positions, head = p.head * s.group + r / p.positions;
    size_t at = ((p.batch * a.q.m + position) * a.q.heads + head) * s.width;
    narrow_row(a.q.type, row, a.out, at, s.width);
  }
}

static void attention(const Attention& a, float* scratch, float* partial, size_t first, size_t last) {
  Shape shape(a);
  for (size_t part = first; part < last; ++part) {
    Part p(a, shape, scratch, partial, part);
    attend_part(a, shape, p);
    if (shape.splits == 1) write_outputs(a, shape, p);
  }
}

// Adds what the other splits of a run left to what the first one did, and writes it.
static void attention_join(const Attention& a, float* partial, size_t first, size_t last) {
  Shape s(a);
  for (size_t join = first; join < last; ++join) {
    Part p(a, s, partial, partial, join * s.splits);
    for (size_t r = 0; r < p.rows; ++r) {
      float* sums = p.sums + r * s.dim;
      for (size_t other = s.partial(); other < s.splits * s.partial(); other += s.partial()) {
        float now = larger(all(p.largest[other + r]), all(p.largest[r]))[0];
        float fade = exponential(all(p.largest[r] - now))[0];
        float share = exponential(all(p.largest[other + r] - now))[0];
        for (size_t d = 0; d < s.dim; ++d) sums[d] = sums[d] * fade + sums[other + d] * share;
        p.total[r] = p.total[r] * fade + p.total[other + r] * share;
        p.largest[r] = now;
      }
    }
    write_outputs(a, s, p);
  }
}

}  // namespace mlk::MLK_ISA
