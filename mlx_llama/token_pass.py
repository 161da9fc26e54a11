"""One token's way through a whole model in one operation, where the native kernels take it.

What MLX and Python cost for each operation is a good part of a small model's token otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_llama import native, ops
from mlx_llama.cache.slots import Arrays, Slots
from mlx_llama.config import ModelConfig
from mlx_llama.linear import Dense, Matrix, Packed, Stack
from mlx_llama.options import INT8

PackedArrays = tuple[list[mx.array], int, int]  # group_size and bits are 0 where it is dense


@dataclass(frozen=True, slots=True)
class TokenPass:
    """A model as the kernels take it. It holds the model's own arrays."""

    native: Any

    def __call__(
        self, token: mx.array, slots: Slots, position: int, *, activations: str
    ) -> tuple[mx.array, mx.array, Arrays, Arrays]:
        """Return logits (1, 1, V) float32 behind a token (1, 1), and what `fill_slots` takes."""
        return self.native(
            token.astype(mx.uint32),
            slots.keys,
            slots.values,
            slots.row,
            slots.n_rows,
            position,
            slots.sight,
            slots.after,
            activations == INT8,
        )


def token_pass(
    config: ModelConfig,
    *,
    embeddings: Matrix,
    layers: Sequence[tuple[mx.array | Matrix, ...]],
    norm: mx.array,
    output: Matrix,
    periods: mx.array,
    scale: float,
) -> TokenPass | None:
    """Make the pass of a model; None where the kernels do not take all of it.

    Raises ValueError for matrices that do not fit together.

    layers: attention_norm, wqkv, wo, ffn_norm, w13, w2 of each.
    """
    ours = ops.kernels()
    if ours is None or 2 * periods.size > ours.MOST_HEAD_DIM:
        return None
    if not isinstance(embeddings, Dense | Packed) or embeddings.row_dtype != mx.float32:
        return None
    taken = [
        tuple(part if isinstance(part, mx.array) else _side(part) for part in layer)
        for layer in layers
    ]
    first, last = _side(embeddings), _side(output)
    if first is None or last is None or any(part is None for layer in taken for part in layer):
        return None
    made = ours.TokenPass(
        first[0], taken, norm, last, periods, config.n_heads, config.n_kv_heads,
        config.norm_eps, scale,
    )  # fmt: skip
    return TokenPass(made)


def _side(matrix: Matrix) -> list[PackedArrays] | None:
    """Return the matrices of one product as the kernels take them; None where they do not."""
    match matrix:
        case Stack():
            sides = [_side(part) for part in matrix.parts]
            return None if None in sides else [one for side in sides if side for one in side]
        case Dense() if matrix.weight.dtype in native.FLOATS:
            return [(matrix.arrays(), 0, 0)]
        case Packed() if matrix.biases is not None and native.takes_format(matrix.form):
            is_taken = matrix.scales.dtype in native.FLOATS
            fits = matrix.scales.shape[-1] <= native.most_groups()
            form = matrix.form
            return [(matrix.arrays(), form.group_size, form.bits)] if is_taken and fits else None
    return None
