"""The operations of a Llama, and the one place that knows which device runs them.

Everything here is MLX's own; a faster kernel for one backend is chosen in this file and nowhere
else. Knows nothing of files or tokens; of a cache it sees what attention reads.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_llama.attention import Manner, attend
from mlx_llama.cache.view import Sees, View
from mlx_llama.config import QuantFormat
from mlx_llama.errors import OptionError

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def backend() -> str:
    """Name what runs the model: metal, cuda or cpu."""
    if mx.default_device() == mx.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def working_set() -> int | None:
    """Return the bytes that a GPU should hold at most, by its driver; None on a CPU."""
    if backend() == "cpu":
        return None
    most = mx.device_info().get("max_recommended_working_set_size")
    return int(most) if most else None


def compute_dtype(stored: str, *, is_quantized: bool, asked: str | None) -> mx.Dtype:
    """Choose the dtype of activations, scales and dense weights.

    stored: dtype of the checkpoint's dense tensors. asked: the user's choice, which wins.
    On a CPU MLX's quantized products are 9 (bfloat16) and 40 (float16) times slower than in
    float32, and dense float16 is slowest of all; a GPU is the other way round.
    """
    if asked is not None:
        if asked not in DTYPES:
            raise OptionError(f"--dtype {asked!r}: expected one of {', '.join(DTYPES)}")
        return DTYPES[asked]
    if backend() == "cpu":
        return mx.bfloat16 if stored == "bfloat16" and not is_quantized else mx.float32
    if stored == "float32" and is_quantized:
        return mx.bfloat16
    return DTYPES.get(stored, mx.bfloat16)


def prefill_chunk() -> int:
    """Return how many tokens of a prompt are computed at once.

    A constant, because the size of a slice changes the last bits of the result; small on a CPU,
    where larger slices are no faster and a cancelled prompt must end soon.
    """
    return 128 if backend() == "cpu" else 512


def linear(x: mx.array, weight: mx.array) -> mx.array:
    """Multiply by a dense matrix: x (..., in), weight (out, in) -> (..., out)."""
    return x @ weight.T


def quantized_linear(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array | None, form: QuantFormat
) -> mx.array:
    """Multiply by a packed matrix: x (..., in), weight (out, in * bits / 32) uint32."""
    return mx.quantized_matmul(
        x,
        weight,
        scales=scales,
        biases=biases,
        transpose=True,
        group_size=form.group_size,
        bits=form.bits,
        mode=form.mode,
    )


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """Scale rows to unit root mean square, then by weight; accumulates in float32."""
    return mx.fast.rms_norm(x, weight, eps)


def rotate(x: mx.array, periods: mx.array, offset: int) -> mx.array:
    """Apply RoPE to x (B, heads, L, D), half-split pairs, the first row at position offset."""
    return mx.fast.rope(
        x, x.shape[-1], traditional=False, base=None, scale=1.0, offset=offset, freqs=periods
    )


def attention(q: mx.array, view: View, *, scale: float) -> mx.array:
    """Attend over a view: q (B, H, m, D), the newest m queries -> (B, H, m, D); float32 softmax.

    Where a prompt meets packed rows, or a CPU, it evaluates: see `attention.attend`.
    """
    if view.is_plain and backend() != "cpu":
        return _fused_attention(q, view, scale)
    return attend(q, view, scale=scale, manner=attention_manner(q.dtype))


def attention_manner(dtype: mx.Dtype) -> Manner:
    """Return how `attend` works here. dtype: of the queries."""
    if backend() == "cpu":
        # Packed products are several times slower in half precision. Tiles of 1 MiB of float32
        # scores are 3 % slower than larger ones, which take 4 times the memory.
        return Manner(mx.float32, tile_scores=1 << 18, by_heads=True)
    return Manner(dtype, tile_scores=1 << 20, by_heads=False)


def _fused_attention(q: mx.array, view: View, scale: float) -> mx.array:
    k, v = (
        arrays[0] if len(arrays) == 1 else mx.concatenate(arrays, axis=2)
        for arrays in ([part[which].arrays[0] for part in view.parts] for which in (0, 1))
    )
    if view.sight.is_causal:
        mask = "causal" if q.shape[2] > 1 else None
    else:
        mask = None if isinstance(seen := view.mask(q.shape[2]), Sees) else seen
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Compute silu(gate) * up (arXiv 2002.05202, equation 6)."""
    return gate * mx.sigmoid(gate) * up
