"""The choice between codes that learned from inputs and codes that did not, on inputs kept back."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from mlx_llama.config import QuantFormat
from mlx_llama.linear import Dense
from mlx_llama_quantize import gptq
from mlx_llama_quantize.packing import PARTS, pack_matrix, unpacked
from mlx_llama_quantize.products import for_texts


def coded(
    values: mx.array, form: QuantFormat, factor: gptq.Factor, held: mx.array | None
) -> dict[str, mx.array]:
    """Pack values (out, in) by what they read; by `mse` where that errs less on inputs held back.

    held: (n, in) float32; None where nothing was.
    """
    learned: dict[str, mx.array] = dict(
        zip(PARTS, gptq.quantize(values, form, factor), strict=True)
    )
    if held is None:
        return learned
    searched = pack_matrix(values, form, "mse")
    return min((learned, searched), key=lambda parts: _output_error(values, parts, form, held))


def _output_error(
    values: mx.array, parts: Mapping[str, mx.array], form: QuantFormat, inputs: mx.array
) -> float:
    """Return the squared error of the outputs (n, out) that packing leaves."""
    rest = unpacked(parts, form) - values.astype(mx.float32)
    out = for_texts(Dense(rest))(inputs)
    return float(mx.sum(out * out))
