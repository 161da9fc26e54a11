"""What tells one loaded model from another, so that a saved cache is never read by a wrong one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import mlx.core as mx

from mlx_llama.config import ModelConfig
from mlx_llama.dtypes import name_of
from mlx_llama.model import LlamaModel
from mlx_llama.options import FLOAT32
from mlx_llama.tensor_ref import byte_view

DIGEST_BYTES = 16 << 20  # of the rows that are summed at once


def model_fingerprint(
    model: LlamaModel, dtype: mx.Dtype, activations: str = FLOAT32
) -> Mapping[str, str]:
    """Return what two models must have in common to share a cache, by the name of the part.

    dtype: of the activations. activations: as packed products take them; rounded ones give other
    keys and values, as another dtype does. Reads every weight once.
    """
    config = model.config
    rounded = "" if activations == FLOAT32 else f", activations {activations}"
    return {
        "shape": _shape(config),
        "RoPE": _rope(config),
        "quantization": _quantization(config),
        "dtype": name_of(dtype) + rounded,
        "weights": _digest(model),
    }


def _shape(config: ModelConfig) -> str:
    heads = f"{config.n_heads}/{config.n_kv_heads} heads of {config.head_dim}"
    widths = f"width {config.dim}/{config.hidden_dim}"
    rest = f"{config.vocab_size} tokens, norm_eps {config.norm_eps:g}"
    return f"{config.n_layers} layers, {widths}, {heads}, {rest}"


def _rope(config: ModelConfig) -> str:
    theta, scaling = f"theta {config.rope_theta:g}", config.rope_scaling
    if scaling is None:
        return theta
    kind = f"{theta}, {scaling.rope_type} scaling, factor {scaling.factor:g}"
    if scaling.rope_type == "linear":
        return kind
    bands = f"{scaling.low_freq_factor:g} to {scaling.high_freq_factor:g}"
    return f"{kind}, {bands} of {scaling.original_context}"


def _quantization(config: ModelConfig) -> str:
    if config.quantization is None:
        return "none"
    # Which tensors differ from it is in the digest: their numbers are stored in another form.
    return config.quantization.describe()


def _digest(model: LlamaModel) -> str:
    """Return a digest of every row's sum, its bits taken as whole numbers.

    What it does not see is the order within a row. Halves are taken as float32, which scales are
    where no native kernel reads them as stored: a block of rows at a time, because it is a copy.
    """
    digest = hashlib.sha256()
    for array in model.arrays():
        rows = array.reshape(-1, array.shape[-1])
        at_once = max(1, DIGEST_BYTES // max(1, 4 * rows.shape[1]))
        for first in range(0, len(rows), at_once):
            block = rows[first : first + at_once]
            wide = block.astype(mx.float32) if array.itemsize == 2 else block
            sums = mx.contiguous(wide).view(mx.uint32).sum(axis=-1, keepdims=True)
            mx.eval(sums)
            digest.update(byte_view(sums))
    return digest.hexdigest()[:32]
