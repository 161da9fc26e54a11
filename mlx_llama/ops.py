"""The operations of a Llama, and the one place that knows which device runs them.

Metal and CUDA run MLX's own; a CPU runs the native kernels where they are installed and take what
they are given, else MLX's. Knows nothing of files or tokens; of a cache it sees what attention
reads.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import mlx.core as mx

from mlx_llama import blas, dequantized, native
from mlx_llama.attention import Manner, attend
from mlx_llama.cache.rows import AS_COMPUTED, WIDE, KVBits, Storage
from mlx_llama.cache.view import Sees, View
from mlx_llama.config import QuantFormat
from mlx_llama.dtypes import name_of
from mlx_llama.errors import OptionError
from mlx_llama.options import FLOAT32, INT8

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def backend() -> str:
    """Name what runs the model: metal, cuda or cpu."""
    if mx.default_device() == mx.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def gpu_name() -> str | None:
    """Return what the GPU that runs the model is called, such as "Apple M4 Pro"; None on a CPU."""
    if backend() == "cpu":
        return None
    name = mx.device_info().get("device_name")
    return str(name) if name else None


def kernels() -> Any | None:
    """Return the native kernels where they are what runs; None on a GPU, or without them."""
    return native.kernels() if backend() == "cpu" else None


def fast_blas() -> blas.Blas | None:
    """Return the BLAS that multiplies float32 matrices in place of kernels, where there is one."""
    return blas.taken() if backend() == "cpu" and kernels() is None else None


def blas_name() -> str | None:
    """Name the BLAS that multiplies float32 matrices in place of kernels; None for MLX's own."""
    fast = fast_blas()
    return None if fast is None else fast.name


def runs_ahead() -> bool:
    """Whether arrays are allocated long before they are computed: by MLX's own CPU operations.

    The native kernels wait for one another; a GPU's driver orders both.
    """
    return backend() == "cpu" and kernels() is None


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
    float32, and dense float16 is slowest of all; a GPU is the other way round. The native kernels
    compute in float32, and read weights as they are stored; a BLAS knows float32 alone.
    """
    if asked is not None:
        if asked not in DTYPES:
            raise OptionError(f"--dtype {asked!r}: expected one of {', '.join(DTYPES)}")
        return DTYPES[asked]
    if backend() == "cpu":
        has_fast = kernels() is not None or fast_blas() is not None
        is_float_slower = stored == "bfloat16" and not is_quantized and not has_fast
        return mx.bfloat16 if is_float_slower else mx.float32
    if stored == "float32" and is_quantized:
        return mx.bfloat16
    return DTYPES.get(stored, mx.bfloat16)


def scales_dtype(stored: mx.Dtype, compute: mx.Dtype, form: QuantFormat) -> mx.Dtype:
    """Choose the dtype of a packed matrix's scales; the kernels read them as they are stored."""
    keeps = kernels() is not None and native.takes_format(form) and compute == mx.float32
    return stored if keeps else compute


def dense_dtype(stored: mx.Dtype, compute: mx.Dtype) -> mx.Dtype:
    """Choose the dtype of a dense matrix; the kernels read it as it is stored."""
    keeps = kernels() is not None and compute == mx.float32 and stored in native.FLOATS
    return stored if keeps else compute


def cache_dtype(compute: mx.Dtype, bits: KVBits) -> mx.Dtype:
    """Choose the dtype of cached keys and values, and of packed ones' scales.

    compute: of the activations. The native kernels attend over what is stored as it is, and half
    the bytes are half the time at depth. Half precision, because bfloat16 loses eight times as
    much: a mean KL divergence of 3e-4 where float16 has 5e-6. Raises OptionError where 32 bits are
    asked for and activations have fewer.
    """
    if WIDE in (bits.keys, bits.values):
        if compute == mx.float32:
            return compute
        name = name_of(compute)
        raise OptionError(
            f"--kv-bits {bits}: the model computes in {name}, which has 16; give --dtype float32 "
            "too, or leave it at 16",
            option="kv_bits",
        )
    return mx.float16 if compute == mx.float32 and kernels() is not None else compute


def cache_storage(compute: mx.Dtype, bits: KVBits) -> Storage:
    """Choose how a cache keeps its numbers; raises as `cache_dtype` does."""
    dtype, ours = cache_dtype(compute, bits), kernels()
    return AS_COMPUTED if ours is None else Storage(dtype, ours.append, ours.append_packed)


