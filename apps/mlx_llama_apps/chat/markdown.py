"""Draws finished blocks: what rich makes of Markdown, plain enough for any terminal.

Colours are the terminal's own, so that light and dark backgrounds both do. Nothing of the text is
lost: HTML and reference definitions, which Markdown hides, are shown as they stand.
"""

from __future__ import annotations

import re

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markdown import Heading, Markdown
from rich.padding import Padding
from rich.style import Style
from rich.syntax import ANSISyntaxTheme, Syntax
from rich.table import Table
from rich.text import Text

from mlx_llama_apps.chat.blocks import Block, Kind
from mlx_llama_apps.terminal import visible

CODE_CONTEXT = 200  # lines before a line of code that its colours may depend on
_ITEM = re.compile(r"(\s*)([-*+]|\d{1,9}[.)])(\s+)(.*)", re.DOTALL)
_LEADING = re.compile(r" {0,3}(#{1,6}|>)[ \t]+")  # what a heading or a quotation begins with
_STRUCTURE = re.compile(r"\A(\d{0,9})((?:[-+*.)#=]+(?=\s|$))|>|`{3}|~{3})")  # at a line's beginning
_TRAILING = re.compile(r"[ ]+((?:\x1b\[[0-9;]*m)*)$", re.MULTILINE)


def _theme() -> ANSISyntaxTheme:
    from pygments.token import Comment, Keyword, Name, Number, String

    return ANSISyntaxTheme(
        {
            Comment: Style(dim=True, italic=True),
            Keyword: Style(bold=True),
            Name.Function: Style(bold=True),
            Name.Class: Style(bold=True),
            String: Style(color="green"),
            Number: Style(color="cyan"),
        }
    )


class _LeftHeading(Heading):
    """A heading that stands where text stands, without a frame."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        self.text.stylize("bold")
        yield self.text


class _Markdown(Markdown):
    elements = {**Markdown.elements, "heading_open": _LeftHeading}  # noqa: RUF012 as rich has it

    def __init__(self, markup: str) -> None:
        from markdown_it import MarkdownIt

        super().__init__("", hyperlinks=False, inline_code_theme="ansi_dark")
        parser = MarkdownIt().enable("strikethrough").enable("table")
        parser.disable(["html_block", "html_inline", "reference"])
        self.markup = markup
        self.parsed = parser.parse(markup)


class Drawing:
    """Turns blocks into terminal text, one after the other; remembers what they follow."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lexer: str | None = None
        self._code: list[str] = []
        self._is_in_list = False
        self._blanks = 0

    def draw(self, block: Block, *, n_left: int = 0) -> str:
        """Return a block as it is shown, with its line break.

        n_left: characters of it that stand there already; the rest begins a row.
        """
        rest = block.raw[n_left:] if n_left else ""
        if block.kind is Kind.BLANK:
            self._blanks += 1
            return "\n" if self._blanks == 1 and not n_left else ""
        self._blanks = 0
        raw, rest = (visible(text.replace("\t", "    ")) for text in (block.raw, rest))
        if block.kind is Kind.FENCE:
            self._lexer, self._code = block.language, []
            what = Text(raw, style="dim")
        elif block.kind is Kind.CODE:
            what = self._highlighted(raw)
        else:
            what = self._text(raw)
        if n_left and not rest.strip():
            return ""
        if block.kind is not Kind.TEXT:
            return self._printed(Text(rest) if n_left else what, is_wrapped=False)
        what = self._rest(raw[: len(raw) - len(rest)], rest) if n_left else what
        return _TRAILING.sub(r"\1", self._printed(what))

    def _rest(self, begun: str, rest: str) -> RenderableType:
        """Return what is behind a block's beginning, as a text of its own."""
        if rest.lstrip().startswith("|"):  # rows of a table without its head
            return Text(rest.rstrip())
        item, leading = _ITEM.fullmatch(begun), _LEADING.match(begun)
        if not begun.endswith("\n"):
            rest = _STRUCTURE.sub(r"\1\\\2", rest.lstrip())
            rest = rest if leading is None else leading[0] + rest
        if item is None:
            return _Markdown(rest)
        indent = sum(map(len, item.groups()[:3]))
        return Padding(_Markdown(_dedented(rest)), (0, 0, 0, self._indent(indent)))

    def _printed(self, what: RenderableType, *, is_wrapped: bool = True) -> str:
        with self._console.capture() as capture:
            self._console.print(what, soft_wrap=not is_wrapped)
        return capture.get()

    def _highlighted(self, line: str) -> Text:
        self._code = [*self._code[-CODE_CONTEXT:], line]
        if not line.strip() or not self._lexer:
            return Text(line)
        syntax = Syntax("", self._lexer, theme=_theme())
        shown = syntax.highlight("\n".join(self._code))
        shown.rstrip()
        last = shown.split("\n", allow_blank=True)[-1]
        return last if last.plain.rstrip() == line.rstrip() else Text(line)

    def _text(self, raw: str) -> RenderableType:
        item = _ITEM.fullmatch(raw)
        if item is not None and not set(raw.strip()) <= set("-*_ "):
            self._is_in_list = True
            return self._item(*item.groups())
        indent = len(raw) - len(raw.lstrip(" "))
        if self._is_in_list and indent:
            return Padding(_Markdown(_dedented(raw)), (0, 0, 0, self._indent(indent)))
        self._is_in_list = False
        return _Markdown(raw)

    def _item(self, indent: str, marker: str, gap: str, content: str) -> RenderableType:
        del gap
        first, _, rest = content.partition("\n")
        mark = "•" if marker in "-*+" else marker
        grid = Table.grid(expand=True)
        grid.add_column(width=cell_len(mark) + 1, no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_row(Text(mark), _Markdown(first + ("\n" + _dedented(rest) if rest else "")))
        return Padding(grid, (0, 0, 0, self._indent(len(indent))))

    def _indent(self, asked: int) -> int:
        return min(asked, self._console.width // 3)


def _dedented(text: str) -> str:
    return "\n".join(line.lstrip(" ") for line in text.split("\n"))
