"""The Llama architecture: tokens and a cache in, logits out.

Takes its matrices ready made (`weights.py` builds them); knows no files, names or devices.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx

from mlx_llama import ops
from mlx_llama.cache import Cache, NoCache
from mlx_llama.config import ModelConfig
from mlx_llama.linear import Matrix
from mlx_llama.options import FLOAT32
from mlx_llama.rope import rope_periods
from mlx_llama.token_pass import TokenPass, token_pass

LAST = slice(-1, None)  # the newest position alone


@dataclass(frozen=True, slots=True)
class Block:
    """The weights of one layer. wqkv: rows of wq, wk, wv; w13: rows of w1 (gate) and w3 (up)."""

    attention_norm: mx.array
    wqkv: Matrix
    wo: Matrix
    ffn_norm: mx.array
    w13: Matrix
    w2: Matrix

    def arrays(self) -> list[mx.array]:
        """Return what is held in memory."""
        matrices = (self.wqkv, self.wo, self.w13, self.w2)
        return [self.attention_norm, self.ffn_norm, *(a for m in matrices for a in m.arrays())]


class LlamaModel:
    """A decoder of `n_layers` blocks: pre-norm, grouped-query attention, SwiGLU.

    activations: "float32", or "int8" where packed products round them.
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
        if tokens.shape == (1, 1) and (positions is None or positions is LAST):
            logits = None if cache is None else self._pass_token(tokens, cache)
            if logits is not None:
                return logits
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
            ops.use_activations(self.activations)  # at each layer: others may build in between
            h = self._attention(layer, block, h, cache, asked)
            yield h
            ops.use_activations(self.activations)
            h = self._feed_forward(block, h)
            yield h
        cache.advance(n_tokens)

    def _pass_token(self, token: mx.array, cache: Cache) -> mx.array | None:
        """Return logits (1, 1, V) for one token (1, 1), in one operation; None where none can."""
        if ops.kernels() is None or not cache.has_slots or (whole := self._token_pass) is None:
            return None
        cache.begin(1)
        logits, over, keys, values = whole(
            token, cache.slots(), cache.position, activations=self.activations
        )
        cache.fill_slots(over, keys, values)
        cache.advance(1)
        return logits

    @cached_property
    def _token_pass(self) -> TokenPass | None:
        return token_pass(
            self.config,
            embeddings=self.tok_embeddings,
            layers=[(b.attention_norm, b.wqkv, b.wo, b.ffn_norm, b.w13, b.w2) for b in self.blocks],
            norm=self.norm,
            output=self.output,
            periods=self._periods,
            scale=self._scale,
        )

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
        q, k, v = self._heads(block, h, cache.position)
        view = cache.append(layer, k, v)
        if positions is LAST:  # the newest query sees everything
            q, h, positions = q[:, :, LAST], h[:, LAST], None
        out = ops.attention(q, view, scale=self._scale).transpose(0, 2, 1, 3)
        if positions is not None:
            out, h = out[:, positions], h[:, positions]
        return h + block.wo(out.reshape(*out.shape[:2], -1))

    def _heads(self, block: Block, h: mx.array, offset: int) -> tuple[mx.array, mx.array, mx.array]:
        """Return queries (B, H, L, D), keys and values (B, K, L, D), rotated but for the values."""
        config, batch, n_tokens = self.config, h.shape[0], h.shape[1]
        n_heads, n_turned = config.n_heads, config.n_heads + config.n_kv_heads
        x = block.wqkv(ops.rms_norm(h, block.attention_norm, config.norm_eps))
        x = x.reshape(batch, n_tokens, n_turned + config.n_kv_heads, -1).transpose(0, 2, 1, 3)
        # q and k turn by the same angles, so one call turns both: (B, H + K, L, D).
        turned = ops.rotate(x[:, :n_turned], self._periods, offset)
        return turned[:, :n_heads], turned[:, n_heads:], x[:, n_turned:]

    def _feed_forward(self, block: Block, h: mx.array) -> mx.array:
        """Return the residual stream h behind a block's feed-forward layer."""
        x = ops.rms_norm(h, block.ffn_norm, self.config.norm_eps)
        return h + block.w2(ops.swiglu(block.w13(x)))

    def arrays(self) -> list[mx.array]:
        """Return every weight held in memory, a tied output once."""
        ends = [self.norm, *self.tok_embeddings.arrays()]
        if self.output is not self.tok_embeddings:
            ends += self.output.arrays()
        return [*ends, *(a for block in self.blocks for a in block.arrays())]
