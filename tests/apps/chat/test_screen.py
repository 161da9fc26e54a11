"""Screens that are narrow, or change while an answer is drawn."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from terminal import Start, Terminal, messages, saved, speaking

from mlx_llama_apps.chat.settings import KEYS


def test_resize_in_mid_answer_breaks_no_word(home: Path, chat_model: Path) -> None:
    """The model's words are replaced by some that can be told apart."""
    words = [f"word{number:04}" for number in range(80)]
    pieces = [half for word in words for half in (word[:3], f"{word[3:]} ")]
    code = speaking([*pieces, "\n\n", "end", "ed"])
    argv = [sys.executable, "-c", code, "chat", str(chat_model), "--max-tokens", "163"]
    terminal = Terminal(home, argv=argv, columns=45)  # five words fill a row
    terminal.prompt()
    terminal.send("hello\r")
    terminal.expect("word0012")
    terminal.resize(72, 24)  # eight: a screen that wraps by itself breaks none
    terminal.expect("word0040")
    terminal.resize(83, 24)
    terminal.expect("ended")
    terminal.prompt()
    assert re.findall(r"w\S+", terminal.text.partition("> hello")[2].partition("ended")[0]) == words
    assert terminal.leave() == 0


@pytest.mark.parametrize("no_color", ["", "1"])
def test_answers_are_coloured_but_where_nobody_wants_it(
    home: Path, chat_model: Path, no_color: str
) -> None:
    pieces = ["Use `co", "de`:\n\n", "```python\nx = 1\n```\n", "日本語 🙂 **bo", "ld**\n"]
    argv = [sys.executable, "-c", speaking(pieces), "chat", str(chat_model), "--max-tokens", "5"]
    terminal = Terminal(home, argv=argv, NO_COLOR=no_color)
    terminal.prompt()
    terminal.enter("hello")
    assert "Use code: ```python x = 1 ``` 日本語 🙂 bold" in terminal.flat
    assert ("\x1b[35m" in terminal.raw) == (not no_color)
    assert "\x1b[1mbold" in terminal.raw  # no colour
    assert terminal.leave() == 0


@pytest.mark.parametrize("columns", [20, 40])
def test_narrow_terminals_hold_everything(
    home: Path, chat_model: Path, start: Start, columns: int
) -> None:
    terminal = start(chat_model, "--max-tokens", 40, columns=columns, lines=12, NO_COLOR="1")
    terminal.enter("/help")
    terminal.enter("日本語 🙂 " * 6)
    terminal.enter("/set")
    terminal.expect("top_p")
    terminal.send("hello\r")
    terminal.resize(columns + 15, 14)
    terminal.expect("peak", times=1)
    terminal.prompt()
    assert messages(saved(home)[0])[0][1].startswith("日本語 🙂")
    colours = re.findall(r"\x1b\[[0-9;]*m", terminal.raw)
    assert not [c for c in colours if re.search(r"[\[;](3[0-7]|38|9[0-7]|4[0-7])[;m]", c)]
    assert terminal.leave() == 0


def test_a_setting_takes_two_lines_of_a_narrow_terminal_at_most(
    home: Path, chat_model: Path, start: Start
) -> None:
    """It took four, none of which said what it was."""
    terminal = start(chat_model, "--top-k", 3, columns=40, lines=60)
    terminal.enter("/set")
    shown = terminal.text.partition("> /set\n")[2].partition("\n>")[0].splitlines()
    names = [line.split()[0] for line in shown if not line.startswith(" ")]
    assert names == list(KEYS)
    assert shown[shown.index("top_k  3") + 1] == "  flag; default 0"
    assert "seed  - (default)" in shown
    assert "activations  float32 (default)" in shown
    assert len(shown) <= 2 * len(KEYS)
    terminal.leave()
