"""Writes tiny `.pth` files and whole Meta checkpoints for tests, without torch.

Independent of the reader: opcodes and zip records are put together by hand, so that a test can
also ask for what torch would never write. Arrays are numpy; bfloat16 is `bfloat16(values)`, the
bits as uint16 with a tag.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

Tagged: TypeAlias = tuple[np.ndarray, str]
Values: TypeAlias = np.ndarray | Tagged

_STORAGES = {
    "bfloat16": "BFloat16Storage",
    "float16": "HalfStorage",
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "float8_e4m3fn": "Float8_e4m3fnStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "int32": "IntStorage",
    "int64": "LongStorage",
    "bool": "BoolStorage",
}


def bfloat16(values: np.ndarray) -> Tagged:
    """Round float32 values to bfloat16 (nearest, ties to even)."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return (rounded >> 16).astype(np.uint16), "bfloat16"


def as_dtype(values: np.ndarray, dtype: str) -> Values:
    """Convert float values to the form that `write_pth` takes for a dtype."""
    return bfloat16(values) if dtype == "bfloat16" else values.astype(dtype)


# Pickle, protocol 2


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def integers(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(integer, values)) + b"t"


def name_of(module: str, name: str) -> bytes:
    return b"c" + f"{module}\n{name}\n".encode()


def storage_id(storage: str, key: str, numel: int, *, module: str = "torch") -> bytes:
    kind = name_of(module, storage)
    return b"(" + text("storage") + kind + text(key) + text("cpu") + integer(numel) + b"tQ"


ORDERED_DICT = name_of("collections", "OrderedDict") + b")R"
REBUILD = name_of("torch._utils", "_rebuild_tensor_v2")


def tensor_pickle(
    storage: bytes, offset: int, shape: Sequence[int], strides: Sequence[int] | None = None
) -> bytes:
    """Pickle a call of `_rebuild_tensor_v2`."""
    strides = contiguous_strides(shape) if strides is None else strides
    arguments = storage + integer(offset) + integers(shape) + integers(strides)
    return REBUILD + b"(" + arguments + b"\x89" + ORDERED_DICT + b"tR"


def parameter_pickle(tensor: bytes) -> bytes:
    rebuild = name_of("torch._utils", "_rebuild_parameter")
    return rebuild + b"(" + tensor + b"\x88" + ORDERED_DICT + b"tR"


def dict_pickle(entries: Mapping[str, bytes], *, start: bytes = b"}") -> bytes:
    """Pickle a dict whose values are pickled already; `start` makes the empty dict."""
    body = b"".join(text(name) + value for name, value in entries.items())
    return b"\x80\x02" + start + b"(" + body + b"u."


def contiguous_strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


# Zip


@dataclass
class Member:
    """One file of the zip; `method` and `flags` are written as they are, data is never packed."""

    name: str
    data: bytes
    method: int = 0
    flags: int = 0x0808  # sizes in a data descriptor, name in UTF-8, as torch writes
    claimed_nbytes: int | None = None


def write_zip(
    path: Path, members: Sequence[Member], *, zip64: bool = False, align: int = 64
) -> None:
    """Write stored members, padded so that each payload begins at a multiple of `align`."""
    out, directory = bytearray(), bytearray()
    for member in members:
        offset, name = len(out), member.name.encode()
        padding = -(offset + 30 + len(name) + 4) % align
        extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
        # CRC and sizes are zero here, as the flag says: they follow the data.
        out += struct.pack("<4s5HIIIHH", b"PK\3\4", 0, member.flags, member.method, 0, 0,
                           0, 0, 0, len(name), len(extra))  # fmt: skip
        out += name + extra + member.data
        out += struct.pack("<4sIII", b"PK\7\x08", zlib.crc32(member.data), *2 * [len(member.data)])
        directory += _directory_entry(member, name, offset, zip64=zip64)
    start, count = len(out), len(members)
    out += directory
    if zip64:
        end64 = len(out)
        out += struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count,
                           len(directory), start)  # fmt: skip
        out += struct.pack("<4sIQI", b"PK\6\7", 0, end64, 1)
        count, start, size = 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF
    else:
        size = len(directory)
    out += struct.pack("<4s4HIIH", b"PK\5\6", 0, 0, count, count, size, start, 0)
    path.write_bytes(out)


