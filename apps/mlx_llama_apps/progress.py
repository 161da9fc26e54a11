"""Progress and remarks on stderr; stdout belongs to results."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from mlx_llama_apps.terminal import StatusLine

SECONDS_BETWEEN_LINES = 5.0

OnBytes = Callable[[int, int, str], None]
OnForget = Callable[[int], None]


def remark(text: str) -> None:
    """Print a line for the person who watches."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def byte_bar(title: str, *, is_quiet: bool = False) -> Iterator[OnBytes | None]:
    """Yield a callback(done, total, name) that draws a bar, or plain lines without a terminal."""
    if is_quiet:
        yield None
        return
    if not sys.stderr.isatty():
        yield _plain_lines(title)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.table import Column

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[name]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
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


def shown(status: StatusLine, what: str) -> Callable[[int, int], None]:
    """Return what shows how far it is and how long it will take."""
    started, first = monotonic(), None

    def show(done: int, total: int) -> None:
        nonlocal first
        first = done if first is None else first
        line = f"{what}: {100 * done // total} %"
        if done > first:
            left_s = (monotonic() - started) / (done - first) * (total - done)
            line += f", {duration(left_s)} left"
        status.show(line)

    return show


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
