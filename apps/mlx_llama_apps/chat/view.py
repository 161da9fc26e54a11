"""All that the chat draws: remarks, tables, and answers as they stream.

At a terminal the block that is open is shown as it comes, and replaced by its Markdown when it is
finished. A pipe gets the answers' text and nothing else.
"""

from __future__ import annotations

import base64
import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlx_llama_apps.chat.blocks import Block, BlockReader, Kind
from mlx_llama_apps.chat.markdown import Drawing
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
_ROW = re.compile(r".*")
_WORD = re.compile(r"[^\s\u1100-\uffff]*")  # between wide characters a row may end
NARROW = 16  # columns of the screen for each of a table; with less its cells become lines


class View:
    """A terminal, or a pipe, which gets the answers alone."""

    def __init__(self, console: Console | None = None, *, is_plain: bool = False) -> None:
        self.is_terminal = sys.stdout.isatty()
        self.is_plain = is_plain
        self._console = console or Console(highlight=False)
        self._answer: _PlainAnswer | _MarkdownAnswer | None = None

    @property
    def width(self) -> int:
        """Columns."""
        return self._console.width

    # --- remarks ---------------------------------------------------------------------------------

    def say(self, text: str, *, is_dim: bool = True) -> None:
        """Print a remark of the program's own."""
        self._console.print(Text(visible(text), style="dim" if is_dim else ""))

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        """Print rows in columns; under each other where there is no room beside."""
        rows = [[visible(cell) for cell in row] for row in rows]
        n_columns = max((len(row) for row in rows), default=0)
        first_width = max((cell_len(row[0]) for row in rows if row), default=0)
        if self.width < max(NARROW * n_columns, first_width + NARROW * (n_columns - 1)):
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
        kind = _MarkdownAnswer if is_drawn else _PlainAnswer
        self._answer = kind(self._console, begun)

    def write(self, text: str) -> None:
        """Show a part of the answer as it comes."""
        if self._answer is not None and text:
            self._answer.write(text)

    def resumed(self) -> None:
        """Note that the program was stopped, and others wrote meanwhile. A signal handler may."""
        if self._answer is not None:
            self._answer.is_resumed = True

    def end_answer(self, reason: str | None, stats: Stats | None) -> None:
        """Close the answer; at a terminal, say why it stopped and what it cost."""
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


class _PlainAnswer:
    """Text as it comes."""

    def __init__(self, console: Console, begun: str) -> None:
        self._file = console.file
        self._is_terminal = console.is_terminal
        self.is_resumed = False  # text goes on wherever it is
        self._last = ""
        self.write(begun.rpartition("\n")[2])

    def write(self, text: str) -> None:
        if text:
            self._file.write(visible(text) if self._is_terminal else text)
            self._file.flush()
            self._last = text

    def end(self) -> None:
        if not self._last.endswith("\n"):
            self._file.write("\n")
            self._file.flush()


class _MarkdownAnswer:
    """Finished blocks as Markdown; the open one as it comes, until it is replaced.

    The open block is only shown as far as the screen is high: what has scrolled away cannot be
    replaced. When the terminal is resized meanwhile, what stands there stays: its last word is
    finished, and the rest of the block drawn from the next row on. After a stop the block is shown
    again, below what others wrote.
    """

    def __init__(self, console: Console, begun: str) -> None:
        self._console = console
        self._file = console.file
        self._reader = BlockReader()
        self._drawing = Drawing(console)
        self._n_left = 0  # characters of the open block that stay as they stand
        self._is_word_open = False  # the last of them is to be finished
        self._shown = ""  # of the open block behind them; it is replaced
        self._size = _terminal_size()
        self.is_resumed = False
        for block in self._reader.feed(begun):
            self._drawing.draw(block)
        self._emit(self._more())

    def write(self, text: str) -> None:
        """Draw what the text finishes, and show what it opens."""
        out = self._looked() + self._finished(self._reader.feed(text))
        self._emit(out + self._more())

    def end(self) -> None:
        """Draw what is still open."""
        self._emit(self._looked() + self._finished(self._reader.finish()))

    def _looked(self) -> str:
        """See what has become of the screen."""
        out, size = "", _terminal_size()
        if self.is_resumed:
            self.is_resumed = self._is_word_open = False
            out, self._shown = "\n" if self._shown else "", ""
        elif self._shown and size != self._size:
            self._n_left += len(self._shown)
            self._shown, self._is_word_open = "", True
        self._size = size
        return out

    def _finished(self, blocks: Sequence[Block]) -> str:
        out = ""
        for block in blocks:
            out += self._erased()
            if self._n_left <= len(block.raw):
                out += self._word(block.raw, is_whole=True, is_code=block.kind is not Kind.TEXT)
                out += self._drawing.draw(block, n_left=self._n_left)
            else:
                self._drawing.draw(block)  # it stands there, with its line break
            self._n_left = max(0, self._n_left - len(block.raw) - 1)
            self._is_word_open = self._is_word_open and self._n_left > 0
        return out

    def _word(self, raw: str, *, is_whole: bool, is_code: bool) -> str:
        """Return what finishes the word that was open on another screen, and its line break.

        A row of code or of a table counts as one word.
        """
        if not self._is_word_open:
            return ""
        before, rest = raw[: self._n_left], raw[self._n_left :]
        is_row = is_code or before.rpartition("\n")[2].lstrip().startswith("|")
        is_within = is_row or bool(before[-1:].strip())
        found = (_ROW if is_row else _WORD).match(rest) if is_within else None
        word = found[0] if found is not None else ""
        self._n_left += len(word)
        if is_within and len(word) == len(rest) and not is_whole:
            return _flat(word)
        self._is_word_open = False
        self._n_left += rest[len(word) : len(word) + 1].isspace()
        return _flat(word) + ("" if before.endswith("\n") else "\n")

    def _erased(self) -> str:
        if not self._shown:
            return ""
        rows = rows_taken(_flat(self._shown), self._size[0]) - 1
        self._shown = ""
        up = f"\x1b[{rows}A" if rows else ""
        return f"\r{up}\x1b[J"

    def _more(self) -> str:
        """Return what of the open block is not shown yet and has room."""
        tail = self._reader.tail
        word = self._word(tail, is_whole=False, is_code=self._reader.is_code)
        if self._is_word_open:
            return word
        more = tail[self._n_left + len(self._shown) :]
        columns, lines = self._size
        while more and rows_taken(_flat(self._shown + more), columns) > max(1, lines - 2):
            more = more[: len(more) // 2]
        self._shown += more
        return word + _flat(more)

    def _emit(self, text: str) -> None:
        if text:
            self._file.write(text)
            self._file.flush()


def _flat(text: str) -> str:
    return visible(text.replace("\t", "    "))


def _terminal_size() -> tuple[int, int]:
    """Return columns and lines as the terminal has them now."""
    try:
        found = os.get_terminal_size(sys.stdout.fileno())
    except (OSError, ValueError):
        return (80, 24)
    return (found.columns or 80, found.lines or 24)


def rows_taken(text: str, columns: int) -> int:
    """Return how many rows a text takes on a terminal that wraps at so many columns."""
    row, column = 1, 0
    for line_number, line in enumerate(text.split("\n")):
        if line_number:
            row, column = row + 1, 0
        if line.isascii():
            row += max(0, len(line) - 1) // columns
            continue
        for character in line:
            width = cell_len(character)
            if column + width > columns:
                row, column = row + 1, 0
            column += width
    return row
