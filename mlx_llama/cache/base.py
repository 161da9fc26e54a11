"""What a model needs of a cache, and the one that keeps nothing.

A cache is owned by the caller, not by attention. A pass of the model calls `begin` once, `append`
once a layer and `advance` once at the end; of one token, where there are slots, `slots` and
`fill_slots` in place of `append`.
"""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx

from mlx_llama.cache.rows import Stored
from mlx_llama.cache.slots import Arrays, Slots
from mlx_llama.cache.view import Sight, View


class Cache(Protocol):
    """What a model needs of a cache."""

    @property
    def position(self) -> int:
        """RoPE position of the next token."""
        ...

    def begin(self, n_tokens: int) -> None:
        """Prepare for a pass of new tokens."""
        ...

    def append(self, layer: int, k: mx.array, v: mx.array) -> View:
        """Store k, v (B, K, L, D) of one layer; return what their queries may see."""
        ...

    @property
    def has_slots(self) -> bool:
        """Whether `slots` can be asked for, once a pass of one token has begun."""
        ...

    def slots(self) -> Slots:
        """Return what a pass of one token finds, instead of `append` for each layer."""
        ...

    def fill_slots(self, over: mx.array, keys: Arrays, values: Arrays) -> None:
        """Note what such a pass returns: what says that it is over, and buffers that are new."""
        ...

    def advance(self, n_tokens: int) -> None:
        """Count the tokens that every layer has stored."""
        ...


class NoCache:
    """One pass over a whole sequence: nothing is kept."""

    position = 0
    has_slots = False

    def __init__(self) -> None:
        self._sight = Sight(0, 0)

    def begin(self, n_tokens: int) -> None:
        """Note the length."""
        self._sight = Sight(0, n_tokens)

    def append(self, layer: int, k: mx.array, v: mx.array) -> View:
        """Show k and v as they are."""
        del layer
        return View(((Stored((k,)), Stored((v,))),), self._sight)

    def slots(self) -> Slots:
        """Not to be asked for, as `has_slots` says."""
        raise ValueError("no cache has no slots")

    def fill_slots(self, over: mx.array, keys: Arrays, values: Arrays) -> None:
        """Not to be asked for, as `has_slots` says."""
        raise ValueError("no cache has no slots")

    def advance(self, n_tokens: int) -> None:
        """Do nothing."""
