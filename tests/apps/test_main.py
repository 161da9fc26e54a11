"""The command line as a table: arguments, exit code, what stands on stderr."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mlx_llama
from interrupts import lost_lock
from mlx_llama_apps import main as main_module
from mlx_llama_apps.main import main
from processes import environment, interrupt, start
from shared_data import shared
from tiny_models import write_meta


def command(*arguments: str | Path) -> list[str]:
    code = "from mlx_llama_apps.entry import run_main; run_main()"
    return [sys.executable, "-c", code, *map(str, arguments)]


def test_stories260k_prints_its_authors_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, expected = (
        shared("checkpoints/stories260k"),
        shared("checkpoints/stories260k.expected.txt"),
    )
    out = str(tmp_path / "out")
    assert main(["convert", str(source), "--no-quantize", "-o", out]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert main(["run", out, "--raw", "--temperature", "0", "--max-tokens", "256", ""]) == 0
    assert capsys.readouterr().out == expected.read_text(encoding="utf-8")


@pytest.mark.parametrize("bits", ["4", "8"])
def test_quantized_stories260k_tells_a_story(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bits: str
) -> None:
    source, out = shared("checkpoints/stories260k"), str(tmp_path / "out")
    assert main(["convert", str(source), "--bits", bits, "-o", out]) == 0
    capsys.readouterr()
    assert main(["run", out, "--temperature", "0", "--max-tokens", "60", ""]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Once upon a time, there was a little girl named Lily. ")


USAGE = [
    (["bogus"], 'Unknown command "bogus"'),
    (["run"], "MODEL is missing: give a model directory"),
    (["show"], "MODEL is missing: give a model directory"),
    (["convert"], "SOURCE is missing: give the folder of a checkpoint"),
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


@pytest.mark.parametrize(
    ("arguments", "closed", "text"),
    [
        (["run", "BASE"], "<&-", "standard input is closed"),
        (["chat", "BASE"], "<&-", "standard input is closed"),
        (["show", "BASE"], ">&-", "standard output is closed"),
    ],
)
def test_a_closed_stream_is_one_line(
    base_model: Path, home: Path, arguments: list[str], closed: str, text: str
) -> None:
    asked = command(*(base_model if a == "BASE" else a for a in arguments))
    done = subprocess.run(
        ["/bin/sh", "-c", f'"$@" {closed}', "sh", *asked],
        env=environment(home),
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode > 0
    (line,) = done.stderr.splitlines()
    assert text in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["show", "BASE"],
        ["bench", "BASE", "--prompt", "4", "--generate", "0", "--repetitions", "1"],
        ["compare", "BASE", "BASE", "--text", "TEXT", "--context", "32", "--no-costs"],
    ],
)
def test_a_reader_that_has_gone_is_no_error(
    base_model: Path, tmp_path: Path, home: Path, arguments: list[str]
) -> None:
    text = tmp_path / "text"
    text.write_text("the thing in hello world end " * 40)
    places = {"BASE": base_model, "TEXT": text}
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            command(*(places.get(a, a) for a in arguments)),
            env=environment(home),
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(write)
    assert (done.returncode, "Error" in done.stderr) == (0, False)


@pytest.mark.parametrize("home", ["~nosuch/x", "/tmp/\udcff"])
def test_a_home_that_cannot_be_is_one_line(
    home: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLX_LLAMA_HOME", home)
    assert main(["run", "bundled", "Hi"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "there is no such user" in line or "not UTF-8; rename that folder" in line


def test_a_source_whose_name_is_not_utf8_is_refused_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_meta(tmp_path / "s\udcff")
    for given in (str(source), "."):
        monkeypatch.chdir(source)
        assert main(["convert", given, "-o", str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "not UTF-8; rename that folder" in line
    assert not list(tmp_path.glob("out*"))


def test_output_knows_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_meta(tmp_path / "tiny")
    assert main(["convert", "~/tiny", "-o", "~/out", "--quiet"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    assert not (tmp_path / "~").exists()


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


def test_convert_without_output_writes_into_the_models_folder(
    tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_meta(tmp_path / "tiny")
    assert main(["convert", str(source), "--bits", "8"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == [str(home / "data" / "models" / "tiny-8bit")]
    assert main(["show", "tiny-8bit"]) == 0
    assert "8 bits, group 64" in capsys.readouterr().out


def test_dry_run_refuses_the_output_that_the_run_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write_meta(tmp_path / "tiny"), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    asked = ["convert", str(source), "-o", str(out), "--dry-run"]
    assert main(asked) == 1
    captured = capsys.readouterr()
    assert "matrices" in captured.out
    assert "exists; choose another --output, or --force" in captured.err
    assert main([*asked, "--force"]) == 1
    assert "mine.txt is not of it" in capsys.readouterr().err


def test_dry_run_prints_the_plan_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_meta(tmp_path / "tiny")
    assert main(["convert", str(source), "-o", str(tmp_path / "out"), "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for text in (
        "kind      llama2 (",
        "4 bits, group 64",
        "bits per weight",
        str(tmp_path / "out"),
    ):
        assert text in captured.out
    assert not (tmp_path / "out").exists()


def test_show_as_json_has_the_facts(chat_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(chat_model), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == {"value": "llama3.1-instruct", "reason": "asked for with --kind"}
    assert facts["prompt_format"] == "llama3.1"
    assert facts["rope"]["factor"] == 8.0
    assert facts["context"] == 131072
    assert [f["name"] for f in facts["source_files"]] == [
        "consolidated.00.pth",
        "params.json",
        "tokenizer.model",
    ]
    assert facts["backend"] in ("cpu", "metal", "cuda")


def test_ctrl_c_in_a_conversion_leaves_nothing(tmp_path: Path, home: Path) -> None:
    source = write_meta(tmp_path / "tiny")
    slow = (
        "import sys, time\n"
        "from mlx_llama_quantize import packing\n"
        "from mlx_llama_apps.main import main\n"
        "pack = packing._pack\n"
        "say = lambda: print('packing\\n', end='', flush=True)\n"
        "packing._pack = lambda *a: (say(), time.sleep(0.5), pack(*a))[2]\n"
        "sys.exit(main())\n"
    )
    process = start(slow, "convert", source, "-o", tmp_path / "out", home=home)
    interrupt(process, at="packing")
    assert process.returncode == 130
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "home") == ["tiny"]


def test_ctrl_c_that_costs_a_lock_is_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was an unexpected error, once in hundreds: "cannot release un-acquired lock"."""

    def wait(*_: object, **__: object) -> None:
        raise lost_lock()

    monkeypatch.setattr(main_module, "app", wait)
    assert main([]) == 130
    assert capsys.readouterr().err == ""


