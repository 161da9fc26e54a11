"""Meta's `params.json`: every key known or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_llama.errors import CheckpointError, UnsupportedModelError
from mlx_llama_convert.refusals import refuse_int4_params

# Keys that describe how Meta's code was run, not the weights.
_RUNTIME_KEYS = ("max_batch_size", "max_seq_len")
_KNOWN_KEYS = (
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "vocab_size",
    "multiple_of",
    "ffn_dim_multiplier",
    "norm_eps",
    "rope_theta",
    "use_scaled_rope",
)
_REFUSED_KEYS = {
    "vision_chunk_size": "vision models are not converted",
    "vision_num_cross_attention_layers": "vision models are not converted",
    "moe_args": "mixture-of-experts models are not converted",
}


@dataclass(frozen=True, slots=True)
class MetaParams:
    """What `params.json` says. vocab_size None: stored as -1, to be read from the weights."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int | None
    multiple_of: int
    ffn_dim_multiplier: float | None
    norm_eps: float
    rope_theta: float | None
    is_rope_scaled: bool

    @property
    def hidden_dim(self) -> int:
        """Width of the feed-forward layer, by Meta's formula; the order of the roundings matters.

        Source: `FeedForward.__init__` in meta-llama/llama-models `models/llama3/model.py`.
        """
        hidden = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return self.multiple_of * -(-hidden // self.multiple_of)


def parse_params(raw: Mapping[str, Any], *, where: str) -> MetaParams:
    """Check a parsed `params.json`; where names it in errors.

    Raises UnsupportedModelError for a key that is not known: its meaning could change the model.
    """
    inner = raw.get("model")
    if isinstance(inner, Mapping) and len(raw) == 1:  # some releases nest everything
        raw = inner
    refuse_int4_params(raw, where=where)
    for key in raw:
        if key in _REFUSED_KEYS:
            raise UnsupportedModelError(f"{where}: {key}: {_REFUSED_KEYS[key]}")
        if key not in _KNOWN_KEYS and key not in _RUNTIME_KEYS:
            raise UnsupportedModelError(
                f"{where}: key {key!r} is unknown, and what it changes too; known are "
                f"{', '.join(_KNOWN_KEYS)}"
            )
    n_heads = _whole(raw, "n_heads", where, most=4096)
    vocab_size = _whole(raw, "vocab_size", where, least=-1, most=1 << 21, default=-1)
    if vocab_size == 0:
        raise CheckpointError(f"{where}: vocab_size is 0, expected -1 or the number of tokens")
    multiplier = raw.get("ffn_dim_multiplier")
    theta = raw.get("rope_theta")
    return MetaParams(
        dim=_whole(raw, "dim", where, most=1 << 17),
        n_layers=_whole(raw, "n_layers", where, most=1024),
        n_heads=n_heads,
        n_kv_heads=_whole(raw, "n_kv_heads", where, most=4096, default=n_heads),
        vocab_size=None if vocab_size == -1 else vocab_size,
        multiple_of=_whole(raw, "multiple_of", where, most=1 << 20, default=256),
        ffn_dim_multiplier=None
        if multiplier is None
        else _real(raw, "ffn_dim_multiplier", where, least=1e-3, most=1e3),
        norm_eps=_real(raw, "norm_eps", where, least=1e-12, most=0.1, default=1e-5),
        rope_theta=None if theta is None else _real(raw, "rope_theta", where, least=2, most=1e12),
        is_rope_scaled=_flag(raw, "use_scaled_rope", where),
    )


def _whole(
    raw: Mapping[str, Any],
    key: str,
    where: str,
    *,
    most: int,
    least: int = 1,
    default: int | None = None,
) -> int:
    value = raw.get(key)
    if value is None:
        value = default
    if value is None:
        raise CheckpointError(f"{where}: key {key!r} is missing; the file is not whole")
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise CheckpointError(
            f"{where}: {key} is {_short(value)}, expected a whole number from {least} to {most}"
        )
    return value


def _real(
    raw: Mapping[str, Any],
    key: str,
    where: str,
    *,
    least: float,
    most: float,
    default: float | None = None,
) -> float:
    value = raw.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise CheckpointError(
            f"{where}: {key} is {_short(value)}, expected a number from {least:g} to {most:g}"
        )
    return float(value)


def _flag(raw: Mapping[str, Any], key: str, where: str) -> bool:
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{where}: {key} is {_short(value)}, expected true or false")
    return bool(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
