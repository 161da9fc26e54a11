"""A tensor that still lies in a file: where it is, what it is, and how its rows are read.

Owns the only bulk read of checkpoint bytes. Takes no format for granted: the `.pth` reader and the
safetensors reader both make these. Knows nothing of shards or of what a name means.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_llama.dtypes import DTYPES
from mlx_llama.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A promise of one tensor, rows contiguous and little-endian; holds no data, no open file.

    dtype: a key of `DTYPES`. offset: bytes from the start of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def read(self, rows: slice | None = None) -> mx.array:
        """Read the whole tensor, or the asked rows of axis 0.

        rows: bounds as of a Python slice, step 1. Returns an evaluated array that any thread may
        use; `float8_e4m3fn` comes as the uint8 codes that `mx.from_fp8` takes.
        Raises: CheckpointError when the file cannot be read or ends early.
        """
        if rows is None:
            shape = self.shape
        else:
            start, stop = row_bounds(rows, self.shape)
            shape = (stop - start, *self.shape[1:])
        buffer = RowBuffer(self.dtype, shape)
        self.read_into(buffer.view, rows)
        return buffer.array()

    def read_into(self, view: memoryview, rows: slice | None = None) -> None:
        """Fill `view` (bytes) with the asked rows, straight from the file.

        Safe from many threads: each call opens the file for itself, which costs microseconds
        against megabytes read, and the read releases the GIL. The file is not mapped: mapped pages
        would count as memory of this process.
        """
        start, stop = (0, 1) if rows is None else row_bounds(rows, self.shape)
        row_nbytes = self.nbytes
        if rows is not None:
            row_nbytes = math.prod(self.shape[1:]) * DTYPES[self.dtype].itemsize
        wanted = (stop - start) * row_nbytes
        if len(view) != wanted:
            raise ValueError(f"{self.name}: buffer of {len(view)} bytes for {wanted} bytes")
        offset = self.offset + start * row_nbytes
        try:
            found = _read_at(self.path, offset, view)
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: tensor {self.name!r} cannot be read: {error.strerror}"
            ) from error
        if found != wanted:
            raise CheckpointError(
                f"{self.path}: tensor {self.name!r} is cut short: {found} bytes at offset "
                f"{offset}, expected {wanted}; the file has changed or was not copied completely"
            )


def byte_view(array: mx.array) -> memoryview:
    """Show an evaluated array's own memory as bytes; it must not be bfloat16."""
    return memoryview(array).cast("B")  # pyright: ignore[reportArgumentType] - its stub lacks it


class RowBuffer:
    """Fresh memory of an array, filled through `view` and then handed out once by `array()`.

    The bytes are read straight into the memory of an MLX array, so that no second copy of a
    tensor of gigabytes exists.
    """

    def __init__(self, dtype: str, shape: tuple[int, ...]) -> None:
        self._dtype = DTYPES[dtype]
        self._shape = shape
        self._carrier = mx.zeros((math.prod(shape),), dtype=self._dtype.carrier)
        mx.eval(self._carrier)  # gives it the memory that `view` shows
        # A memoryview of no elements cannot be cast.
        self.view = byte_view(self._carrier) if self._carrier.size else memoryview(b"")

    def array(self) -> mx.array:
        """Return the filled memory as an evaluated array of the tensor's dtype and shape."""
        typed = self._carrier if self._dtype.name != "bool" else self._carrier != 0
        array = typed.view(self._dtype.array).reshape(self._shape)
        # MLX's streams belong to threads: a lazy view made here would fail on another one.
        mx.eval(array)
        return array


def row_bounds(rows: slice, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return first and one past last row of a slice of axis 0."""
    if not shape:
        raise ValueError("a scalar has no rows")
    start, stop, step = rows.indices(shape[0])
    if step != 1:
        raise ValueError(f"rows are read with step 1, not {step}")
    return start, max(start, stop)


def _read_at(path: Path, offset: int, view: memoryview) -> int:
    done = 0
    if not view:
        return done
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while done < len(view):
            count = file.readinto(view[done:])  # short where the system caps one read at 2 GiB
            if not count:
                break
            done += count
    return done
