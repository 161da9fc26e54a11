"""Triangular factors of large symmetric matrices, in place, by products of blocks.

At 4096 columns NumPy's own Cholesky takes four times as long and MLX's on a CPU 20 times, and both
want copies; the inverse of a triangle is in neither.
"""

from __future__ import annotations

import numpy as np

BLOCK = 256  # columns


def try_cholesky(matrix: np.ndarray) -> bool:
    """Turn a symmetric matrix (n, n) into its lower Cholesky factor; False where it has none.

    What it holds then is of no use.
    """
    for start in range(0, len(matrix), BLOCK):
        end = start + BLOCK
        column = matrix[start:, start:end]
        column -= matrix[start:, :start] @ matrix[start:end, :start].T
        try:
            square = np.linalg.cholesky(column[:BLOCK])
            column[BLOCK:] = column[BLOCK:] @ np.linalg.inv(square).T
        except np.linalg.LinAlgError:
            return False
        column[:BLOCK] = square
        matrix[start:end, end:] = 0
    return True


def invert_lower(matrix: np.ndarray) -> None:
    """Turn a lower triangle (n, n) into its inverse; a quarter of its size is taken besides."""
    n = len(matrix)
    if n <= BLOCK:
        matrix[:] = np.tril(np.linalg.inv(matrix))
        return
    half = (n // 2 + BLOCK - 1) // BLOCK * BLOCK
    upper, lower, corner = matrix[:half, :half], matrix[half:, half:], matrix[half:, :half]
    invert_lower(upper)
    invert_lower(lower)
    np.matmul(lower, corner @ upper, out=corner)
    np.negative(corner, out=corner)
