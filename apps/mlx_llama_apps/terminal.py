"""Writing to a terminal with care: no foreign escape codes, one line of status that goes away."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
import threading
from time import monotonic
from types import TracebackType
from typing import Self, TextIO

from mlx_llama.errors import MlxLlamaError, OptionError

# What a model (or a file it was fed) must not send to a terminal: C0 and C1 but tab and newline.
# Halves of surrogate pairs cannot be written at all; they come from bytes that were no UTF-8.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# Characters of two columns that belong to no word: a row may end before and behind each.
WIDE = "\u1100-\u11ff\u2e80-\ua4cf\uac00-\ud7ff\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\uffe0-\uffe6"
# What stands before a row's value: a label and two spaces or more, or those alone.
_LABEL = re.compile(r"(?=.{2,16}\S)\S*(?: \S+)* {2,}")
_CLEAR_LINE = "\r\x1b[2K"


def size(nbytes: int) -> str:
    """Say a number of bytes in decimal units: 1.31 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes} bytes"


def visible(text: str) -> str:
    """Return a text with its control characters, but tab and newline, as U+FFFD."""
    return _CONTROL.sub("\ufffd", text)


def _cut(text: str, columns: int) -> str:
    """Return what of a line fits, so that it stays one line."""
    return text if len(text) <= columns else text[: max(0, columns - 1)] + "…"


def columns_of(stream: TextIO) -> int:
    """Return how wide the terminal behind a stream is."""
    try:
        found = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):  # no terminal, or closed
        found = 0
    return found or shutil.get_terminal_size().columns


def write_line(line: str, stream: TextIO) -> None:
    """Print a line; at a terminal what is too long for it goes on behind a whole word.

    A row goes on under its value, which stands behind a label and two spaces or more.
    """
    if stream.isatty():
        line = _wrapped(line, columns_of(stream))
    print(line, file=stream, flush=True)


def _wrapped(line: str, columns: int) -> str:
    label = _LABEL.match(line)
    indent = len(label[0]) if label is not None else 0
    rows = textwrap.wrap(
        line,
        columns,
        subsequent_indent=" " * (indent if 2 * indent <= columns else 2),
        replace_whitespace=False,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(rows)


def write_text(text: str, stream: TextIO) -> None:
    """Write a model's text at once; at a terminal control characters become U+FFFD."""
    stream.write(visible(text) if stream.isatty() else text)
    stream.flush()


def read_stdin() -> str:
    """Read a text from standard input, less its last line break.

    Raises MlxLlamaError for bytes that are not UTF-8, OptionError where it is closed.
    """
    if sys.stdin is None:
        raise OptionError("standard input is closed: give it a text, as in: echo TEXT | mlx-llama")
    if sys.stdin.isatty():
        write_line("reading from the terminal; Ctrl-D on an empty line ends it", sys.stderr)
    data = sys.stdin.buffer.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MlxLlamaError(
            f"standard input: byte {data[error.start]:#04x} at {error.start} is not UTF-8; "
            "convert it first, for example with iconv"
        ) from error
    return text.removesuffix("\n").removesuffix("\r")


CTRL_C_COLUMNS = 2  # what a terminal adds to a line, as ^C; one that it breaks is not cleared


class StatusLine:
    """A line on stderr for what takes more than a moment; silent where nobody watches.

    Safe to update from another thread. Leaving the context clears it.
    """

    def __init__(self, *, after_s: float = 1.0) -> None:
        self._lock = threading.Lock()
        self._due = monotonic() + after_s
        self._is_shown = False
        self._is_over = not sys.stderr.isatty()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def show(self, text: str) -> None:
        """Replace the line, once the wait has become noticeable."""
        with self._lock:
            if not self._is_over and monotonic() >= self._due:
                self._is_shown = True
                line = _cut(visible(text), columns_of(sys.stderr) - 1 - CTRL_C_COLUMNS)
                sys.stderr.write(_CLEAR_LINE + line)
                sys.stderr.flush()

    def close(self) -> None:
        """Clear the line for good."""
        self._is_over = True
        self.hide()

    def remark(self, text: str) -> None:
        """Print a line above it."""
        self.hide()
        write_line(text, sys.stderr)

    def hide(self) -> None:
        """Clear the line until it is shown again, before something else is printed."""
        with self._lock:
            if self._is_shown:
                self._is_shown = False
                sys.stderr.write(_CLEAR_LINE)
                sys.stderr.flush()
