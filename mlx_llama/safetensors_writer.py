"""The safetensors writer: a file whose tensors are known beforehand and arrive in pieces.

Takes names, dtypes and shapes first and writes the header, then takes arrays, whole or in pieces of
rows, each to its place, so that memory is bounded by one piece. Knows nothing of what the names
mean, of several files or of atomic folders.

Source: the format section of the safetensors project's README.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import mlx.core as mx

from mlx_llama.dtypes import DTYPES
from mlx_llama.tensor_ref import byte_view

# name, dtype (a key of DTYPES, as `TensorRef.dtype`), shape
Entry: TypeAlias = tuple[str, str, tuple[int, ...]]

_ALIGNMENT = 8


def entry_nbytes(entry: Entry) -> int:
    """Return the size of an entry's tensor in bytes."""
    _, dtype, shape = entry
    return math.prod(shape) * DTYPES[dtype].itemsize


@dataclass(slots=True)
class _Place:
    """Where one tensor lies in the file, and how many of its rows are written."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    rows_done: int = 0

    @property
    def n_rows(self) -> int:
        return self.shape[0] if self.shape else 1


class SafetensorsWriter:
    """One safetensors file in the making; a context manager.

    Leaving it normally checks that every tensor is complete, then makes the file durable (fsync);
    is_durable: leave that out for a file that nobody keeps.
    After an exception the file is closed as it is, and removing it is the caller's business.
    Raises: OSError as the system gives it; ValueError when an array is not the one announced.
    """

    def __init__(
        self,
        path: Path,
        entries: Sequence[Entry],
        metadata: Mapping[str, str] | None = None,
        *,
        is_durable: bool = True,
    ) -> None:
        self._header = _header(entries, metadata)
        self._is_durable = is_durable
        self._path = path
        self._file: io.FileIO | None = None
        self._places: dict[str, _Place] = {}
        offset = len(self._header)
        for entry in entries:
            name, dtype, shape = entry
            self._places[name] = _Place(dtype, shape, offset)
            offset += entry_nbytes(entry)

    def __enter__(self) -> Self:
        self._file = self._path.open("wb", buffering=0)
        try:
            self._write_at(0, memoryview(self._header))
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is None:
            return
        with self._file as file:
            if kind is not None:
                return
            for name, place in self._places.items():
                if place.rows_done < place.n_rows:
                    raise ValueError(
                        f"{self._path}: closed with {place.rows_done} of {place.n_rows} rows of "
                        f"{name!r} written"
                    )
            if self._is_durable:
                os.fsync(file.fileno())

    def write(self, name: str, array: mx.array) -> None:
        """Write a tensor, or its next rows; tensors may come in any order and take turns.

        array: of the announced dtype; of the announced shape, or with fewer rows on axis 0, in
        which case later calls bring the rest. It is evaluated here and written from its own
        memory; only an array whose rows do not follow one another is copied.
        """
        place = self._expect(name, array)
        carrier = DTYPES[place.dtype].carrier
        plain = array if array.shape else array.reshape(1)
        plain = mx.contiguous(plain.view(carrier))
        mx.eval(plain)
        if plain.size:
            row_nbytes = plain.nbytes // plain.shape[0]
            self._write_at(place.offset + place.rows_done * row_nbytes, byte_view(plain))
        place.rows_done += plain.shape[0]

    def _expect(self, name: str, array: mx.array) -> _Place:
        """Check an array against what was announced under its name."""
        place = self._places.get(name)
        if place is None:
            raise ValueError(f"{self._path}: {name!r} was not announced")
        if array.dtype != DTYPES[place.dtype].array:
            raise ValueError(f"{self._path}: {name!r} is {array.dtype}, announced as {place.dtype}")
        found, shape = tuple(array.shape), place.shape
        if shape and found:
            fits = found[1:] == shape[1:] and found[0] <= place.n_rows - place.rows_done
        else:
            fits = found == shape and not place.rows_done
        if not fits:
            raise ValueError(
                f"{self._path}: {name!r} has shape {found}, announced {shape}, "
                f"{place.rows_done} rows are written"
            )
        return place

    def _write_at(self, offset: int, view: memoryview) -> None:
        if self._file is None or self._file.closed:
            raise ValueError(f"{self._path}: written outside its `with` block")
        done = 0
        while done < len(view):
            # Short where the system caps one write at 2 GiB.
            done += os.pwrite(self._file.fileno(), view[done:], offset + done)


def _header(entries: Sequence[Entry], metadata: Mapping[str, str] | None) -> bytes:
    """Encode length and header; padded with spaces so that the data begins at a multiple of 8."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for entry in entries:
        name, dtype, shape = entry
        if name in table or name == "__metadata__":
            raise ValueError(f"tensor {name!r} is announced twice")
        end = position + entry_nbytes(entry)
        table[name] = {
            "dtype": DTYPES[dtype].safetensors,
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(table, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
