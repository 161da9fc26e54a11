"""A slow cache in NumPy float64 for tests: which tokens a query sees, where they stand, the result.

It keeps every token as it came, unrotated, and does the arithmetic anew for each query from two
numbers: the first token of the window that is not forgotten, and how far the window was turned
back. Knows nothing of MLX, of rings, of growth or of packing.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Self

import numpy as np

# A score that is off by more than this changes its weight by more than a fifth: beyond first order.
FIRST_ORDER_LIMIT = 0.2


@dataclass(slots=True)
class CacheOracle:
    """One cache: capacity, keep and slides as `KVCache` has them.

    packed_from: passes end at this many tokens, 0 where nothing is packed. key_error, value_error:
    standard deviation of what packing adds to one number. first: the first token beyond the kept
    ones that is not forgotten. shift: a token of the window stands at its number minus this.
    """

    theta: float
    max_context: int
    capacity: int
    keep: int = 0
    slides: bool = False
    packed_from: int = 0
    key_error: float = 0.0
    value_error: float = 0.0
    keys: list[np.ndarray] = field(default_factory=list)  # of each token: (layers, K, D)
    values: list[np.ndarray] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)  # of each token: how often it was turned back
    first: int = 0
    shift: int = 0

    def __post_init__(self) -> None:
        self.first = self.keep

    @property
    def window(self) -> int:
        return self.capacity - self.keep

    @property
    def offset(self) -> int:
        return len(self.keys)

    @property
    def position(self) -> int:
        return self.offset - self.shift

    @property
    def forgotten(self) -> int:
        return max(0, min(self.first, self.offset) - self.keep)

    @property
    def held(self) -> int:
        return self.offset - self.forgotten

    @property
    def is_turn_due(self) -> bool:
        return self.slides and self.position == self.max_context

    @property
    def room(self) -> int:
        """Tokens of the next pass at most, packing aside."""
        if not self.slides:
            return self.capacity - self.offset
        turned = self.fork()
        turned.turn_if_due()
        return self.max_context - turned.position

    @property
    def pass_limit(self) -> int:
        until_packed = self.packed_from - self.offset
        return min(self.room, until_packed) if until_packed > 0 else self.room

    def fork(self) -> Self:
        made = copy.copy(self)
        made.keys, made.values = list(self.keys), list(self.values)
        made.turns = list(self.turns)
        return made

    def turn_if_due(self) -> None:
        """Do what comes before a pass: the window moves back to follow the kept tokens."""
        if not self.is_turn_due:
            return
        margin = max(1, self.max_context // 16)
        dropped = max(0, margin - (self.max_context - self.capacity))
        dropped = min(dropped, self.window - 1)
        self.first = max(self.first, self.offset - (self.window - dropped))
        self.shift = self.first - self.keep
        for s in range(self.first, self.offset):
            self.turns[s] += 1

    def run(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, *, scale: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Do one pass: q (layers, H, L, D), k and v (layers, K, L, D).

        Returns (layers, H, L, D) twice: the results, and the deviation that packing gives them,
        infinite where the scores are too far off to say.
        """
        self.turn_if_due()
        start = self.offset
        self.keys += list(np.moveaxis(k.astype(np.float64), 2, 0))
        self.values += list(np.moveaxis(v.astype(np.float64), 2, 0))
        self.turns += [0] * k.shape[2]
        rows = [
            self.attend(q[:, :, i].astype(np.float64), start + i, scale) for i in range(q.shape[2])
        ]
        self.first = max(self.first, self.offset - self.window)
        results, deviations = zip(*rows, strict=True)
        return np.stack(results, axis=2), np.stack(deviations, axis=2)

    def attend(self, q: np.ndarray, token: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
        """Return what the query of one token finds: q (layers, H, D) -> (layers, H, D), twice."""
        seen = self.seen(token)
        group = q.shape[1] // self.keys[0].shape[1]
        q = self.rotated(q, self.position_of(token))
        keys = np.stack([self.rotated(self.keys[s], self.position_of(s)) for s in seen])
        keys = np.repeat(keys, group, axis=2)  # (S, layers, H, D)
        values = np.repeat(np.stack([self.values[s] for s in seen]), group, axis=2)
        scores = scale * (keys * q).sum(axis=-1)
        weights = np.exp(scores - scores.max(axis=0))
        weights = (weights / weights.sum(axis=0))[..., None]  # (S, layers, H, 1)
        out = (weights * values).sum(axis=0)
        # First order: d out = sum of w dv + w (v - out) ds, with ds = scale * q . dk. A key is
        # packed when it comes and once more for each turn.
        packings = np.sqrt([1 + self.turns[s] for s in seen])[:, None, None, None]
        score_error = packings * scale * np.linalg.norm(q, axis=-1, keepdims=True) * self.key_error
        variance = weights**2 * (self.value_error**2 + (score_error * (values - out)) ** 2)
        is_small = score_error.max(axis=0) <= FIRST_ORDER_LIMIT
        return out, np.where(is_small, np.sqrt(variance.sum(axis=0)), np.inf)

    def seen(self, token: int) -> list[int]:
        """Return the tokens that one token sees, itself included, during its pass."""
        return [
            s
            for s in range(token + 1)
            if s < self.keep or (s > token - self.window and s >= self.first)
        ]

    def position_of(self, token: int) -> int:
        return token if token < self.keep else token - self.shift

    def rotated(self, x: np.ndarray, position: int) -> np.ndarray:
        """Turn feature i with i + D/2 (half-split): x (..., D)."""
        half = x.shape[-1] // 2
        angles = position / self.theta ** (2 * np.arange(half) / x.shape[-1])
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
        return np.concatenate([turned.real, turned.imag], axis=-1)

    def trim(self, n_tokens: int) -> None:
        left = self.offset - n_tokens
        del self.keys[left:], self.values[left:], self.turns[left:]
        if left <= self.keep:
            self.first, self.shift = self.keep, 0
        else:
            self.first = min(self.first, left)
            self.shift = min(self.shift, left - self.keep)
