"""The Llama architecture: tokens and a cache in, logits out.

Takes its matrices ready made (`weights.py` builds them); knows no files, names or devices.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import mlx.core as mx

from mlx_llama import ops, row_ops
from mlx_llama.cache import Cache, NoCache
from mlx_llama.config import ModelConfig
from mlx_llama.linear import Matrix, held
from mlx_llama.options import FLOAT32
from mlx_llama.rope import rope_periods

LAST = slice(-1, None)  # the newest position alone


class HeldMatrices(NamedTuple):
    """A layer's matrices as the native kernels take them; None where they do not."""

    wqkv: row_ops.Held | None
    wo: row_ops.Held | None
    w13: row_ops.Held | None
    w2: row_ops.Held | None


@dataclass(frozen=True, slots=True)
class Block:
    """The weights of one layer. wqkv: rows of wq, wk, wv; w13: rows of w1 (gate) and w3 (up)."""

    attention_norm: mx.array
    wqkv: Matrix
    wo: Matrix
    ffn_norm: mx.array
    w13: Matrix
    w2: Matrix
    held: HeldMatrices = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Make once what every token would make anew."""
        matrices = (self.wqkv, self.wo, self.w13, self.w2)
        object.__setattr__(self, "held", HeldMatrices(*map(held, matrices)))

    def arrays(self) -> list[mx.array]:
        """Return what is held in memory."""
        matrices = (self.wqkv, self.wo, self.w13, self.w2)
        return [self.attention_norm, self.ffn_norm, *(a for m in matrices for a in m.arrays())]


class LlamaModel:
    """A decoder of `n_layers` blocks: pre-norm, grouped-query attention, SwiGLU.

    activations: "float32", or "int8" where packed products round them. Products read it when they
    are computed: evaluate a pass before one of a model that takes them otherwise begins.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        tok_embeddings: Matrix,
        blocks: Sequence[Block],
        norm: mx.array,
        output: Matrix,
    ) -> None:
        self.config = config
        self.tok_embeddings = tok_embeddings
        self.blocks = tuple(blocks)
        self.norm = norm
        self.output = output
        self.activations = FLOAT32
        self._periods = rope_periods(config)
        self._scale = config.head_dim**-0.5

    def with_activations(self, chosen: str) -> LlamaModel:
        """Return a model of the same weights whose packed products take activations so."""
        other = copy.copy(self)
        other.activations = chosen
        return other

    def __call__(
        self,
        tokens: mx.array,
        cache: Cache | None = None,
        *,
        positions: slice | mx.array | None = None,
    ) -> mx.array:
        """Return logits (B, P, V) float32 for tokens (B, L), which follow what the cache holds.

        positions: which of the L tokens to give logits for; None gives all.
        """
        return self.logits(self.hidden(tokens, cache, positions=positions))

    def hidden(
        self,
        tokens: mx.array,
        cache: Cache | None = None,
        *,
        positions: slice | mx.array | None = None,
    ) -> mx.array:
        """Return the residual stream behind the last block, (B, P, dim), as `__call__` takes them.

        The last block works for the asked positions alone: its other outputs lead nowhere.
        """
        return deque(self.by_halves(tokens, cache, positions=positions), maxlen=1).pop()

    def by_halves(
        self,
        tokens: mx.array,
        cache: Cache | None = None,
        *,
        positions: slice | mx.array | None = None,
    ) -> Iterator[mx.array]:
        """Yield the residual stream behind each attention and each feed-forward layer.

        So a pass can be evaluated piece by piece, and given up on the way: the cache counts the
        tokens when the iterator is exhausted; one that is left earlier leaves the cache as it was.
        """
        cache = NoCache() if cache is None else cache
        n_tokens = tokens.shape[1]
        cache.begin(n_tokens)
        h = self.tok_embeddings.rows(tokens)
        for layer, block in enumerate(self.blocks):
            asked = positions if layer == len(self.blocks) - 1 else None
            ops.use_activations(self.activations)  # at each layer: others may compute in between
            h = self._attention(layer, block, h, cache, asked)
            yield h
            ops.use_activations(self.activations)
            h = self._feed_forward(block, h)
            yield h
        cache.advance(n_tokens)

    def through(self, block: Block, h: mx.array) -> mx.array:
        """Return the residual stream h (B, L, dim) of whole texts behind one block."""
        ops.use_activations(self.activations)
        cache = NoCache()
        cache.begin(h.shape[1])
        return self._feed_forward(block, self._attention(0, block, h, cache, None))

    def logits(self, hidden: mx.array) -> mx.array:
        """Return the scores of the vocabulary, (..., V) float32, for hidden (..., dim)."""
        ops.use_activations(self.activations)
        h = ops.rms_norm(hidden, self.norm, self.config.norm_eps)
        return self.output(h).astype(mx.float32)

    def _attention(
        self,
        layer: int,
        block: Block,
        h: mx.array,
        cache: Cache,
        positions: slice | mx.array | None,
    ) -> mx.array:
        """Return the residual stream h behind a block's attention, of the asked positions alone."""
        turned, k, v = self._heads(block, h, cache.position)
        n_heads = self.config.n_heads
        view = cache.append(layer, k, v)
        if positions is LAST:  # the newest query sees everything
            if h.shape[1] > 1:
                turned, h = turned[:, :, LAST], h[:, LAST]
            positions = None
        if positions is None:
            whole = row_ops.attended(h, turned, n_heads, view, self._scale, block.held.wo)
            if whole is not None:
                return whole
        q = turned[:, :n_heads]
        out = ops.attention(q, view, scale=self._scale).transpose(0, 2, 1, 3)
        if positions is not None:
            out, h = out[:, positions], h[:, positions]
        return h + block.wo(out.reshape(*out.shape[:2], -1))

    def _heads(self, block: Block, h: mx.array, offset: int) -> tuple[mx.array, mx.array, mx.array]:
        """Return heads (B, H or more, L, D), the queries first; keys and values (B, K, L, D).

        Queries and keys are rotated.
        """
        config, batch, n_tokens = self.config, h.shape[0], h.shape[1]
        n_heads, n_turned = config.n_heads, config.n_heads + config.n_kv_heads
        norm = block.attention_norm, config.norm_eps
        whole = row_ops.turned_heads(h, norm, block.held.wqkv, self._periods, offset, n_turned)
        if whole is not None:
            return whole, whole[:, n_heads:n_turned], whole[:, n_turned:]
        x = block.wqkv(ops.rms_norm(h, *norm))
        x = x.reshape(batch, n_tokens, n_turned + config.n_kv_heads, -1).transpose(0, 2, 1, 3)
        # q and k turn by the same angles, so one call turns both: (B, H + K, L, D).
        turned = ops.rotate(x[:, :n_turned], self._periods, offset)
        return turned, turned[:, n_heads:], x[:, n_turned:]

    def _feed_forward(self, block: Block, h: mx.array) -> mx.array:
        """Return the residual stream h behind a block's feed-forward layer."""
        norm = block.ffn_norm, self.config.norm_eps
        whole = row_ops.feed_forward(h, norm, block.held.w13, block.held.w2)
        if whole is not None:
            return whole
        return h + block.w2(ops.swiglu(block.w13(ops.rms_norm(h, *norm))))

    def arrays(self) -> list[mx.array]:
        """Return every weight held in memory, a tied output once."""
        ends = [self.norm, *self.tok_embeddings.arrays()]
        if self.output is not self.tok_embeddings:
            ends += self.output.arrays()
        return [*ends, *(a for block in self.blocks for a in block.arrays())]
