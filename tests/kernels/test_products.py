"""Products with packed and dense matrices against float64."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels_oracle import (
    INSTALLED,
    assert_close,
    float64,
    laid_out,
    layouts,
    many,
    needs_kernels,
    seeds,
    types,
)

FEW = 5  # rows of activations that are multiplied without panels


def step_of(n_rows: int, *, is_coarse: bool = False) -> float:
    """Return by how much of its group's largest an activation of n_rows may be off.

    Few are counted in steps of 2^-23, of which half is lost and half a margin; many in 32767ths;
    all in 127ths where they may be coarse.
    """
    if is_coarse:
        return 0.505 / 127
    return 1.01 * 2.0**-23 if n_rows <= FEW else 0.505 / 32767


def product(
    kernels: object, x: mx.array, packed: tuple[mx.array, ...], group: int, bits: int, *,
    is_coarse: bool,
) -> mx.array:  # fmt: skip
    kernels.use_byte_activations(is_coarse)  # pyright: ignore
    try:
        found = kernels.quantized_matmul(x, *packed, group_size=group, bits=bits)  # pyright: ignore
        mx.eval(found)
    finally:
        kernels.use_byte_activations(False)  # pyright: ignore
    return found


@needs_kernels
@many
@given(
    seeds, st.sampled_from([2, 3, 4, 5, 6, 8]), st.sampled_from([32, 64, 128]), st.integers(0, 70),
    st.integers(1, 70), st.integers(1, 9), types, types, layouts, st.booleans(),
)  # fmt: skip
def test_products_are_those_of_float64(
    kernels: object, seed: int, bits: int, group: int, m: int, rows: int, groups: int,
    dtype: mx.Dtype, scale_dtype: mx.Dtype, layout: str, is_coarse: bool,
) -> None:  # fmt: skip
    random, columns = np.random.default_rng(seed), group * groups
    x = laid_out(random.normal(size=(m, columns)), layout, dtype)
    weight = mx.array(random.integers(0, 2**32, (rows, columns * bits // 32), dtype=np.uint32))
    scales, biases = (
        mx.array(random.normal(size=(rows, groups)).astype(np.float32)).astype(scale_dtype)
        for _ in range(2)
    )
    found = product(kernels, x, (weight, scales, biases), group, bits, is_coarse=is_coarse)
    stream = np.unpackbits(np.array(weight).view(np.uint8), axis=-1, bitorder="little")
    numbers = stream.reshape(rows, columns, bits) @ (2.0 ** np.arange(bits))
    scale, bias = (np.repeat(float64(a), group, axis=1) for a in (scales, biases))
    wide = float64(x)
    sizes = np.abs(scale) * numbers + np.abs(bias)
    matrix = scale * numbers + bias
    largest = np.abs(wide).reshape(m, groups, group).max(axis=2)
    steps = np.repeat(largest, group, axis=1) * step_of(m, is_coarse=is_coarse)
    moved = steps @ (sizes if m <= FEW and not is_coarse else np.abs(matrix)).T
    size = (math.sqrt(columns) * np.abs(wide)) @ sizes.T
    assert found.dtype == dtype
    assert_close(found, wide @ matrix.T, size + moved * 2**24, 2**-24)


@needs_kernels
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("n_rows", [1, 20])
@pytest.mark.parametrize("is_coarse", [False, True])
def test_small_activations_beside_a_large_one_keep_their_steps(
    kernels: object, bits: int, spread: float, n_rows: int, is_coarse: bool
) -> None:
    """Each activation is off by a step of its group's largest at most, and by none of another's."""
    random, columns = np.random.default_rng(bits), 256
    x = random.normal(size=(n_rows, columns)).astype(np.float32) * np.float32(spread)
    x[0, 70] = -1000.0  # in the second group of four
    # The matrix takes out single activations: one number of a row is 1, the others 0.
    numbers = np.zeros((columns, columns), dtype=np.uint8)
    np.fill_diagonal(numbers, 1)
    stream = ((numbers[..., None] >> np.arange(bits)) & 1).astype(np.uint8)
    packed = np.packbits(stream.reshape(columns, -1), axis=-1, bitorder="little")
    weight = mx.array(packed.view(np.uint32))
    ones, none = mx.ones((columns, 4)), mx.zeros((columns, 4))
    found = product(kernels, mx.array(x), (weight, ones, none), 64, bits, is_coarse=is_coarse)
    largest = np.repeat(np.abs(x).reshape(n_rows, 4, 64).max(axis=2), 64, axis=1)
    error = np.abs(float64(found) - x.astype(np.float64))
    assert (error <= largest * (step_of(n_rows, is_coarse=is_coarse) + 2.0**-24)).all()
    assert error[0, 70] <= 1000 * 3 * 2.0**-24  # the largest: what floats round alone


@needs_kernels
@many
@given(
    seeds, st.integers(0, 70), st.integers(0, 70), st.integers(0, 1100), types, types, layouts,
    layouts,
)  # fmt: skip
def test_dense_products_are_those_of_float64(
    kernels: object, seed: int, m: int, rows: int, columns: int, dtype: mx.Dtype,
    weight_dtype: mx.Dtype, layout: str, weight_layout: str,
) -> None:  # fmt: skip
    random = np.random.default_rng(seed)
    x = laid_out(random.normal(size=(m, columns)), layout, dtype)
    weight = laid_out(random.normal(size=(rows, columns)), weight_layout, weight_dtype)
    found = kernels.matmul(x, weight)  # pyright: ignore
    wide, matrix = float64(x), float64(weight)
    assert found.dtype == dtype
    bound = (math.sqrt(columns) + 4) * 2**-24
    assert_close(found, wide @ matrix.T, np.abs(wide) @ np.abs(matrix).T, bound)


@needs_kernels
@pytest.mark.parametrize(("n_rows", "bound"), [(1, 8192 / 16 + 32), (20, 8192 / 512 + 512)])
def test_long_sums_of_one_sign_stay_within_their_bound(
    kernels: object, n_rows: int, bound: float
) -> None:
    x = mx.full((n_rows, 8192), 0.1)
    packed = mx.full((32, 1024), 0x77777777, dtype=mx.uint32)
    scales, biases = mx.full((32, 128), 0.1), mx.zeros((32, 128))
    found = kernels.quantized_matmul(x, packed, scales, biases, group_size=64, bits=4)  # pyright: ignore
    expected = 8192 * float(np.float32(0.1)) ** 2 * 7
    assert np.abs(float64(found) / expected - 1).max() <= bound * 2.0**-24


@needs_kernels
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize(("n_rows", "bound"), [(1, 8192 / 16 + 32), (20, 8192 / 512 + 512)])
def test_long_dense_sums_of_one_sign_stay_within_their_bound(
    kernels: object, n_rows: int, bound: float, dtype: mx.Dtype
) -> None:
    weight = mx.full((32, 8192), 0.1).astype(dtype)
    found = kernels.matmul(mx.full((n_rows, 8192), 0.1), weight)  # pyright: ignore
    expected = 8192 * float(np.float32(0.1)) * float(weight[0, 0].astype(mx.float32).item())
    assert np.abs(float64(found) / expected - 1).max() <= bound * 2.0**-24


@needs_kernels
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_row(kernels: object, bad: float) -> None:
    for m in (3, 20):
        x = np.ones((m, 64), dtype=np.float32)
        x[1, 7] = bad
        packed = mx.quantize(mx.random.normal((40, 64)), group_size=32, bits=4)
        for found in (
            kernels.quantized_matmul(mx.array(x), *packed, group_size=32, bits=4),
            kernels.matmul(mx.array(x), mx.random.normal((40, 64))),
            kernels.rms_norm(mx.array(x), mx.ones(64), 1e-5),
            kernels.swiglu(mx.array(x)),
        ):
            rows = np.isfinite(np.array(found)).all(axis=1)
            assert not rows[1] and rows[[i for i in range(m) if i != 1]].all()


@needs_kernels
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 7}, "bits: found 7, expected 2, 3, 4, 5, 6 or 8"),
        ({"group_size": 48}, "group_size: found 48"),
        ({"group_size": 32}, "scales and biases: expected 8 rows of 4"),
        ({"bits": 8}, "weight: rows of 16 words, expected 32"),
    ],
)
def test_wrong_shapes_are_refused(changes: dict[str, int], message: str) -> None:
    assert INSTALLED is not None
    packed = mx.quantize(mx.zeros((8, 128)), group_size=64, bits=4)
    with pytest.raises(ValueError, match=message):
        INSTALLED.quantized_matmul(
            mx.zeros((1, 128)), *packed, **{"group_size": 64, "bits": 4, **changes}
        )
