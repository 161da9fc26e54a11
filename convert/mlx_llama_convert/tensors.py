"""A tensor of the model, wherever its rows lie and however they are stored.

`LogicalTensor` is what the converter reads: a `TensorRef` of one file is one, and so are the
wrappers that merge ranks, undo a quantization or leave out copies. All read rows on demand, so that
no wrapper ever holds a tensor. Knows nothing of names or layouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import mlx.core as mx

from mlx_llama.dtypes import DTYPES
from mlx_llama.tensor_ref import TensorRef, row_bounds

# What the converter takes as a weight; anything else in a file would lose meaning by a cast.
WEIGHT_DTYPES = ("bfloat16", "float16", "float32")


class LogicalTensor(Protocol):
    """A promise of one tensor of the model.

    dtype: of the array that `read` gives, a key of `DTYPES`. nbytes: what it takes in the files.
    path: the file to name when something is wrong with it, the first of several.
    """

    @property
    def name(self) -> str:
        """Name in the files."""
        ...

    @property
    def dtype(self) -> str:
        """Element type."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Full shape."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes in the files."""
        ...

    @property
    def path(self) -> Path:
        """File to name in errors."""
        ...

    def read(self, rows: slice | None = None) -> mx.array:
        """Read the asked rows (all when None) into an evaluated array."""
        ...


@dataclass(frozen=True, slots=True)
class MergedTensor:
    """Parts that follow each other along axis 0 (rows) or 1 (columns)."""

    parts: tuple[LogicalTensor, ...]
    axis: int

    @property
    def name(self) -> str:
        """Name in the files."""
        return self.parts[0].name

    @property
    def dtype(self) -> str:
        """Element type, the same in all parts."""
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole."""
        shape = self.parts[0].shape
        merged = sum(part.shape[self.axis] for part in self.parts)
        return (*shape[: self.axis], merged, *shape[self.axis + 1 :])

    @property
    def nbytes(self) -> int:
        """Bytes in the files."""
        return sum(part.nbytes for part in self.parts)

    @property
    def path(self) -> Path:
        """File of the first part."""
        return self.parts[0].path

    def read(self, rows: slice | None = None) -> mx.array:
        """Read and join the asked rows, from the parts that hold them alone."""
        if self.axis == 1:
            return joined([part.read(rows) for part in self.parts], axis=1)
        start, stop = row_bounds(rows or slice(None), self.shape)
        pieces: list[mx.array] = []
        first = 0
        for part in self.parts:
            count = part.shape[0]
            begin, end = max(start - first, 0), min(stop - first, count)
            first += count
            if begin < end:
                pieces.append(part.read(slice(begin, end)))
        return joined(pieces or [self.parts[0].read(slice(0, 0))], axis=0)


def joined(pieces: Sequence[mx.array], *, axis: int) -> mx.array:
    """Return the pieces as one evaluated array; a lazy one would fail on another thread."""
    if len(pieces) == 1:
        return pieces[0]
    whole = mx.concatenate([*pieces], axis=axis)
    mx.eval(whole)
    return whole


def equal_content(a: LogicalTensor, b: LogicalTensor, *, block_rows: int = 8192) -> bool:
    """Whether two tensors hold the same bits, read in blocks of rows; stops where they differ.

    Tensors that share their storage are equal without reading. Recognises a tied output, which
    Meta's files repeat.
    """
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if _is_same_place(a, b):
        return True
    if not a.shape:
        return same_bits(a.read(), b.read(), a.dtype)
    for start in range(0, a.shape[0], block_rows):
        rows = slice(start, start + block_rows)
        if not same_bits(a.read(rows), b.read(rows), a.dtype):
            return False
    return True


def same_bits(a: mx.array, b: mx.array, dtype: str) -> bool:
    """Whether two arrays of a dtype hold the same bits."""
    # As numbers NaN would differ from itself, and 0.0 would equal -0.0.
    carrier = DTYPES[dtype].carrier
    return bool(mx.array_equal(a.view(carrier), b.view(carrier)).item())


def _is_same_place(a: LogicalTensor, b: LogicalTensor) -> bool:
    match a, b:
        case TensorRef(), TensorRef():
            return (a.path, a.offset) == (b.path, b.offset)
        case MergedTensor(), MergedTensor():
            return a.axis == b.axis and all(map(_is_same_place, a.parts, b.parts))
    return False
