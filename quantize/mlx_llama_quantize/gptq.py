"""GPTQ: codes that make up for each other's errors on a layer's real inputs.

Columns are rounded one after another, and what a column lost is taken up by those that are still to
come, weighed by the inverse Hessian of the inputs (Frantar et al. 2022, arXiv 2210.17323, algorithm
1). A group's grid is searched by least squares when its first column is reached. Groups come in the
order of their inputs' energy, the strongest first, so that the rest can take up their errors; the
format stays MLX's. Rows do not depend on one another, so memory is bounded by some rows and the
Hessian.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_llama.config import QuantFormat
from mlx_llama.errors import QuantizationError
from mlx_llama_quantize import mse
from mlx_llama_quantize.triangles import invert_lower, try_cholesky

DAMPING = 0.01  # of the mean of the Hessian's diagonal
TRIES = 5  # with ten times the damping each
ROWS = 4096  # of a matrix that are worked on together
STEP = 128  # columns whose errors are passed on together


@dataclass(frozen=True, slots=True)
class Factor:
    """What inputs say of the order and the passing on. upper: of the inverse Hessian, (in, in).

    columns: the order of columns, whole groups; upper's rows and columns stand in it.
    """

    upper: np.ndarray
    columns: np.ndarray


def factorize(hessian: np.ndarray, group_size: int) -> Factor:
    """Return the Cholesky factor of the damped Hessian's inverse; hessian: (in, in) float32."""
    energy = np.diagonal(hessian).reshape(-1, group_size).sum(axis=1)
    groups = np.argsort(-energy, kind="stable")
    columns = (groups[:, None] * group_size + np.arange(group_size)).ravel()
    mean = float(np.diagonal(hessian).mean()) or 1.0
    # With rows and columns turned round, the inverse of the factor is the inverse's factor.
    turned = columns[::-1]
    for number in range(TRIES):
        inverse = hessian[np.ix_(turned, turned)]
        inverse[np.diag_indices(len(inverse))] += np.float32(mean * DAMPING * 10**number)
        if try_cholesky(inverse) and np.isfinite(inverse).all():
            invert_lower(inverse)
            return Factor(inverse[::-1, ::-1], columns)
    raise QuantizationError("gptq: the inputs of a layer are no numbers; the weights are damaged")


def quantize(values: mx.array, form: QuantFormat, factor: Factor) -> mse.Packed:
    """Pack values (out, in) in affine mode; scales have the values' dtype."""
    exact = np.array(values.astype(mx.float32))
    codes = np.empty(exact.shape, np.uint8)
    n_groups = exact.shape[1] // form.group_size
    scale, bias = (np.empty((len(exact), n_groups), np.float32) for _ in range(2))
    for start in range(0, len(exact), ROWS):
        rows = slice(start, start + ROWS)
        columns = np.ascontiguousarray(exact[rows].T[factor.columns])
        found, grids = _rounded(columns, form, factor.upper, values.dtype)
        codes[rows, factor.columns] = found.T
        for place, grid in enumerate(grids):
            group = factor.columns[place * form.group_size] // form.group_size
            scale[rows, group], bias[rows, group] = grid.scale, grid.bias
    return mse.packed(codes, scale.ravel(), bias.ravel(), form, values.dtype)


def _rounded(
    columns: np.ndarray, form: QuantFormat, upper: np.ndarray, dtype: mx.Dtype
) -> tuple[np.ndarray, list[mse.Grid]]:
    """Return codes (in, R) and the groups' grids; columns: (in, R), used up."""
    codes = np.empty(columns.shape, np.uint8)
    grids: list[mse.Grid] = []
    n = len(columns)
    for start in range(0, n, STEP):
        end = min(start + STEP, n)
        errors = np.empty((end - start, columns.shape[1]), np.float32)
        for place in range(start, end):
            if place % form.group_size == 0:
                group = columns[place : place + form.group_size]
                grids.append(mse.search(group, form.bits, dtype)[0])
            grid, column = grids[-1], columns[place : place + 1]
            found = mse.nearest(column, grid, form.bits)
            codes[place] = found[0]
            error = (column[0] - (found[0] * grid.scale + grid.bias)) / upper[place, place]
            columns[place + 1 : end] -= upper[place, place + 1 : end, None] * error
            errors[place - start] = error
        if end < n:
            columns[end:] -= upper[start:end, end:].T @ errors
    return codes, grids
