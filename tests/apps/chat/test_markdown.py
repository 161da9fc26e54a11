"""Markdown as it streams: what is shown never depends on how the text was cut into pieces."""

from __future__ import annotations

import io
import random
import re

import pyte
import pytest
from rich.console import Console

from mlx_llama_apps.chat import streaming
from mlx_llama_apps.chat.blocks import BlockReader, Kind
from mlx_llama_apps.chat.streaming import redrawn, wrapped
from mlx_llama_apps.chat.view import View

TEXT = """# A title

Some *words* and `code`, long enough that they go on over the end of the row, and 日本語 too: \
日本語日本語日本語日本語日本語日本語.

1. first
2. second **bold**
   - nested

   goes on
10. tenth

```python
def f(x):
    return "long string" + str(x)  # comment

```

| a | b |
|---|---|
| 1 | 日本 |

> quoted
> twice

<div>kept</div> [1]: http://kept
***
end 🙂
"""


def drawn(text: str, pieces: list[str], columns: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the screen's lines after an answer that came in pieces."""
    monkeypatch.setattr(streaming, "_terminal_size", lambda: (columns, 24))
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=columns, color_system="truecolor")
    shown = View(console)
    shown.is_terminal = True
    shown.begin_answer()
    for piece in pieces:
        shown.write(piece)
    shown.end_answer(None, None)
    screen = pyte.HistoryScreen(columns, 24, history=1000)
    screen.set_mode(pyte.modes.LNM)
    pyte.Stream(screen).feed(out.getvalue())
    above = ["".join(line[x].data for x in range(columns)) for line in screen.history.top]
    return [line.rstrip() for line in [*above, *screen.display]]


@pytest.mark.parametrize("columns", [20, 40, 80])
def test_screen_is_the_same_however_the_text_came(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    whole = drawn(TEXT, [TEXT], columns, monkeypatch)
    dice = random.Random(1)
    for _ in range(3):
        pieces, rest = [], TEXT
        while rest:
            size = dice.choice([1, 2, 3, 7])
            pieces.append(rest[:size])
            rest = rest[size:]
        assert drawn(TEXT, pieces, columns, monkeypatch) == whole
    flat = " ".join(" ".join(whole).split())
    for kept in ("A title", "first", "nested", "goes on", "tenth", "def f(x):", "日本", "quoted"):
        assert kept in flat
    assert "<div>kept</div>" in flat.replace(" ", "") or "<div>kept</div>" in flat
    assert "**" not in flat.replace("***", "")


def test_blocks_are_finished_as_soon_as_they_cannot_change() -> None:
    reader = BlockReader()
    assert reader.feed("a para") == []
    assert reader.tail == "a para"
    assert [b.raw for b in reader.feed("graph\n\n")] == ["a paragraph", ""]
    assert reader.feed("- one") == []
    assert [b.raw for b in reader.feed("\n- two")] == []
    assert [b.raw for b in reader.feed("\n")] == ["- one"]
    assert [b.kind for b in reader.feed("```py\nx = 1\n")] == [Kind.TEXT, Kind.FENCE, Kind.CODE]
    assert reader.is_code
    assert [b.kind for b in reader.feed("```\n")] == [Kind.FENCE]
    assert [b.raw for b in reader.feed("Head\n---\n\n")] == ["Head\n---", ""]
    reader.feed("end")
    assert [b.raw for b in reader.finish()] == ["end"]


@pytest.mark.parametrize(
    ("text", "columns", "rows"),
    [
        ("", 10, ""),
        ("0123456789", 10, "0123456789"),
        ("0123456789a", 10, "0123456789\na"),
        ("one two", 5, "one \ntwo"),
        ("one   two", 4, "one \ntwo"),
        ("one two-and-more x", 5, "one \ntwo-a\nnd-mo\nre x"),
        ("a\nb", 10, "a\nb"),
        ("日本語日本語", 10, "日本語日本\n語"),
        ("a 日本語日本", 10, "a 日本語日\n本"),
        ("a\u2019b cd", 5, "a\u2019b \ncd"),
        ("012345678日", 10, "012345678\n日"),
        ("ab \u2764\ufe0f", 4, "ab \n\u2764\ufe0f"),
        ("| one two |", 6, "| one \ntwo |"),
    ],
)
def test_rows_of_a_text(text: str, columns: int, rows: str) -> None:
    assert wrapped(text, columns) == rows


def test_words_are_moved_whole_while_they_are_written() -> None:
    """Once the word at the end of a row stood in two until its paragraph was finished."""
    dice = random.Random(2)
    words = [dice.choice(["a", "word", "日本", "x" * 14, "it\u2019s"]) for _ in range(60)]
    text, screen = " ".join(words), pyte.Screen(12, 60)
    screen.set_mode(pyte.modes.LNM)
    stream, before = pyte.Stream(screen), ""
    for end in range(len(text) + 1):
        after = wrapped(text[:end], 12)
        stream.feed(redrawn(before, after))
        before = after
        shown = [line.rstrip() for line in screen.display]
        assert "\n".join(shown).rstrip() == re.sub(" +(?=\n|$)", "", after)


def streamed(
    pieces: list[str | int], monkeypatch: pytest.MonkeyPatch, columns: int = 40
) -> list[str]:
    """Return the lines of an answer in pieces; a number resizes to so many columns, 0 is a stop.

    What stood before a resize is not wrapped anew.
    """
    monkeypatch.setenv("TERM", "xterm-256color")
    size = [columns, 24]
    monkeypatch.setattr(streaming, "_terminal_size", lambda: tuple(size))
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=columns, color_system=None)
    shown = View(console)
    shown.is_terminal = True
    screen = pyte.Screen(columns, 24)
    screen.set_mode(pyte.modes.LNM)
    stream = pyte.Stream(screen)
    shown.begin_answer()
    for piece in pieces:
        if piece == 0:
            shown.resumed()
        elif isinstance(piece, int):
            size[0] = piece
            console.width = piece
            screen.resize(24, piece)
        else:
            shown.write(piece)
            stream.feed(out.getvalue())
            out.seek(0)
            out.truncate()
    shown.end_answer(None, None)
    stream.feed(out.getvalue())
    return [line.rstrip() for line in screen.display if line.strip()]


