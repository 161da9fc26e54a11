"""All that the chat draws: remarks, tables, and answers, which `streaming` shows as they come.

A pipe gets the answers' text and nothing else.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlx_llama_apps.chat.hush import is_in_foreground, undivided
from mlx_llama_apps.chat.streaming import MarkdownAnswer, PlainAnswer
from mlx_llama_apps.terminal import size, visible

if TYPE_CHECKING:
    from mlx_llama import Stats

REASONS = {
    "length": "ended after max_tokens; /continue goes on",
    "context": "ended: the context is full",
    "cancelled": "stopped; /continue goes on",
    "timeout": "ended after the timeout; /continue goes on",
    "stop": "ended at a stop text",
}
NARROW = 16  # columns of the screen for each of a table; with less its cells become lines


class View:
    """A terminal, or a pipe, which gets the answers alone."""

    def __init__(self, console: Console | None = None, *, is_plain: bool = False) -> None:
        self.is_terminal = sys.stdout.isatty()
        self.is_plain = is_plain
        self._console = console or Console(highlight=False)
        self._answer: PlainAnswer | MarkdownAnswer | None = None
        self._held = ""  # of the answer, that came while the program was in the background

    @property
    def width(self) -> int:
        """Columns."""
        return self._console.width

    # --- remarks ---------------------------------------------------------------------------------

    def say(self, text: str, *, is_dim: bool = True) -> None:
        """Print a remark of the program's own."""
        self._console.print(Text(visible(text), style="dim" if is_dim else ""))

    def has_room(self, n_columns: int, *, first_width: int = 0) -> bool:
        """Whether so many columns of a table can stand beside each other."""
        return self.width >= max(NARROW * n_columns, first_width + NARROW * (n_columns - 1))

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        """Print rows in columns; under each other where there is no room beside."""
        rows = [[visible(cell) for cell in row] for row in rows]
        n_columns = max((len(row) for row in rows), default=0)
        first_width = max((cell_len(row[0]) for row in rows if row), default=0)
        if not self.has_room(n_columns, first_width=first_width):
            for first, *rest in rows:
                self._console.print(Text(first, style="bold"))
                for cell in filter(None, rest):
                    self._console.print(Text(f"  {cell}"))
            return
        grid = Table.grid(padding=(0, 2))
        for number in range(n_columns):
            grid.add_column(no_wrap=number == 0, overflow="fold")
        for first, *rest in rows:
            grid.add_row(Text(first, style="bold"), *map(Text, rest))
        self._console.print(grid)

    def show_message(self, role: str, content: str) -> None:
        """Print a message that was said before."""
        if role == "assistant":
            self.begin_answer()
            self.write(content)
            self.end_answer(None, None)
        else:
            self._console.print(Text(f"> {visible(content)}", style="bold"))

    def copy(self, text: str) -> None:
        """Hand a text to the terminal's clipboard (OSC 52)."""
        code = base64.b64encode(text.encode("utf-8", "replace")).decode("ascii")
        self._write(f"\x1b]52;c;{code}\x07")

    # --- answers ---------------------------------------------------------------------------------

    def begin_answer(self, begun: str = "") -> None:
        """Begin to show an answer; begun: what a cut one had, shown from its last block."""
        is_drawn = self.is_terminal and not self.is_plain and not self._console.is_dumb_terminal
        kind = MarkdownAnswer if is_drawn else PlainAnswer
        self._answer = kind(self._console, begun)

    def write(self, text: str) -> None:
        """Show a part of the answer as it comes; in the background, when that is over."""
        self._held += text
        with undivided():
            if not sys.stdout.isatty() or is_in_foreground(sys.stdout.fileno()):
                self._write_held()

    def _write_held(self) -> None:
        text, self._held = self._held, ""
        if self._answer is not None and text:
            self._answer.write(text)

    def resumed(self) -> None:
        """Note that the program was stopped, and others wrote meanwhile. A signal handler may."""
        if self._answer is not None:
            self._answer.is_resumed = True

    def end_answer(self, reason: str | None, stats: Stats | None) -> None:
        """Close the answer; at a terminal, say why it stopped and what it cost."""
        self._write_held()
        if self._answer is not None:
            self._answer.end()
            self._answer = None
        if not self.is_terminal:
            return
        parts = [REASONS[reason]] if reason in REASONS else []
        parts += [] if stats is None else stats_parts(stats)
        if parts:
            self.say(" · ".join(parts))

    def _write(self, text: str) -> None:
        self._console.file.write(text)
        self._console.file.flush()


def stats_parts(stats: Stats) -> list[str]:
    """Say what an answer cost, in the order of what happened."""
    new = stats.prompt_tokens - stats.cached_tokens
    parts = [
        f"prompt {new} new tokens at {stats.prompt_tokens_per_s:.0f}/s",
        f"answer {stats.answer_tokens} tokens at {stats.answer_tokens_per_s:.1f}/s",
        f"first after {stats.time_to_first_token_s:.2f} s",
        f"peak {size(stats.peak_memory_bytes)}",
        meter_text(stats.context_tokens, stats.context_limit),
    ]
    if stats.forgotten_tokens:
        parts.append(f"{stats.forgotten_tokens} oldest tokens dropped")
    return parts


def meter_text(used: int, limit: int) -> str:
    """Say how full a context is: context 1234 of 8192 (15 %)."""
    share = 100 * used // limit if limit else 0
    return f"context {used} of {limit} ({share} %)"
