"""Appending to a cache's buffer: rounding, what does not fit half precision, in place or not."""

from __future__ import annotations

import copy

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels_oracle import INSTALLED, float64, heads_of, many, needs_kernels, seeds, types

MOST_HALF = 65504.0


def appended(buffer: mx.array, x: mx.array, row: int) -> np.ndarray:
    """Return what a buffer holds when x is in its rows from `row` on, as NumPy rounds."""
    expected, new = float64(buffer), float64(x)
    if buffer.dtype == mx.float16:
        new = np.where(np.isfinite(new), np.clip(new, -MOST_HALF, MOST_HALF), new)
    if x.dtype != buffer.dtype:
        # bfloat16 is not NumPy's; the rounding of MLX is to the nearest, too.
        new = float64(mx.array(new.astype(np.float32)).astype(buffer.dtype))
    expected[:, :, row : row + x.shape[2]] = new
    return expected


@needs_kernels
@many
@given(
    seeds, st.integers(1, 2), st.integers(1, 5), st.integers(0, 40), st.integers(0, 40),
    st.integers(0, 300), st.sampled_from([1, 7, 16, 33, 64, 80]), types, types, st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_rows_are_appended_as_numpy_rounds_them(
    kernels: object, seed: int, batch: int, heads: int, row: int, n_new: int, behind: int,
    dim: int, dtype: mx.Dtype, cached: mx.Dtype, is_strided: bool, is_shared: bool,
) -> None:  # fmt: skip
    random = np.random.default_rng(seed)
    n_rows = row + n_new + behind
    buffer = heads_of(random, (batch, heads, n_rows, dim), cached, is_strided=is_strided)
    x = heads_of(random, (batch, heads, n_new, dim), dtype, is_strided=is_strided)
    # From the least that half precision tells from zero to far more than it holds.
    x = (x * mx.array(10.0 ** random.integers(-9, 9, x.shape), mx.float32)).astype(dtype)
    mx.eval(buffer, x)
    expected, before = appended(buffer, x, row), float64(buffer)
    kept = copy.copy(buffer) if is_shared else None
    found = kernels.append(buffer, x, row)
    del buffer
    mx.eval(found)
    assert found.dtype == cached
    np.testing.assert_array_equal(float64(found), expected)
    if kept is not None:
        np.testing.assert_array_equal(float64(kept), before)


@needs_kernels
def test_no_finite_number_becomes_infinite_and_the_others_stay(kernels: object) -> None:
    odd = [1e30, -1e30, 65504.0, 65519.0, 65520.0, -65536.0, 1e-9, np.inf, -np.inf, np.nan]
    most = MOST_HALF
    expected = [most, -most, most, most, most, -most, 0.0, np.inf, -np.inf, np.nan]
    for dtype in (mx.float32, mx.bfloat16):
        x = mx.array([odd * 2]).reshape(1, 1, 1, -1).astype(dtype)
        found = kernels.append(mx.zeros((1, 1, 3, 20), mx.float16), x, 1)  # pyright: ignore
        np.testing.assert_array_equal(float64(found)[0, 0, 1], expected * 2)
        assert not float64(found)[0, 0, ::2].any()


@needs_kernels
def test_words_of_packed_rows_are_appended_bit_for_bit(kernels: object) -> None:
    random = np.random.default_rng(0)
    words = random.integers(0, 2**32, (1, 3, 5, 12), dtype=np.uint32)
    found = kernels.append(mx.zeros((1, 3, 9, 12), mx.uint32), mx.array(words), 4)  # pyright: ignore
    assert found.dtype == mx.uint32
    np.testing.assert_array_equal(np.array(found)[:, :, 4:], words)
    assert not np.array(found)[:, :, :4].any()


@needs_kernels
@pytest.mark.parametrize("n_new", [1, 64])
def test_an_unshared_buffer_is_appended_to_in_place(n_new: int) -> None:
    """One that others hold is copied whole; one that nobody else holds must not be."""
    assert INSTALLED is not None
    buffer, x = mx.zeros((1, 4, 4096, 64), mx.float16), mx.ones((1, 4, n_new, 64))
    mx.eval(buffer, x)
    nbytes = buffer.nbytes
    mx.clear_cache()
    for row in range(3):
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        buffer = INSTALLED.append(buffer, x, row)
        mx.eval(buffer)
        assert mx.get_peak_memory() - before < nbytes / 4
    assert float(buffer[:, :, : n_new + 2].min().item()) == 1.0


@needs_kernels
@pytest.mark.parametrize(
    ("buffer", "x", "row", "message"),
    [
        ((1, 2, 8, 16), (1, 2, 3, 16), 6, "3 rows from 6 on, in a buffer of 8"),
        ((1, 2, 8, 16), (1, 2, 3, 16), -1, "3 rows from -1 on"),
        ((1, 2, 8, 16), (1, 3, 3, 16), 0, "all but its rows as the buffer's"),
        ((1, 2, 8, 16), (1, 2, 3, 15), 0, "all but its rows as the buffer's"),
        ((1, 2, 8), (1, 2, 3), 0, "all but its rows as the buffer's"),
    ],
)
def test_rows_that_do_not_fit_are_not_appended(
    buffer: tuple[int, ...], x: tuple[int, ...], row: int, message: str
) -> None:
    assert INSTALLED is not None
    with pytest.raises(ValueError, match=message):
        INSTALLED.append(mx.zeros(buffer), mx.zeros(x), row)
    with pytest.raises(ValueError, match=r"buffer: found .*uint32, expected float32"):
        INSTALLED.append(mx.zeros((1, 1, 1, 1), mx.uint32), mx.zeros((1, 1, 1, 1)), 0)
