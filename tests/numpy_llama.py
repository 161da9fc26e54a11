"""A Llama in NumPy, float64: what compares numbers with MLX has them from here. Slow and short."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

# From q (H, L, D), k and v (K, L, D), none of them turned, to (H, L, D).
Attend = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def llama_logits(
    weights: Mapping[str, np.ndarray],
    raw: Mapping[str, Any],
    ids: Any,
    *,
    attend: Attend | None = None,
) -> np.ndarray:
    """Return the logits (L, V) of one text; weights by Hugging Face names, raw: config.json.

    Without RoPE scaling. attend: what does it in each layer instead of causal attention.
    """
    head_dim = raw["head_dim"]
    length = len(ids)
    theta = raw.get("rope_theta") or raw["rope_parameters"]["rope_theta"]
    attend = attend or (lambda q, k, v: _causal(q, k, v, theta))

    def matrix(name: str) -> np.ndarray:
        return np.asarray(weights[f"{name}.weight"], dtype=np.float64)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        scale = np.sqrt((x**2).mean(axis=-1, keepdims=True) + raw["rms_norm_eps"])
        return x / scale * matrix(name)

    def heads(x: np.ndarray) -> np.ndarray:
        return x.reshape(length, -1, head_dim).transpose(1, 0, 2)

    h = matrix("model.embed_tokens")[np.asarray(ids)]
    for layer in range(raw["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        x = norm(h, f"{at}.input_layernorm")
        q, k, v = (heads(x @ matrix(f"{at}.self_attn.{name}_proj").T) for name in "qkv")
        out = attend(q, k, v)
        h = h + out.transpose(1, 0, 2).reshape(length, -1) @ matrix(f"{at}.self_attn.o_proj").T
        x = norm(h, f"{at}.post_attention_layernorm")
        gate, up = (x @ matrix(f"{at}.mlp.{name}_proj").T for name in ("gate", "up"))
        h = h + (gate / (1 + np.exp(-gate)) * up) @ matrix(f"{at}.mlp.down_proj").T
    h = norm(h, "model.norm")
    output = "model.embed_tokens" if raw.get("tie_word_embeddings") else "lm_head"
    return h @ matrix(output).T


def _causal(q: np.ndarray, k: np.ndarray, v: np.ndarray, theta: float) -> np.ndarray:
    """Attend from every token to itself and those before it."""
    n_heads, length, head_dim = q.shape
    half, group = head_dim // 2, n_heads // len(k)
    angles = np.arange(length)[:, None] / theta ** (np.arange(half) / half)

    def turned(x: np.ndarray) -> np.ndarray:
        z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
        return np.concatenate([z.real, z.imag], axis=-1)

    q, k, v = turned(q), np.repeat(turned(k), group, axis=0), np.repeat(v, group, axis=0)
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(head_dim)
    scores = scores + np.triu(np.full((length, length), -np.inf), 1)
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return (scores / scores.sum(axis=-1, keepdims=True)) @ v


def dequantized(
    packed: np.ndarray, scales: np.ndarray, biases: np.ndarray, *, bits: int
) -> np.ndarray:
    """Return the matrix that MLX's affine packing in 4 or 8 bits stands for."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    numbers = (packed[..., None] >> shifts) & np.uint32(2**bits - 1)
    grouped = numbers.reshape(*scales.shape, -1).astype(np.float64)
    return (grouped * scales[..., None] + biases[..., None]).reshape(len(packed), -1)
