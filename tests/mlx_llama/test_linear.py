"""Matrices: packed values by their bits, products, row lookup, stacking."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_llama.config import QuantFormat
from mlx_llama.linear import Dense, Matrix, Packed, Stack, stack_rows
from model_folders import convert, write_hf
from random_models import SPM_VOCAB, Case, random_model

# Of the largest value: float32 sums in another order.
ORDER_TOLERANCE = 1e-5
COUNTED_TOLERANCE = 5e-5  # the native kernels count in whole numbers of 16 bits
BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
FORMS = [QuantFormat(bits, group) for bits in BITS for group in GROUPS]
CASE = Case(200, 2, 1, 64, 1e4, dim=128, n_layers=1, vocab_size=SPM_VOCAB)


def form_id(form: QuantFormat) -> str:
    return f"{form.bits}bit-{form.group_size}"


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """Return the integers in rows of uint32 words: a stream of bits, the lowest first."""
    stream = np.unpackbits(words.astype("<u4").view(np.uint8), axis=-1, bitorder="little")
    values = stream.reshape(len(words), -1, bits).astype(np.int64)
    return (values << np.arange(bits)).sum(-1)


def dequantized(weight: mx.array, scales: mx.array, biases: mx.array, bits: int) -> np.ndarray:
    """Return integers times scale plus bias, in float64."""
    levels = unpack(np.asarray(weight), bits)
    repeat = levels.shape[1] // scales.shape[1]
    wide_scales, wide_biases = (
        np.repeat(np.asarray(a).astype(np.float64), repeat, axis=1) for a in (scales, biases)
    )
    return levels * wide_scales + wide_biases


def packed(form: QuantFormat, *, rows: int = 24, seed: int = 0) -> Packed:
    values = np.random.RandomState(seed).standard_normal((rows, 256)).astype(np.float32)
    weight, scales, biases = mx.quantize(
        mx.array(values), group_size=form.group_size, bits=form.bits
    )
    return Packed(weight, scales, biases, form)


@pytest.mark.parametrize("form", FORMS, ids=form_id)
def test_packed_rows_and_products_are_those_of_the_unpacked_bits(form: QuantFormat) -> None:
    matrix = packed(form)
    assert matrix.biases is not None
    expected = dequantized(matrix.weight, matrix.scales, matrix.biases, form.bits)
    rows = np.asarray(matrix.rows(mx.array([[3, 0], [23, 3]])))
    assert rows.shape == (2, 2, 256)
    np.testing.assert_allclose(rows, expected[[[3, 0], [23, 3]]], rtol=0, atol=1e-6)
    x = np.random.RandomState(1).standard_normal((2, 5, 256)).astype(np.float32)
    product = x.astype(np.float64) @ expected.T
    found = np.asarray(matrix(mx.array(x)))
    assert np.abs(found - product).max() < COUNTED_TOLERANCE * np.abs(product).max()


@pytest.mark.parametrize("form", FORMS, ids=form_id)
def test_conversion_stores_the_nearest_level_of_each_weight(
    form: QuantFormat, tmp_path: Path
) -> None:
    """A weight within a group's levels is off by half a step at most; none beyond the nearest.

    MLX moves the levels so that the largest weight of a group is exact, which may leave its other
    end outside of them by more than half a step, most of all with 2 bits.
    """
    source = write_hf(tmp_path / "hf", CASE)
    target = convert(source, tmp_path / "out", bits=form.bits, group_size=form.group_size)
    arrays = mx.load(str(target / "model.safetensors"))
    assert isinstance(arrays, dict)
    weights, _ = random_model(CASE)
    for name, original in weights.items():
        module = name.removesuffix(".weight")
        if original.ndim == 1:
            assert np.array_equal(np.asarray(arrays[name]), original)
            continue
        scales, biases = arrays[f"{module}.scales"], arrays[f"{module}.biases"]
        assert scales.dtype == mx.float32
        assert original.shape[1] // scales.shape[1] == form.group_size
        found = dequantized(arrays[name], scales, biases, form.bits)
        step = np.abs(np.repeat(np.asarray(scales), form.group_size, axis=1)).astype(np.float64)
        ends = [
            np.repeat(np.asarray(biases + q * scales), form.group_size, axis=1)
            for q in (0, 2**form.bits - 1)
        ]
        within = np.clip(original, np.minimum(*ends), np.maximum(*ends)).astype(np.float64)
        # 1e-5 of a step: the division that finds the level is in float32.
        assert (np.abs(found - within) <= step * (0.5 + 1e-5)).all(), name
        assert (np.abs(within - original) <= step * 1.01).all(), name


@pytest.mark.parametrize("bits", BITS)
def test_the_largest_weight_of_a_group_is_exact(bits: int) -> None:
    values = np.random.RandomState(2).standard_normal((16, 256)).astype(np.float32)
    matrix = Packed(*mx.quantize(mx.array(values), group_size=64, bits=bits), QuantFormat(bits, 64))
    rows = np.asarray(matrix.rows(mx.arange(16))).reshape(-1, 64)
    groups = values.reshape(-1, 64)
    largest = np.abs(groups).argmax(axis=1, keepdims=True)
    np.testing.assert_allclose(
        np.take_along_axis(rows, largest, 1), np.take_along_axis(groups, largest, 1), rtol=1e-6
    )


def dense(rows: int, seed: int, dtype: mx.Dtype = mx.float32) -> Dense:
    values = np.random.RandomState(seed).standard_normal((rows, 256)).astype(np.float32)
    return Dense(mx.array(values).astype(dtype))


def test_dense_products_and_rows() -> None:
    matrix = dense(7, 3)
    x = np.random.RandomState(4).standard_normal((3, 256)).astype(np.float32)
    expected = x @ np.asarray(matrix.weight).T
    found = np.asarray(matrix(mx.array(x)))
    assert np.abs(found - expected).max() < ORDER_TOLERANCE * np.abs(expected).max()
    rows = matrix.rows(mx.array([[6, 0]]))
    assert mx.array_equal(rows[0, 0], matrix.weight[6]).item() and rows.shape == (1, 2, 256)


def test_rows_of_a_packed_embedding_come_in_the_dtype_of_its_scales() -> None:
    matrix = packed(QuantFormat(4, 64))
    assert matrix.biases is not None
    half = Packed(
        matrix.weight,
        matrix.scales.astype(mx.bfloat16),
        matrix.biases.astype(mx.bfloat16),
        matrix.form,
    )
    assert half.rows(mx.array([1])).dtype == mx.bfloat16


FOUR, EIGHT = QuantFormat(4, 64), QuantFormat(8, 64)
STACKS = {
    "dense": ([dense(4, 1), dense(8, 2), dense(12, 3)], Dense),
    "packed": ([packed(FOUR, seed=s) for s in range(3)], Packed),
    "other bits": ([packed(FOUR), packed(EIGHT)], Stack),
    "other groups": ([packed(FOUR), packed(QuantFormat(4, 32))], Stack),
    "packed and dense": ([packed(FOUR), dense(8, 1)], Stack),
    "one": ([packed(EIGHT)], Packed),
}


@pytest.mark.parametrize("name", STACKS)
def test_stacking_gives_the_products_side_by_side(name: str) -> None:
    parts, kind = STACKS[name]
    stacked = stack_rows(parts)
    assert type(stacked) is kind
    x = mx.array(np.random.RandomState(5).standard_normal((2, 3, 256)).astype(np.float32))
    expected = mx.concatenate([part(x) for part in parts], axis=-1)
    found = stacked(x)
    assert found.shape == expected.shape
    assert mx.max(mx.abs(found - expected)).item() < ORDER_TOLERANCE * mx.max(expected).item()


@pytest.mark.parametrize("name", ["dense", "packed", "one"])
def test_joined_rows_are_the_parts_bit_for_bit(name: str) -> None:
    parts, _ = STACKS[name]
    joined = stack_rows(parts).arrays()
    for index, array in enumerate(joined):
        expected = mx.concatenate([part.arrays()[index] for part in parts])
        assert mx.array_equal(array, expected).item()


def test_formats_without_biases_are_joined_too() -> None:
    form = QuantFormat(4, 32, "mxfp4")
    parts: list[Matrix] = []
    for seed in range(2):
        weight, scales = mx.quantize(dense(8, seed).weight, group_size=32, bits=4, mode="mxfp4")
        parts.append(Packed(weight, scales, None, form))
    joined = stack_rows(parts)
    assert isinstance(joined, Packed) and joined.biases is None and len(joined.arrays()) == 2
    x = mx.array(np.random.RandomState(6).standard_normal((2, 256)).astype(np.float32))
    expected = mx.concatenate([part(x) for part in parts], axis=-1)
    assert mx.max(mx.abs(joined(x) - expected)).item() < 1e-4
    rows = joined.rows(mx.array([9]))
    np.testing.assert_allclose(np.asarray(joined(x))[:, 9], np.asarray(x @ rows[0]), atol=1e-3)


def test_a_stack_has_no_rows_and_names_all_its_arrays() -> None:
    stack = stack_rows([packed(FOUR), dense(8, 1)])
    assert len(stack.arrays()) == 4
    with pytest.raises(TypeError, match="no rows"):
        stack.rows(mx.array([0]))
