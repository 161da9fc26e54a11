"""The shapes of the family by name, for models of random weights. Imports no MLX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mlx_llama.config import ModelConfig, RopeScaling
from mlx_llama.errors import OptionError

LLAMA3_VOCAB, LLAMA2_VOCAB = 128256, 32000
LONG = 131072

# dim, layers, heads, key/value heads, feed-forward width
_SIZES: Mapping[str, tuple[int, int, int, int, int]] = {
    "7b": (4096, 32, 32, 32, 11008),
    "13b": (5120, 40, 40, 40, 13824),
    "30b": (6656, 60, 52, 52, 17920),
    "34b": (8192, 48, 64, 8, 22016),
    "65b": (8192, 80, 64, 64, 22016),
    "8b": (4096, 32, 32, 8, 14336),
    "70b": (8192, 80, 64, 8, 28672),
    "405b": (16384, 126, 128, 8, 53248),
    "1b": (2048, 16, 32, 8, 8192),
    "3b": (3072, 28, 24, 8, 8192),
    "110m": (768, 12, 12, 12, 2048),
    "15m": (288, 6, 6, 6, 768),
}


def _shape(size: str, **changes: object) -> ModelConfig:
    dim, n_layers, n_heads, n_kv_heads, hidden_dim = _SIZES[size]
    base = ModelConfig(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=dim // n_heads,
        hidden_dim=hidden_dim,
        vocab_size=LLAMA3_VOCAB,
        norm_eps=1e-5,
        rope_theta=500000.0,
        max_context=8192,
        tied=False,
        # Random weights have no vocabulary of their own: theirs is tiktoken's in every shape.
        kind="llama3",
    )
    return replace(base, **changes)  # pyright: ignore[reportArgumentType]


def _llama1(size: str) -> ModelConfig:
    return _shape(
        size, vocab_size=LLAMA2_VOCAB, norm_eps=1e-6, rope_theta=10000.0, max_context=2048
    )


def _llama2(size: str) -> ModelConfig:
    return _shape(size, vocab_size=LLAMA2_VOCAB, rope_theta=10000.0, max_context=4096)


def _codellama(size: str, vocab_size: int = LLAMA2_VOCAB) -> ModelConfig:
    return _shape(size, vocab_size=vocab_size, rope_theta=1e6, max_context=16384)


def _llama31(size: str) -> ModelConfig:
    scaling = RopeScaling("llama3", 8.0)
    return _shape(size, max_context=LONG, kind="llama3.1", rope_scaling=scaling)


def _llama32(size: str) -> ModelConfig:
    scaling = RopeScaling("llama3", 32.0)
    return _shape(size, max_context=LONG, tied=True, kind="llama3.2", rope_scaling=scaling)


def _small(size: str) -> ModelConfig:
    return _shape(size, vocab_size=LLAMA2_VOCAB, tied=True)


SHAPES: Mapping[str, ModelConfig] = {
    **{f"llama-1-{size}": _llama1(size) for size in ("7b", "13b", "30b", "65b")},
    **{f"llama-2-{size}": _llama2(size) for size in ("7b", "13b", "70b")},
    **{f"codellama-{size}": _codellama(size, 32016) for size in ("7b", "13b")},
    **{f"codellama-{size}": _codellama(size) for size in ("34b", "70b")},
    **{f"llama-3-{size}": _shape(size) for size in ("8b", "70b")},
    **{f"llama-3.1-{size}": _llama31(size) for size in ("8b", "70b", "405b")},
    **{f"llama-3.2-{size}": _llama32(size) for size in ("1b", "3b")},
    "llama-3.3-70b": _llama31("70b"),
    **{size: _small(size) for size in ("110m", "15m")},
}


def shape_named(name: str) -> ModelConfig:
    """Return the shape called so; OptionError lists the known ones."""
    found = SHAPES.get(name.lower())
    if found is None:
        raise OptionError(f"--shape: found {name!r}, expected one of {', '.join(SHAPES)}")
    return found
