"""Attention over the rows that a cache shows, where no fused kernel does it: any storage, any mask.

The query heads that share a key head are folded into one product. One pass over all scores where
they are few; else tile by tile with a running softmax (arXiv 2205.14135, algorithm 1), each tile
evaluated before the next, because a lazy loop would keep every tile alive.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_llama.cache.rows import PLAIN, Stored
from mlx_llama.cache.view import Mask, Sees, View

LEAST_ROWS = 32  # of a tile
FLOOR = -1e30  # below every score; finite, so that a tile without visible rows gives no NaN


@dataclass(frozen=True, slots=True)
class Manner:
    """What suits a device.

    packed_dtype: of products with packed rows. tile_scores: how many are evaluated at once.
    by_heads: whether a product with packed rows is made head by head, because one of several heads
    would first copy rows that are a part of longer buffers.
    """

    packed_dtype: mx.Dtype
    tile_scores: int
    by_heads: bool

    def tile_rows(self, n_heads: int, n_queries: int) -> int:
        """Return how many rows one tile has."""
        return max(LEAST_ROWS, self.tile_scores // (n_heads * n_queries))


def attend(q: mx.array, view: View, *, scale: float, manner: Manner) -> mx.array:
    """Attend over a view: q (B, H, m, D), the newest m queries -> (B, H, m, D); float32 softmax.

    Evaluates where the scores are many.
    """
    batch, n_heads, n_queries, head_dim = q.shape
    folded = (q * scale).reshape(batch, view.n_kv_heads, -1, head_dim)  # (B, K, H / K * m, D)
    n_rows = manner.tile_rows(n_heads, n_queries)
    if n_queries == 1 or view.n_rows <= n_rows:
        out = _at_once(folded, view, n_queries, manner)
    else:
        out = _by_tiles(folded, view, n_queries, n_rows, manner)
    return out.astype(q.dtype).reshape(batch, n_heads, n_queries, head_dim)


def _at_once(q: mx.array, view: View, n_queries: int, manner: Manner) -> mx.array:
    scores = [_scores(q, keys, manner) for keys, _ in view.parts]
    joined = scores[0] if len(scores) == 1 else mx.concatenate(scores, axis=-1)
    weights = mx.softmax(_masked(joined, view.mask(n_queries)), axis=-1, precise=True)
    out, before = None, 0
    for _, values in view.parts:
        part = weights[..., before : before + values.n_rows] if len(view.parts) > 1 else weights
        product = _mixed(part, values, manner)
        out = product if out is None else out + product
        before += values.n_rows
    assert out is not None
    return out


def _scores(q: mx.array, keys: Stored, manner: Manner) -> mx.array:
    """Return q (B, K, N, D) times the keys, (B, K, N, S)."""
    if keys.bits == PLAIN:
        return q @ keys.arrays[0].swapaxes(-1, -2)
    return _packed_product(q, keys, manner, transpose=True)


def _mixed(weights: mx.array, values: Stored, manner: Manner) -> mx.array:
    """Return weights (B, K, N, S) times the values, (B, K, N, D)."""
    if values.bits == PLAIN:
        return weights.astype(values.arrays[0].dtype) @ values.arrays[0]
    return _packed_product(weights, values, manner, transpose=False)


def _packed_product(x: mx.array, rows: Stored, manner: Manner, *, transpose: bool) -> mx.array:
    dtype, n_heads = manner.packed_dtype, rows.n_kv_heads
    step = 1 if manner.by_heads else n_heads
    products = []
    for head in range(0, n_heads, step):
        numbers, scales, biases = (a[:, head : head + step] for a in rows.arrays)
        products.append(
            mx.quantized_matmul(
                x[:, head : head + step].astype(dtype),
                numbers,
                scales=scales.astype(dtype),
                biases=biases.astype(dtype),
                transpose=transpose,
                group_size=rows.group,
                bits=rows.bits,
            )
        )
    return products[0] if len(products) == 1 else mx.concatenate(products, axis=1)


def _by_tiles(q: mx.array, view: View, n_queries: int, n_rows: int, manner: Manner) -> mx.array:
    dtype = q.dtype
    largest = mx.full((*q.shape[:3], 1), FLOOR, dtype=mx.float32)
    total, out = mx.zeros_like(largest), mx.zeros(q.shape, dtype=mx.float32)
    for keys, values, mask in view.tiles(n_rows, n_queries):
        # A CPU multiplies 1.5 times as fast by a right side whose own rows are unbroken; a packed
        # one that stands so is faster still, one that must be transposed slower.
        columns = mx.contiguous(keys.dense(dtype).swapaxes(-1, -2))
        scores = _masked(q @ columns, mask).astype(mx.float32)
        now = mx.maximum(largest, scores.max(axis=-1, keepdims=True))
        weights, fade = mx.exp(scores - now), mx.exp(largest - now)
        total = total * fade + weights.sum(axis=-1, keepdims=True)
        out = out * fade + _mixed(weights, values, manner).astype(mx.float32)
        largest = now
        del scores, weights, columns, keys, values  # the next tile's memory
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
