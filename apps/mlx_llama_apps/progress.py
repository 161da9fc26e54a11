"""Progress and remarks on stderr; stdout belongs to results."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic

from mlx_llama_apps.terminal import CTRL_C_COLUMNS, StatusLine, write_line

SECONDS_BETWEEN_LINES = 5.0
SECONDS_OF_A_STAGE = 30.0  # between lines of what takes minutes

OnBytes = Callable[[int, int, str], None]
OnForget = Callable[[int], None]


def remark(text: str) -> None:
    """Print a line for the person who watches."""
    write_line(text, sys.stderr)


@contextmanager
def byte_bar(title: str, *, is_quiet: bool = False) -> Iterator[OnBytes | None]:
    """Yield a callback(done, total, name) that draws a bar, or plain lines without a terminal."""
    if is_quiet:
        yield None
        return
    if not sys.stderr.isatty():
        yield _plain_lines(title)
        return
    from rich.console import Console, ConsoleDimensions
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.table import Column

    class Narrower(Console):
        @property
        def size(self) -> ConsoleDimensions:  # pyright: ignore[reportIncompatibleMethodOverride]
            width, height = super().size
            return ConsoleDimensions(max(1, width - CTRL_C_COLUMNS), height)

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[name]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
    )
    with Progress(*columns, console=Narrower(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None, name="")

        def show(done: int, total: int, name: str) -> None:
            progress.update(task, completed=done, total=total, name=name)

        yield show


def _plain_lines(title: str) -> OnBytes:
    last = monotonic()

    def show(done: int, total: int, name: str) -> None:
        nonlocal last
        if monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = monotonic()
            remark(f"{title}: {done / 1e6:.0f} of {total / 1e6:.0f} MB, {name}")

    return show


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


def shown(
    say: Callable[[str], None], what: str, *, left: str = "left"
) -> Callable[[int, int], None]:
    """Return what says how far it is and how long it will take; left: as it calls that."""
    first: int | None = None  # done when it was asked first: before, other work was done
    started = 0.0

    def show(done: int, total: int) -> None:
        nonlocal first, started
        if first is None:
            first, started = done, monotonic()
        line = f"{what}: {100 * done // total} %"
        if done > first:
            left_s = (monotonic() - started) / (done - first) * (total - done)
            line += f", {duration(left_s)} {left}"
        say(line)

    return show


class Stages:
    """The parts of a long work: where each of them is, and how long it took.

    On a terminal that is a line of status, elsewhere a line when a stage begins and one now and
    then. Time between two reports belongs to the later one, which says what has been done.
    parts: their names in the order of the work. is_quiet: nothing is said.
    """

    def __init__(self, status: StatusLine, parts: Sequence[str], *, is_quiet: bool = False) -> None:
        self.parts = parts
        self._status, self._shows_lines = status, not sys.stderr.isatty()
        self._is_quiet = is_quiet
        self._started = self._last = monotonic()
        self._line_due = 0.0
        self.seconds: dict[str, float] = {}

    def of(self, what: str) -> Callable[..., None]:
        """Return a callback(done, total) for one stage; what else it is given does not count.

        The share and the time left are those of the part, and say so.
        """
        number, n_parts = self.parts.index(what) + 1, len(self.parts)
        name = f"{what}, part {number} of {n_parts}" if n_parts > 1 else what
        left = "left of this part" if number < n_parts else "left"
        show = shown(self._say, name, left=left)

        def report(done: int, total: int, *_: object) -> None:
            now = monotonic()
            if what not in self.seconds:
                self._line_due = now
            self.seconds[what] = self.seconds.get(what, 0.0) + now - self._last
            self._last = now
            show(done, total)

        return report

    def summary(self) -> str:
        """Say how long all of it took, and its stages."""
        stages = ", ".join(f"{what} {taken:.1f} s" for what, taken in self.seconds.items())
        return f"done in {monotonic() - self._started:.1f} s" + (f": {stages}" if stages else "")

    def tell(self, *lines: str) -> None:
        """Print lines that stay."""
        for line in () if self._is_quiet else lines:
            self._status.remark(line)

    def _say(self, line: str) -> None:
        if self._is_quiet:
            return
        if not self._shows_lines:
            self._status.show(line)
        elif monotonic() >= self._line_due:
            self._line_due = monotonic() + SECONDS_OF_A_STAGE
            remark(line)


def duration(seconds: float) -> str:
    """Say a duration as short as it may be: 8 s, 2 min 5 s, 1 h 3 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@contextmanager
def told_when_forgotten() -> Iterator[OnForget]:
    """Yield a callback that takes how many tokens a sliding context dropped; say it at the end."""
    n_tokens = 0

    def note(n_forgotten: int) -> None:
        nonlocal n_tokens
        n_tokens = n_forgotten

    try:
        yield note
    finally:
        if n_tokens:
            tokens = "1 token" if n_tokens == 1 else f"{n_tokens} tokens"
            remark(f"the context was full: the oldest {tokens} behind the kept ones were dropped")
