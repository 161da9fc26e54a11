"""GPTQ against its definition, and what it promises on the calibration inputs."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_llama.config import QuantFormat
from mlx_llama_quantize import gptq, mse

FACTOR_TOLERANCE = 1e-3  # float32 against float64, of the largest element
AGREEING = 0.999  # of the codes: float32 decides a tie otherwise than float64


def inputs(width: int, seed: int, n: int = 1024) -> np.ndarray:
    """Inputs whose channels differ in strength and depend on one another."""
    random = np.random.default_rng(seed)
    mixed = random.standard_normal((n, width)) @ random.standard_normal((width, width))
    return (mixed / width**0.5 * np.exp(random.standard_normal(width))).astype(np.float32)


def loss(
    packed: tuple[mx.array, ...], form: QuantFormat, weight: np.ndarray, x: np.ndarray
) -> float:
    """Squared error of the outputs, float64."""
    weights, scales, biases = packed
    found = mx.dequantize(
        weights,
        scales.astype(mx.float32),
        biases.astype(mx.float32),
        group_size=form.group_size,
        bits=form.bits,
    )
    rest = x.astype(np.float64) @ (np.array(found, dtype=np.float64) - weight).T
    return float((rest**2).sum())


def test_factor_is_the_inverses() -> None:
    x = inputs(96, 1)
    hessian = x.T @ x
    factor = gptq.factorize(hessian, 32)
    exact = hessian.astype(np.float64)[np.ix_(factor.columns, factor.columns)]
    exact += gptq.DAMPING * np.diagonal(exact).mean() * np.eye(96)
    expected = np.linalg.inv(exact)
    found = factor.upper.astype(np.float64).T @ factor.upper
    assert np.abs(found - expected).max() < FACTOR_TOLERANCE * np.abs(expected).max()
    assert np.array_equal(factor.upper, np.triu(factor.upper))
    energy = np.diagonal(hessian).reshape(-1, 32).sum(axis=1)
    assert [c // 32 for c in factor.columns[::32]] == np.argsort(-energy).tolist()


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (3, 64), (8, 128)])
def test_codes_are_those_of_eliminating_column_by_column(bits: int, group: int) -> None:
    """The definition, float64: the inverse Hessian shrinks with each column that is settled."""
    width, form = 256, QuantFormat(bits, group)
    x = inputs(width, bits)
    weight = np.random.default_rng(2).standard_normal((40, width)).astype(np.float32)
    factor = gptq.factorize(x.T @ x, group)
    found, scales, biases = gptq.quantize(mx.array(weight), form, factor)
    ones, zeros = mx.ones(scales.shape), mx.zeros(scales.shape)
    codes = np.array(mx.dequantize(found, ones, zeros, group_size=group, bits=bits))
    scale, bias = (
        np.repeat(np.array(a, dtype=np.float64), group, axis=1) for a in (scales, biases)
    )
    hessian = (x.T @ x).astype(np.float64)
    hessian += gptq.DAMPING * np.diagonal(hessian).mean() * np.eye(width)
    left, columns = weight.astype(np.float64), list(factor.columns)
    inverse = np.linalg.inv(hessian[np.ix_(columns, columns)])
    agreeing = 0
    for place, column in enumerate(columns):
        expected = np.rint((left[:, column] - bias[:, column]) / scale[:, column])
        expected = np.clip(expected, 0, 2**bits - 1)
        agreeing += int((expected == codes[:, column]).sum())
        kept = codes[:, column] * scale[:, column] + bias[:, column]  # so that ties do not spread
        error = (left[:, column] - kept) / inverse[place, place]
        rest = columns[place + 1 :]
        left[:, rest] -= error[:, None] * inverse[place, place + 1 :]
        inverse -= np.outer(inverse[:, place], inverse[place]) / inverse[place, place]
    assert agreeing > AGREEING * codes.size


def test_without_dependence_there_is_nothing_to_make_up() -> None:
    values = mx.random.normal((16, 128), key=mx.random.key(1)).astype(mx.bfloat16)
    form = QuantFormat(4, 64)
    factor = gptq.factorize(np.eye(128, dtype=np.float32), 64)
    for a, b in zip(gptq.quantize(values, form, factor), mse.quantize(values, form), strict=True):
        np.testing.assert_array_equal(
            np.array(a.astype(mx.float32)), np.array(b.astype(mx.float32))
        )


@settings(deadline=None, max_examples=12)
@given(
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    group=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from([mx.float32, mx.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_error_on_the_calibration_inputs_is_below_rounding_to_nearest(
    bits: int, group: int, dtype: mx.Dtype, seed: int
) -> None:
    x, form = inputs(256, seed), QuantFormat(bits, group)
    random = np.random.default_rng(seed)
    values = mx.array(random.standard_normal((64, 256)).astype(np.float32)).astype(dtype)
    weight = np.array(values.astype(mx.float32), dtype=np.float64)
    nearest = mx.quantize(values, group_size=group, bits=bits)
    found = gptq.quantize(values, form, gptq.factorize(x.T @ x, group))
    assert loss(found, form, weight, x) < loss(nearest, form, weight, x)  # pyright: ignore


def test_inputs_that_are_all_zero_do_no_harm() -> None:
    hessian = np.zeros((64, 64), np.float32)
    values = mx.random.normal((8, 64), key=mx.random.key(1))
    found = gptq.quantize(values, QuantFormat(4, 32), gptq.factorize(hessian, 32))
    unpacked = mx.dequantize(*found, group_size=32, bits=4)
    assert float(mx.abs(unpacked - values).max().item()) < 0.3
