"""`mlx-llama convert`: where it writes, what it plans, and what an end before its time leaves."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from terminal import CODE, Terminal

from mlx_llama_apps.main import main
from processes import environment, interrupt, start
from shared_data import shared
from tiny_models import write_meta


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
    assert main(["run", out, "--raw", "--temperature", "0", "--max-tokens", "60", ""]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Once upon a time, there was a little girl named Lily. ")


def test_convert_without_output_writes_into_the_models_folder(
    tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_meta(tmp_path / "tiny")
    assert main(["convert", str(source), "--bits", "8"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == [str(home / "data" / "models" / "tiny-8bit")]
    assert main(["show", "tiny-8bit"]) == 0
    assert "8 bits, group 64" in capsys.readouterr().out


def test_a_moment_is_not_said_to_be_the_disks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever kept the processor from work was called the disk."""
    source = write_meta(tmp_path / "tiny")
    assert main(["convert", str(source), "-o", str(tmp_path / "out")]) == 0
    end = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"done in .* s, .* read and .* written a second", end)


def test_output_knows_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_meta(tmp_path / "tiny")
    assert main(["convert", "~/tiny", "-o", "~/out", "--quiet"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    assert not (tmp_path / "~").exists()


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
    _, errors = interrupt(process, at="packing")
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "mlx-llama: stopped; no output was made"
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "home") == ["tiny"]


def test_ctrl_c_takes_the_bar_away(tmp_path: Path, home: Path) -> None:
    """It filled the row; the terminal's ^C broke the line, of which the first row stood."""
    slow = (
        "import time\n"
        "from mlx_llama_quantize import packing\n"
        "pack = packing._pack\n"
        f"packing._pack = lambda *a: (time.sleep(0.3), pack(*a))[1]\n{CODE}"
    )
    asked = ["convert", str(write_meta(tmp_path / "tiny")), "-o", str(tmp_path / "out")]
    terminal = Terminal(home, argv=[sys.executable, "-c", slow, *asked])
    terminal.until(lambda: "model.layers.0" in terminal.text, "bar")
    terminal.interrupt()
    assert terminal.ended() == 130
    assert "converting" not in terminal.text
    assert "mlx-llama: stopped; no output was made" in terminal.text


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
