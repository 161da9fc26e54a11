"""RMSNorm, SwiGLU and rotation against float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels_oracle import (
    assert_close,
    float64,
    heads_of,
    laid_out,
    layouts,
    many,
    needs_kernels,
    seeds,
    types,
)


@needs_kernels
@many
@given(seeds, st.integers(0, 9), st.integers(1, 1100), types, types, layouts)
def test_norms_and_gates_are_those_of_float64(
    kernels: object, seed: int, m: int, n: int, dtype: mx.Dtype, other: mx.Dtype, layout: str
) -> None:
    random = np.random.default_rng(seed)
    x = laid_out(random.normal(size=(m, n)), layout, dtype)
    weight = mx.array(random.normal(size=n).astype(np.float32)).astype(other)
    wide = float64(x)
    expected = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + 1e-5) * float64(weight)
    assert_close(kernels.rms_norm(x, weight, 1e-5), expected, np.abs(expected), 1e-6)
    pairs = laid_out(random.normal(size=(m, 2 * n)) * 8, layout, dtype)
    gate, up = np.split(float64(pairs), 2, axis=-1)
    expected = gate / (1 + np.exp(-gate)) * up
    assert_close(kernels.swiglu(pairs), expected, np.abs(expected), 1e-6)


@needs_kernels
@pytest.mark.parametrize("width", [1500, 4096, 16384])
def test_norms_of_one_sign_stay_within_their_bound(kernels: object, width: int) -> None:
    value = float(np.float32(0.1))
    found = kernels.rms_norm(mx.full((1, width), value), mx.ones(width), 0.0)  # pyright: ignore
    assert np.abs(float64(found) - 1).max() <= 1e-6


@needs_kernels
@many
@given(
    seeds, st.integers(1, 2), st.integers(1, 9), st.integers(0, 40), st.integers(0, 200),
    st.integers(1, 40), types, st.booleans(),
)  # fmt: skip
def test_heads_turn_as_in_float64(
    kernels: object, seed: int, batch: int, n_heads: int, m: int, offset: int, half: int,
    dtype: mx.Dtype, is_strided: bool,
) -> None:  # fmt: skip
    random = np.random.default_rng(seed)
    q = heads_of(random, (batch, n_heads, m, 2 * half), dtype, is_strided=is_strided)
    periods = np.exp(random.uniform(0, 9, half)).astype(np.float32)
    positions = np.arange(offset, offset + m, dtype=np.float32)
    angles = (positions[:, None] * (1 / periods)).astype(np.float64)
    a, b = np.split(float64(q), 2, axis=-1)
    turned = np.concatenate(
        [a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)], axis=-1
    )
    size = np.tile(np.abs(a) + np.abs(b), 2)
    assert_close(kernels.rotate(q, mx.array(periods), offset), turned, size, 2.0**-22)
