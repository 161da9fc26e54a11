"""What attention reads in one layer: stored rows, and which of them a query may see.

Made by the caches, read by `ops.attention`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_llama.cache.rows import PLAIN, Stored
from mlx_llama.cache.window import Window

if TYPE_CHECKING:
    import numpy as np


class Sees(Enum):
    """What the queries of a pass see of some rows, where no mask need tell them apart."""

    ALL = "all"
    NONE = "none"


Mask = mx.array | Sees


@dataclass(slots=True)
class Sight:
    """Which rows the queries of one pass may see; shared by its layers, which ask the same.

    start, n_tokens: the pass's own tokens. tokens: the token of each row, -1 for none; None where
    row and token have one number. window: who sees whom; None where everything before is seen.
    """

    start: int
    n_tokens: int
    tokens: np.ndarray | None = None
    window: Window | None = None
    _known: dict[tuple[int, int, int], Mask] = field(default_factory=dict)
    _bounds: dict[int, mx.array] = field(default_factory=dict)

    @property
    def is_causal(self) -> bool:
        """Whether every query sees all rows up to its own, the last row being the newest's."""
        return self.tokens is None

    def mask(self, n_queries: int, start: int, stop: int) -> Mask:
        """Return what the last n_queries see of the rows start to stop; (n_queries, rows) bool."""
        key = (n_queries, start, stop)
        if key not in self._known:
            self._known[key] = self._mask(*key)
        return self._known[key]

    def bounds(self, n_queries: int) -> mx.array | None:
        """Return the first and the last of the last n_queries that see each row, (2, S) int32.

        None where each sees all rows up to its own, as `is_causal` says.
        """
        if self.tokens is None or self.window is None:
            return None
        if n_queries not in self._bounds:
            import numpy as np

            first, last = self.window.seen_by(self.tokens)
            start = self.start + self.n_tokens - n_queries
            counted = np.clip(np.stack([first, last]) - start, -1, n_queries)
            self._bounds[n_queries] = mx.array(counted.astype(np.int32))
        return self._bounds[n_queries]

    def _mask(self, n_queries: int, start: int, stop: int) -> Mask:
        end = self.start + self.n_tokens
        if self.tokens is None or self.window is None:
            if stop <= end - n_queries + 1:
                return Sees.ALL
            queries = mx.arange(end - n_queries, end)
            return mx.arange(start, stop)[None] <= queries[:, None]
        import numpy as np

        seen = self.window.visible(np.arange(end - n_queries, end), self.tokens[start:stop])
        if seen.all():
            return Sees.ALL
        return mx.array(seen) if seen.any() else Sees.NONE


@dataclass(frozen=True, slots=True)
class View:
    """The rows of one layer in parts, each keys and values, and who sees them.

    buffers: keys and values of each part. sight: who sees which rows. counts: how many rows of each
    part are looked at, the first ones; all of them, where there are none.
    """

    buffers: tuple[tuple[Stored, Stored], ...]
    sight: Sight
    counts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Count the rows where the caller did not."""
        if not self.counts:
            object.__setattr__(self, "counts", tuple(keys.n_rows for keys, _ in self.buffers))

    @property
    def parts(self) -> tuple[tuple[Stored, Stored], ...]:
        """The rows that are looked at."""
        pairs = zip(self.buffers, self.counts, strict=True)
        return tuple((keys.rows(0, n), values.rows(0, n)) for (keys, values), n in pairs)

    @property
    def n_rows(self) -> int:
        """Rows of all parts, S."""
        return sum(self.counts)

    @property
    def n_kv_heads(self) -> int:
        """Number of heads, K."""
        return self.buffers[0][0].n_kv_heads

    @property
    def is_plain(self) -> bool:
        """Whether nothing is packed."""
        return all(rows.bits == PLAIN for part in self.buffers for rows in part)

    def mask(self, n_queries: int) -> Mask:
        """Return what the last n_queries see of all rows."""
        return self.sight.mask(n_queries, 0, self.n_rows)

    def tiles(self, n_rows: int, n_queries: int) -> Iterator[tuple[Stored, Stored, Mask]]:
        """Yield the rows in pieces of at most n_rows that some query sees, with their masks."""
        before = 0
        for keys, values in self.parts:
            for start in range(0, keys.n_rows, n_rows):
                stop = min(start + n_rows, keys.n_rows)
                mask = self.sight.mask(n_queries, before + start, before + stop)
                if mask is not Sees.NONE:
                    yield keys.rows(start, stop), values.rows(start, stop), mask
            before += keys.n_rows
