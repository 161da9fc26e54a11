"""What the tests of the chat share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from terminal import Start, Terminal


@pytest.fixture
def start(home: Path) -> Iterator[Start]:
    running: list[Terminal] = []

    def begin(*arguments: object, **more: object) -> Terminal:
        terminal = Terminal(home, *arguments, **more)  # pyright: ignore[reportArgumentType]
        running.append(terminal)
        terminal.prompt()
        return terminal

    yield begin
    for terminal in running:
        terminal.child.close(force=True)