def test_full_disk_is_one_line(tmp_path: Path, home: Path) -> None:
    """The kernel itself refuses: files may not grow past a limit (as with a full disk)."""
    source = write_meta(tmp_path / "tiny")
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "from mlx_llama_apps.main import main\n"
        "sys.exit(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "convert", str(source), "-o", str(tmp_path / "out")],
        env=environment(home),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "File too large; nothing was left behind" in done.stderr.splitlines()[-1]
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "home") == ["tiny"]


def test_killed_conversion_leaves_one_folder_that_the_next_replaces(
    tmp_path: Path, home: Path
) -> None:
    source = write_meta(tmp_path / "tiny")
    slow = (
        "import sys, time\n"
        "from mlx_llama_quantize import packing\n"
        "from mlx_llama_apps.main import main\n"
        "packing._pack = lambda *a: (print('packing\\n', end='', flush=True), time.sleep(60))\n"
        "sys.exit(main())\n"
    )
    arguments = ["convert", str(source), "-o", str(tmp_path / "out")]
    with subprocess.Popen(
        [sys.executable, "-c", slow, *arguments], env=environment(home), stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "home") == ["out.partial", "tiny"]
    assert main(arguments) == 0
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "home") == ["out", "tiny"]


def test_reader_that_goes_away_is_no_error(base_model: Path, home: Path) -> None:
    arguments = ["run", base_model, "hello", "--max-tokens", "400", "--ignore-eos"]
    with subprocess.Popen(
        command(*arguments), env=environment(home), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (0, b"")


def test_ctrl_c_ends_run_at_once(base_model: Path, home: Path) -> None:
    arguments = ["run", base_model, "hello", "--ignore-eos"]
    with subprocess.Popen(
        command(*arguments), env=environment(home), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(5)
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        rest, errors = process.stdout.read(), process.stderr.read()
        process.wait(10)
    assert time.monotonic() - started < 5
    assert (process.returncode, errors) == (130, b"")
    assert rest.endswith(b"\n")


def test_prompt_behind_two_hyphens_is_taken_as_it_is(
    base_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(base_model), "--max-tokens", "1", "--ignore-eos", "--", "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_ctrl_c_while_starting_is_quiet(base_model: Path, home: Path) -> None:
    for delay in (0.02, 0.08, 0.15, 0.25):
        with subprocess.Popen(
            command("run", base_model, "hello", "--ignore-eos"),
            env=environment(home),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        ) as process:
            assert process.stderr is not None
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
            errors = process.stderr.read()
        # The interpreter's own start, before any line of ours, is not ours to quieten.
        assert process.returncode in (130, -signal.SIGINT, 1)
        assert b"mlx_llama" not in errors


@pytest.mark.parametrize("where", [">&-", "> /dev/full"])
def test_output_that_cannot_be_written_is_no_traceback(
    base_model: Path, home: Path, where: str
) -> None:
    if where.endswith("full") and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    line = " ".join(
        f"'{part}'" for part in command("run", base_model, "hello", "--max-tokens", "3")
    )
    done = subprocess.run(
        ["sh", "-c", f"{line} {where}"],
        env=environment(home),
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 1
