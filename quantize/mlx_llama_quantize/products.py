"""Products of whole texts with matrices on a CPU, for walks, which multiply hundreds of rows.

The native kernels take them in slices that stay in a core's cache: 0.6 to 0.8 of the time of
NumPy's BLAS, which takes a hundredth of MLX's and is what runs where there are no kernels. A GPU
keeps what it has.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_llama import ops
from mlx_llama.linear import Dense, Matrix, Packed, Stack
from mlx_llama.model import Block

UNPACKED_BYTES = 32 << 20  # of a packed matrix, in float32
SLAB = 512  # rows of second moments that are added together


@dataclass(frozen=True, slots=True)
class Hosted:
    """A float32 matrix, or a packed one, multiplied by BLAS.

    Of a packed one some rows at a time are unpacked, anew for each product.
    """

    matrix: Dense | Packed

    def __call__(self, x: mx.array) -> mx.array:
        """Return x times the transposed matrix, evaluated: (..., out) float32."""
        matrix = self.matrix
        if isinstance(matrix, Dense):
            return host_product(x, matrix.weight)
        n_rows, step = matrix.weight.shape[0], max(1, UNPACKED_BYTES // (4 * x.shape[-1]))
        unpacking = replace(matrix, dtype=mx.float32)
        starts = range(0, n_rows, step)
        found = [
            host_product(x, unpacking.rows(mx.arange(start, min(start + step, n_rows))))
            for start in starts
        ]
        return found[0] if len(found) == 1 else mx.concatenate(found, axis=-1)

    def rows(self, ids: mx.array) -> mx.array:
        """Return the rows ids (...,) as (..., in)."""
        return self.matrix.rows(ids)

    def arrays(self) -> list[mx.array]:
        """Return what is held in memory."""
        return self.matrix.arrays()


@dataclass(frozen=True, slots=True)
class Sliced:
    """A matrix that the native kernels multiply by, a prompt's slice of rows at a time.

    512 rows of width 8192 at once take twice the time: they leave the cache between two uses.
    """

    matrix: Dense | Packed

    def __call__(self, x: mx.array) -> mx.array:
        """Return x (..., L, in) times the transposed matrix: (..., L, out)."""
        step = ops.prefill_chunk()
        starts = range(0, x.shape[-2], step)
        found = [self.matrix(x[..., start : start + step, :]) for start in starts]
        return found[0] if len(found) == 1 else mx.concatenate(found, axis=-2)

    def rows(self, ids: mx.array) -> mx.array:
        """Return the rows ids (...,) as (..., in)."""
        return self.matrix.rows(ids)

    def arrays(self) -> list[mx.array]:
        """Return what is held in memory."""
        return self.matrix.arrays()


def host_product(x: mx.array, weight: mx.array) -> mx.array:
    """Return x (..., in) times the transposed weight (out, in), both float32; evaluates."""
    rows = np.array(x.reshape(-1, x.shape[-1]), copy=False)
    with np.errstate(over="ignore", invalid="ignore"):  # told by the results
        found = rows @ np.array(weight, copy=False).T
    return mx.array(found).reshape(*x.shape[:-1], found.shape[-1])


class Moments:
    """Outer products of what is read with itself, added up: (in, in) float32.

    On a CPU they are added slab by slab into one array, the upper half of it.
    """

    def __init__(self) -> None:
        self._host: np.ndarray | None = None
        self._device: mx.array | None = None

    def add(self, x: mx.array) -> None:
        """Add those of x (..., in); evaluates."""
        rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        if ops.backend() != "cpu":
            product = rows.T @ rows
            self._device = product if self._device is None else self._device + product
            mx.eval(self._device)
            return
        host = np.array(rows, copy=False)
        width = host.shape[1]
        if self._host is None:
            self._host = np.zeros((width, width), np.float32)
        for start in range(0, width, SLAB):
            slab = host[:, start : start + SLAB]
            self._host[start : start + SLAB, start:] += slab.T @ host[:, start:]

    def taken(self) -> np.ndarray:
        """Return the sums, which are not held any longer."""
        host, device = self._host, self._device
        self._host = self._device = None
        if device is not None:
            return np.array(device)
        assert host is not None, "every input is read by a walk"
        for start in range(0, len(host), SLAB):
            end = start + SLAB
            square = host[start:end, start:end]
            square[:] = np.triu(square) + np.triu(square, 1).T
            host[end:, start:end] = host[start:end, end:].T
        return host


def for_texts(matrix: Matrix) -> Matrix:
    """Return a matrix as whole texts are best multiplied by it here."""
    if isinstance(matrix, Stack):
        return Stack(tuple(for_texts(part) for part in matrix.parts))
    if ops.backend() != "cpu" or not isinstance(matrix, Dense | Packed):
        return matrix
    is_packed = isinstance(matrix, Packed)
    if ops.kernels() is not None and (not is_packed or ops.is_native_format(matrix.form)):
        return Sliced(matrix)
    dtype = matrix.dtype if is_packed else matrix.weight.dtype
    return Hosted(matrix) if dtype == mx.float32 else matrix


def block_for_texts(block: Block) -> Block:
    """Return a layer whose matrices are those of `for_texts`."""
    return replace(
        block,
        wqkv=for_texts(block.wqkv),
        wo=for_texts(block.wo),
        w13=for_texts(block.w13),
        w2=for_texts(block.w2),
    )
