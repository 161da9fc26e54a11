"""Commands whose streams are closed, full or unread, and Ctrl-C while they start and answer."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from processes import command, environment


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
        rest, errors = process.stdout.read(), process.stderr.read()
    assert (process.returncode, errors) == (130, b"")
    assert rest.endswith(b"\n") and len(rest) < 4000  # the whole context holds 7553 bytes


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
