"""What a quantized model lost, measured: its predictions against the source's, and its weights.

Both models are walked block by block, in one dtype, so that the quantization is all that differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import mlx.core as mx
import numpy as np

from mlx_llama.config import ModelConfig
from mlx_llama.dtypes import name_of
from mlx_llama.loading import ModelDirectory
from mlx_llama.packed_ref import PackedRef, packed_ref
from mlx_llama.weights import WeightSource, hf_module
from mlx_llama_quantize.comparison import (
    HIDDEN_BYTES,
    SLICE_BYTES,
    Comparison,
    OnProgress,
    Spent,
)
from mlx_llama_quantize.divergence import Divergence, TokenScores, summarize
from mlx_llama_quantize.keeping import OnNote
from mlx_llama_quantize.products import UNPACKED_BYTES
from mlx_llama_quantize.subject import Subject
from mlx_llama_quantize.texts import Text
from mlx_llama_quantize.windows import cut_windows

CONTEXT = 512  # tokens of a window, where the model has so many
BLOCK_BYTES = 16 << 20  # of a tensor in float32


@dataclass(frozen=True, slots=True)
class WeightError:
    """What packing did to one matrix.

    relative: root of the squared error over the squared weights. largest: of a weight.
    """

    tensor: str
    format: str
    bits_per_weight: float
    relative: float
    largest: float


@dataclass(frozen=True, slots=True)
class TextUsed:
    """What was read. n_tokens: of whole windows; n_scored: of those the ones that were compared."""

    name: str
    sha256: str
    n_tokens: int
    n_scored: int
    context: int


@dataclass(frozen=True, slots=True)
class Certificate:
    """The result. divergence and text: None where only weights were compared.

    dtype: of both models' activations. peak_bytes: MLX's, of the measuring. elapsed_s: of it. Where
    it was stopped and went on, both count all parts, but for what was lost.
    """

    weights: tuple[WeightError, ...]
    text: TextUsed | None
    divergence: Divergence | None
    dtype: str | None
    elapsed_s: float
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Request:
    """What to measure. text: None compares the weights alone. states: as of `Comparison`."""

    text: Text | None
    states: Path | None = None
    on_progress: OnProgress | None = None
    on_note: OnNote | None = None


def certify(
    weights: WeightSource, source: Subject, result: ModelDirectory, request: Request
) -> tuple[Certificate, TokenScores | None]:
    """Compare a directory with what it was made of.

    weights: what was packed: the source's, or with scales folded in.

    Raises KeyboardInterrupt with what is done kept, OptionError for a text that is too short.
    """
    started = perf_counter()
    mx.clear_cache()
    mx.reset_peak_memory()
    errors = tuple(weight_errors(weights, result))
    used = scores = dtype = None
    before = Spent()
    if request.text is not None:
        compared = Subject.of_directory(result)
        dtype = name_of(compared.dtype_with(None))
        tokenizer = source.tokenizer
        windows = cut_windows(
            tokenizer.encode(request.text.content),
            bos_id=tokenizer.bos_id,
            context=min(CONTEXT, source.config.max_context),
        )
        # Never resident, whatever is free: what measuring takes was promised, and walking a small
        # model costs nothing.
        comparison = Comparison(
            source,
            compared,
            windows,
            dtype=dtype,
            is_resident=False,
            states=request.states,
            on_note=request.on_note,
        )
        before = comparison.before
        with comparison.told_when_stopped():
            scores = comparison.run(on_progress=request.on_progress)
        used = TextUsed(
            request.text.name, request.text.sha256, windows.ids.size, len(scores), windows.context
        )
    certificate = Certificate(
        weights=errors,
        text=used,
        divergence=None if scores is None else summarize(scores),
        dtype=dtype,
        elapsed_s=before.elapsed_s + perf_counter() - started,
        peak_bytes=max(before.peak_bytes, mx.get_peak_memory()),
    )
    return certificate, scores


def certificate_bytes(config: ModelConfig, *loaded: int) -> int:
    """Return what measuring takes at most; bytes.

    loaded: what each of the two models would take in memory. The ends of both, a block of each and
    one more matrix, as it is stored or unpacked, the states of the windows, and a slice of logits;
    or, before, the ends of one as they are stored and as they are computed with.
    """
    ends = config.vocab_size * config.dim * (1 if config.tied else 2)
    share = ends / config.parameter_count
    at_ends = [int(nbytes * share) for nbytes in loaded]
    blocks = sum(int(nbytes * (1 - share) / config.n_layers) for nbytes in loaded)
    matrix = max(4 * config.dim * max(config.hidden_dim, config.dim), UNPACKED_BYTES)
    walking = sum(at_ends) + blocks + matrix + HIDDEN_BYTES + 3 * SLICE_BYTES
    return max(walking, sum(at_ends) + max(at_ends) // 2)


def weight_errors(weights: WeightSource, result: ModelDirectory) -> Iterator[WeightError]:
    """Compare every packed matrix with the source's, some rows at a time."""
    tensors = result.tensors
    for name in weights.names():
        module = hf_module(name)
        if f"{module}.scales" not in tensors:
            continue
        form = result.config.quant_format(module)
        packed = packed_ref(tensors, module, form, dtype="float32")
        relative, largest = _difference(lambda rows, n=name: weights.read(n, rows), packed)
        yield WeightError(
            tensor=name,
            format=packed.form.describe(),
            bits_per_weight=8 * packed.nbytes / (packed.shape[0] * packed.shape[1]),
            relative=relative,
            largest=largest,
        )


def _difference(read: Callable[[slice], mx.array], packed: PackedRef) -> tuple[float, float]:
    """Return the relative error and the largest one."""
    n_rows, width = packed.shape
    step = max(1, BLOCK_BYTES // (4 * width))
    squares = total = largest = 0.0
    for start in range(0, n_rows, step):
        rows = slice(start, min(start + step, n_rows))
        exact = np.array(read(rows).astype(mx.float32))
        rest = np.array(packed.read(rows))
        rest -= exact
        squares += float(np.vdot(rest, rest))
        total += float(np.vdot(exact, exact))
        largest = max(largest, float(np.abs(rest).max()))
    return (squares / total) ** 0.5 if total else 0.0, largest


def by_layer(certificate: Certificate) -> Mapping[str, float]:
    """Return the mean relative error of each layer's matrices, and of those outside the layers."""
    grouped: dict[str, list[float]] = {}
    for error in certificate.weights:
        parts = error.tensor.split(".")
        where = f"layer {parts[1]}" if parts[0] == "layers" else parts[0]
        grouped.setdefault(where, []).append(error.relative)
    return {where: sum(found) / len(found) for where, found in grouped.items()}
