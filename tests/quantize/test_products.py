"""Products of texts, however a machine makes them: slices of rows and BLAS give one result."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_llama import ops
from mlx_llama.config import QuantFormat
from mlx_llama.linear import Dense, Matrix, Packed, Stack
from mlx_llama_quantize.products import Hosted, Sliced, for_texts

FORM = QuantFormat(4, 64)


def matrices(dtype: mx.Dtype) -> list[Dense | Packed]:
    weight = mx.random.normal((96, 128), key=mx.random.key(1)).astype(dtype)
    packed, scales, biases = mx.quantize(weight, group_size=64, bits=4)
    return [Dense(weight, mx.float32), Packed(packed, scales, biases, FORM, mx.float32)]


@pytest.mark.parametrize("length", [1, 128, 300])  # of one slice, and with a short one at the end
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_products_are_those_of_the_rows(length: int, dtype: mx.Dtype) -> None:
    x = mx.random.normal((1, length, 128), key=mx.random.key(2))
    for matrix in matrices(dtype):
        expected = np.array(x, np.float64) @ np.array(matrix.rows(mx.arange(96)), np.float64).T
        kinds: list[Matrix] = [Sliced(matrix), for_texts(matrix)]
        kinds += [Hosted(matrix)] if dtype == mx.float32 or isinstance(matrix, Packed) else []
        kinds += [Stack((Sliced(matrix),))]
        for kind in kinds:
            found = np.array(kind(x))
            assert found.shape == (1, length, 96)
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-3)


@pytest.mark.skipif(ops.kernels() is None, reason="needs the native kernels")
def test_kernels_multiply_what_they_take() -> None:
    dense, packed = matrices(mx.bfloat16)
    assert isinstance(for_texts(dense), Sliced)
    assert isinstance(for_texts(packed), Sliced)
    weight, scales = mx.quantize(mx.ones((8, 64)), mode="mxfp4")
    other = Packed(weight, scales, None, QuantFormat(4, 32, "mxfp4"), mx.float32)
    assert isinstance(for_texts(other), Hosted)
