"""The chat in a pseudo-terminal whose screen can be read, as a person sees it."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pexpect
import pyte

from processes import PATIENCE_S

PROMPT_BEGINS = "\x1b[6n"  # the line editor asks where the cursor is
CODE = "from mlx_llama_apps.entry import run_main; run_main()"


def environment(home: Path, **more: str) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "MLX_LLAMA_HOME": str(home),
        "TERM": "xterm-256color",
        **more,
    }


def speaking(pieces: list[str], *, pause_s: float = 0.01) -> str:
    """Return the program's code with the model's words replaced, one piece a token."""
    return (
        "import time; from mlx_llama import generation as g\n"
        f"pieces = iter({pieces!r})\n"
        "def add(self, token):\n"
        f"    time.sleep({pause_s})\n"
        "    return next(pieces), None\n"
        "g._Output.add = add\n" + CODE
    )


class Terminal:
    """A running chat behind a screen of so many columns and lines."""

    def __init__(
        self,
        home: Path,
        *arguments: object,
        columns: int = 80,
        lines: int = 24,
        argv: list[str] | None = None,
        **more: str,
    ) -> None:
        self.raw = ""
        self.screen = pyte.HistoryScreen(columns, lines, history=5000, ratio=0.5)
        self._stream = pyte.Stream(self.screen)
        command = argv or [sys.executable, "-c", CODE, "chat", *map(str, arguments)]
        self.child: pexpect.spawn[str] = pexpect.spawn(
            command[0],
            command[1:],
            env=environment(home, **more),
            dimensions=(lines, columns),
            encoding="utf-8",
            codec_errors="replace",
        )
        self.screen.write_process_input = self.child.send  # where the cursor is, when asked

    def feed(self, wait_s: float = 0.02) -> None:
        """Take what the program has written."""
        try:
            text = self.child.read_nonblocking(1 << 16, timeout=wait_s)
        except pexpect.TIMEOUT:
            return
        except pexpect.EOF:
            return
        self.raw += text
        self._stream.feed(text)

    @property
    def text(self) -> str:
        """Everything on the screen, and what has scrolled away."""
        above = [
            "".join(line[x].data for x in range(self.screen.columns)).rstrip()
            for line in self.screen.history.top
        ]
        return "\n".join([*above, *(line.rstrip() for line in self.screen.display)])

    @property
    def has_prompt(self) -> bool:
        """Whether the cursor stands in an empty prompt."""
        line = self.screen.display[self.screen.cursor.y]
        return line.rstrip() == ">" and self.screen.cursor.x == 2

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a condition."""
        started = time.monotonic()
        while not condition():
            assert time.monotonic() - started < PATIENCE_S, f"no {what}; the screen:\n{self.text}"
            self.feed()

    @property
    def flat(self) -> str:
        """The same as one line, however it was wrapped."""
        return " ".join(self.text.split())

    def expect(self, text: str, *, times: int = 1) -> None:
        """Wait until the screen holds a text."""
        self.until(lambda: self.flat.count(text) >= times, repr(text))

    def prompt(self) -> None:
        """Wait for the prompt."""
        self.until(lambda: self.has_prompt, "prompt")

    def send(self, text: str) -> None:
        self.child.send(text)

    def enter(self, text: str) -> None:
        """Type a line and wait for the next prompt."""
        self.prompt()
        before = self.n_prompts
        self.child.send(text + "\r")
        self.next_prompt(before)

    @property
    def n_prompts(self) -> int:
        """How many prompts there were."""
        return self.raw.count(PROMPT_BEGINS)

    def next_prompt(self, before: int) -> None:
        """Wait for an empty prompt behind so many."""
        self.until(lambda: self.n_prompts > before and self.has_prompt, "prompt")

    def interrupt(self) -> None:
        self.child.send("\x03")

    def resize(self, columns: int, lines: int) -> None:
        self.child.setwinsize(lines, columns)
        self.screen.resize(lines, columns)

    def leave(self) -> int | None:
        """Send Ctrl-D; return the exit code."""
        self.child.send("\x04")
        return self.ended()

    def ended(self) -> int | None:
        started = time.monotonic()
        while self.child.isalive():
            assert time.monotonic() - started < PATIENCE_S, self.text
            self.feed()
        self.feed(0)
        self.child.close()
        return self.child.exitstatus

    def kill(self) -> None:
        """End it as a crash would."""
        self.child.kill(signal.SIGKILL)
        self.child.close(force=True)


Start = Callable[..., Terminal]


def saved(home: Path) -> list[Path]:
    return sorted((home / "data" / "chats").glob("*.jsonl"))


def records(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def messages(path: Path) -> list[tuple[str, str]]:
    from mlx_llama_apps.chat.store import read_chat

    return [(m.role, m.content) for m in read_chat(path).messages]


def new_tokens(terminal: Terminal) -> list[int]:
    text = terminal.flat
    return [int(n) for n in re.findall(r"prompt (\d+) new tokens", text)]


def said(home: Path) -> list[str]:
    return [content for _, content in messages(saved(home)[-1])]
