"""Streams tensors into a `.pth` file as `torch.save` lays it out, without torch.

Takes names and shapes and a function that yields a tensor's bytes; bfloat16 only. Holds one piece
of one tensor. Used by `random_checkpoint.py`.
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

ORDERED_DICT = b"ccollections\nOrderedDict\n)R"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
STORAGE = b"ctorch\nBFloat16Storage\n"


def write_pth(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    content: Callable[[str], Iterable[memoryview]],
    *,
    aliases: Mapping[str, str],
) -> None:
    """Write one storage for each tensor; an alias is a name that shares another's storage."""
    keys = {name: str(number) for number, name in enumerate(shapes)}
    pickled = {name: _tensor(keys[name], shape) for name, shape in shapes.items()}
    pickled |= {alias: pickled[name] for alias, name in aliases.items()}
    body = b"".join(_text(name) + tensor for name, tensor in pickled.items())
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        root = path.stem
        archive.writestr(f"{root}/data.pkl", b"\x80\x02" + ORDERED_DICT + b"(" + body + b"u.")
        archive.writestr(f"{root}/byteorder", b"little")
        for name, key in keys.items():
            with archive.open(f"{root}/data/{key}", "w", force_zip64=True) as member:
                for piece in content(name):
                    member.write(piece)
        archive.writestr(f"{root}/version", b"3\n")


def _tensor(key: str, shape: tuple[int, ...]) -> bytes:
    """Pickle the call of `_rebuild_tensor_v2` that makes a contiguous tensor."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    size = _integer(math.prod(shape))
    storage = b"(" + _text("storage") + STORAGE + _text(key) + _text("cpu") + size + b"tQ"
    arguments = storage + _integer(0) + _integers(shape) + _integers(strides)
    return REBUILD + b"(" + arguments + b"\x89" + ORDERED_DICT + b"tR"


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def _integers(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"
