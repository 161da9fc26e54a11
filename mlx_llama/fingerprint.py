"""What tells one loaded model from another, so that a saved cache is never read by a wrong one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import mlx.core as mx

from mlx_llama.config import ModelConfig
from mlx_llama.model import LlamaModel
from mlx_llama.tensor_ref import byte_view

SAMPLED_ROWS = 8  # of each matrix


def model_fingerprint(model: LlamaModel, dtype: mx.Dtype) -> Mapping[str, str]:
    """Return what two models must have in common to share a cache, by the name of the part.

    dtype: of the activations. Reads sampled rows of every matrix, and the norms whole.
    """
    config = model.config
    return {
        "shape": _shape(config),
        "RoPE": _rope(config),
        "quantization": _quantization(config),
        "dtype": str(dtype).removeprefix("mlx.core."),
        "weights": _digest(model),
    }


def _shape(config: ModelConfig) -> str:
    heads = f"{config.n_heads}/{config.n_kv_heads} heads of {config.head_dim}"
    widths = f"width {config.dim}/{config.hidden_dim}"
    return f"{config.n_layers} layers, {widths}, {heads}, {config.vocab_size} tokens"


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
    digest = hashlib.sha256()
    for array in model.arrays():
        step = 1 if array.ndim == 1 else max(1, array.shape[0] // SAMPLED_ROWS)
        rows = mx.contiguous(array[::step]).view(mx.uint8)
        mx.eval(rows)
        digest.update(byte_view(rows))
    return digest.hexdigest()[:32]
