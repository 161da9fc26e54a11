"""Matrices as they are stored, dense or packed: the product, the row lookup, stacking by rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from mlx_llama import ops
from mlx_llama.config import QuantFormat


class Matrix(Protocol):
    """A matrix (out, in) that multiplies activations (..., in)."""

    def __call__(self, x: mx.array) -> mx.array:
        """Return x times the transposed matrix: (..., out)."""
        ...

    def rows(self, ids: mx.array) -> mx.array:
        """Return the rows ids (...,) as (..., in): the embedding lookup."""
        ...

    def arrays(self) -> list[mx.array]:
        """Return what is held in memory."""
        ...


@dataclass(frozen=True, slots=True)
class Dense:
    """A matrix in a float dtype: weight (out, in)."""

    weight: mx.array
    dtype: mx.Dtype | None = None  # of the rows, where it is not the weight's

    @property
    def row_dtype(self) -> mx.Dtype:
        """The dtype of looked up rows."""
        return self.dtype or self.weight.dtype

    def __call__(self, x: mx.array) -> mx.array:
        """Return x times the transposed matrix: (..., out)."""
        return ops.linear(x, self.weight)

    def rows(self, ids: mx.array) -> mx.array:
        """Return the rows ids (...,) as (..., in)."""
        rows = self.weight[ids]
        return rows if self.dtype is None else rows.astype(self.dtype)

    def arrays(self) -> list[mx.array]:
        """Return what is held in memory."""
        return [self.weight]


@dataclass(frozen=True, slots=True)
class Packed:
    """A quantized matrix: weight (out, in * bits / 32) uint32, scales and biases (out, groups)."""

    weight: mx.array
    scales: mx.array
    biases: mx.array | None
    form: QuantFormat
    dtype: mx.Dtype | None = None  # of the rows; scales of the mx modes carry none

    @property
    def row_dtype(self) -> mx.Dtype:
        """The dtype of looked up rows."""
        return self.dtype or self.scales.dtype

    def __call__(self, x: mx.array) -> mx.array:
        """Return x times the transposed matrix: (..., out)."""
        return ops.quantized_linear(x, self.weight, self.scales, self.biases, self.form)

    def rows(self, ids: mx.array) -> mx.array:
        """Return the rows ids (...,) dequantized to (..., in)."""
        scales, biases = self.scales[ids], None
        if self.biases is not None:  # scales are numbers then, not bit patterns
            dtype = self.dtype or scales.dtype
            scales, biases = scales.astype(dtype), self.biases[ids].astype(dtype)
        rows = ops.dequantize(self.weight[ids], scales, biases, self.form)
        return rows if self.dtype is None else rows.astype(self.dtype)

    def arrays(self) -> list[mx.array]:
        """Return what is held in memory."""
        return [self.weight, self.scales, *([] if self.biases is None else [self.biases])]


@dataclass(frozen=True, slots=True)
class Stack:
    """Matrices of one input that cannot be joined (their bits differ): the products are."""

    parts: tuple[Matrix, ...]

    def __call__(self, x: mx.array) -> mx.array:
        """Return the parts' products side by side: (..., sum of out)."""
        return mx.concatenate([part(x) for part in self.parts], axis=-1)

    def rows(self, ids: mx.array) -> mx.array:
        """Not needed: an embedding is never stacked."""
        raise TypeError("a stack of projections has no rows to look up")

    def arrays(self) -> list[mx.array]:
        """Return what is held in memory."""
        return [array for part in self.parts for array in part.arrays()]


def stack_rows(parts: Sequence[Matrix]) -> Matrix:
    """Join matrices of one input into one product; packed rows join without loss."""
    dense = [part for part in parts if isinstance(part, Dense)]
    if len(dense) == len(parts) and len({part.weight.dtype for part in dense}) == 1:
        return Dense(_joined([part.weight for part in dense]), dense[0].dtype)
    packed = [part for part in parts if isinstance(part, Packed)]
    if len(packed) == len(parts) and len({part.form for part in packed}) == 1:
        biases = [part.biases for part in packed if part.biases is not None]
        return Packed(
            _joined([part.weight for part in packed]),
            _joined([part.scales for part in packed]),
            _joined(biases) if biases else None,
            packed[0].form,
            packed[0].dtype,
        )
    return Stack(tuple(parts))


def _joined(arrays: list[mx.array]) -> mx.array:
    return arrays[0] if len(arrays) == 1 else ops.join_rows(arrays)
