"""The native CPU kernels, where they are installed: a distribution of their own, `kernels/`.

Owns finding them, and saying what is missing. `ops.py` decides when they are used.
"""

from __future__ import annotations

import sys
from functools import cache
from types import ModuleType
from typing import Any

import mlx.core as mx

from mlx_llama.cache.view import View
from mlx_llama.config import QuantFormat

INTERFACE = 7  # of the extension: one that was built of older sources is refused
BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
FLOATS = (mx.float32, mx.bfloat16, mx.float16)
# Of a matrix whose activations can be rounded to 8 bits, by instructions; the others round none.
MOST_BITS_BESIDE_BYTES = {
    **dict.fromkeys(("avx2", "avx512"), 6),
    **dict.fromkeys(("avxvnni", "vnni", "vbmi"), 8),
}


@cache
def kernels() -> Any | None:
    """Return the extension; None where it is missing or does not fit."""
    return _found()[0]


@cache
def missing_reason() -> str | None:
    """Say why there are none; None where there are."""
    return _found()[1]


@cache
def _found() -> tuple[ModuleType | None, str | None]:
    if not can_be_built():
        return None, "they are built on Linux alone"
    try:
        import mlx_llama_kernels
    except ModuleNotFoundError as error:
        if error.name == "mlx_llama_kernels":
            return None, "mlx_llama_kernels is not installed"
        return None, f"mlx_llama_kernels is not whole ({error}): build it again"
    except ImportError as error:
        return None, str(error)
    if getattr(mlx_llama_kernels, "INTERFACE", 1) != INTERFACE:
        return None, "mlx_llama_kernels is of another version of mlx-llama: build it again"
    try:
        # Another nanobind than MLX's lets it load, and then refuses every array.
        mlx_llama_kernels.rms_norm(mx.ones((1, 2)), mx.ones((2,)), 1e-5)
    except TypeError:
        reason = "mlx_llama_kernels does not take MLX's arrays, it was built with another nanobind"
        return None, f"{reason}: build it again"
    return mlx_llama_kernels, None


def can_be_built() -> bool:
    """Whether the extension is meant for this machine."""
    return sys.platform == "linux"


def takes_format(form: QuantFormat) -> bool:
    """Whether the kernels multiply by matrices of a format."""
    return form.mode == "affine" and form.bits in BITS and form.group_size in GROUPS


def _limits() -> Any:
    """Return what names the largest sizes that are taken: the extension, which must be there."""
    ours = kernels()
    assert ours is not None
    return ours


def most_groups() -> int:
    """Return how many groups a packed row may have."""
    return _limits().MOST_GROUPS


def takes_bytes(form: QuantFormat) -> bool:
    """Whether the kernels can round activations to 8 bits for matrices of a format."""
    if (ours := kernels()) is None or not takes_format(form):
        return False
    return form.bits <= MOST_BITS_BESIDE_BYTES.get(ours.instructions(), 0)


def takes_product(x: mx.array, scales: mx.array, form: QuantFormat) -> bool:
    """Whether the kernels multiply x by a matrix of this format and these scales."""
    return (
        takes_format(form)
        and x.shape[-1] <= most_groups() * form.group_size
        and (x.dtype == mx.float32 or x.dtype == scales.dtype)
    )


def takes_numbers(x: mx.array, form: QuantFormat) -> bool:
    """Whether the kernels pack x (..., in) in this format."""
    return takes_format(form) and x.dtype in FLOATS and x.shape[-1] % form.group_size == 0


def takes_packed(scales: mx.array, biases: mx.array, form: QuantFormat) -> bool:
    """Whether the kernels unpack numbers of this format."""
    return takes_format(form) and scales.dtype in FLOATS and biases.dtype == scales.dtype


def takes_dense(x: mx.array, weight: mx.array) -> bool:
    """Whether the kernels multiply x by a dense matrix."""
    return x.dtype in FLOATS and weight.dtype in FLOATS and x.dtype in (mx.float32, weight.dtype)


def takes_heads(x: mx.array) -> bool:
    """Whether the kernels rotate x (B, heads, L, D)."""
    return x.dtype in FLOATS and x.shape[-1] % 2 == 0 and x.shape[-1] <= _limits().MOST_HEAD_DIM


def takes_view(q: mx.array, view: View) -> bool:
    """Whether the kernels attend over a view with queries q (B, H, m, D)."""
    stored = [tuple((rows.bits, rows.group) for rows in part) for part in view.buffers]
    floats = (q, *(rows.arrays[-1] for part in view.buffers for rows in part))
    return (
        q.shape[-1] <= _limits().MOST_HEAD_DIM
        and len(set(stored)) == 1
        and all(array.dtype in FLOATS for array in floats)
    )
