"""The `.pth` reader: a torch checkpoint as references to its tensors, without torch.

Takes the path of a zip archive as `torch.save` writes it, returns a `TensorRef` for each name. The
file is untrusted: sizes come from the zip's directory and are checked against the file, the pickle
is read as data by `unpickle`. Knows nothing of Llama's names or of other shards.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
from pathlib import Path

from mlx_llama.dtypes import DTYPES
from mlx_llama.errors import CheckpointError
from mlx_llama.signatures import explain_foreign
from mlx_llama.tensor_ref import TensorRef
from mlx_llama_convert.pickle_objects import UNTYPED, PickledStorage, PickledTensor
from mlx_llama_convert.unpickle import read_pickled_dict

# Llama 3.1 405B, the largest, has a pickle of 200 kB and a directory of 100 kB.
MAX_PICKLE_NBYTES = 4 << 20
MAX_DIRECTORY_NBYTES = 16 << 20

MAX_NAME_LENGTH = 256

_LOCAL_HEADER = struct.Struct("<4s22xHH")
_DAMAGED = "damaged or not downloaded completely: compare it with checklist.chk, download it again"


def open_pth(path: Path) -> dict[str, TensorRef]:
    """Return the tensors of a `.pth` file by name, in the file's order; reads no weights.

    Raises: CheckpointError, one line with the path, for a file that cannot be read, is damaged or
    hostile, or holds anything but contiguous tensors in a dict.
    """
    try:
        with _CappedFile(path) as file:
            return _Archive(path, file).tensors()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


class _CappedFile(io.FileIO):
    """A file of which a damaged size field cannot ask gigabytes at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_DIRECTORY_NBYTES:
            raise zipfile.BadZipFile("a directory of absurd size")
        return super().read(-1 if size is None else size)


class _Archive:
    """One open `.pth`: the zip's members, and where the storages in it begin."""

    def __init__(self, path: Path, file: _CappedFile) -> None:
        self._path = path
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self._members = self._read_directory()
        self._root = self._find_root()
        self._offsets: dict[str, int] = {}

    def tensors(self) -> dict[str, TensorRef]:
        """Read the pickle and check every tensor against the storage that it lies in."""
        byteorder = self._root + "byteorder"
        if byteorder in self._members and self._read_small(byteorder, 16) != b"little":
            raise self._error("its numbers are big-endian, only little-endian files are read")
        data = self._read_small(self._root + "data.pkl", MAX_PICKLE_NBYTES)
        entries = read_pickled_dict(data, where=str(self._path))
        return {name: self._tensor_ref(name, value) for name, value in entries.items()}

    def _error(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {text}")

    def _read_directory(self) -> dict[str, zipfile.ZipInfo]:
        head = self._file.read(64)
        if reason := explain_foreign(head):
            raise self._error(reason)
        if not head.startswith(b"PK\x03\x04"):
            raise self._error("not a PyTorch checkpoint: it does not begin as a zip archive")
        try:
            with zipfile.ZipFile(self._file) as archive:
                infos = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError) as error:
            raise self._error(f"the zip's directory cannot be read; {_DAMAGED}") from error
        except (OverflowError, EOFError, IndexError) as error:
            raise self._error(f"the zip's directory is absurd; {_DAMAGED}") from error
        members = {info.filename: info for info in infos}
        if any(len(name) > MAX_NAME_LENGTH for name in members):
            raise self._error("a name in the zip's directory is longer than any that torch writes")
        if len(members) != len(infos):
            raise self._error("a name stands twice in the zip's directory")
        return members

    def _find_root(self) -> str:
        pickles = [name for name in self._members if name.split("/")[-1] == "data.pkl"]
        if len(pickles) != 1:
            raise self._error(
                f"{len(pickles)} members are called data.pkl, expected 1 as torch.save writes"
            )
        return pickles[0].removesuffix("data.pkl")

    def _read_small(self, name: str, most: int) -> bytes:
        nbytes = self._members[name].file_size
        if nbytes > most:
            raise self._error(f"member {name!r} has {nbytes} bytes, at most {most} are expected")
        self._file.seek(self._payload_offset(name))
        return self._file.read(nbytes)

    def _payload_offset(self, name: str) -> int:
        """Return where a member's bytes begin; they are stored and lie inside the file.

        The sizes in the local header are zero in torch's files and are not used; its own lengths
        are, because torch pads there to align the payload.
        """
        info = self._members[name]
        is_stored = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1
        if not is_stored or info.compress_size != info.file_size:
            raise self._error(
                f"member {name!r} is compressed or encrypted; torch.save stores it plainly"
            )
        if not 0 <= info.header_offset <= self._size - _LOCAL_HEADER.size:
            raise self._error(f"member {name!r} lies outside the file; {_DAMAGED}")
        self._file.seek(info.header_offset)
        magic, *lengths = _LOCAL_HEADER.unpack(self._file.read(_LOCAL_HEADER.size))
        offset = info.header_offset + _LOCAL_HEADER.size + sum(lengths)
        if magic != b"PK\x03\x04" or offset + info.file_size > self._size:
            raise self._error(f"member {name!r} lies outside the file; {_DAMAGED}")
        return offset

    def _tensor_ref(self, name: str, value: object) -> TensorRef:
        if len(name) > MAX_NAME_LENGTH:
            raise self._error(f"tensor {name[:80]!r}... has a name of {len(name)} letters")
        if type(value) is not PickledTensor:
            raise self._error(_not_a_tensor(name, value))
        itemsize = DTYPES[value.dtype].itemsize
        storage_offset, storage_nbytes = self._storage(name, value.storage)
        begin = value.offset * itemsize
        end = begin + math.prod(value.shape) * itemsize
        if end > storage_nbytes:
            raise self._error(
                f"tensor {name!r} ends at byte {end} of a storage of {storage_nbytes} bytes"
            )
        if not _is_contiguous(value):
            raise self._error(
                f"tensor {name!r} has strides {value.strides} for shape {value.shape}, expected "
                "contiguous rows: save it again after .contiguous()"
            )
        return TensorRef(name, value.dtype, value.shape, self._path, storage_offset + begin)

    def _storage(self, name: str, storage: PickledStorage) -> tuple[int, int]:
        """Return offset in the file and bytes of a storage, found as big as the pickle says."""
        member = f"{self._root}data/{storage.key}"
        if member not in self._members:
            raise self._error(f"tensor {name!r} lies in storage {storage.key[:80]!r}, not there")
        expected = storage.numel
        if storage.dtype != UNTYPED:
            expected *= DTYPES[storage.dtype].itemsize
        found = self._members[member].file_size
        if found != expected:
            raise self._error(
                f"tensor {name!r} lies in a storage of {found} bytes, the pickle says {expected}"
            )
        if member not in self._offsets:
            self._offsets[member] = self._payload_offset(member)
        return self._offsets[member], found


def _not_a_tensor(name: str, value: object) -> str:
    if isinstance(value, dict):
        return (
            f"{name[:80]!r} is a dict, not a tensor: this is a training checkpoint; "
            "save the model's own state_dict at the top level"
        )
    return f"{name[:80]!r} is of type {type(value).__name__}, not a tensor"


def _is_contiguous(tensor: PickledTensor) -> bool:
    """Whether rows follow one another; the stride of a dimension of size 1 means nothing."""
    if 0 in tensor.shape:
        return True
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