def _directory_entry(member: Member, name: bytes, offset: int, *, zip64: bool) -> bytes:
    nbytes = len(member.data) if member.claimed_nbytes is None else member.claimed_nbytes
    sizes, extra = (nbytes, nbytes, offset), b""
    if zip64:
        extra = struct.pack("<HHQQQ", 1, 24, *sizes)
        sizes = (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
    packed, unpacked, place = sizes
    head = struct.pack("<4s6HIIIHHHHHII", b"PK\1\2", 45, 45, member.flags, member.method, 0, 0,
                       zlib.crc32(member.data), packed, unpacked, len(name), len(extra), 0, 0, 0,
                       0, place)  # fmt: skip
    return head + name + extra


# Checkpoints


def write_pth(
    path: Path,
    tensors: Mapping[str, Values],
    *,
    prefix: str = "consolidated.00",
    shared_storage: bool = False,
    byteorder: str | None = "little",
    ordered: bool = True,
    parameters: bool = False,
    pickle: bytes | None = None,
    zip64: bool = False,
    extra_members: Sequence[Member] = (),
) -> None:
    """Write tensors as `torch.save` does.

    shared_storage: one storage for all tensors of a dtype, told apart by offsets, as in the old
    sharded files. ordered: an OrderedDict, else a dict. parameters: wrap each in a Parameter.
    pickle: takes the place of `data.pkl`. byteorder: None leaves the member out, as old torch did.
    """
    entries, storages = _lay_out(tensors, shared_storage=shared_storage)
    if parameters:
        entries = {name: parameter_pickle(entry) for name, entry in entries.items()}
    data = dict_pickle(entries, start=ORDERED_DICT if ordered else b"}")
    members = [Member(f"{prefix}/data.pkl", data if pickle is None else pickle)]
    if byteorder is not None:
        members.append(Member(f"{prefix}/byteorder", byteorder.encode()))
    members += [Member(f"{prefix}/data/{key}", blob) for key, blob in storages.items()]
    members.append(Member(f"{prefix}/version", b"3\n"))
    write_zip(path, [*members, *extra_members], zip64=zip64)


def _lay_out(
    tensors: Mapping[str, Values], *, shared_storage: bool
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Return the pickled tensors by name and the storages by key."""
    groups: dict[str, list[tuple[str, np.ndarray, str]]] = {}
    for name, values in tensors.items():
        array, dtype = values if isinstance(values, tuple) else (values, values.dtype.name)
        groups.setdefault(dtype if shared_storage else name, []).append((name, array, dtype))
    entries: dict[str, bytes] = {}
    storages: dict[str, bytes] = {}
    for key, group in enumerate(groups.values()):
        blob = b"".join(array.tobytes() for _, array, _ in group)
        storages[str(key)] = blob
        offset = 0
        for name, array, dtype in group:
            numel = len(blob) // array.dtype.itemsize
            storage = storage_id(_STORAGES[dtype], str(key), numel)
            entries[name] = tensor_pickle(storage, offset, array.shape)
            offset += array.size
    return {name: entries[name] for name in tensors}, storages


def tiny_tensors(
    *,
    dim: int = 16,
    n_layers: int = 2,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    hidden_dim: int = 32,
    vocab_size: int = 64,
    tied: bool = False,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Make the weights of a small random Llama, float32, under Meta's names; unsplit."""
    rng = np.random.default_rng(seed)

    def weight(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / math.sqrt(shape[-1])).astype(np.float32)

    def norm() -> np.ndarray:
        return (1 + 0.1 * rng.standard_normal(dim)).astype(np.float32)

    kv_dim = dim // n_heads * n_kv_heads
    tensors = {"tok_embeddings.weight": weight(vocab_size, dim)}
    for layer in range(n_layers):
        at = f"layers.{layer}"
        tensors[f"{at}.attention.wq.weight"] = weight(dim, dim)
        tensors[f"{at}.attention.wk.weight"] = weight(kv_dim, dim)
        tensors[f"{at}.attention.wv.weight"] = weight(kv_dim, dim)
        tensors[f"{at}.attention.wo.weight"] = weight(dim, dim)
        tensors[f"{at}.feed_forward.w1.weight"] = weight(hidden_dim, dim)
        tensors[f"{at}.feed_forward.w2.weight"] = weight(dim, hidden_dim)
        tensors[f"{at}.feed_forward.w3.weight"] = weight(hidden_dim, dim)
        tensors[f"{at}.attention_norm.weight"] = norm()
        tensors[f"{at}.ffn_norm.weight"] = norm()
    tensors["norm.weight"] = norm()
    embeddings = tensors["tok_embeddings.weight"]
    tensors["output.weight"] = embeddings.copy() if tied else weight(vocab_size, dim)
    return tensors


def split_ranks(
    tensors: Mapping[str, np.ndarray], count: int, *, embedding_axis: int
) -> list[dict[str, np.ndarray]]:
    """Split weights over tensor-parallel ranks as Meta does.

    embedding_axis: 0 as Llama 3 (vocabulary), 1 as Llama 2 and before (width).
    """
    ranks: list[dict[str, np.ndarray]] = [{} for _ in range(count)]
    for name, array in tensors.items():
        if array.ndim == 1:
            pieces = [array] * count
        elif name == "tok_embeddings.weight":
            pieces = np.split(array, count, axis=embedding_axis)
        else:
            is_row_parallel = name.split(".")[-2] in ("wo", "w2")
            pieces = np.split(array, count, axis=1 if is_row_parallel else 0)
        for rank, piece in zip(ranks, pieces, strict=True):
            rank[name] = np.ascontiguousarray(piece)
    return ranks


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    *,
    dtype: str = "float32",
    ranks: int = 1,
    embedding_axis: int = 0,
    params: Mapping[str, Any] | None = None,
    **options: Any,
) -> None:
    """Write `consolidated.NN.pth` for each rank, and `params.json` when given.

    options: passed to `write_pth`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for rank, piece in enumerate(split_ranks(tensors, ranks, embedding_axis=embedding_axis)):
        stem = f"consolidated.{rank:02d}"
        values = {name: as_dtype(array, dtype) for name, array in piece.items()}
        write_pth(folder / f"{stem}.pth", values, **{"prefix": stem, **options})
    if params is not None:
        (folder / "params.json").write_text(json.dumps(params), encoding="utf-8")
