"""Streams weights through a quantizer, a few rows at a time, on as many threads as asked.

Groups run along a row, so rows are packed independently: the bytes do not depend on how a tensor
was cut. Packing runs on the CPU device whatever the machine has, for the same reason. Knows the
names of a model directory, no files.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlx_llama import ops
from mlx_llama.config import QuantFormat
from mlx_llama.errors import QuantizationError
from mlx_llama.ops import DTYPES
from mlx_llama.weights import WeightSource, hf_module
from mlx_llama_quantize import mse

PARTS = ("weight", "scales", "biases")
BLOCK_BYTES = 8 << 20  # of a tensor as stored; a few of them are alive for each thread

Entry = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


def packed_entries(
    name: str, shape: tuple[int, ...], dtype: str, form: QuantFormat | None
) -> list[Entry]:
    """Return what one tensor becomes in a model directory: (name, dtype, shape) each."""
    module = hf_module(name)
    if form is None:
        return [(f"{module}.weight", dtype, shape)]
    rows, width = shape
    groups = (rows, width // form.group_size)
    weight = (f"{module}.weight", "uint32", (rows, width * form.bits // 32))
    if form.mode != "affine":  # the scales are bit patterns there
        return [weight, (f"{module}.scales", "uint8", groups)]
    return [weight, (f"{module}.scales", dtype, groups), (f"{module}.biases", dtype, groups)]


class Ready(Protocol):
    """Tensors that are packed already, by Meta's names in `ready`."""

    @property
    def ready(self) -> Mapping[str, Any]:
        """The names."""
        ...

    def read(self, name: str) -> dict[str, mx.array]:
        """Return a tensor's arrays by part, evaluated."""
        ...


@dataclass(frozen=True, slots=True)
class _Job:
    name: str
    rows: slice | None
    form: QuantFormat | None
    dtype: str | None
    method: str


def quantize_weights(
    source: WeightSource,
    forms: Mapping[str, QuantFormat | None],
    *,
    dtype: str | None,
    n_threads: int,
    method: str = "rtn",
    ready: Ready | None = None,
    names: Sequence[str] | None = None,
) -> Iterator[tuple[str, mx.array]]:
    """Yield every tensor's arrays under their Hugging Face names, in pieces of consecutive rows.

    forms: by Meta's name, None for a tensor that is not packed. dtype: of scales and unpacked
    tensors, None for the source's. method: rtn, as `mx.quantize` does, or mse. ready: what is
    packed already. names: the tensors wanted, by default all of `source.names()`.
    Pieces come in that order and in the order of rows; weight, scales and biases of the same rows
    follow each other. Evaluated.
    """
    streams = threading.local()

    def work(job: _Job) -> list[tuple[str, mx.array]]:
        if not hasattr(streams, "cpu"):
            streams.cpu = mx.new_stream(mx.cpu)
        with mx.stream(streams.cpu):
            if ready is not None and job.name in ready.ready:
                module = hf_module(job.name)
                return [(f"{module}.{part}", a) for part, a in ready.read(job.name).items()]
            return _pack(source, job)

    wanted = source.names() if names is None else names
    whole = ready.ready if ready is not None else ()
    jobs = (
        job
        for name in wanted
        for job in _jobs(source, name, forms[name], dtype, method, is_whole=name in whole)
    )
    waiting: deque[Future[list[tuple[str, mx.array]]]] = deque()
    pool = ThreadPoolExecutor(n_threads, thread_name_prefix="quantize")
    try:
        for job in jobs:
            waiting.append(pool.submit(work, job))
            # A short queue keeps the threads busy and the memory bounded.
            if len(waiting) > n_threads + 1:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _jobs(
    source: WeightSource,
    name: str,
    form: QuantFormat | None,
    dtype: str | None,
    method: str,
    *,
    is_whole: bool,
) -> Iterator[_Job]:
    shape = source.shape(name)
    if is_whole or len(shape) == 1:
        yield _Job(name, None, form, dtype, method)
        return
    n_rows, width = shape
    itemsize = 4 if source.dtype(name) == "float32" else 2
    step = max(1, BLOCK_BYTES // (width * itemsize))
    step = max(step // 256 * 256, 1) if step >= 256 else step
    for start in range(0, n_rows, step):
        yield _Job(name, slice(start, min(start + step, n_rows)), form, dtype, method)


def _pack(source: WeightSource, job: _Job) -> list[tuple[str, mx.array]]:
    """Read and pack one job's rows; runs in a worker's own stream."""
    values = source.read(job.name, job.rows)
    if job.dtype is not None and values.dtype != DTYPES[job.dtype]:
        values = _cast(job.name, values, job.dtype)
    module = hf_module(job.name)
    if job.form is None:
        mx.eval(values)
        return [(f"{module}.weight", values)]
    refuse_no_numbers(job.name, values)
    arrays = pack_matrix(values, job.form, job.method)
    return [(f"{module}.{part}", array) for part, array in arrays.items()]


def pack_matrix(values: mx.array, form: QuantFormat, method: str) -> dict[str, mx.array]:
    """Pack values (out, in): weight, scales and, in affine mode, biases. Evaluated."""
    if method == "mse" and form.mode == "affine":
        packed = mse.quantize(values, form)
    else:
        packed = ops.quantize(values, form)
    arrays: dict[str, mx.array] = dict(zip(PARTS, packed, strict=False))
    mx.eval(arrays)
    return arrays


def unpacked(parts: Mapping[str, mx.array], form: QuantFormat) -> mx.array:
    """Return what a matrix packed in affine mode is read as, (out, in) float32."""
    scales, biases = (parts[part].astype(mx.float32) for part in ("scales", "biases"))
    return ops.dequantize(parts["weight"], scales, biases, form)


def refuse_no_numbers(name: str, values: mx.array) -> None:
    """Raise QuantizationError for NaN and infinities: whole groups would become such."""
    # By their bits, whose exponents are all ones: MLX's own look takes a quarter of packing's time.
    unsigned, signed = (mx.uint32, np.int32) if values.dtype.size == 4 else (mx.uint16, np.int16)
    infinite, below = (mx.array(x, values.dtype) for x in (float("inf"), -float("inf")))
    bits = np.array(values.view(unsigned), copy=False)
    if (
        bits.view(signed).max() >= infinite.view(unsigned).item()
        or bits.max() >= below.view(unsigned).item()
    ):
        raise QuantizationError(
            f"tensor {name}: holds values that are no numbers (NaN or infinite); the weights are "
            "damaged, fetch them again"
        )


def _cast(name: str, values: mx.array, dtype: str) -> mx.array:
    """Change the dtype; QuantizationError where float16 would overflow."""
    cast = values.astype(DTYPES[dtype])
    if dtype == "float16" and not bool(mx.all(mx.isfinite(cast) == mx.isfinite(values)).item()):
        largest = mx.max(mx.abs(values.astype(mx.float32))).item()
        raise QuantizationError(
            f"tensor {name}: holds {largest:g}, float16 ends at 65504; take --dtype bfloat16"
        )
    return cast
