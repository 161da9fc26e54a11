"""Choosing a token: the native kernels where they run, else MLX's operations."""

from __future__ import annotations

import mlx.core as mx

from mlx_llama import ops


def likeliest(logits: mx.array) -> mx.array:
    """Return the first of the likeliest tokens, (1,) uint32, of logits (V,) float32."""
    ours = ops.kernels()
    if ours is None or logits.dtype != mx.float32:
        return mx.argmax(logits, keepdims=True)
    return ours.likeliest(logits)


def draw(logits: mx.array, key: mx.array) -> mx.array:
    """Draw a token, (1,) uint32, by logits (V,) float32 and a key (2,) uint32.

    The native kernels draw the same one, unless rounding decides.
    """
    ours = ops.kernels()
    if ours is None or logits.dtype != mx.float32:
        return mx.random.categorical(logits[None], key=key)
    return ours.draw(logits, key)


def keep_likeliest(logits: mx.array, *, top_k: int, top_p: float, min_p: float) -> mx.array | None:
    """Set all but the likeliest logits (V,) to minus infinity; None where MLX's operations do."""
    ours = ops.kernels()
    if ours is None or logits.dtype != mx.float32:
        return None
    return ours.keep_likeliest(logits, top_k, top_p, min_p)
