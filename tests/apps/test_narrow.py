"""At a terminal of 40 columns no word is broken."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
from terminal import CODE, Terminal

from mlx_llama_apps.bench import machine
from mlx_llama_apps.main import main
from tiny_models import write_meta

COLUMNS = 40
CHANGING = re.compile(r"^(memory|needs) .*\n(  .*\n)*", re.MULTILINE)  # rows with what is free


def at_terminal(home: Path, *arguments: str) -> str:
    argv = [sys.executable, "-c", CODE, *arguments]
    terminal = Terminal(home, argv=argv, columns=COLUMNS, lines=60)
    terminal.ended()
    return terminal.text


def words(text: str) -> list[str]:
    return CHANGING.sub("", text).split()


@pytest.mark.parametrize(
    "arguments",
    [
        ["show", "base"],
        ["convert", "meta", "-o", "out", "--dry-run"],
        ["convert", "meta", "-o", "base"],
        ["bogus"],
    ],
)
def test_lines_go_on_behind_whole_words(
    tmp_path: Path,
    home: Path,
    base_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
) -> None:
    """The terminal broke them wherever a row ended."""
    shutil.copytree(base_model, tmp_path / "base")
    write_meta(tmp_path / "meta")
    monkeypatch.chdir(tmp_path)
    main(arguments)
    told = capsys.readouterr()
    shown = at_terminal(home, *arguments)
    assert words(shown) == words(told.out + told.err)
    assert max(map(len, shown.splitlines())) <= COLUMNS


def test_rows_go_on_under_their_value(
    tmp_path: Path, home: Path, base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base_model, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    shown = at_terminal(home, "show", "base").splitlines()
    number = next(n for n, line in enumerate(shown) if line.startswith("shape         0.1"))
    assert re.match(r" {14}\S", shown[number + 1])


def test_where_no_table_has_room_its_rows_are_stacked(
    base_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second table of `bench` was wider than the screen."""
    monkeypatch.setattr(machine, "measured_bandwidth", lambda **_: 1e9)
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    asked = ["--prompt", "4", "--generate", "2", "--repetitions", "2", "--depth", "0"]
    assert main(["bench", str(base_model), *asked]) == 0
    _, *rows = re.split(r"\n\n", capsys.readouterr().out)
    names = [[line.strip().split("  ")[0] for line in row.splitlines()] for row in rows]
    assert names == [
        ["pp4", "tokens/s", "first token", "peak"],
        ["tg2", "tokens/s", "peak", "read/token", "GB/s", "of memory"],
    ]
    assert max(len(line) for row in rows for line in row.splitlines()) <= COLUMNS
