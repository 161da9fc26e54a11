"""What the matrices of a layer read while a text goes through it."""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from mlx_llama.linear import Matrix
from mlx_llama_quantize.products import Moments


@dataclass(slots=True)
class Input:
    """What is known of one input. held: of windows that are kept back, (1, L, in) float32 each.

    is_holding: whether what comes now is kept back, and not learned from.
    """

    moments: Moments = field(default_factory=Moments)
    held: list[mx.array] = field(default_factory=list)
    is_holding: bool = False

    def add(self, x: mx.array) -> None:
        """Take in what was read, (1, L, in)."""
        if not self.is_holding:
            self.moments.add(x)
            return
        self.held.append(x.astype(mx.float32))
        mx.eval(self.held)

    def rows(self, scales: np.ndarray | None = None) -> mx.array | None:
        """Return what was kept back, (n, in), as matrices under scales (in,) read it."""
        if not self.held:
            return None
        rows = mx.concatenate(self.held, axis=1)[0]
        rows = rows if scales is None else rows / mx.array(scales)
        mx.eval(rows)
        self.held.clear()
        return rows


@dataclass(frozen=True, slots=True)
class Watched:
    """A matrix whose input is remembered."""

    matrix: Matrix
    input: Input

    def __call__(self, x: mx.array) -> mx.array:
        """Return x times the transposed matrix: (..., out)."""
        self.input.add(x)
        return self.matrix(x)

    def rows(self, ids: mx.array) -> mx.array:
        """Return the rows ids (...,) as (..., in)."""
        return self.matrix.rows(ids)

    def arrays(self) -> list[mx.array]:
        """Return what is held in memory."""
        return self.matrix.arrays()
