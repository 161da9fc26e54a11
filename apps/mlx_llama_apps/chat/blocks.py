"""Markdown as it streams: which blocks are finished, and what is still open.

A block is what can be drawn by itself and will not change any more: a paragraph, one item of a
list, a table, a heading, one line of code. Knows nothing of how it is drawn.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, auto

_FENCE = re.compile(r"^(\s*)(`{3,}|~{3,})\s*([^`]*)$")
_HEADING = re.compile(r"^ {0,3}#{1,6}(\s|$)")
_RULE = re.compile(r"^ {0,3}([-*_])(\s*\1){2,}\s*$")
_ITEM = re.compile(r"^\s*([-*+]|\d{1,9}[.)])\s+\S")


class Kind(Enum):
    """What a block is."""

    TEXT = auto()
    FENCE = auto()  # the line that opens or closes code
    CODE = auto()  # one line of it
    BLANK = auto()  # empty lines between blocks


@dataclass(frozen=True, slots=True)
class Block:
    """One finished block. raw: as the model wrote it, without its last line break.

    language: of a line that opens code, "" where none is named, None for one that closes it.
    """

    kind: Kind
    raw: str
    language: str | None = None


class BlockReader:
    """Takes text as it comes; gives out blocks when they are finished."""

    def __init__(self) -> None:
        self._lines: list[str] = []  # of the block that is open
        self._line = ""  # the line that is open
        self._fence: str | None = None  # what the code that is open began with

    @property
    def tail(self) -> str:
        """What has come of the block that is open."""
        return "\n".join([*self._lines, self._line])

    @property
    def is_code(self) -> bool:
        """Whether the tail is a line of code."""
        return self._fence is not None

    def feed(self, text: str) -> list[Block]:
        """Take text; return the blocks that it finishes."""
        found: list[Block] = []
        *whole, self._line = (self._line + text).split("\n")
        for line in whole:
            found += self._take(line)
        return found

    def finish(self) -> list[Block]:
        """Return what is open at the end."""
        found = self._take(self._line) if self._line else []
        self._line = ""
        return found + self._flush()

    def _take(self, line: str) -> list[Block]:
        if self._fence is not None:
            return [self._code(line)]
        if not line.strip():
            return [*self._flush(), Block(Kind.BLANK, line)]
        if fence := _FENCE.match(line):
            self._fence = fence[2]
            words = fence[3].split()
            return [*self._flush(), Block(Kind.FENCE, line, words[0] if words else "")]
        if _RULE.match(line) and not (self._lines and "-" in line):  # else a heading's underline
            return [*self._flush(), Block(Kind.TEXT, line)]
        if _HEADING.match(line):
            return [*self._flush(), Block(Kind.TEXT, line)]
        if _ITEM.match(line) or (self._lines and _group(line) != _group(self._lines[-1])):
            done = self._flush()
            self._lines.append(line)
            return done
        self._lines.append(line)
        return []

    def _code(self, line: str) -> Block:
        fence = self._fence or ""
        if line.strip().startswith(fence) and not line.strip().strip(fence[0]):
            self._fence = None
            return Block(Kind.FENCE, line, None)
        return Block(Kind.CODE, line)

    def _flush(self) -> list[Block]:
        lines, self._lines = self._lines, []
        return [Block(Kind.TEXT, "\n".join(lines))] if lines else []


def _group(line: str) -> str:
    """Return what lines of one table or quotation have in common."""
    first = line.lstrip()[:1]
    return first if first in "|>" else ""
