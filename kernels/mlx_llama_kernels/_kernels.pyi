from collections.abc import Sequence

import mlx.core as mx

MOST_GROUPS: int  # of a packed row
MOST_HEAD_DIM: int

_Packed = tuple[Sequence[mx.array], int, int]
_Side = Sequence[_Packed]
_Layer = tuple[mx.array, _Side, _Side, mx.array, _Side, _Side]

class TokenPass:
    def __init__(
        self,
        embeddings: _Packed,
        layers: Sequence[_Layer],
        norm: mx.array,
        output: _Side,
        periods: mx.array,
        n_heads: int,
        n_kv_heads: int,
        eps: float,
        scale: float,
    ) -> None: ...
    def __call__(
        self,
        token: mx.array,
        keys: Sequence[Sequence[mx.array]],
        values: Sequence[Sequence[mx.array]],
        row: int,
        n_rows: int,
        position: int,
        sight: mx.array | None,
        is_own: bool,
        is_coarse: bool,
    ) -> tuple[mx.array, list[list[mx.array]], list[list[mx.array]]]: ...

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
def append_packed(
    buffers: Sequence[mx.array], x: mx.array, row: int, *, group_size: int, bits: int
) -> list[mx.array]: ...
def attention(
    q: mx.array,
    keys: Sequence[Sequence[mx.array]],
    values: Sequence[Sequence[mx.array]],
    rows: Sequence[int],
    scale: float,
    sight: mx.array | None = None,
) -> mx.array: ...
def quantize(x: mx.array, *, group_size: int, bits: int) -> list[mx.array]: ...
def dequantize(
    weight: mx.array, scales: mx.array, biases: mx.array, *, group_size: int, bits: int
) -> mx.array: ...
def keep_likeliest(scores: mx.array, top_k: int, top_p: float, min_p: float) -> mx.array: ...
def likeliest(scores: mx.array) -> mx.array: ...
def draw(scores: mx.array, key: mx.array) -> mx.array: ...
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
