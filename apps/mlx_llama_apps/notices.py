"""What a user is told while a prompt is read and when the context forgets; one line on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable
from time import monotonic
from types import TracebackType
from typing import Self

from mlx_llama_apps.terminal import StatusLine


def prefill_progress(status: StatusLine) -> Callable[[int, int], None]:
    """Return what shows how far a prompt has been read, how fast, and how long it will take."""
    started = monotonic()
    first: int | None = None  # tokens known when the first slice was over; it includes loading

    def show(done: int, total: int) -> None:
        nonlocal first, started
        if first is None or done < first:
            first, started = done, monotonic()
        text = f"reading the prompt: {done} of {total} tokens"
        elapsed_s = monotonic() - started
        if done > first and elapsed_s > 0:
            rate = (done - first) / elapsed_s
            text += f", {rate:.0f} a second, {duration((total - done) / rate)} left"
        status.show(text)

    return show


def duration(seconds: float) -> str:
    """Say a duration as short as it may be: 8 s, 2 min 5 s, 1 h 3 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def forgotten_text(n_tokens: int) -> str:
    """Say what a sliding context has dropped."""
    tokens = "1 token" if n_tokens == 1 else f"{n_tokens} tokens"
    return f"the context was full: the oldest {tokens} behind the kept ones were dropped"


class Forgotten:
    """Counts what a sliding context dropped, and says it once when the answer ends."""

    def __init__(self) -> None:
        self._n_tokens = 0

    def note(self, n_tokens: int) -> None:
        """Take the count so far; called on another thread."""
        self._n_tokens = n_tokens

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._n_tokens:
            print(forgotten_text(self._n_tokens), file=sys.stderr)
