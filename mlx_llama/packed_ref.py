"""A packed matrix that still lies in a file, read as the numbers that it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_llama import ops
from mlx_llama.config import QuantFormat
from mlx_llama.dtypes import DTYPES
from mlx_llama.errors import CheckpointError
from mlx_llama.tensor_ref import TensorRef


@dataclass(frozen=True, slots=True)
class PackedRef:
    """Codes and their scales; holds no data, like a `TensorRef`. dtype: of what is read."""

    codes: TensorRef
    scales: TensorRef
    biases: TensorRef | None
    form: QuantFormat
    dtype: str

    @property
    def name(self) -> str:
        """Name in the files."""
        return self.codes.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix, not of its codes."""
        return (self.codes.shape[0], self.codes.shape[1] * 32 // self.form.bits)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and biases."""
        return sum(part.nbytes for part in (self.codes, self.scales, self.biases) if part)

    @property
    def path(self) -> Path:
        """File of the codes."""
        return self.codes.path

    def read(self, rows: slice | None = None) -> mx.array:
        """Return the rows, computed in float32 and rounded once to the dtype; evaluated."""
        scales = self.scales.read(rows)
        if self.biases is not None:
            scales = scales.astype(mx.float32)
        biases = None if self.biases is None else self.biases.read(rows).astype(mx.float32)
        values = ops.dequantize(self.codes.read(rows), scales, biases, self.form)
        values = values.astype(DTYPES[self.dtype].array)
        mx.eval(values)
        return values


def packed_ref(
    tensors: Mapping[str, TensorRef], module: str, form: QuantFormat | None, *, dtype: str | None
) -> PackedRef:
    """Take a module's codes, scales and biases out of a directory's tensors, shapes checked.

    dtype: of what is read; None takes the scales', bfloat16 where they are bit patterns. Raises
    CheckpointError.
    """
    codes, scales = tensors[f"{module}.weight"], tensors[f"{module}.scales"]
    if form is None:
        raise CheckpointError(
            f"{scales.path}: tensor {module}.scales: config.json does not say how it is quantized"
        )
    is_affine = form.mode == "affine"
    biases = tensors.get(f"{module}.biases") if is_affine else None
    if is_affine and biases is None:
        raise CheckpointError(f"{scales.path}: tensor {module}.biases is missing")
    width = scales.shape[-1] * form.group_size
    expected = (scales.shape[0], width * form.bits // 32)
    if len(scales.shape) != 2 or codes.shape != expected or codes.dtype != "uint32":
        raise CheckpointError(
            f"{codes.path}: tensor {module}.weight is {codes.dtype} {codes.shape}, expected uint32 "
            f"{expected} by its scales and config.json"
        )
    if biases is not None and biases.shape != scales.shape:
        raise CheckpointError(
            f"{biases.path}: tensor {module}.biases has shape {biases.shape}, its scales "
            f"{scales.shape}"
        )
    if (scales.dtype == "uint8") == is_affine:
        raise CheckpointError(
            f"{scales.path}: tensor {module}.scales is {scales.dtype}, not of mode {form.mode}"
        )
    return PackedRef(
        codes, scales, biases, form, dtype or (scales.dtype if is_affine else "bfloat16")
    )
