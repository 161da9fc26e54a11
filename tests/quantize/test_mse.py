"""Packing against MLX's own, bit for bit, and what the search for scales promises."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_oracle import INSTRUCTIONS
from mlx_llama import native
from mlx_llama.config import QuantFormat
from mlx_llama_quantize import mse

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
KERNELS = native.kernels()
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


def weights(seed: int, spread: str, magnitude: float, dtype: str) -> mx.array:
    """Return (6, 256) numbers of a kind."""
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
    if dtype == "float16":
        raw = np.clip(raw, -6e4, 6e4)  # what is infinite is refused before it is packed
    return mx.array(raw.astype(np.float32)).astype(DTYPES[dtype])


any_weights = st.builds(
    weights,
    st.integers(0, 2**31),
    st.sampled_from(["normal", "heavy", "offset", "flat", "planted", "zero"]),
    st.sampled_from([1e-4, 0.02, 1.0, 100.0, 1e30]),
    st.sampled_from(sorted(DTYPES)),
)
any_form = st.builds(QuantFormat, st.sampled_from(BITS), st.sampled_from(GROUPS))


@pytest.mark.parametrize("quantize", [mse.quantize, mse.quantize_in_numpy])
@settings(deadline=None, max_examples=60)
@given(values=any_weights, form=any_form)
def test_no_group_is_worse_than_rounding_to_nearest(
    quantize: Callable[[mx.array, QuantFormat], mse.Packed], values: mx.array, form: QuantFormat
) -> None:
    exact = np.array(values.astype(mx.float32), dtype=np.float64)
    known = mx.quantize(values, group_size=form.group_size, bits=form.bits)
    nearest = errors(exact, known, form)  # pyright: ignore
    found = errors(exact, quantize(values, form), form)
    largest = np.abs(exact).reshape(-1, form.group_size).max(axis=1)
    floor = (largest * 2**-22) ** 2 * form.group_size
    assert (found <= nearest * (1 + RELATIVE) + floor).all()


@pytest.mark.skipif(KERNELS is None, reason=f"no native kernels: {native.missing_reason()}")
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@settings(deadline=None, max_examples=40)
@given(values=any_weights, form=any_form, n_rows=st.integers(1, 6), turned=st.booleans())
def test_kernels_give_the_same_bytes(
    instructions: str, values: mx.array, form: QuantFormat, n_rows: int, turned: bool
) -> None:
    assert KERNELS is not None
    values = values[:n_rows]
    before = KERNELS.instructions()
    if not KERNELS.use_instructions(instructions):
        pytest.skip(f"this processor has no {instructions}")
    try:  # rows that do not follow each other in memory are taken, too
        found = mse.quantize(mx.contiguous(values.T).T if turned else values, form)
    finally:
        KERNELS.use_instructions(before)
    for ours, expected in zip(found, mse.quantize_in_numpy(values, form), strict=True):
        assert ours.dtype == expected.dtype
        bits = mx.uint32 if ours.dtype.size == 4 else mx.uint16
        np.testing.assert_array_equal(np.array(ours.view(bits)), np.array(expected.view(bits)))


@pytest.mark.skipif(KERNELS is None, reason=f"no native kernels: {native.missing_reason()}")
def test_kernels_refuse_what_they_cannot_pack() -> None:
    assert KERNELS is not None
    search = {"cut": 0.5, "rounds": 1}
    with pytest.raises(ValueError, match="rows of 96, expected groups of 64"):
        KERNELS.least_squares(mx.zeros((2, 96)), group_size=64, bits=4, **search)
    with pytest.raises(ValueError, match="bits: found 7"):
        KERNELS.least_squares(mx.zeros((2, 64)), group_size=64, bits=7, **search)


@pytest.mark.parametrize(
    ("bits", "most"), [(2, 0.73), (3, 0.83), (4, 0.89), (5, 0.90), (6, 0.89), (8, 0.58)]
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