def native_summary(activations: str | None = None) -> str:
    """Say what computes on a CPU: the kernels' instructions and threads, or why there are none.

    activations: how packed products take them.
    """
    if (ours := kernels()) is not None:
        rounded = ", activations in 8 bits" if activations == INT8 else ""
        return f"native kernels: {ours.instructions()}, {_counted(ours.threads())}{rounded}"
    if backend() != "cpu":
        return "MLX's own kernels"
    if (fast := fast_blas()) is not None:
        threads = "" if (n := fast.threads()) is None else f", {_counted(n)}"
        return f"MLX's own operations, products by {fast.name}{threads}: {native.missing_reason()}"
    return f"MLX's own operations, one thread: {native.missing_reason()}"


def _counted(n_threads: int) -> str:
    return "1 thread" if n_threads == 1 else f"{n_threads} threads"


def slow_reason() -> str | None:
    """Say why products are many times slower than they could be here; None where they are not."""
    return native.missing_reason() if backend() == "cpu" and native.can_be_built() else None


def is_native_format(form: QuantFormat) -> bool:
    """Whether the native kernels multiply by packed matrices of this format."""
    return native.takes_format(form)


def packs_by_threads(form: QuantFormat) -> bool:
    """Whether `quantize` shares one matrix out among threads: the native kernels do."""
    return kernels() is not None and native.takes_format(form)


def use_threads(asked: int | None) -> None:
    """Let so many threads compute. Raises OptionError where that cannot be."""
    if asked is None:
        return
    if (fast := fast_blas()) is not None:
        if not fast.use_threads(asked):
            why = f"{fast.name} takes no number of threads"
            raise OptionError(f"--threads {asked}: {why}; leave it out", option="threads")
        n_threads = fast.threads()
    else:
        ours = _kernels_for("threads", asked, "and a BLAS have threads to count")
        if asked != ours.threads():
            ours.use_threads(asked)
        n_threads = ours.threads()
    if n_threads is not None and n_threads < asked:
        most = f"this process may have {n_threads} at most"
        raise OptionError(f"--threads {asked}: {most}; ask for fewer", option="threads")


def choose_activations(forms: Collection[QuantFormat], *, asked: str | None) -> str:
    """Choose how packed products take activations: "float32", or "int8" where it is asked for.

    forms: of the model's packed matrices. Raises OptionError where nothing here can do it, or no
    matrix is multiplied so.
    """
    if asked is None:
        return FLOAT32
    ours = _kernels_for("activations", asked, "have a choice")
    if asked == INT8 and not any(native.takes_bytes(form) for form in forms):
        found = "; ".join(sorted(form.describe() for form in forms))
        why = f"the native kernels ({ours.instructions()}) do it for none of its formats ({found})"
        raise OptionError(
            f"--activations {asked}: no activations of this model are rounded: "
            f"{why if forms else 'it has no packed matrix'}; leave it out",
            option="activations",
        )
    return asked


def use_activations(chosen: str) -> None:
    """Let products take activations so that this thread puts into a graph from now on."""
    if (ours := kernels()) is not None:
        ours.use_byte_activations(chosen == INT8)


def _kernels_for(option: str, asked: object, what: str) -> Any:
    """Return the native kernels; OptionError for an option that does nothing without them."""
    if (ours := kernels()) is None:
        why = native.missing_reason() if backend() == "cpu" else f"the model runs on {backend()}"
        told = f"--{option} {asked}: only the native CPU kernels {what}, and {why}"
        raise OptionError(told, option=option)
    return ours


def prefill_chunk() -> int:
    """Return how many tokens of a prompt are computed at once.

    A constant, because the size of a slice changes the last bits of the result. On a CPU larger
    slices are no faster than 256, without the native kernels than 128; with a BLAS they are, since
    each one dequantizes all weights. A cancelled prompt ends behind half a block, at any size.
    """
    if backend() != "cpu" or fast_blas() is not None:
        return 512
    return 128 if kernels() is None else 256


def join_rows(arrays: list[mx.array]) -> mx.array:
    """Join matrices (rows, in) one below another: the native kernels read files into the whole."""
    ours = kernels()
    return mx.concatenate(arrays, axis=0) if ours is None else ours.join_rows(arrays)


def linear(x: mx.array, weight: mx.array) -> mx.array:
    """Multiply by a dense matrix: x (..., in), weight (out, in) -> (..., out), of x's dtype."""
    ours = kernels()
    if ours is not None and native.takes_dense(x, weight):
        return ours.matmul(x, weight)
    return x @ weight.T


