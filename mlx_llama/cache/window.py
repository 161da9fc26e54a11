"""Which tokens are held, where their rows lie, at which positions, and who may see them.

Integers only: this module knows no keys, values or layers. A token is named by how many came before
it; it lies in row `token` until the capacity is reached, from then on in a ring behind the kept
rows. Source of the policy: StreamingLLM (arXiv 2309.17453), with positions kept inside the range
that the model was trained for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mlx_llama.errors import ContextOverflowError, OptionError

if TYPE_CHECKING:
    import numpy as np

# Turning positions back rewrites every key, so it must buy this share of the trained range.
TURN_SHARE = 16
NEVER = 1 << 62  # a token that no query is


@dataclass(slots=True)
class Window:
    """The bookkeeping of one cache.

    capacity: positions that attention may see, the newest included. keep: the first tokens, never
    forgotten. max_position: positions that the model was trained for. slides: whether the oldest
    tokens behind the kept ones make room for new ones; otherwise a full cache takes no more.
    """

    capacity: int
    keep: int
    max_position: int
    slides: bool
    offset: int = 0  # tokens counted, forgotten ones included
    first: int = field(init=False)  # the oldest token held behind the kept ones
    shift: int = 0  # how far the positions of those tokens have been turned back

    def __post_init__(self) -> None:
        self.first = self.keep
        if not 1 <= self.capacity <= self.max_position:
            raise OptionError(
                f"--context: found {self.capacity}, expected 1 to {self.max_position}, the "
                "positions that the model was trained for"
            )
        least = 2 if self.slides else 1
        if not 0 <= self.keep <= self.capacity - least:
            raise OptionError(
                f"--keep: found {self.keep}, expected 0 to {self.capacity - least}: a context of "
                f"{self.capacity} tokens must have room for new ones"
            )

    @property
    def span(self) -> int:
        """Tokens behind the kept ones that a query sees at most, itself included."""
        return self.capacity - self.keep

    @property
    def position(self) -> int:
        """RoPE position of the next token."""
        return self.offset - self.shift

    @property
    def forgotten(self) -> int:
        """Tokens counted that are held no more."""
        return max(0, min(self.first, self.offset) - self.keep)

    @property
    def is_straight(self) -> bool:
        """Whether nothing was ever forgotten: every token lies in the row of its number."""
        return self.first == self.keep and self.offset <= self.capacity

    @property
    def n_rows(self) -> int:
        """Rows that hold tokens, whether or not they are still seen."""
        return self.offset if self.is_straight else self.capacity

    @property
    def must_turn(self) -> bool:
        """Whether the next token has no position left in the trained range."""
        return self.slides and self.position >= self.max_position

    @property
    def room(self) -> int:
        """Tokens that the next pass may have at most; a full cache that does not slide has 0."""
        if not self.slides:
            return self.capacity - self.offset
        position = self.keep + self.offset - self._first_kept() if self.must_turn else self.position
        return self.max_position - position

    def check(self, n_tokens: int) -> None:
        """Raise ContextOverflowError when a pass of so many tokens has no place."""
        if not self.slides and self.offset + n_tokens > self.capacity:
            longer = " or raise --context" if self.capacity < self.max_position else ""
            raise ContextOverflowError(
                f"{self.offset} tokens are held, {n_tokens} are to come, the context holds "
                f"{self.capacity}: shorten the text{longer}"
            )

    def turn(self) -> int:
        """Give the tokens behind the kept ones the positions that follow the kept ones'.

        Returns by how many positions their keys are to be turned back.
        """
        self.first = self._first_kept()
        before, self.shift = self.shift, self.first - self.keep
        return self.shift - before

    def _first_kept(self) -> int:
        """Return the oldest token that survives turning back.

        A capacity near the trained range would have to turn after every few tokens; some of the
        oldest are forgotten then, so that it pays.
        """
        spare = max(1, self.max_position // TURN_SHARE) - (self.max_position - self.capacity)
        return max(self.first, self.offset - (self.span - min(max(0, spare), self.span - 1)))

    def advance(self, n_tokens: int) -> None:
        """Count tokens; the oldest that the next one may not see are forgotten."""
        self.offset += n_tokens
        self.first = max(self.first, self.offset - self.span)

    def resume(self, *, offset: int, first: int, shift: int) -> None:
        """Take up counts that were kept elsewhere; ValueError for ones that nothing leads to."""
        if first == self.keep:
            is_sound = 0 <= offset <= self.capacity and shift == 0
        else:
            is_sound = self.slides and self.keep < first <= offset <= first + self.span
            is_sound = is_sound and 0 <= shift <= first - self.keep
        if not is_sound or offset - shift > self.max_position:
            raise ValueError(
                f"offset {offset}, first {first} and shift {shift} contradict the rest"
            )
        self.offset, self.first, self.shift = offset, first, shift

    def overwrite(self) -> None:
        """Forget the token whose row the next one takes, if the ring is full."""
        self.first = max(self.first, self.offset + 1 - self.span)

    def trim(self, n_tokens: int) -> None:
        """Forget the newest tokens; ones that were forgotten before do not come back."""
        if not 0 <= n_tokens <= self.offset:
            raise ValueError(f"cannot trim {n_tokens} of {self.offset} cached tokens")
        self.offset -= n_tokens
        if self.offset <= self.keep:
            self.first, self.shift = self.keep, 0
        else:
            self.first = min(self.first, self.offset)
            self.shift = min(self.shift, self.offset - self.keep)

    def is_lost(self, offset: int) -> bool:
        """Whether trimming to so many tokens would leave less than half of what the next one sees.

        Some of the newest behind the kept ones were forgotten then, and do not come back.
        """
        if self.first <= self.keep or offset <= self.keep:
            return False
        return offset - self.first < min(self.span, offset - self.keep) // 2

    # --- rows ------------------------------------------------------------------------------------

    def row(self, token: int) -> int:
        """Return the row of a token."""
        return token if token < self.keep else self.keep + (token - self.keep) % self.span

    def runs(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Return where tokens from start to stop go, as (token, row, count) of unbroken rows.

        Of more tokens than the ring has rows only the newest have a place.
        """
        found = []
        token = start
        while token < stop:
            if token >= self.keep:
                token = max(token, stop - self.span)
            row = self.row(token)
            end = self.keep if token < self.keep else self.capacity
            count = min(stop - token, end - row)
            found.append((token, row, count))
            token += count
        return found

    def tokens_of_rows(self) -> np.ndarray:
        """Return the token that each row of a whole ring holds, (capacity,) int64; -1 for none."""
        import numpy as np

        rows = np.arange(self.capacity)
        newest = self.offset - 1
        ring = newest - (newest - rows) % self.span  # the newest token that falls on each row
        tokens = np.where(rows < self.keep, rows, ring)
        held = np.where(rows < self.keep, rows < self.offset, tokens >= self.first)
        return np.where(held, tokens, -1)

    def visible(self, queries: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Return which tokens (S,) each query token (m,) sees, (m, S) bool; -1 is seen by none."""
        ask, seen = queries[:, None], tokens[None, :]
        near = (seen < self.keep) | (seen > ask - self.span)
        return (seen >= 0) & (seen <= ask) & near

    def seen_by(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the first and the last query token that see each of tokens (S,), int64.

        It is what `visible` says; of -1, which nobody sees, the last comes before the first.
        """
        import numpy as np

        last = np.where(tokens < self.keep, NEVER, tokens + self.span - 1)
        return tokens, np.where(tokens < 0, -2, last)
