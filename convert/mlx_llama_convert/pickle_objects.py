"""What may stand in the pickle of a `.pth`: names from a table, storages, tensors.

Owns the allow-list and the checks of torch's own constructors' arguments. Nothing here is an
imported object of torch: a name maps to a role. Bounds within the file are `pth`'s question.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_llama.dtypes import MAX_DIMENSION, MAX_NDIM


class RefusedError(Exception):
    """The pickle is damaged, hostile, or holds more than tensors."""


@dataclass(frozen=True, slots=True)
class Global:
    """An allowed `module.name` of a pickle. role: what it does here; dtype: for number types."""

    role: str
    dtype: str = ""


UNTYPED = "untyped"

GLOBALS: Mapping[tuple[str, str], Global] = {
    ("collections", "OrderedDict"): Global("dict"),
    ("torch._utils", "_rebuild_tensor_v2"): Global("tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"): Global("tensor_v3"),
    ("torch._utils", "_rebuild_parameter"): Global("parameter"),
    ("torch", "BFloat16Storage"): Global("storage", "bfloat16"),
    ("torch", "HalfStorage"): Global("storage", "float16"),
    ("torch", "FloatStorage"): Global("storage", "float32"),
    ("torch", "Float8_e4m3fnStorage"): Global("storage", "float8_e4m3fn"),
    ("torch", "CharStorage"): Global("storage", "int8"),
    ("torch", "ByteStorage"): Global("storage", "uint8"),
    ("torch", "IntStorage"): Global("storage", "int32"),
    ("torch", "LongStorage"): Global("storage", "int64"),
    ("torch", "BoolStorage"): Global("storage", "bool"),
    ("torch.storage", "UntypedStorage"): Global("storage", UNTYPED),
    ("torch", "float8_e4m3fn"): Global("dtype", "float8_e4m3fn"),
}


@dataclass(frozen=True, slots=True)
class PickledStorage:
    """A block of numbers in the archive. dtype: key of `DTYPES` or UNTYPED; numel: then bytes."""

    dtype: str
    key: str
    numel: int


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A view of a storage; offset and strides count elements. Bounds are not checked yet."""

    storage: PickledStorage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def unknown_global(module: str, name: str) -> str:
    """Say that a name is refused; it may hold any bytes, the message stays one line."""
    shown = f"{module[:80]}.{name[:80]}".encode("unicode_escape").decode("ascii")
    if module == "torch" and name.endswith("Storage"):
        return f"numbers are stored as {shown}, which no Llama checkpoint uses"
    return f"names {shown}, which is no part of a tensor: refused, no code of the file is run"


def make_storage(description: object) -> PickledStorage:
    """Check a persistent id as torch writes it: kind, type, key, device, number of elements."""
    match description:
        case ("storage", Global(role="storage", dtype=dtype), str(key), str(), numel) if (
            is_int(numel) and numel >= 0
        ):
            return PickledStorage(dtype, key, numel)
    raise RefusedError("a storage is not described as torch.save does")


def call(function: object, arguments: object) -> object:
    """Return what a call of an allowed name stands for; nothing is called.

    The signatures are those of torch's `_utils.py`: storage, offset, shape, strides,
    requires_grad, hooks, then dtype (v3), then optional metadata.
    """
    if type(arguments) is not tuple or type(function) is not Global:
        raise RefusedError("calls something that is not a known function")
    match function.role, arguments:
        case "dict", ():
            return {}
        case "parameter", (PickledTensor() as tensor, bool(), dict()):
            return tensor
        case "tensor_v2", (_, _, _, _, _, _, *rest) if len(rest) <= 1:
            return _tensor(arguments[:6], None, rest)
        case "tensor_v3", (_, _, _, _, _, _, Global(role="dtype", dtype=dtype), *rest) if (
            len(rest) <= 1
        ):
            return _tensor(arguments[:6], dtype, rest)
    raise RefusedError(f"the arguments of a {function.role} do not fit")


def _tensor(arguments: tuple[Any, ...], dtype: str | None, rest: list[Any]) -> PickledTensor:
    """Check the arguments of torch's `_rebuild_tensor_v2` and `_v3`.

    arguments: storage, offset, shape, strides, requires_grad, hooks; the last two say nothing about
    the weights. rest: metadata, which would mark a conjugated or negated view.
    """
    storage, offset, shape, strides = arguments[:4]
    if type(storage) is not PickledStorage or (storage.dtype == UNTYPED) != (dtype is not None):
        raise RefusedError("a tensor has no storage of its type")
    if any(item is not None and item != {} for item in rest):
        raise RefusedError("a tensor carries metadata, expected plain numbers")
    if not (is_int(offset) and offset >= 0):
        raise RefusedError("a tensor's offset is not a whole number from 0")
    for numbers in (shape, strides):
        if type(numbers) is not tuple or len(numbers) > MAX_NDIM or not all(map(is_int, numbers)):
            raise RefusedError(f"a tensor's shape is not a tuple of at most {MAX_NDIM} integers")
    if len(shape) != len(strides) or any(not 0 <= size <= MAX_DIMENSION for size in shape):
        raise RefusedError("a tensor's shape or strides are absurd")
    return PickledTensor(storage, dtype or storage.dtype, offset, shape, strides)


def is_int(value: object) -> bool:
    """Whether a value is a whole number; True and False are not."""
    return type(value) is int
