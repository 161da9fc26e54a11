"""Attention over the rows that a cache shows, where no fused kernel does it: any storage, any mask.

The query heads that share a key head are folded into one product. One pass over all scores where
they are few; else tile by tile with a running softmax (arXiv 2205.14135, algorithm 1), each tile
evaluated before the next, because a lazy loop would keep every tile alive.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_llama.cache.rows import PLAIN, Stored
from mlx_llama.cache.view import Mask, Sees, View

TILE_SCORES = 1 << 20  # scores of one tile: 4 MiB in float32
LEAST_ROWS = 32
FLOOR = -1e30  # below every score; finite, so that a tile without visible rows gives no NaN


def attend(q: mx.array, view: View, *, scale: float, packed_dtype: mx.Dtype) -> mx.array:
    """Attend over a view: q (B, H, m, D), the newest m queries -> (B, H, m, D); float32 softmax.

    packed_dtype: of the products with packed rows. Evaluates where the scores are many.
    """
    batch, n_heads, n_queries, head_dim = q.shape
    folded = (q * scale).reshape(batch, view.n_kv_heads, -1, head_dim)  # (B, K, H / K * m, D)
    if n_queries == 1 or n_heads * n_queries * view.n_rows <= TILE_SCORES:
        out = _at_once(folded, view, n_queries, packed_dtype)
    else:
        out = _by_tiles(folded, view, n_queries, tile_rows(n_heads, n_queries))
    return out.astype(q.dtype).reshape(batch, n_heads, n_queries, head_dim)


def tile_rows(n_heads: int, n_queries: int) -> int:
    """Return how many rows one tile has."""
    return max(LEAST_ROWS, TILE_SCORES // (n_heads * n_queries))


def _at_once(q: mx.array, view: View, n_queries: int, packed_dtype: mx.Dtype) -> mx.array:
    scores = [_scores(q, keys, packed_dtype) for keys, _ in view.parts]
    joined = scores[0] if len(scores) == 1 else mx.concatenate(scores, axis=-1)
    weights = mx.softmax(_masked(joined, view.mask(n_queries)), axis=-1, precise=True)
    out, before = None, 0
    for _, values in view.parts:
        part = weights[..., before : before + values.n_rows] if len(view.parts) > 1 else weights
        product = _mixed(part, values, packed_dtype)
        out = product if out is None else out + product
        before += values.n_rows
    assert out is not None
    return out


def _scores(q: mx.array, keys: Stored, packed_dtype: mx.Dtype) -> mx.array:
    """Return q (B, K, N, D) times the keys, (B, K, N, S)."""
    if keys.bits == PLAIN:
        return q @ keys.arrays[0].swapaxes(-1, -2)
    return _packed_product(q, keys, packed_dtype, transpose=True)


def _mixed(weights: mx.array, values: Stored, packed_dtype: mx.Dtype) -> mx.array:
    """Return weights (B, K, N, S) times the values, (B, K, N, D)."""
    if values.bits == PLAIN:
        return weights.astype(values.arrays[0].dtype) @ values.arrays[0]
    return _packed_product(weights, values, packed_dtype, transpose=False)


def _packed_product(x: mx.array, rows: Stored, dtype: mx.Dtype, *, transpose: bool) -> mx.array:
    numbers, scales, biases = rows.arrays
    return mx.quantized_matmul(
        x.astype(dtype),
        numbers,
        scales=scales.astype(dtype),
        biases=biases.astype(dtype),
        transpose=transpose,
        group_size=rows.group,
        bits=rows.bits,
    )


def _by_tiles(q: mx.array, view: View, n_queries: int, n_rows: int) -> mx.array:
    dtype = q.dtype
    largest = mx.full((*q.shape[:3], 1), FLOOR, dtype=mx.float32)
    total, out = mx.zeros_like(largest), mx.zeros(q.shape, dtype=mx.float32)
    for keys, values, mask in view.tiles(n_rows, n_queries):
        scores = _masked(q @ keys.dense(dtype).swapaxes(-1, -2), mask).astype(mx.float32)
        now = mx.maximum(largest, scores.max(axis=-1, keepdims=True))
        weights, fade = mx.exp(scores - now), mx.exp(largest - now)
        total = total * fade + weights.sum(axis=-1, keepdims=True)
        out = out * fade + (weights.astype(dtype) @ values.dense(dtype)).astype(mx.float32)
        largest = now
        del scores, weights, keys, values  # the next tile's memory
        mx.eval(largest, total, out)
    return out / total


def _masked(scores: mx.array, mask: Mask) -> mx.array:
    """Hide what no query of scores (B, K, H / K * m, S) may see; mask: (m, S)."""
    if isinstance(mask, Sees):
        return scores
    batch, heads, rows, width = scores.shape
    folded = scores.reshape(batch, heads, -1, *mask.shape)
    return mx.where(mask, folded, mx.array(-mx.inf, scores.dtype)).reshape(
        batch, heads, rows, width
    )
