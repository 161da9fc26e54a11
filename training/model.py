"""Llama 3.1's architecture in PyTorch, with Meta's names, so that its state dict is a checkpoint.

Takes token ids, returns logits. Knows nothing of text or of files.

Source: meta-llama/llama-models, models/llama3/model.py at a9c89c4; written here as small as a
training run needs it: no cache, no model parallelism.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# Llama 3.1's scaling of RoPE: see `apply_scaling` in the source.
SCALE, LOW_FREQ, HIGH_FREQ, OLD_CONTEXT = 8.0, 1.0, 4.0, 8192


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of a model; the names are those of `params.json`."""

    vocab_size: int
    dim: int = 256
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 2
    multiple_of: int = 64
    norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    use_scaled_rope: bool = True

    @property
    def hidden_dim(self) -> int:
        """Width of the feed-forward layer, by Meta's rule."""
        return -(-int(2 * 4 * self.dim / 3) // self.multiple_of) * self.multiple_of

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.dim // self.n_heads

    def params(self) -> dict[str, Any]:
        """Return what `params.json` holds."""
        return asdict(self)

    @staticmethod
    def student(vocab_size: int) -> Shape:
        """Return a shape of about a quarter of the default's parameters."""
        return Shape(vocab_size, dim=128, n_layers=2, n_heads=2, n_kv_heads=1)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions on pairs (2i, 2i + 1), as Meta's weights."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        width = shape.head_dim
        self.wq = nn.Linear(shape.dim, shape.n_heads * width, bias=False)
        self.wk = nn.Linear(shape.dim, shape.n_kv_heads * width, bias=False)
        self.wv = nn.Linear(shape.dim, shape.n_kv_heads * width, bias=False)
        self.wo = nn.Linear(shape.n_heads * width, shape.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: (B, L, dim); cos, sin: (L, head_dim / 2)."""
        batch, length, _ = x.shape
        width, n_kv = self.shape.head_dim, self.shape.n_kv_heads
        query, key, value = (
            layer(x).view(batch, length, -1, width).transpose(1, 2)  # (B, H or K, L, D)
            for layer in (self.wq, self.wk, self.wv)
        )
        # Written out: on a CPU in bfloat16 PyTorch's fused attention makes a step a quarter slower.
        # The heads of a group stand side by side, so one product serves them all.
        query = rotate(query, cos, sin) / math.sqrt(width)
        query = query.reshape(batch, n_kv, -1, width)  # (B, K, H / K * L, D)
        scores = query @ rotate(key, cos, sin).transpose(-1, -2)
        scores = scores.view(batch, n_kv, -1, length, length).float()
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, -math.inf).softmax(-1).to(value.dtype)
        out = weights.view(batch, n_kv, -1, length) @ value
        out = out.view(batch, -1, length, width).transpose(1, 2)  # (B, L, H, D)
        return self.wo(out.reshape(batch, length, -1))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.w1 = nn.Linear(shape.dim, shape.hidden_dim, bias=False)
        self.w2 = nn.Linear(shape.hidden_dim, shape.dim, bias=False)
        self.w3 = nn.Linear(shape.dim, shape.hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, L, dim)."""
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Attention and feed-forward, each behind its norm and beside its residual."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention = Attention(shape)
        self.feed_forward = FeedForward(shape)
        self.attention_norm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)
        self.ffn_norm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: (B, L, dim)."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    """The whole model; the output is its own matrix, not the embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.tok_embeddings = nn.Embedding(shape.vocab_size, shape.dim)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.n_layers))
        self.norm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)
        self.output = nn.Linear(shape.dim, shape.vocab_size, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                is_last = name.endswith(("wo.weight", "w2.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * shape.n_layers if is_last else 1))

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return what the output matrix takes. tokens: (B, L) → (B, L, dim)."""
        cos, sin = angles(self.shape, tokens.shape[1])
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits. tokens: (B, L) → (B, L, V)."""
        return self.output(self.hidden(tokens))


def frequencies(shape: Shape) -> Tensor:
    """Return RoPE's angular frequencies, scaled as in Llama 3.1: (head_dim / 2,) float32."""
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    freqs = 1.0 / shape.rope_theta**exponents
    if not shape.use_scaled_rope:
        return freqs
    wavelengths = 2 * math.pi / freqs
    smooth = (OLD_CONTEXT / wavelengths - LOW_FREQ) / (HIGH_FREQ - LOW_FREQ)
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * freqs / SCALE + smooth * freqs


def angles(shape: Shape, length: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of positions 0 to length - 1: (length, head_dim / 2) each."""
    product = torch.outer(torch.arange(length, dtype=torch.float32), frequencies(shape))
    return product.cos(), product.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (2i, 2i + 1) of each head. x: (B, H, L, D)."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)
