"""The native kernels where they are, arrays that stand in many ways, and comparing with float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st

from mlx_llama import native

INSTALLED = native.kernels()
needs_kernels = pytest.mark.skipif(
    INSTALLED is None, reason=f"no native kernels: {native.missing_reason()}"
)
INSTRUCTIONS = (
    *("baseline", "neon", "dotprod", "i8mm"),
    *("avx2", "avxvnni", "avx512", "vnni", "vbmi", "amx"),
)
HALF_STEP = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}
LEAST = {mx.float32: 1e-37, mx.float16: 6e-8, mx.bfloat16: 1e-37}
types = st.sampled_from([mx.float32, mx.bfloat16, mx.float16])
seeds = st.integers(0, 2**31)
many = settings(max_examples=60, deadline=None)
layouts = st.sampled_from(["whole", "columns", "every other", "broadcast"])


def float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32), dtype=np.float64)


def bits_of(x: mx.array) -> np.ndarray:
    return np.array(x.view(mx.uint32 if x.dtype.size == 4 else mx.uint16))


def laid_out(values: np.ndarray, layout: str, dtype: mx.Dtype) -> mx.array:
    """Return values (m, n) as an array that stands in memory in another way."""
    x = mx.array(values.astype(np.float32)).astype(dtype)
    if layout == "columns":
        return mx.contiguous(x.T).T
    if layout == "every other":
        return mx.repeat(x, 2, axis=-1)[:, ::2]
    if layout == "broadcast":
        return mx.broadcast_to(x[:1], x.shape)
    return x


def assert_close(found: mx.array, expected: np.ndarray, size: np.ndarray, bound: float) -> None:
    """Compare within bound of size, what was added, and the rounding of the result."""
    allowed = bound * size + HALF_STEP[found.dtype] * np.abs(expected) + LEAST[found.dtype]
    assert found.shape == expected.shape
    assert (np.abs(float64(found) - expected) <= allowed).all()


def heads_of(
    random: np.random.Generator, shape: tuple[int, ...], dtype: mx.Dtype, *, is_strided: bool
) -> mx.array:
    """Return normal numbers (B, heads, L, D), if wanted as a projection leaves them."""
    batch, n_heads, n_rows, dim = shape
    x = mx.array(random.normal(size=(batch, n_rows + 3, n_heads, dim)).astype(np.float32))
    x = x.astype(dtype)[:, :n_rows].swapaxes(1, 2)
    return x if is_strided else mx.contiguous(x)
