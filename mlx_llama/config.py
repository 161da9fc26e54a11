"""The model's configuration: Meta's names inside, Hugging Face's `config.json` outside.

Owns reading and writing of `config.json`, both RoPE dialects, and the bounds that keep absurd
files out. Meta's `params.json` is read by the converter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_llama.errors import CheckpointError, UnsupportedModelError

ROPE_TYPES = ("llama3", "linear")
# Bits and group sizes that MLX has, by mode.
MODES = {
    "affine": ((2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}

FULL_ATTENTION = "full_attention"

# Bounds of what a Llama can be; a file beyond them is damaged or hostile.
LIMITS = {
    "dim": 1 << 17,
    "n_layers": 1024,
    "n_heads": 4096,
    "n_kv_heads": 4096,
    "head_dim": 1024,
    "hidden_dim": 1 << 20,
    "vocab_size": 1 << 21,
    "max_context": 1 << 24,
}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How RoPE's frequencies are stretched beyond the pretraining length.

    `llama3` is Llama 3.1's piecewise rule (its constants are the defaults here); `linear` divides
    every frequency by `factor`.
    """

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise UnsupportedModelError(
                f"config: RoPE type {self.rope_type!r} is not one of default, "
                f"{', '.join(ROPE_TYPES)}; no Llama uses it"
            )
        if not (math.isfinite(self.factor) and 1.0 <= self.factor <= 1024.0):
            raise CheckpointError(f"config: RoPE factor {self.factor} is not between 1 and 1024")
        if self.rope_type == "llama3" and not (
            0 < self.low_freq_factor < self.high_freq_factor < 1e6 and self.original_context > 0
        ):
            raise CheckpointError("config: the constants of the llama3 RoPE scaling are absurd")


@dataclass(frozen=True, slots=True)
class QuantFormat:
    """How one tensor is packed: bits per weight, weights per scale, MLX's mode."""

    bits: int
    group_size: int
    mode: str = "affine"

    def __post_init__(self) -> None:
        bits, group_sizes = MODES.get(self.mode, ((), ()))
        if self.bits not in bits or self.group_size not in group_sizes:
            raise UnsupportedModelError(
                f"config: quantization with {self.bits} bits, group {self.group_size}, mode "
                f"{self.mode!r} is not one that MLX has"
            )

    def describe(self) -> str:
        """Say it as a person would: "4 bits, group 64"."""
        mode = "" if self.mode == "affine" else f", {self.mode}"
        return f"{self.bits} bits, group {self.group_size}{mode}"

    def to_json(self) -> dict[str, Any]:
        """Return the form of `config.json` that mlx-lm reads."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The architecture of one Llama. Attributes carry Meta's names.

    dim: width of the residual stream. hidden_dim: width of the feed-forward layer.
    max_context: positions that the model was trained for. tied: whether the output matrix is the
    embedding. quantization: default format of packed tensors; `overrides` by Hugging Face module
    name, None for a tensor that is not packed.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    max_context: int
    tied: bool
    kind: str
    rope_scaling: RopeScaling | None = None
    quantization: QuantFormat | None = None
    overrides: Mapping[str, QuantFormat | None] = field(default_factory=dict)
    dtype: str = "bfloat16"
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, most in LIMITS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise CheckpointError(
                    f"config: {name} is {value!r}, expected a whole number from 1 to {most}"
                )
        if self.n_heads % self.n_kv_heads:
            raise CheckpointError(
                f"config: n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"config: head_dim {self.head_dim} is odd, RoPE needs pairs")
        if not 0.0 < self.norm_eps < 1.0:
            raise CheckpointError(f"config: norm_eps {self.norm_eps} is not between 0 and 1")
        if not 1.0 < self.rope_theta < 1e12:
            raise CheckpointError(f"config: rope_theta {self.rope_theta} is not between 1 and 1e12")

    def quant_format(self, module: str) -> QuantFormat | None:
        """Return how the tensor of a Hugging Face module is packed when it has scales."""
        return self.overrides.get(module, self.quantization)

    @property
    def parameter_count(self) -> int:
        """Number of weights, a tied output counted once."""
        attention = self.dim * self.head_dim * (2 * self.n_heads + 2 * self.n_kv_heads)
        layer = attention + 3 * self.dim * self.hidden_dim + 2 * self.dim
        embeddings = self.vocab_size * self.dim * (1 if self.tied else 2)
        return self.n_layers * layer + embeddings + self.dim


def config_from_hf(raw: Mapping[str, Any], *, kind: str, is_tied: bool | None) -> ModelConfig:
    """Read a Hugging Face `config.json`; it may hold keys that are not ours.

    is_tied: what the weights show, used when the file does not say.
    """
    _refuse_foreign(raw)
    dim = _number(raw, "hidden_size")
    n_heads = _number(raw, "num_attention_heads")
    tied = raw.get("tie_word_embeddings")
    tied = is_tied if tied is None else tied
    if tied is None:
        raise CheckpointError("config.json: tie_word_embeddings is missing, no weights decide it")
    if not isinstance(tied, bool):
        raise CheckpointError(
            f"config.json: tie_word_embeddings is {tied!r}, expected true or false"
        )
    theta, scaling = rope_from_hf(raw)
    quantization, overrides = quantization_from_hf(raw)
    bos = _ids(raw, "bos_token_id")
    return ModelConfig(
        dim=dim,
        n_layers=_number(raw, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=_number(raw, "num_key_value_heads", n_heads),
        head_dim=_number(raw, "head_dim", dim // max(n_heads, 1)),
        hidden_dim=_number(raw, "intermediate_size"),
        vocab_size=_number(raw, "vocab_size"),
        norm_eps=_real(raw, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        max_context=_number(raw, "max_position_embeddings", 2048),
        tied=tied,
        kind=kind,
        rope_scaling=scaling,
        quantization=quantization,
        overrides=overrides,
        dtype=str(raw.get("torch_dtype") or raw.get("dtype") or "bfloat16"),
        bos_id=bos[0] if bos else None,
        eos_ids=_ids(raw, "eos_token_id"),
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return `config.json` as transformers and mlx-lm read it, RoPE in both dialects."""
    raw: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_context,
        "tie_word_embeddings": config.tied,
        "torch_dtype": config.dtype,
        **_rope_to_hf(config),
    }
    if config.bos_id is not None:
        raw["bos_token_id"] = config.bos_id
    if config.eos_ids:
        raw["eos_token_id"] = config.eos_ids[0] if len(config.eos_ids) == 1 else [*config.eos_ids]
    if config.quantization is not None:
        entry: dict[str, Any] = config.quantization.to_json()
        for module, form in sorted(config.overrides.items()):
            entry[module] = False if form is None else form.to_json()
        # mlx-lm reads the first name, other tools the second.
        raw["quantization"] = raw["quantization_config"] = entry
    return raw


