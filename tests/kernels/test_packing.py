"""Packing and unpacking, to the bits of MLX's own operations."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels_oracle import INSTALLED, bits_of, laid_out, layouts, many, needs_kernels, seeds, types
from mlx_llama import ops
from mlx_llama.config import QuantFormat

BITS = [2, 3, 4, 5, 6, 8]
GROUPS = [32, 64, 128]
ODD = [np.nan, np.inf, -np.inf, 0.0, -0.0, 3e38, -3e38, 65504.0, 1e-40, -1e-45, 6e-8]


def numbers(random: np.random.Generator, rows: int, groups: int, group: int) -> np.ndarray:
    """Return groups of normal numbers, and of what quantizers trip over, (rows, in) float32."""
    x = random.normal(size=(rows, groups, group)) * np.exp(
        random.normal(size=(rows, groups, 1)) * random.choice([0, 1, 10])
    )
    x = (x + random.choice([0, 0, 9], size=(rows, groups, 1))).astype(np.float32)
    kinds = random.integers(0, 12, size=(rows, groups))
    x[kinds == 0] = x[kinds == 0][:, :1]  # one value
    x[kinds == 1] = np.float32(random.choice(ODD))
    x[kinds == 2, random.integers(group)] = np.float32(random.choice(ODD))
    whole = (kinds == 3)[..., None]  # ties between two steps
    return np.where(whole, np.rint(x * 4) / 4, x).reshape(rows, groups * group)


@needs_kernels
@many
@given(
    seeds, st.sampled_from(BITS), st.sampled_from(GROUPS), st.integers(0, 20), st.integers(1, 70),
    types, layouts,
)  # fmt: skip
def test_numbers_are_packed_and_unpacked_to_the_bits_of_mlx(
    kernels: object, seed: int, bits: int, group: int, rows: int, groups: int, dtype: mx.Dtype,
    layout: str,
) -> None:  # fmt: skip
    with np.errstate(over="ignore"):
        values = numbers(np.random.default_rng(seed), rows, groups, group)
    x = laid_out(values, layout, dtype)
    expected = mx.quantize(x, group_size=group, bits=bits) if rows else None
    found = kernels.quantize(x, group_size=group, bits=bits)
    assert [a.shape for a in found] == [
        (rows, groups * group * bits // 32), (rows, groups), (rows, groups),
    ]  # fmt: skip
    back = kernels.dequantize(*found, group_size=group, bits=bits)
    assert (back.shape, back.dtype) == (x.shape, dtype)
    if expected is None:
        return
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert np.array_equal(bits_of(ours), bits_of(theirs))
    exact = mx.dequantize(*expected, group_size=group, bits=bits)
    # Of two NaNs that are added a processor keeps either's sign.
    assert np.array_equal(np.array(mx.isnan(back)), np.array(mx.isnan(exact)))
    is_number = ~np.array(mx.isnan(exact))
    assert np.array_equal(bits_of(back)[is_number], bits_of(exact)[is_number])


@needs_kernels
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_any_scale_and_bias_unpack_to_the_bits_of_mlx(
    kernels: object, bits: int, dtype: mx.Dtype
) -> None:
    """A product and a sum that are joined to one operation differ in the last bit."""
    random = np.random.default_rng(bits)
    words = mx.array(random.integers(0, 2**32, (50, 4 * bits), dtype=np.uint32))
    scales, biases = (
        mx.array(random.normal(size=(50, 4)).astype(np.float32)).astype(dtype) for _ in range(2)
    )
    found = kernels.dequantize(words, scales, biases, group_size=32, bits=bits)
    expected = mx.dequantize(words, scales, biases, group_size=32, bits=bits)
    assert np.array_equal(bits_of(found), bits_of(expected))


@needs_kernels
def test_heads_of_a_cache_are_packed_as_they_stand() -> None:
    assert INSTALLED is not None
    x = mx.random.normal((2, 5, 3, 64)).swapaxes(1, 2)
    for ours, theirs in zip(
        INSTALLED.quantize(x, group_size=32, bits=8),
        mx.quantize(x, group_size=32, bits=8),
        strict=True,
    ):
        assert ours.shape == theirs.shape
        assert mx.array_equal(ours, theirs)


@pytest.mark.parametrize("form", [QuantFormat(4, 64), QuantFormat(4, 32, "mxfp4")], ids=str)
def test_each_format_packs_whoever_does_it(form: QuantFormat) -> None:
    x = mx.random.normal((3, 128))
    how = {"group_size": form.group_size, "bits": form.bits, "mode": form.mode}
    packed = ops.quantize(x, form)
    expected = mx.quantize(x, **how)
    assert all(mx.array_equal(a, b) for a, b in zip(packed, expected, strict=True))
    words, scales, *biases = packed
    found = ops.dequantize(words, scales, biases[0] if biases else None, form)
    assert mx.array_equal(found, mx.dequantize(*expected, **how))


@needs_kernels
@pytest.mark.parametrize(
    ("shape", "changes", "message"),
    [
        ((2, 96), {}, "values: found rows of 96, expected groups of 64"),
        ((2, 128), {"bits": 7}, "bits: found 7, expected 2, 3, 4, 5, 6 or 8"),
        ((2, 128), {"group_size": 48}, "group_size: found 48"),
        ((), {}, "values: found 0 dimensions"),
    ],
)
def test_what_is_no_row_of_groups_is_refused(
    shape: tuple[int, ...], changes: dict[str, int], message: str
) -> None:
    assert INSTALLED is not None
    with pytest.raises(ValueError, match=message):
        INSTALLED.quantize(mx.zeros(shape), **{"group_size": 64, "bits": 4, **changes})


@needs_kernels
@pytest.mark.parametrize(
    ("words", "scales", "biases", "message"),
    [
        (8, 3, 3, "scales and biases: expected one for each 32 numbers"),
        (8, 2, 1, "scales and biases: expected one for each 32 numbers"),
        (9, 2, 2, "weight: found rows of 72, expected groups of 32"),
    ],
)
def test_what_does_not_fit_together_is_not_unpacked(
    words: int, scales: int, biases: int, message: str
) -> None:
    assert INSTALLED is not None
    weight = mx.zeros((2, words), dtype=mx.uint32)
    with pytest.raises(ValueError, match=message):
        INSTALLED.dequantize(
            weight, mx.ones((2, scales)), mx.ones((2, biases)), group_size=32, bits=4
        )
