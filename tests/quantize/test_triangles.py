"""Triangular factors in place, in sizes of one block and of several, against float64."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_llama_quantize.triangles import BLOCK, invert_lower, try_cholesky


def definite(n: int) -> np.ndarray:
    x = np.random.default_rng(n).standard_normal((n, 2 * n)).astype(np.float32)
    return x @ x.T / np.float32(2 * n)


@pytest.mark.parametrize("n", [1, 96, BLOCK, BLOCK + 1, 2 * BLOCK + 44, 3 * BLOCK])
def test_factor_and_its_inverse_are_those_of_float64(n: int) -> None:
    matrix = definite(n)
    expected = np.linalg.cholesky(matrix.astype(np.float64))
    assert try_cholesky(matrix)
    np.testing.assert_allclose(matrix, expected, atol=1e-5)
    assert np.array_equal(matrix, np.tril(matrix))
    invert_lower(matrix)
    np.testing.assert_allclose(matrix, np.linalg.inv(expected), atol=1e-4)
    assert np.array_equal(matrix, np.tril(matrix))


@pytest.mark.parametrize("place", [0, BLOCK + 3])
def test_no_factor_of_what_is_not_definite(place: int) -> None:
    matrix = definite(2 * BLOCK)
    matrix[place, place] = -1
    assert not try_cholesky(matrix)
