from collections.abc import Sequence

import mlx.core as mx

MOST_GROUPS: int  # of a packed row
MOST_HEAD_DIM: int

def quantized_matmul(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array,
    *,
    group_size: int,
    bits: int,
) -> mx.array: ...
def matmul(x: mx.array, weight: mx.array) -> mx.array: ...
def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array: ...
def swiglu(x: mx.array) -> mx.array: ...
def rotate(x: mx.array, periods: mx.array, offset: int) -> mx.array: ...
def append(buffer: mx.array, x: mx.array, row: int) -> mx.array: ...
def attention(
    q: mx.array,
    keys: Sequence[Sequence[mx.array]],
    values: Sequence[Sequence[mx.array]],
    rows: Sequence[int],
    scale: float,
    sight: mx.array | None = None,
) -> mx.array: ...
def turned_heads(
    h: mx.array,
    norm: mx.array,
    eps: float,
    wqkv: Sequence[mx.array],
    group_size: int,
    bits: int,
    periods: mx.array,
    offset: int,
    n_turned: int,
) -> mx.array: ...
def attended(
    h: mx.array,
    q: mx.array,
    heads: int,
    keys: Sequence[Sequence[mx.array]],
    values: Sequence[Sequence[mx.array]],
    rows: Sequence[int],
    scale: float,
    sight: mx.array | None,
    wo: Sequence[mx.array],
    group_size: int,
    bits: int,
) -> mx.array: ...
def feed_forward(
    h: mx.array,
    norm: mx.array,
    eps: float,
    w13: Sequence[mx.array],
    w2: Sequence[mx.array],
    group_size: int,
    bits: int,
) -> mx.array: ...
def quantize(x: mx.array, *, group_size: int, bits: int) -> list[mx.array]: ...
def dequantize(
    weight: mx.array, scales: mx.array, biases: mx.array, *, group_size: int, bits: int
) -> mx.array: ...
def keep_likeliest(scores: mx.array, top_k: int, top_p: float, min_p: float) -> mx.array: ...
def file_array(path: str, offset: int, shape: Sequence[int], dtype: mx.Dtype) -> mx.array: ...
def join_rows(arrays: Sequence[mx.array]) -> mx.array: ...
def least_squares(
    values: mx.array, *, group_size: int, bits: int, cut: float, rounds: int
) -> list[mx.array]: ...
def instructions() -> str: ...
def use_byte_activations(asked: bool) -> None: ...
def use_instructions(name: str) -> bool: ...
def threads() -> int: ...
def use_threads(n: int) -> None: ...
