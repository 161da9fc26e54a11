"""Draws finished blocks: what rich makes of Markdown, plain enough for any terminal.

The one colour is the terminal's own magenta, which light and dark backgrounds both let be read; no
background is painted. Nothing of the text is lost: HTML and reference definitions, which Markdown
hides, are shown as they stand, and so is a block of which something would not be seen.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown, TableElement
from rich.padding import Padding
from rich.style import Style
from rich.syntax import ANSISyntaxTheme, Syntax
from rich.table import Table
from rich.text import Text
from rich.theme import Theme

from mlx_llama_apps.chat.blocks import Block, Kind
from mlx_llama_apps.terminal import WIDE, visible

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token

COLOUR = "magenta"
THEME = Theme(
    {
        "markdown.code": COLOUR,
        "markdown.code_block": "none",
        "markdown.block_quote": "italic",
        **{f"markdown.h{level}": "bold" for level in range(2, 7)},
        "markdown.item.number": "none",
        "markdown.link": "underline",
        "markdown.link_url": "dim",
        "markdown.table.border": "dim",
        "markdown.table.header": "bold",
    }
)
CODE_CONTEXT = 200  # lines before a line of code that its colours may depend on
_ITEM = re.compile(r"(\s*)([-*+]|\d{1,9}[.)])(\s+)(.*)", re.DOTALL)
_LEADING = re.compile(r" {0,3}(#{1,6}|>)[ \t]+")  # what a heading or a quotation begins with
_STRUCTURE = re.compile(r"\A(\d{0,9})((?:[-+*.)#=]+(?=\s|$))|>|`{3}|~{3})")  # at a line's beginning
_TRAILING = re.compile(r"[ ]+((?:\x1b\[[0-9;]*m)*)$", re.MULTILINE)
_STYLE = re.compile(r"\x1b\[[0-9;]*m")
_WORD_OR_WIDE = re.compile(rf"[{WIDE}]|[^\s{WIDE}]+")
_CUT = "\ue000"  # stands where a block was cut; no word of a language has it


def _theme() -> ANSISyntaxTheme:
    from pygments.token import Comment, Keyword, Name, Number, String

    return ANSISyntaxTheme(
        {
            Comment: Style(dim=True, italic=True),
            Keyword: Style(bold=True),
            Name.Function: Style(bold=True),
            Name.Class: Style(bold=True),
            String: Style(color=COLOUR),
            Number: Style(color=COLOUR),
        }
    )


class _LeftHeading(Heading):
    """A heading that stands where text stands, without a frame."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        self.text.stylize("bold")
        yield self.text


class _PlainCode(CodeBlock):
    """Code within a quotation, or by its indent: as it stands, without a frame."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Padding(Text(str(self.text).rstrip()), (0, 0, 0, 4))


class _WholeTable(TableElement):
    """A table; where it has no room without breaking words, its rows as lines under each other."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        parts = (self.header.row if self.header else None, *(self.body.rows if self.body else ()))
        rows = [[cell.content for cell in row.cells] for row in parts if row is not None]
        widths = [max(map(_widest_word, column)) for column in zip(*rows, strict=False)]
        if sum(widths) + 2 * len(widths) > options.max_width:
            for row in rows[1:]:
                yield from (
                    Text.assemble((name.plain, "markdown.table.header"), ": ", cell)
                    for name, cell in zip(rows[0], row, strict=False)
                )
                yield Text()
            return
        for table in super().__rich_console__(console, options):
            if isinstance(table, Table):
                for column in table.columns:
                    column.overflow = "fold"
            yield table


def _widest_word(text: Text) -> int:
    return max(map(cell_len, _WORD_OR_WIDE.findall(text.plain)), default=1)


class _Markdown(Markdown):
    elements = {  # noqa: RUF012 as rich has it
        **Markdown.elements,
        "heading_open": _LeftHeading,
        "code_block": _PlainCode,
        "fence": _PlainCode,
        "table_open": _WholeTable,
    }

    def __init__(self, markup: str) -> None:
        super().__init__("", hyperlinks=False)
        self.markup = markup
        self.parsed = _parser().parse(markup)
        for token in self.parsed:
            token.children = _without_own_addresses(token.children)


def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    parser = MarkdownIt().enable("strikethrough").enable("table")
    return parser.disable(["html_block", "html_inline", "reference"])


def _without_own_addresses(tokens: list[Token] | None) -> list[Token] | None:
    """Leave a link whose text is its address a text: rich would show the address twice."""
    return tokens and [
        token
        for token in tokens
        if not (token.type in ("link_open", "link_close") and token.markup == "autolink")
    ]


def _open_marks(begun: str, rest: str) -> str:
    """Return the marks of what is bold, slanted, struck, code or a link where a block is cut."""
    for token in _parser().parse(begun + _CUT + rest):
        marks: list[str] = []
        for child in token.children or []:
            if _CUT in child.content:
                return "".join([*marks, child.markup if child.type == "code_inline" else ""])
            if child.nesting > 0:
                marks.append("[" if child.type == "link_open" else child.markup)
            elif child.nesting < 0:
                marks.pop()
    return ""


def _is_whole(raw: str, shown: str) -> bool:
    """Whether all letters and digits of a text are shown."""
    wanted, found = html.unescape(raw), _STYLE.sub("", shown)
    return Counter(filter(str.isalnum, wanted)) <= Counter(filter(str.isalnum, found))


def _without_blank_edges(shown: str) -> str:
    """Return lines without the blank ones round them, which the answer's own blocks are."""
    lines = shown.split("\n")
    while lines and not _STYLE.sub("", lines[0]).strip():
        del lines[0]
    while lines and not _STYLE.sub("", lines[-1]).strip():
        del lines[-1]
    return "".join(f"{line}\n" for line in lines)


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
        shown, wanted = self._printed(what), rest if n_left else raw
        shown = shown if _is_whole(wanted, shown) else self._printed(Text(wanted))
        return _TRAILING.sub(r"\1", _without_blank_edges(shown))

    def _rest(self, begun: str, rest: str) -> RenderableType:
        """Return what is behind a block's beginning, as a text of its own."""
        if rest.lstrip().startswith("|"):  # rows of a table without its head
            return Text(rest.rstrip())
        item, leading = _ITEM.fullmatch(begun), _LEADING.match(begun)
        marks, is_in_line = _open_marks(begun, rest), not begun.endswith("\n")
        if marks and (is_in_line or not _LEADING.match(rest)):
            rest = marks + rest.lstrip()
        elif is_in_line:
            rest = _STRUCTURE.sub(r"\1\\\2", rest.lstrip())
        if is_in_line and leading is not None:
            rest = leading[0] + rest
        if item is None:
            return _Markdown(rest)
        indent = sum(map(len, item.groups()[:3]))
        return Padding(_Markdown(_dedented(rest)), (0, 0, 0, self._indent(indent)))

    def _printed(self, what: RenderableType, *, is_wrapped: bool = True) -> str:
        with self._console.use_theme(THEME), self._console.capture() as capture:
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
