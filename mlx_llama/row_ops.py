"""One token's way through a block in three operations, where the native kernels take it.

What MLX costs for each operation is a good part of a small model's step. Each function returns None
where the operations of `ops` are to be used, one by one.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_llama import native, ops
from mlx_llama.cache.view import View
from mlx_llama.config import QuantFormat
from mlx_llama.native import Held


def held(arrays: list[mx.array], form: QuantFormat | None) -> Held | None:
    """Return a matrix of these arrays as the native kernels take it; None where they do not."""
    return native.held(arrays, form)


def _row_kernels(h: mx.array) -> Any | None:
    """Return the native kernels where they take h (B, L, dim) through a block: one token's row."""
    ours = ops.kernels()
    return ours if ours is not None and native.takes_row(h) else None


def turned_heads(
    h: mx.array,
    norm: tuple[mx.array, float],
    wqkv: Held | None,
    periods: mx.array,
    offset: int,
    n_turned: int,
) -> mx.array | None:
    """Return the heads (1, heads, 1, D) of wqkv times the normed row h, the first ones rotated.

    norm: weight and epsilon.
    """
    ours = _row_kernels(h)
    if ours is None or wqkv is None or 2 * periods.size > ours.MOST_HEAD_DIM:
        return None
    how = wqkv.arrays, wqkv.group_size, wqkv.bits
    return ours.turned_heads(h, *norm, *how, periods, offset, n_turned)


def attended(
    h: mx.array, q: mx.array, n_heads: int, view: View, scale: float, wo: Held | None
) -> mx.array | None:
    """Return the row h plus wo times what attention over a view gives.

    q: (1, n_heads or more, 1, D), of which the first are the queries.
    """
    ours = _row_kernels(h)
    if ours is None or wo is None or q.shape[2] != 1 or not native.takes_view(q, view):
        return None
    how = wo.arrays, wo.group_size, wo.bits
    return ours.attended(h, q, n_heads, *ops.view_buffers(view), scale, view.sight.bounds(1), *how)


def feed_forward(
    h: mx.array,
    norm: tuple[mx.array, float],
    w13: Held | None,
    w2: Held | None,
) -> mx.array | None:
    """Return the row h plus w2 times the gated w13 times the normed h."""
    ours = _row_kernels(h)
    if ours is None or w13 is None or w2 is None:
        return None
    if (w13.group_size, w13.bits) != (w2.group_size, w2.bits):
        return None
    return ours.feed_forward(h, *norm, w13.arrays, w2.arrays, w2.group_size, w2.bits)
