"""Activation-aware scaling: channels with strong inputs get finer steps, at no cost in size.

Before packing, a matrix's columns are multiplied by scales, and what feeds it is divided by them:
the norm before q, k, v and before gate and up, the rows of v before the output projection, the rows
of up before down (Lin et al. 2023, arXiv 2306.00978). The scales are a power of the inputs' root
mean square; the power is searched by the error of the outputs on the calibration inputs, which the
Hessian gives without the inputs themselves. Power 0 changes nothing and is one of the candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np

from mlx_llama.config import ModelConfig, QuantFormat
from mlx_llama.weights import WeightSource
from mlx_llama_quantize import mse

POWERS = tuple(number / 10 for number in range(11))
SAMPLE_ROWS = 256  # of each matrix, spread over it, whose error is looked at
LIMIT = 1e4  # of the ratio of the largest scale to the least

# Which matrices read an input, and what feeds it.
READERS = {
    "attention": ("attention.wq", "attention.wk", "attention.wv"),
    "mixed": ("attention.wo",),
    "feed_forward": ("feed_forward.w1", "feed_forward.w3"),
    "gated": ("feed_forward.w2",),
}
FEEDERS = {
    "attention": "attention_norm",
    "mixed": "attention.wv",
    "feed_forward": "ffn_norm",
    "gated": "feed_forward.w3",
}

Scales = Mapping[str, np.ndarray]  # by "layer.input", (in,) float32


def find_scales(
    matrices: Sequence[tuple[np.ndarray, QuantFormat | None]],
    hessian: np.ndarray,
    dtype: mx.Dtype,
    *,
    shared: int = 1,
    width: int = 1,
) -> np.ndarray:
    """Return scales (in,) float32 for matrices (out, in) of one input.

    shared: how many runs of `width` channels next to each other must have the same scales, because
    one row feeds them all (grouped-query attention).
    """
    energy = np.diagonal(hessian).astype(np.float64)
    if shared > 1:
        runs = energy.reshape(-1, shared, width).mean(axis=1, keepdims=True)
        energy = np.broadcast_to(runs, (len(runs), shared, width)).ravel()
    strength = np.sqrt(np.maximum(energy, energy.max() / LIMIT**2 + 1e-30))
    best, least = np.ones(len(energy), np.float32), np.inf
    for power in POWERS:
        scales = strength**power
        scales = (scales / np.sqrt(scales.max() * scales.min())).astype(np.float32)
        error = sum(_error(*matrix, scales, hessian, dtype) for matrix in matrices)
        if error < least:
            best, least = scales, error
    return best


def _error(
    weight: np.ndarray,
    form: QuantFormat | None,
    scales: np.ndarray,
    hessian: np.ndarray,
    dtype: mx.Dtype,
) -> float:
    """Return the outputs' squared error for some rows of a matrix packed under scales."""
    if form is None or form.mode != "affine":
        return 0.0
    rows = weight[:: max(1, len(weight) // SAMPLE_ROWS)]
    groups = np.ascontiguousarray((rows * scales).reshape(-1, form.group_size).T)
    grid, codes = mse.search(groups, form.bits, dtype)
    found = codes * grid.scale + grid.bias
    rest = found.T.reshape(rows.shape) / scales - rows
    return float(np.vdot(rest @ hessian, rest)) * len(weight) / len(rows)


class FoldedWeights:
    """A `WeightSource` whose matrices have their scales in them, and what feeds them the inverse.

    The model computes what it did, but for the rounding of what is stored.
    """

    def __init__(self, source: WeightSource, scales: Scales) -> None:
        self._source = source
        self._scales = scales

    @property
    def config(self) -> ModelConfig:
        """The architecture that the weights belong to."""
        return self._source.config

    def names(self) -> list[str]:
        """Return the tensors in writing order."""
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the full shape of a tensor."""
        return self._source.shape(name)

    def dtype(self, name: str) -> str:
        """Return the dtype that a tensor is stored in."""
        return self._source.dtype(name)

    def read(self, name: str, rows: slice | None = None) -> mx.array:
        """Return a tensor, or some of its rows, evaluated."""
        values = self._source.read(name, rows)
        if not name.startswith("layers."):
            return values
        _, layer, rest = name.split(".", 2)
        part = rest.removesuffix(".weight")
        dtype, folded = values.dtype, values.astype(mx.float32)
        for place, readers in READERS.items():
            scales = self._scales.get(f"{layer}.{place}")
            if scales is None:
                continue
            if part in readers:
                folded = folded * mx.array(scales)
            if part == FEEDERS[place]:
                feeding = mx.array(self._feeding(place, scales))[rows or slice(None)]
                folded = folded / (feeding if folded.ndim == 1 else feeding[:, None])
        folded = folded.astype(dtype)
        mx.eval(folded)
        return folded

    def _feeding(self, place: str, scales: np.ndarray) -> np.ndarray:
        """Return the scales by the feeder's rows: one row of v feeds several heads."""
        if place != "mixed":
            return scales
        config = self.config
        runs = scales.reshape(config.n_kv_heads, -1, config.head_dim)
        return np.ascontiguousarray(runs[:, 0]).ravel()


def foldable(norm: mx.array, scales: np.ndarray) -> np.ndarray:
    """Return scales that a norm (dim,) takes up exactly, rounding and zeros included."""
    exact = np.array(norm.astype(mx.float32))
    stored = mse.rounded((exact / scales).astype(np.float32), norm.dtype)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = exact / stored
    return np.where(np.isfinite(found) & (found > 0), found, 1).astype(np.float32)