def quantized_linear(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array | None, form: QuantFormat
) -> mx.array:
    """Multiply by a packed matrix: x (..., in), weight (out, in * bits / 32) uint32."""
    ours = kernels()
    if ours is not None and biases is not None and native.takes_product(x, scales, form):
        return ours.quantized_matmul(
            x, weight, scales, biases, group_size=form.group_size, bits=form.bits
        )
    if is_dequantized(x):
        return dequantized.multiply(x, weight, scales, biases, form)
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


def is_dequantized(x: mx.array) -> bool:
    """Whether a packed matrix is dequantized for x (..., in): there is a BLAS, and many rows."""
    n_rows = math.prod(x.shape[:-1])
    return n_rows >= dequantized.LEAST_ROWS and x.dtype == mx.float32 and fast_blas() is not None


def quantize(x: mx.array, form: QuantFormat) -> tuple[mx.array, ...]:
    """Pack x (..., in): words (..., in * bits / 32) uint32, scales and, in affine mode, biases.

    Scales (..., in / group) are of x's dtype, bit patterns but in affine mode. On a CPU the bits
    are those of `mx.quantize`, whoever packs.
    """
    ours = kernels()
    if ours is not None and native.takes_numbers(x, form):
        return tuple(ours.quantize(x, group_size=form.group_size, bits=form.bits))
    return tuple(mx.quantize(x, group_size=form.group_size, bits=form.bits, mode=form.mode))


def least_squares(
    values: mx.array, form: QuantFormat, *, cut: float, rounds: int
) -> tuple[mx.array, mx.array, mx.array] | None:
    """Pack values (out, in), evaluated, searching for scales; None without the native kernels.

    They search on any device, by the calling thread, at once. cut: steps that each group's range is
    shortened by at first; rounds: of least squares.
    """
    if (ours := native.kernels()) is None:
        return None
    words, scales, biases = ours.least_squares(
        values, group_size=form.group_size, bits=form.bits, cut=cut, rounds=rounds
    )
    return words, scales, biases


def dequantize(
    weight: mx.array, scales: mx.array, biases: mx.array | None, form: QuantFormat
) -> mx.array:
    """Unpack words (..., in * bits / 32): (..., in), in affine mode of the scales' dtype.

    On a CPU the bits are those of `mx.dequantize`, whoever unpacks.
    """
    ours = kernels()
    if ours is not None and biases is not None and native.takes_packed(scales, biases, form):
        return ours.dequantize(weight, scales, biases, group_size=form.group_size, bits=form.bits)
    return mx.dequantize(
        weight, scales, biases, group_size=form.group_size, bits=form.bits, mode=form.mode
    )


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """Scale rows to unit root mean square, then by weight; accumulates in float32."""
    if (ours := kernels()) is not None:
        return ours.rms_norm(x, weight, eps)
    return mx.fast.rms_norm(x, weight, eps)


def rotate(x: mx.array, periods: mx.array, offset: int) -> mx.array:
    """Apply RoPE to x (B, heads, L, D), half-split pairs, the first row at position offset."""
    ours = kernels()
    if ours is not None and native.takes_heads(x):
        return ours.rotate(x, periods, offset)
    return mx.fast.rope(
        x, x.shape[-1], traditional=False, base=None, scale=1.0, offset=offset, freqs=periods
    )


def attention(q: mx.array, view: View, *, scale: float) -> mx.array:
    """Attend over a view: q (B, H, m, D), the newest m queries -> (B, H, m, D); float32 softmax.

    Where a prompt meets packed rows on a GPU, or a CPU without the native kernels, it evaluates:
    see `attention.attend`.
    """
    if view.is_plain and backend() != "cpu":
        return _fused_attention(q, view, scale)
    ours = kernels()
    if ours is not None and native.takes_view(q, view):
        return ours.attention(q, *view_buffers(view), scale, view.sight.bounds(q.shape[2]))
    return attend(q, view, scale=scale, manner=attention_manner(q.dtype))


def view_buffers(view: View) -> tuple[list[Any], list[Any], tuple[int, ...]]:
    """Return the arrays of keys and of values, and how many rows of each part are looked at."""
    return (
        [keys.arrays for keys, _ in view.buffers],
        [values.arrays for _, values in view.buffers],
        view.counts,
    )


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


def swiglu(x: mx.array) -> mx.array:
    """Compute silu(gate) * up (arXiv 2002.05202, equation 6), x (..., 2 n) being gate, then up."""
    if (ours := kernels()) is not None:
        return ours.swiglu(x)
    gate, up = mx.split(x, 2, axis=-1)
    return gate * mx.sigmoid(gate) * up
