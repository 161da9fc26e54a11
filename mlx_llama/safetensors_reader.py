"""The safetensors reader: references to the tensors of one file.

Takes a path, returns a `TensorRef` for each name. The header is untrusted JSON: every entry is
checked against the file, and the entries must tile its data exactly. Knows nothing of an index
over several files, or of what a name means.

Source: the format section of the safetensors project's README.
"""

from __future__ import annotations

import io
import math
import os
from pathlib import Path
from typing import Any

from mlx_llama.dtypes import BY_SAFETENSORS, MAX_DIMENSION, MAX_NDIM, Dtype
from mlx_llama.errors import CheckpointError
from mlx_llama.signatures import explain_foreign
from mlx_llama.strict_json import parse_json_bytes
from mlx_llama.tensor_ref import TensorRef

MAX_HEADER_NBYTES = 100_000_000  # the limit of the safetensors library
MAX_NAME_LENGTH = 256

_LENGTH_NBYTES = 8


def open_safetensors(path: Path) -> dict[str, TensorRef]:
    """Return the tensors of a safetensors file by name, in the header's order; reads no weights.

    Raises: CheckpointError, one line with the path, for a file that cannot be read or whose header
    does not describe exactly the bytes that follow it.
    """
    return open_with_metadata(path)[0]


def open_with_metadata(path: Path) -> tuple[dict[str, TensorRef], dict[str, str]]:
    """Return the same, and the texts that the header holds besides."""
    try:
        with path.open("rb", buffering=0) as file:
            header, data_offset = _read_header(path, file)
            data_nbytes = os.fstat(file.fileno()).st_size - data_offset
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    metadata = _metadata(path, header.pop("__metadata__", None))
    refs = {name: _entry(path, name, entry, data_offset) for name, entry in header.items()}
    _check_tiling(path, refs, data_offset, data_nbytes)
    return refs, metadata


def _read_header(path: Path, file: io.FileIO) -> tuple[dict[str, Any], int]:
    """Return the header's object and the offset at which the data begins."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(64)
    nbytes = int.from_bytes(prefix[:_LENGTH_NBYTES], "little")
    most = min(size - _LENGTH_NBYTES, MAX_HEADER_NBYTES)
    if not 0 < nbytes <= most:
        if reason := explain_foreign(prefix):
            raise CheckpointError(f"{path}: {reason}")
        raise CheckpointError(
            f"{path}: not a safetensors file, or cut short: the header has {nbytes} bytes, "
            f"expected 1 to {max(most, 1)}"
        )
    file.seek(_LENGTH_NBYTES)
    text = file.read(nbytes)
    if not text.startswith(b"{"):
        raise CheckpointError(f"{path}: not a safetensors file: the header is no JSON object")
    return parse_json_bytes(text, where=f"{path}: header"), _LENGTH_NBYTES + nbytes


def _metadata(path: Path, metadata: object) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ of the header is not a table of texts")
    return metadata


def _entry(path: Path, name: str, entry: object, data_offset: int) -> TensorRef:
    """Check one entry by itself and return the reference; its end follows from its size."""
    where = f"{path}: tensor {name[:80]!r}"
    if len(name) > MAX_NAME_LENGTH:
        raise CheckpointError(f"{where}... has a name of {len(name)} letters")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} is not described by dtype, shape and data_offsets")
    dtype, shape = _dtype(where, entry["dtype"]), _shape(where, entry["shape"])
    offsets = _naturals(entry["data_offsets"])
    if offsets is None or len(offsets) != 2:
        raise CheckpointError(f"{where}: data_offsets are not two whole numbers from 0")
    begin, end = offsets
    nbytes = math.prod(shape) * dtype.itemsize
    if end - begin != nbytes:
        raise CheckpointError(
            f"{where} has {_shown(end - begin)} bytes, expected {_shown(nbytes)} for {dtype.name} "
            f"{shape}"
        )
    return TensorRef(name, dtype.name, shape, path, data_offset + begin)


def _dtype(where: str, code: object) -> Dtype:
    if not isinstance(code, str) or code not in BY_SAFETENSORS:
        shown = repr(code[:20]) if isinstance(code, str) else f"a {type(code).__name__}"
        raise CheckpointError(f"{where}: dtype is {shown}, expected one of {_DTYPE_LIST}")
    return BY_SAFETENSORS[code]


_DTYPE_LIST = ", ".join(BY_SAFETENSORS)


def _shape(where: str, value: object) -> tuple[int, ...]:
    shape = _naturals(value)
    if shape is None or len(shape) > MAX_NDIM or any(size > MAX_DIMENSION for size in shape):
        raise CheckpointError(
            f"{where}: shape is not at most {MAX_NDIM} whole numbers from 0 to {MAX_DIMENSION}"
        )
    return tuple(shape)


def _check_tiling(path: Path, refs: dict[str, TensorRef], start: int, nbytes: int) -> None:
    """Refuse overlaps, holes and bytes that belong to no tensor."""
    position = start
    for ref in sorted(refs.values(), key=lambda ref: (ref.offset, ref.nbytes)):
        if ref.offset != position:
            kind = "overlaps another" if ref.offset < position else "leaves a hole before it"
            raise CheckpointError(
                f"{path}: tensor {ref.name!r} {kind}: begins at byte {_shown(ref.offset - start)} "
                f"of the data, expected {position - start}"
            )
        position += ref.nbytes
    if position != start + nbytes:
        raise CheckpointError(
            f"{path}: holds {nbytes} bytes of data, its header describes {position - start}: "
            "cut short or damaged, download it again"
        )


def _naturals(value: object) -> list[int] | None:
    """Return a list of whole numbers from 0, or None for anything else (true is no number)."""
    if isinstance(value, list) and all(type(item) is int and item >= 0 for item in value):
        return value
    return None


def _shown(number: int) -> str:
    return str(number) if abs(number) < 1 << 63 else "an absurd number of"
