"""The documents say what the program does."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_llama
from make_commands_page import PAGE, page
from mlx_llama_apps.main import COMMANDS, arguments_of, main
from processes import environment

ROOT = Path(__file__).resolve().parents[1]


def test_commands_page_is_the_help() -> None:
    """Mend with: python tests/make_commands_page.py."""
    assert PAGE.read_text(encoding="utf-8") == page()


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "docs/bench.md",
        "docs/chat.md",
        "docs/downloads.md",
        "docs/model-directory.md",
        "docs/python.md",
        "docs/quantize.md",
    ],
)
def test_commands_and_options_in_documents_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for command, rest in re.findall(r"mlx-llama (\w+)([^\n|`]*)", text):
        if command not in COMMANDS:
            assert not rest.startswith(" --"), command
            continue
        known = {name for argument in arguments_of(command) for name in argument.names}
        for option in re.findall(r"(?<!\S)(--?[a-z][a-z-]*)", rest):
            assert option in known, f"{document}: mlx-llama {command} {option}"


def test_links_lead_to_files() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / link).exists(), f"{document}: {link}"


@pytest.mark.parametrize(
    ("example", "arguments"),
    [("complete", ["hello"]), ("converse", ["hello", "world"]), ("score", ["hello world"])],
)
def test_examples_run(
    chat_model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    example: str,
    arguments: list[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [example, str(chat_model), *arguments])
    path = ROOT / "examples" / f"{example}.py"
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip()
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40


@pytest.mark.parametrize(
    ("example", "arguments", "code", "told"),
    [
        ("complete", [], 2, "usage: python examples/complete.py MODEL TEXT"),
        ("converse", ["BASE", "hello"], 2, "usage: python examples/converse.py MODEL FIRST SECOND"),
        ("score", ["BASE"], 2, "usage: python examples/score.py MODEL TEXT"),
        ("score", ["BASE", ""], 1, "no token ids"),
        ("complete", ["none", "hello"], 1, "none: no such folder"),
        ("converse", ["BASE", "hello", "world"], 1, "a base model"),
    ],
)
def test_examples_that_cannot_run_say_so_in_a_line(
    base_model: Path, home: Path, example: str, arguments: list[str], code: int, told: str
) -> None:
    given = [str(base_model) if each == "BASE" else each for each in arguments]
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{example}.py", *given],
        env=environment(home),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    (line,) = done.stderr.splitlines()
    assert told in line
    assert done.stdout == ""


def test_the_guide_loads_in_python_as_its_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    (asked,) = re.findall(r"^ +mlx-llama (convert bundled .*)$", text, re.MULTILINE)
    (name,) = re.findall(r'makes a folder of .* `mlx_llama\.load\("(.*)"\)`', text)
    monkeypatch.chdir(tmp_path)
    assert main(asked.split()) == 0
    assert mlx_llama.load(name).generate("Hi", max_tokens=1)


def test_chat_page_names_every_command() -> None:
    from mlx_llama_apps.chat.commands import COMMANDS as CHAT_COMMANDS

    text = (ROOT / "docs" / "chat.md").read_text(encoding="utf-8")
    assert [name for name in CHAT_COMMANDS if f"`/{name}" not in text] == []