def _rope_to_hf(config: ModelConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    if scaling is None:
        fields: dict[str, Any] = {"rope_type": "default"}
    else:
        fields = {"rope_type": scaling.rope_type, "factor": scaling.factor}
        if scaling.rope_type == "llama3":
            fields |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_context,
            }
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else fields,
        "rope_parameters": {"rope_theta": config.rope_theta, **fields},
    }


def rope_from_hf(raw: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Read theta and scaling from either dialect; where both stand they must agree."""
    new = raw.get("rope_parameters") or {}
    old = raw.get("rope_scaling") or {}
    if not isinstance(new, Mapping) or not isinstance(old, Mapping):
        raise CheckpointError("config.json: rope_parameters or rope_scaling is not an object")
    thetas = [_real(part, "rope_theta") for part in (new, raw) if "rope_theta" in part]
    if len(set(thetas)) > 1:
        raise CheckpointError(f"config.json: rope_theta is given twice, as {thetas}; keep one")
    scalings = [_scaling(part) for part in (new, old) if part]
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        raise CheckpointError(
            f"config.json: rope_parameters says {scalings[0]}, rope_scaling {scalings[1]}; keep one"
        )
    return thetas[0] if thetas else 10000.0, scalings[0] if scalings else None


def _scaling(part: Mapping[str, Any]) -> RopeScaling | None:
    rope_type = part.get("rope_type") or part.get("type") or "default"
    if rope_type == "default":
        return None
    return RopeScaling(
        rope_type=str(rope_type),
        factor=_real(part, "factor"),
        low_freq_factor=_real(part, "low_freq_factor", 1.0),
        high_freq_factor=_real(part, "high_freq_factor", 4.0),
        original_context=_number(part, "original_max_position_embeddings", 8192),
    )


def quantization_from_hf(
    raw: Mapping[str, Any],
) -> tuple[QuantFormat | None, dict[str, QuantFormat | None]]:
    """Read the default format of packed tensors, and those of single modules."""
    entry = raw.get("quantization")
    if entry is None:
        if foreign := raw.get("quantization_config"):
            method = foreign.get("quant_method") if isinstance(foreign, Mapping) else foreign
            raise UnsupportedModelError(
                f"config.json: weights quantized with {method!r} are not MLX's; take the "
                "unquantized release"
            )
        return None, {}
    if not isinstance(entry, Mapping):
        raise CheckpointError("config.json: quantization is not an object")
    overrides = {
        name: _quant_format(value) if isinstance(value, Mapping) else None
        for name, value in entry.items()
        if isinstance(value, Mapping) or value is False
    }
    return _quant_format(entry), overrides


def _quant_format(entry: Mapping[str, Any]) -> QuantFormat:
    return QuantFormat(
        _number(entry, "bits"), _number(entry, "group_size"), str(entry.get("mode", "affine"))
    )


def _refuse_foreign(raw: Mapping[str, Any]) -> None:
    """Refuse what has a Llama's file layout but another model's arithmetic."""
    model_type = raw.get("model_type")
    if model_type != "llama":
        raise UnsupportedModelError(
            f"config.json: model_type is {model_type!r}, only 'llama' is run here"
        )
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UnsupportedModelError(f"config.json: hidden_act {raw['hidden_act']!r} is not silu")
    if raw.get("rope_traditional"):
        raise UnsupportedModelError(
            "config.json: rope_traditional is set, for rows in Meta's order; convert the original "
            "checkpoint"
        )
    layers = raw.get("layer_types")
    if raw.get("sliding_window") or (
        isinstance(layers, list) and any(layer != FULL_ATTENTION for layer in layers)
    ):
        raise UnsupportedModelError("config.json: sliding-window attention, which no Llama has")
    for name in ("attention_bias", "mlp_bias"):
        if raw.get(name):
            raise UnsupportedModelError(f"config.json: {name} is set, no Llama has biases")


_MISSING = object()


def _number(raw: Mapping[str, Any], key: str, default: object = _MISSING) -> int:
    value = raw.get(key)
    if value is None and default is not _MISSING:
        value = default
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(f"config.json: {key} is {value!r}, expected a whole number")
    return value


def _ids(raw: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """Return one token id or a list of them, none where the file says null."""
    value = raw.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int):
            raise CheckpointError(f"config.json: {key} is {value!r}, expected token ids")
    return tuple(ids)


def _real(raw: Mapping[str, Any], key: str, default: object = _MISSING) -> float:
    value = raw.get(key)
    if value is None and default is not _MISSING:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"config.json: {key} is {value!r}, expected a number")
    try:
        return float(value)
    except OverflowError as error:
        raise CheckpointError(f"config.json: {key} is too large a number") from error
