"""Packing against MLX's own, bit for bit, and what the search for scales promises."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_llama.config import QuantFormat
from mlx_llama_quantize import mse

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
RELATIVE = 1e-5  # of an error: the search adds up in float32, the test in float64


def errors(values: np.ndarray, packed: tuple[mx.array, ...], form: QuantFormat) -> np.ndarray:
    """Squared error of each group, from codes that MLX unpacks and scales as stored, float64."""
    weight, scales, biases = packed
    ones = mx.ones(scales.shape)
    codes = mx.dequantize(
        weight, ones, mx.zeros(scales.shape), group_size=form.group_size, bits=form.bits
    )
    scale, bias = (
        np.repeat(np.array(a.astype(mx.float32), dtype=np.float64), form.group_size, axis=1)
        for a in (scales, biases)
    )
    rest = np.array(codes, dtype=np.float64) * scale + bias - values
    return (rest.reshape(-1, form.group_size) ** 2).sum(axis=1)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_minimum_and_maximum_are_mlxs_bit_for_bit(bits: int, group: int, dtype: str) -> None:
    values = mx.random.normal((16, 256), key=mx.random.key(bits)).astype(DTYPES[dtype])
    weight, scales, biases = mx.quantize(values, group_size=group, bits=bits)
    columns = np.array(values.astype(mx.float32)).reshape(-1, group).T
    grid = mse.minimum_maximum(columns.min(axis=0), columns.max(axis=0), bits, DTYPES[dtype])
    np.testing.assert_array_equal(grid.scale, np.array(scales.astype(mx.float32)).ravel())
    np.testing.assert_array_equal(grid.bias, np.array(biases.astype(mx.float32)).ravel())
    if dtype == "float32":  # else MLX chooses codes for the scale before it is rounded
        codes = mse.nearest(columns, grid, bits).astype(np.uint8).T
        np.testing.assert_array_equal(
            mse.pack_codes(np.ascontiguousarray(codes), bits).reshape(16, -1), np.array(weight)
        )


@pytest.mark.parametrize("bits", BITS)
def test_packed_codes_are_read_by_mlx(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (8, 128)).astype(np.uint8)
    weight = mx.array(mse.pack_codes(codes, bits).reshape(8, -1))
    ones, zeros = mx.ones((8, 2)), mx.zeros((8, 2))
    found = mx.dequantize(weight, ones, zeros, group_size=64, bits=bits)
    np.testing.assert_array_equal(np.array(found), codes)


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from(BITS),
    group=st.sampled_from(GROUPS),
    dtype=st.sampled_from(sorted(DTYPES)),
    seed=st.integers(0, 2**31),
    spread=st.sampled_from(["normal", "heavy", "offset", "flat", "planted", "zero"]),
    magnitude=st.sampled_from([1e-4, 0.02, 1.0, 100.0, 1e30]),
)
def test_no_group_is_worse_than_rounding_to_nearest(
    bits: int, group: int, dtype: str, seed: int, spread: str, magnitude: float
) -> None:
    random = np.random.default_rng(seed)
    if dtype == "float16":
        magnitude = min(magnitude, 100.0)
    raw = random.standard_normal((6, 256)) * magnitude
    if spread == "heavy":
        raw = random.standard_t(2, (6, 256)) * magnitude
    elif spread == "offset":
        raw += 5 * magnitude
    elif spread == "flat":
        raw = np.full((6, 256), magnitude)
    elif spread == "planted":
        raw[:, ::37] *= 30
    elif spread == "zero":
        raw[:3] = 0
    values = mx.array(raw.astype(np.float32)).astype(DTYPES[dtype])
    form = QuantFormat(bits, group)
    exact = np.array(values.astype(mx.float32), dtype=np.float64)
    nearest = errors(exact, mx.quantize(values, group_size=group, bits=bits), form)  # pyright: ignore
    found = errors(exact, mse.quantize(values, form), form)
    floor = (np.abs(exact).reshape(-1, group).max(axis=1) * 2**-22) ** 2 * group
    assert (found <= nearest * (1 + RELATIVE) + floor).all()


@pytest.mark.parametrize(
    ("bits", "most"), [(2, 0.73), (3, 0.83), (4, 0.89), (5, 0.91), (6, 0.93), (8, 0.96)]
)
def test_error_of_normal_weights_falls(bits: int, most: float) -> None:
    values = mx.random.normal((64, 1024), key=mx.random.key(1)).astype(mx.bfloat16)
    form = QuantFormat(bits, 64)
    exact = np.array(values.astype(mx.float32), dtype=np.float64)
    nearest = errors(exact, mx.quantize(values, group_size=64, bits=bits), form)  # pyright: ignore
    assert errors(exact, mse.quantize(values, form), form).sum() < most * nearest.sum()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_is_mlxs(dtype: str) -> None:
    values = np.random.default_rng(3).standard_normal(10_000).astype(np.float32)
    values[:4] = [0.0, -0.0, 1.00390625, 1.01171875]  # two ties of bfloat16
    expected = np.array(mx.array(values).astype(DTYPES[dtype]).astype(mx.float32))
    np.testing.assert_array_equal(mse.rounded(values, DTYPES[dtype]), expected)
