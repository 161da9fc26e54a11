"""The command line as a table: arguments, exit code, what stands on stderr."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import mlx_llama
from interrupts import lost_lock
from mlx_llama_apps import main as main_module
from mlx_llama_apps.main import main
from processes import environment
from tiny_models import write_meta

USAGE = [
    (
        ["bogus"],
        "unknown command 'bogus'; commands: convert, quantize, pull, verify, show, run, "
        "chat, compare, bench; see mlx-llama --help",
    ),
    (["benhc", "BASE"], "unknown command 'benhc', did you mean bench; commands: convert"),
    (["Show", "BASE"], "unknown command 'Show', did you mean show; commands: convert"),
    (["--json", "show"], "the command comes first, found '--json'; commands: convert"),
    (["run"], "MODEL is missing: give a model directory"),
    (["show"], "MODEL is missing: give a model directory"),
    (["convert"], "SOURCE is missing: give the folder of a checkpoint"),
    (
        ["run", "CHAT", ""],
        "the prompt is empty: write one, or begin a text from nothing with --raw",
    ),
    (["run", "BASE", ""], "the prompt is empty"),
    (["run", "BASE", "hi", "there"], "too many arguments: 'there'"),
    (["run", "BASE", "--temprature", "0", "hi"], "did you mean --temperature"),
    (["run", "BASE", "--ignore-eoss"], "did you mean --ignore-eos"),
    (["run", "BASE", "--quiet"], "unknown option --quiet"),
    (["run", "CHAT", "--system", "--json", "hi"], "--system needs a value, found the option"),
    (["run", "BASE", "hi", "--temperature", "hot"], 'unable to convert "hot"'),
    (["run", "BASE", "hi", "--temperature", "-1"], "--temperature: found -1.0, expected from 0.0"),
    (["run", "BASE", "hi", "--max-tokens"], "--max-tokens requires an argument"),
    (["run", "BASE", "hi", "--raw", "--system", "x"], "do nothing with --raw"),
    (["run", "BASE", "hi", "--system", "x"], "is a base model"),
    (["run", "CHAT", "hi", "--logit-bias", "x"], "expected TEXT=NUMBER"),
    (["run", "CHAT", "hi", "--logit-bias", "hellohello=1"], "no single token"),
    (["run", "CHAT", "hi", "--dtype", "int8"], "expected one of bfloat16, float16, float32"),
    (["run", "CHAT", "hi", "--stop", ""], "--stop: an empty text"),
    (["convert", "META", "--bits", "3.5"], "found '3.5', expected a whole number"),
    (["run", "CHAT", "hi", "--max-tokens", "2.7"], "found '2.7', expected a whole number"),
    (["run", "CHAT", "hi", "--temp", "0"], "did you mean --temperature"),
    (["bench", "BASE", "--prompt", "3.5"], "found '3.5', expected a whole number"),
    (["bench", "BASE", "--repetitions", "1.5"], "found '1.5', expected a whole number"),
    (["bench", "BASE", "--bits", "4.5"], "found '4.5', expected a whole number"),
    (["bench", "BASE", "--depth", "0", "2.5"], "--depth: found '2.5', expected a whole number"),
    (["bench", "BASE", "--depth"], "--depth requires at least 1"),
    (
        ["compare", "BASE", "BASE", "--text", "x", "--context", "3.5"],
        "found '3.5', expected a whole",
    ),
    (["convert", ""], "SOURCE is empty"),
    (["convert", "META", "-o", "~nosuch/x"], "~nosuch/x: there is no such user's home folder"),
    (["convert", "META", "--bits", "7"], "expected one of 2, 3, 4, 5, 6, 8"),
    (["convert", "META", "--group-size", "48"], "expected one of 32, 64, 128"),
    (["convert", "META", "--no-quantize", "--bits", "4"], "--bits: does nothing"),
    (["convert", "META", "--kind", "llama9"], "kind 'llama9' is unknown"),
    (["convert", "META", "--kind", "llama3"], "needs a tiktoken tokenizer"),
    (["convert", "META", "--rope-factor", "8"], "would do nothing"),
]
ERRORS = [
    (["run", "NOTHING", "hi"], "no such folder"),
    (["run", "META", "hi"], "make a model of it: mlx-llama convert"),
    (["show", "META"], "a Meta checkpoint"),
    (["show", "EMPTY"], "no config.json"),
    (["convert", "EMPTY"], "no checkpoint: expected params.json"),
    (["convert", "NOTHING"], "no such folder"),
    (["convert", "META", "-o", "BASE"], "exists; choose another --output"),
    (["convert", "META", "-o", "EMPTY/../file", "--force"], "replaces only what mlx-llama wrote"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [(a, 2, t) for a, t in USAGE] + [(a, 1, t) for a, t in ERRORS],
    ids=[" ".join(a) for a, _ in USAGE + ERRORS],
)
def test_errors_are_one_line_and_an_exit_code(
    tmp_path: Path,
    base_model: Path,
    chat_model: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    text: str,
) -> None:
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "file").write_text("mine")
    places = {"BASE": base_model, "CHAT": chat_model, "META": write_meta(tmp_path / "META")}
    places |= {"EMPTY": tmp_path / "EMPTY", "NOTHING": tmp_path / "NOTHING"}
    places |= {"EMPTY/../file": tmp_path / "file"}
    before = sorted(p.name for p in tmp_path.iterdir())
    assert main([str(places.get(a, a)) for a in arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("mlx-llama: ")
    assert text in line
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize("home", ["~nosuch/x", "/tmp/\udcff"])
def test_a_home_that_cannot_be_is_one_line(
    home: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLX_LLAMA_HOME", home)
    assert main(["run", "bundled", "Hi"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "there is no such user" in line or "not UTF-8; rename that folder" in line


def test_debug_shows_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(tmp_path / "nothing"), "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oh\nno")

    monkeypatch.setattr(main_module, "_refuse_mistyped_option", broken)
    assert main(["show", "x"]) == 1
    assert "unexpected ZeroDivisionError: oh no; --debug" in capsys.readouterr().err


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == mlx_llama.__version__
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("convert", "show", "run", "chat"))


def test_help_imports_no_mlx(home: Path) -> None:
    code = (
        "import sys; from mlx_llama_apps.main import main; main(['run', '--help'])\n"
        "bad = [m for m in ('mlx.core', 'numpy', 'tiktoken', 'sentencepiece', 'prompt_toolkit',"
        " 'huggingface_hub')"
        " if m in sys.modules]\n"
        "sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(home), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_ctrl_c_that_costs_a_lock_is_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was an unexpected error, once in hundreds: "cannot release un-acquired lock"."""

    def wait(*_: object, **__: object) -> None:
        raise lost_lock()

    monkeypatch.setattr(main_module, "app", wait)
    assert main([]) == 130
    assert capsys.readouterr().err == ""
