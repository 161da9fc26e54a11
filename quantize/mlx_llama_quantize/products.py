"""Products of whole texts with matrices on a CPU: NumPy's BLAS takes a hundredth of MLX's time.

It is for walks, which multiply hundreds of rows in float32 and evaluate after every layer anyway. A
GPU, and formats that the native kernels multiply by, keep what they have.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_llama import ops
from mlx_llama.linear import Dense, Matrix, Packed, Stack
from mlx_llama.model import Block


@dataclass(frozen=True, slots=True)
class Hosted:
    """A float32 matrix, or a packed one that is unpacked for each product, multiplied by BLAS."""

    matrix: Dense | Packed

    def __call__(self, x: mx.array) -> mx.array:
        """Return x times the transposed matrix, evaluated: (..., out) float32."""
        matrix = self.matrix
        if isinstance(matrix, Dense):
            weight = matrix.weight
        else:
            n_rows = matrix.weight.shape[0]
            weight = replace(matrix, dtype=mx.float32).rows(mx.arange(n_rows))
        return host_product(x, weight)

    def rows(self, ids: mx.array) -> mx.array:
        """Return the rows ids (...,) as (..., in)."""
        return self.matrix.rows(ids)

    def arrays(self) -> list[mx.array]:
        """Return what is held in memory."""
        return self.matrix.arrays()


def host_product(x: mx.array, weight: mx.array) -> mx.array:
    """Return x (..., in) times the transposed weight (out, in), both float32; evaluates."""
    rows = np.array(x.reshape(-1, x.shape[-1]), copy=False)
    found = rows @ np.array(weight, copy=False).T
    return mx.array(found).reshape(*x.shape[:-1], found.shape[-1])


def second_moments(x: mx.array) -> mx.array:
    """Return the sum of the outer products of x (..., in) with itself, (in, in) float32."""
    rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
    if ops.backend() != "cpu":
        return rows.T @ rows
    host = np.array(rows, copy=False)
    return mx.array(host.T @ host)


def for_texts(matrix: Matrix) -> Matrix:
    """Return a matrix as whole texts are best multiplied by it here."""
    if isinstance(matrix, Stack):
        return Stack(tuple(for_texts(part) for part in matrix.parts))
    if ops.backend() != "cpu":
        return matrix
    if isinstance(matrix, Dense):
        return Hosted(matrix) if matrix.weight.dtype == mx.float32 else matrix
    if isinstance(matrix, Packed) and matrix.dtype == mx.float32:
        has_kernel = ops.kernels() is not None and ops.is_native_format(matrix.form)
        return matrix if has_kernel else Hosted(matrix)
    return matrix


def block_for_texts(block: Block) -> Block:
    """Return a layer whose matrices are those of `for_texts`."""
    return replace(
        block,
        wqkv=for_texts(block.wqkv),
        wo=for_texts(block.wo),
        w13=for_texts(block.w13),
        w2=for_texts(block.w2),
    )
