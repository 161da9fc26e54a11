"""Appending to a cache's buffer: rounding, what does not fit half precision, in place or not."""

from __future__ import annotations

import copy

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels_oracle import INSTALLED, bits_of, float64, heads_of, many, needs_kernels, seeds, types

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


def packed_buffers(
    random: np.random.Generator, shape: tuple[int, ...], group: int, bits: int, dtype: mx.Dtype
) -> list[mx.array]:
    """Return words, scales and biases of random rows (B, K, S, D)."""
    x = mx.array(random.normal(size=shape).astype(np.float32))
    words, *others = mx.quantize(x, group_size=group, bits=bits)
    return [words, *(a.astype(dtype) for a in others)]


@needs_kernels
@many
@given(
    seeds, st.integers(1, 2), st.integers(1, 5), st.integers(0, 40), st.integers(1, 40),
    st.integers(0, 70), st.sampled_from([(32, 1), (32, 3), (64, 1), (64, 2), (128, 1), (32, 17)]),
    st.sampled_from([8, 4]), types, types, st.booleans(), st.booleans(),
)  # fmt: skip
def test_rows_are_packed_in_place_as_mlx_packs_them(
    kernels: object, seed: int, batch: int, heads: int, row: int, n_new: int, behind: int,
    groups: tuple[int, int], bits: int, dtype: mx.Dtype, cached: mx.Dtype, is_strided: bool,
    is_shared: bool,
) -> None:  # fmt: skip
    random = np.random.default_rng(seed)
    group, dim = groups[0], groups[0] * groups[1]
    x = heads_of(random, (batch, heads, n_new, dim), dtype, is_strided=is_strided)
    x = (x * mx.array(10.0 ** random.integers(-9, 9, x.shape), mx.float32)).astype(dtype)
    shape = (batch, heads, row + n_new + behind, dim)
    buffers = packed_buffers(random, shape, group, bits, cached)
    mx.eval(x, buffers)
    before = [bits_of(a) for a in buffers]
    packed = mx.quantize(x, group_size=group, bits=bits)
    expected = [
        kernels.append(copy.copy(to), new, row) for to, new in zip(buffers, packed, strict=True)
    ]
    mx.eval(expected)
    kept = [copy.copy(a) for a in buffers] if is_shared else []
    found = kernels.append_packed(buffers, x, row, group_size=group, bits=bits)
    del buffers
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        np.testing.assert_array_equal(bits_of(ours), bits_of(theirs))
    for array, was in zip(kept, before, strict=False):
        np.testing.assert_array_equal(bits_of(array), was)


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
@pytest.mark.parametrize("n_new", [1, 64])
def test_unshared_packed_buffers_are_appended_to_in_place(n_new: int) -> None:
    """Each of three outputs names the buffers, which MLX takes for buffers that somebody holds."""
    assert INSTALLED is not None
    random = np.random.default_rng(0)
    buffers = packed_buffers(random, (1, 4, 4096, 64), 64, 8, mx.float16)
    x = mx.ones((1, 4, n_new, 64))
    mx.eval(buffers, x)
    nbytes = sum(a.nbytes for a in buffers)
    mx.clear_cache()
    for row in (0, n_new, 2 * n_new):
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        buffers = INSTALLED.append_packed(buffers, x, row, group_size=64, bits=8)
        mx.eval(buffers)
        assert mx.get_peak_memory() - before < nbytes / 8
    # Two passes that are computed at once.
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for row in (0, n_new):
        buffers = INSTALLED.append_packed(buffers, x, row, group_size=64, bits=8)
    mx.eval(buffers)
    assert mx.get_peak_memory() - before < nbytes / 8


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


@needs_kernels
@pytest.mark.parametrize(
    ("x", "row", "changes", "message"),
    [
        ((1, 2, 3, 64), 6, {}, "3 rows from 6 on, in a buffer of 8"),
        ((1, 2, 3, 64), -1, {}, "3 rows from -1 on"),
        ((1, 3, 3, 64), 0, {}, "buffers: expected .*, all but the rows as x's"),
        ((1, 2, 3, 128), 0, {}, "buffers: expected .*, all but the rows as x's"),
        ((1, 2, 3, 32), 0, {}, "values: found rows of 32, expected groups of 64"),
        ((1, 2, 3, 64), 0, {"bits": 4}, "buffers: expected .*, all but the rows as x's"),
        ((1, 2, 3, 64), 0, {"bits": 6}, "bits: found 6, expected 8 or 4"),
        ((1, 2, 3, 64), 0, {"group_size": 48}, "group_size: found 48"),
        ((2, 3, 64), 0, {}, "x: expected "),
    ],
)
def test_rows_that_do_not_fit_are_not_packed(
    x: tuple[int, ...], row: int, changes: dict[str, int], message: str
) -> None:
    assert INSTALLED is not None
    buffers = packed_buffers(np.random.default_rng(0), (1, 2, 8, 64), 64, 8, mx.float16)
    how = {"group_size": 64, "bits": 8, **changes}
    with pytest.raises(ValueError, match=message):
        INSTALLED.append_packed(buffers, mx.zeros(x), row, **how)
    with pytest.raises(ValueError, match="buffers: found 2, expected words, scales and biases"):
        INSTALLED.append_packed(buffers[:2], mx.zeros((1, 2, 3, 64)), 0, group_size=64, bits=8)
    with pytest.raises(ValueError, match="expected words in uint32"):
        INSTALLED.append_packed(buffers[::-1], mx.zeros((1, 2, 3, 64)), 0, group_size=64, bits=8)
