"""Screens that are narrow, or change while an answer is drawn."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from terminal import CODE, Start, Terminal, messages, saved


def test_resize_in_mid_answer_breaks_no_word(home: Path, chat_model: Path) -> None:
    """The model's words are replaced by some that can be told apart."""
    words = [f"word{number:04}" for number in range(80)]
    speaking = (
        "import time; from mlx_llama import generation as g\n"
        "pieces = [half for n in range(80) for half in ('wor', f'd{n:04} ')]\n"
        "pieces = iter([*pieces, '\\n\\n', 'end', 'ed'])\n"
        "def add(self, token):\n"
        "    time.sleep(0.01)\n"
        "    return next(pieces), None\n"
        "g._Output.add = add\n" + CODE
    )
    argv = [sys.executable, "-c", speaking, "chat", str(chat_model), "--max-tokens", "163"]
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
