"""The chat in tmux, which is a terminal of its own: typed at, resized and interrupted there."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from terminal import CODE, environment

from processes import PATIENCE_S

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not here")


class Tmux:
    """A server of its own with one session."""

    def __init__(self, folder: Path, home: Path, *arguments: object) -> None:
        self._socket = folder / "tmux"
        command = [sys.executable, "-c", CODE, "chat", *map(str, arguments)]
        self._run(
            "new-session",
            "-d",
            "-x",
            "60",
            "-y",
            "20",
            *command,
            env=environment(home),
            config=True,
        )

    def _run(self, *arguments: str, env: dict[str, str] | None = None, config: bool = False) -> str:
        call = ["tmux", *(["-f", "/dev/null"] if config else []), "-S", str(self._socket)]
        done = subprocess.run(
            [*call, *arguments], env=env, capture_output=True, text=True, check=True
        )
        return done.stdout

    def keys(self, *names: str) -> None:
        self._run("send-keys", *names)

    def resize(self, columns: int) -> None:
        self._run("resize-window", "-x", str(columns), "-y", "20")

    @property
    def flat(self) -> str:
        return " ".join(self._run("capture-pane", "-p", "-S", "-").split())

    def expect(self, text: str) -> None:
        started = time.monotonic()
        while text not in self.flat:
            assert time.monotonic() - started < PATIENCE_S, self.flat
            time.sleep(0.05)

    def end(self) -> None:
        self._run("kill-server")


@pytest.fixture
def tmux(tmp_path: Path, home: Path, chat_model: Path) -> Iterator[Tmux]:
    started = Tmux(tmp_path, home, chat_model, "--ignore-eos", "--seed", 1)
    yield started
    started.end()


def test_answer_survives_resizing_and_ctrl_c(tmux: Tmux) -> None:
    tmux.expect("/help shows the commands")
    tmux.expect("context 0 of 8192")
    tmux.keys("hello", "Enter")
    time.sleep(0.5)
    tmux.resize(35)
    time.sleep(0.2)
    tmux.resize(80)
    tmux.keys("C-c")
    tmux.expect("/continue goes on")
    tmux.keys("/stats", "Enter")
    tmux.expect("begin the history")
