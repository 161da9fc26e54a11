"""An answer as it streams: text as it comes, or Markdown by finished block.

Owns what stands of the open block on the screen, so that it can be replaced. Knows no model.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console

from mlx_llama.turn import n_shared
from mlx_llama_apps.chat.blocks import Block, BlockReader, Kind
from mlx_llama_apps.chat.markdown import Drawing
from mlx_llama_apps.terminal import WIDE, visible

AS_PICTURE = "\ufe0f"  # makes of a character a picture, which some terminals show wider
_ROW = re.compile(r".*")
_WORD = re.compile(rf"[^\s{WIDE}]*")
_PIECE = re.compile(rf" +|[{WIDE}]|[^ {WIDE}]+")


class PlainAnswer:
    """Text as it comes. begun: what a cut answer had, of which the last line is shown again."""

    def __init__(self, console: Console, begun: str) -> None:
        self._file = console.file
        self._is_terminal = console.is_terminal
        self.is_resumed = False  # text goes on wherever it is
        self._last = ""
        self.write(begun.rpartition("\n")[2])

    def write(self, text: str) -> None:
        """Show the next piece."""
        if text:
            self._file.write(visible(text) if self._is_terminal else text)
            self._file.flush()
            self._last = text

    def end(self) -> None:
        """End the last line."""
        if not self._last.endswith("\n"):
            self._file.write("\n")
            self._file.flush()


class MarkdownAnswer:
    """Finished blocks as Markdown; the open one as it comes, until it is replaced.

    begun: what a cut answer had, shown from its last block. The open block is only shown as far as
    the screen is high: what has scrolled away cannot be replaced. When the terminal is resized
    meanwhile, what stands there stays: its last word is finished, and the rest of the block drawn
    from the next row on. After a stop the block is shown again, below what others wrote.
    """

    def __init__(self, console: Console, begun: str) -> None:
        self._console = console
        self._file = console.file
        self._reader = BlockReader()
        self._drawing = Drawing(console)
        self._n_left = 0  # characters of the open block that stay as they stand
        self._is_word_open = False  # the last of them is to be finished
        self._shown = ""  # of the open block behind them; it is replaced
        self._rows = ""  # the same, as it stands on the screen
        self._is_full = False  # no more of the open block has room
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
            out, self._shown, self._is_full = "\n" if self._shown else "", "", False
        elif self._shown and size != self._size:
            self._n_left += len(self._shown)
            self._shown, self._is_word_open, self._is_full = "", True, False
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
        rows, is_shown = self._rows.count("\n"), bool(self._shown)
        self._shown, self._rows, self._is_full = "", "", False
        up = f"\x1b[{rows}A" if rows else ""
        return f"\r{up}\x1b[J" if is_shown else ""

    def _more(self) -> str:
        """Return what of the open block is not shown yet and has room."""
        tail = self._reader.tail
        word = self._word(tail, is_whole=False, is_code=self._reader.is_code)
        if self._is_word_open:
            return word
        before = self._rows if self._shown else ""
        more = tail[self._n_left + len(self._shown) :] if not self._is_full else ""
        columns, lines = self._size
        while more:
            text = _flat(self._shown + more)
            self._rows = wrapped(text, columns, is_code=self._reader.is_code)
            if self._rows.count("\n") < max(1, lines - 2):
                break
            # A beginning of what came at once is shown; a token that has no room is not.
            self._rows, self._is_full = before, True
            more = "" if self._shown else more[: len(more) // 2]
        self._shown += more
        return word + redrawn(before, self._rows if self._shown else "")

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


def wrapped(text: str, columns: int, *, is_code: bool = False) -> str:
    """Return a text with a line break wherever a row of so many columns ends.

    A row ends between words where it can, in code and tables anywhere. What is appended to the text
    moves its last word at most, and nothing before that.
    """
    return "\n".join(
        _wrapped_line(line, columns, is_row=is_code or line.lstrip().startswith("|"))
        for line in text.split("\n")
    )


def _wrapped_line(line: str, columns: int, *, is_row: bool) -> str:
    if line.isascii() and (is_row or len(line) <= columns):
        return _cut(line, columns)
    parts: list[str] = []
    column = 0
    for piece in line if is_row else _PIECE.findall(line):
        if piece.isspace():  # what has no room at the end of a row is not seen there
            parts.append(piece[: columns - column])
            column += len(parts[-1])
            continue
        width = cells(piece)
        if column and column + width > columns:
            parts.append("\n")
            column = 0
        if width <= columns:
            parts.append(piece)
            column += width
        else:
            parts.append(_cut(piece, columns))
            column = cells(parts[-1].rpartition("\n")[2])
    return "".join(parts)


def _cut(text: str, columns: int) -> str:
    """Return a text with a line break wherever a row is full."""
    if text.isascii():
        return "\n".join(text[n : n + columns] for n in range(0, len(text), columns))
    rows, column = [""], 0
    for character in text:
        width = cells(character)
        if column and column + width > columns:
            rows.append("")
            column = 0
        rows[-1] += character
        column += width
    return "\n".join(rows)


def cells(text: str) -> int:
    """Return how many columns a text takes at most, on any terminal."""
    if text.isascii():
        return len(text)
    return sum(map(cell_len, text)) + text.count(AS_PICTURE)


def redrawn(before: str, after: str) -> str:
    """Return what turns rows on the screen into others, of which only the last word may differ."""
    same = n_shared(before, after)
    if same == len(before):
        return after[same:]
    column = cells(before[:same].rpartition("\n")[2])
    right = f"\x1b[{column}C" if column else ""
    return f"\r{right}\x1b[K{after[same:]}"