LONG = "and then it goes on for more than one row of the screen"


@pytest.mark.parametrize(
    ("pieces", "lines"),
    [
        (["a *first* wo", 60, "rd *of*", " many\n\n*two*\n\n"],
         ["a *first* word", "of many", "two"]),
        (["a *first* ", 60, "part\n\n*two*\n"], ["a *first*", "part", "two"]),
        (["one wo", 30, "rd\n\ntwo"], ["one word", "two"]),
        (["one wo", 30, "rd", 50, "s an", 20, "d more"], ["one words", "and", "more"]),
        (["one two", 30, " - three 1. *x*"], ["one two", "- three 1. x"]),
        (["one two", 30, " 1. three"], ["one two", "1. three"]),
        (["- one two", 30, " *three*\n- *four*\n"], ["- one two", "  three", "• four"]),
        (["> one", 30, " *two*\n> three\n\nend"], ["> one", "▌ two three", "end"]),
        (["日本", 30, "語 *two*"], ["日本", "語 two"]),
        (["| a | b |\n|---", 30, "|---|\n| 1 | 2 |\n\n*x*"],
         ["| a | b |", "|---|---|", "| 1 | 2 |", "x"]),
        (["```py\nx = ", 30, "1 + 2\ny = 3\n```\n"], ["```py", "x = 1 + 2", "y = 3", "```"]),
        (["```p", 30, "y\nx = 1\n```\n*x*"], ["```py", "x = 1", "```", "x"]),
        (["one\n", 30, "two\n\n*x*"], ["one", "two", "x"]),
        (["one\n- t", 30, "wo *x*\n- y"], ["one", "- two", "  x", "• y"]),
        (["one\n  ", 30, "\nNext *x*"], ["one", "Next x"]),
        (["a **one two", 30, " three** *f*\n\n*x*"], ["a **one two", "three f", "x"]),
        (["a **b *c d", 30, " e* f** g"], ["a **b *c d", "e f g"]),
        (["use `a b", 30, " *c*` or [d](e)"], ["use `a b", "*c* or d (e)"]),
        (["see [one two", 30, " three](x) *f*"], ["see [one two", "three (x) f"]),
        (["- **one two", 30, " three** f\n- g"], ["- **one two", "  three f", "• g"]),
        (["**one\n", 30, "two** *f*"], ["**one", "two f"]),
        (["2 ** 3 is", 30, " 8 *f*"], ["2 ** 3 is", "8 f"]),
        (["one wo", 0, "rd *x*\n\ntwo"], ["one wo", "one word x", "two"]),
        (["one two", 30, " three *f", 0, "our*"], ["one two", "three *f", "three four"]),
        (["a wo", 20, "rd " + LONG + "\n\n*x*"],
         ["a word", "and then it goes on", "for more than one", "row of the screen", "x"]),
    ],
)  # fmt: skip
def test_screen_that_changes_in_mid_block_breaks_no_word(
    pieces: list[str | int], lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands there stays, its word is finished, and the rest has the new width."""
    assert streamed(pieces, monkeypatch) == lines


KEPT = [
    ("![alt](http://img/x.png) here", ["http://img/x.png"]),
    ("| a |\n|---|\n| `x || y` |\n", ["x || y"]),
    ('[a](http://x "title")', ["title"]),
    ("> 1. one\n> 1. two", ["one", "two"]),
    ("| 意味 | b | c |\n|---|---|---|\n| 日本語日本語日本語 | long-word-there | 1 |\n", ["意味"]),
]


@pytest.mark.parametrize("columns", [10, 20, 60])
@pytest.mark.parametrize(("text", "parts"), KEPT)
def test_nothing_is_lost_that_markdown_would_hide(
    text: str, parts: list[str], columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a picture's address, a cell too many and words of a narrow column were not shown."""
    shown = "".join("".join(drawn(text, [text], columns, monkeypatch)).split())
    assert all("".join(part.split()) in shown for part in parts)
    assert {c for c in text if c.isalnum()} <= set(shown)


@pytest.mark.parametrize(
    ("columns", "lines"),
    [
        (18, [" Name    of what", "~", " top_p   the most", "         likely", " キーテ  -"]),
        (14, ["Name: top_p", "of what: the", "most likely", "", "Name:", "キーテスト"]),
    ],
)
def test_table_without_room_becomes_lines(
    columns: int, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once its letters stood under each other."""
    text = "| Name | of what |\n|---|---|\n| top_p | the most likely |\n| キーテスト | - |\n"
    shown = drawn("", [text], columns, monkeypatch)
    assert [re.sub("^ ─+$", "~", line) for line in shown[: len(lines)]] == lines


def test_address_that_is_its_own_text_is_shown_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn("", ["see <http://a.b/c>."], 60, monkeypatch)[0] == "see http://a.b/c."


def test_blocks_are_apart_by_the_answers_own_blank_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = drawn("", ["a\n\n> b\n\n---\n\n| c |\n|---|\n| d |\n\ne"], 20, monkeypatch)
    text = "\n".join(lines).rstrip()
    assert re.sub("[-─▌ ]+", "", text).split("\n") == [
        "a",
        "",
        "b",
        "",
        "",
        "",
        "c",
        "",
        "d",
        "",
        "e",
    ]


def test_colours_do_on_light_and_dark_backgrounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inline code once had a black background, and indented code a theme for dark terminals."""
    monkeypatch.setenv("TERM", "xterm-256color")
    out = io.StringIO()
    shown = View(Console(file=out, force_terminal=True, width=60, color_system="truecolor"))
    shown.is_terminal = True
    shown.begin_answer()
    shown.write(TEXT + "\n    indented *code*\n\n> ```js\n> 1\n> ```\n\n## b\n\n[a](b)\n")
    shown.end_answer(None, None)
    codes = {
        c for found in re.findall(r"\x1b\[([0-9;]*)m", out.getvalue()) for c in found.split(";")
    }
    # Bold, dim, slanted, underlined, struck, and the terminal's own magenta.
    assert {"1", "35"} <= codes <= {"0", "1", "2", "3", "4", "9", "35"}


def test_control_characters_of_a_model_reach_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = drawn("", ["a\x1b]0;title\x07b `\x1b[31m` \n\n\x9b1m```\n\x1b[2J\n"], 80, monkeypatch)
    assert "\ufffd" in lines[0]
    assert lines[0].startswith("a\ufffd]0;title\ufffdb")
