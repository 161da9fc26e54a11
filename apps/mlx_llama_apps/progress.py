"""Progress and remarks on stderr; stdout belongs to results."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

SECONDS_BETWEEN_LINES = 5.0

OnBytes = Callable[[int, int, str], None]


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
