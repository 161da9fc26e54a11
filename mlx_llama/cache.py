"""The keys and values of tokens already seen; owned by the caller, not by the attention.

A forward pass calls `reserve` once, `append` once a layer, `advance` once at the end. Knows
nothing of tokens' ids or of the model.
"""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx

STEP = 256  # tokens; capacities are multiples of it


class Cache(Protocol):
    """What attention needs of a cache."""

    @property
    def offset(self) -> int:
        """Position of the next token: the number of tokens held."""
        ...

    @property
    def arrays(self) -> list[mx.array]:
        """What to evaluate so that everything appended is computed."""
        ...

    def reserve(self, n_tokens: int) -> None:
        """Make room for new tokens in every layer."""
        ...

    def append(self, layer: int, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Store k, v (B, K, L, D) of one layer; return all that the queries may see."""
        ...

    def mask(self, n_tokens: int) -> mx.array | str | None:
        """Return the mask for n_tokens new queries over what `append` returns."""
        ...

    def advance(self, n_tokens: int) -> None:
        """Count the tokens that every layer has stored."""
        ...

    def trim(self, n_tokens: int) -> None:
        """Forget the newest tokens."""
        ...


class NoCache:
    """One pass over a whole sequence: nothing is kept."""

    offset = 0

    @property
    def arrays(self) -> list[mx.array]:
        """Return nothing: nothing is kept."""
        return []

    def reserve(self, n_tokens: int) -> None:
        """Do nothing."""

    def append(self, layer: int, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Return k and v as they are."""
        del layer
        return k, v

    def mask(self, n_tokens: int) -> mx.array | str | None:
        """Return the causal mask."""
        return "causal" if n_tokens > 1 else None

    def advance(self, n_tokens: int) -> None:
        """Do nothing."""

    def trim(self, n_tokens: int) -> None:
        """Do nothing."""


class KVCache:
    """Every token, in buffers allocated ahead: k and v (B, K, capacity, D) for each layer.

    The first allocation holds what the caller says it needs, so that nothing is ever copied;
    beyond it the capacity doubles (up to `limit`), so that a token is copied once on average.
    New tokens are written in place: MLX reuses a buffer that nothing else refers to.
    """

    def __init__(self, n_layers: int, *, capacity: int = STEP, limit: int | None = None) -> None:
        self._keys: list[mx.array | None] = [None] * n_layers
        self._values: list[mx.array | None] = [None] * n_layers
        self._limit = limit
        self._capacity = _rounded(capacity, limit)
        self._offset = 0

    @property
    def offset(self) -> int:
        """Position of the next token."""
        return self._offset

    @property
    def capacity(self) -> int:
        """Tokens that fit without a new allocation."""
        return self._capacity

    @property
    def nbytes(self) -> int:
        """Bytes allocated, in use or not."""
        return sum(a.nbytes for a in (*self._keys, *self._values) if a is not None)

    @property
    def arrays(self) -> list[mx.array]:
        """The buffers, for `mx.eval` at the end of a slice of prefill."""
        return [a for a in (*self._keys, *self._values) if a is not None]

    def reserve(self, n_tokens: int) -> None:
        """Make room for n_tokens more, doubling what is there when it is too small."""
        needed = self._offset + n_tokens
        if needed <= self._capacity:
            return
        self._capacity = max(_rounded(2 * self._capacity, self._limit), _rounded(needed, None))
        self._keys = [None if a is None else self._grown(a) for a in self._keys]
        self._values = [None if a is None else self._grown(a) for a in self._values]

    def append(self, layer: int, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Store k, v (B, K, L, D) behind the offset; return all tokens so far (B, K, S + L, D)."""
        end = self._offset + k.shape[2]
        keys, values = self._keys[layer], self._values[layer]
        if keys is None or values is None:
            keys, values = self._blank(k), self._blank(v)
        keys[..., self._offset : end, :] = k
        values[..., self._offset : end, :] = v
        self._keys[layer], self._values[layer] = keys, values
        return keys[..., :end, :], values[..., :end, :]

    def mask(self, n_tokens: int) -> mx.array | str | None:
        """Return the causal mask, aligned to the newest token."""
        return "causal" if n_tokens > 1 else None

    def advance(self, n_tokens: int) -> None:
        """Count the tokens that every layer has stored."""
        self._offset += n_tokens

    def trim(self, n_tokens: int) -> None:
        """Forget the newest tokens; their room is kept."""
        if not 0 <= n_tokens <= self._offset:
            raise ValueError(f"cannot trim {n_tokens} of {self._offset} cached tokens")
        self._offset -= n_tokens

    def _blank(self, like: mx.array) -> mx.array:
        batch, heads, _, dim = like.shape
        return mx.zeros((batch, heads, self._capacity, dim), dtype=like.dtype)

    def _grown(self, old: mx.array) -> mx.array:
        new = self._blank(old)
        new[..., : self._offset, :] = old[..., : self._offset, :]
        return new


def _rounded(n_tokens: int, limit: int | None) -> int:
    rounded = -(-max(n_tokens, 1) // STEP) * STEP
    return rounded if limit is None else min(rounded, -(-limit // STEP) * STEP)
