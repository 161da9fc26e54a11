"""The element types of checkpoint files: one table, used by both readers and the writer.

A name is MLX's own (`bfloat16`), save `float8_e4m3fn`, which MLX holds as uint8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True, slots=True)
class Dtype:
    """One element type.

    itemsize: bytes. carrier: unsigned type of the same size, through which bytes go in and out.
    array: type of the `mx.array`. safetensors: its code in a safetensors header.
    """

    name: str
    itemsize: int
    carrier: mx.Dtype
    array: mx.Dtype
    safetensors: str


DTYPES: Mapping[str, Dtype] = {
    dtype.name: dtype
    for dtype in (
        Dtype("bfloat16", 2, mx.uint16, mx.bfloat16, "BF16"),
        Dtype("float16", 2, mx.uint16, mx.float16, "F16"),
        Dtype("float32", 4, mx.uint32, mx.float32, "F32"),
        Dtype("float8_e4m3fn", 1, mx.uint8, mx.uint8, "F8_E4M3"),
        Dtype("bool", 1, mx.uint8, mx.bool_, "BOOL"),
        Dtype("int8", 1, mx.uint8, mx.int8, "I8"),
        Dtype("uint8", 1, mx.uint8, mx.uint8, "U8"),
        Dtype("int32", 4, mx.uint32, mx.int32, "I32"),
        Dtype("uint32", 4, mx.uint32, mx.uint32, "U32"),
        Dtype("int64", 8, mx.uint64, mx.int64, "I64"),
    )
}

BY_SAFETENSORS: Mapping[str, Dtype] = {dtype.safetensors: dtype for dtype in DTYPES.values()}


def name_of(dtype: mx.Dtype) -> str:
    """Return MLX's name of a dtype, such as `bfloat16`."""
    return str(dtype).removeprefix("mlx.core.")


# What no tensor of a model exceeds; MLX counts a dimension in 32 bits.
MAX_NDIM = 8
MAX_DIMENSION = (1 << 31) - 1
