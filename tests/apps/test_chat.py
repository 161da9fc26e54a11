"""The chat in a pseudo-terminal, as a person uses it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

from mlx_llama_apps.chat.commands import COMMANDS, parse

PROMPT = ">(\x08| )"
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


@pytest.mark.parametrize(
    ("line", "name", "message"),
    [
        ("hello", None, "hello"),
        ("/help", "help", ""),
        ("/exit ", "exit", ""),
        ("//etc/hosts is a file", None, "/etc/hosts is a file"),
        ("help", None, "help"),
        ("q", None, "q"),
    ],
)
def test_commands_begin_with_one_slash(line: str, name: str | None, message: str) -> None:
    command, text = parse(line)
    assert (command and command.name, text) == (name, message)


@pytest.mark.parametrize(
    ("line", "hint"), [("/helo", "did you mean /help"), ("/zzz", "/help shows"), ("/", "/help")]
)
def test_unknown_commands_suggest_the_nearest(line: str, hint: str) -> None:
    with pytest.raises(LookupError, match=hint):
        parse(line)


class Terminal:
    """The chat behind a pseudo-terminal of 80 columns."""

    def __init__(self, home: Path, *arguments: object) -> None:
        code = "from mlx_llama_apps.entry import run_main; run_main()"
        self.child: pexpect.spawn[str] = pexpect.spawn(
            sys.executable,
            ["-c", code, "chat", *map(str, arguments)],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(sys.path),
                "MLX_LLAMA_HOME": str(home),
                "TERM": "xterm",
                "PROMPT_TOOLKIT_NO_CPR": "1",
            },
            dimensions=(24, 80),
            timeout=30,
            encoding="utf-8",
            codec_errors="replace",  # the terminal echoes ^C in the middle of a character
        )

    def expect(self, pattern: str) -> str:
        """Wait for a text; return what came before it, without escape codes."""
        self.child.expect(pattern)
        return ESCAPE.sub("", self.child.before or "")

    def ask(self, text: str) -> str:
        self.child.send(text + "\r")
        return self.expect(r"context (\d+) of (\d+)")

    def leave(self, *, with_key: str = "\x04") -> int | None:
        self.child.send(with_key)
        self.child.expect(pexpect.EOF)
        self.child.close()
        return self.child.exitstatus


@pytest.fixture
def terminal(home: Path, chat_model: Path) -> Iterator[Terminal]:
    started = Terminal(home, chat_model, "--max-tokens", 12, "--system", "the", "--seed", 1)
    yield started
    started.child.close(force=True)


def test_conversation_commands_and_leaving(terminal: Terminal) -> None:
    terminal.expect("llama3.1-instruct, context 8192")
    terminal.expect(PROMPT)
    first = terminal.ask("hello")
    assert "12 answer tokens" in first
    second = terminal.ask("world")
    new_tokens = [int(n) for n in re.findall(r"(\d+) new prompt tokens", first + second)]
    assert new_tokens[1] < new_tokens[0]  # the second turn prefills its own tokens alone
    terminal.child.send("/helo\r")
    terminal.expect("did you mean /help")
    terminal.child.send("/help\r")
    for name in COMMANDS:
        terminal.expect(f"/{name}")
    terminal.child.send("/clear\r")
    terminal.expect("is forgotten")
    third = terminal.ask("hello")
    assert re.findall(r"(\d+) new prompt tokens", third) == [str(new_tokens[0])]
    terminal.expect(PROMPT)
    assert terminal.leave() == 0


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(home: Path, chat_model: Path) -> None:
    terminal = Terminal(home, chat_model, "--ignore-eos")
    terminal.expect(PROMPT)
    terminal.child.send("hello\r")
    time.sleep(1.0)
    terminal.child.sendintr()
    started = time.monotonic()
    terminal.expect("stopped")
    assert time.monotonic() - started < 1.0
    terminal.expect(PROMPT)
    terminal.child.sendintr()
    terminal.expect("/exit leaves")
    terminal.child.send("/exit\r")
    terminal.child.expect(pexpect.EOF)
    terminal.child.close()
    assert terminal.child.exitstatus == 0


def test_pipe_gets_the_answer_alone(home: Path, chat_model: Path) -> None:
    code = "from mlx_llama_apps.entry import run_main; run_main()"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MLX_LLAMA_HOME": str(home)}

    def output(*arguments: str, given: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments, "--temperature", "0", "--max-tokens", "9"],
            input=given,
            env=env,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""
        return done.stdout

    chatted = output("chat", str(chat_model), given="hello\n/exit is text here\n")
    assert chatted == output("run", str(chat_model), given="hello\n/exit is text here\n")
    assert "\x1b" not in chatted


def test_base_model_continues_the_users_text(home: Path, base_model: Path) -> None:
    terminal = Terminal(home, base_model, "--max-tokens", 5, "--ignore-eos")
    terminal.expect("continues your text")
    terminal.expect(PROMPT)
    terminal.ask("hello")
    terminal.ask("the")
    terminal.expect(PROMPT)
    assert terminal.leave() == 0


def test_errors_do_not_end_the_conversation(home: Path, llama2_chat_model: Path) -> None:
    terminal = Terminal(home, llama2_chat_model, "--max-tokens", 5)
    terminal.expect("llama2-chat")
    terminal.expect(PROMPT)
    terminal.ask("hello")
    terminal.child.send("what is [INST] for?\r")
    terminal.expect("INST")
    terminal.expect("cannot|not|holds")
    second = terminal.ask("the")
    assert "new prompt tokens" in second
    terminal.expect(PROMPT)
    assert terminal.leave() == 0


def test_settings_that_cannot_work_are_refused_at_once(
    chat_model: Path, llama2_chat_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlx_llama_apps.main import main

    assert main(["chat", str(llama2_chat_model), "--date", "26 Jul 2024"]) == 2
    assert main(["chat", str(chat_model), "--logit-bias", "hello hello=1"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_base_text_goes_on_where_it_was_typed(base_model: Path) -> None:
    import threading

    import mlx_llama
    from mlx_llama_apps.chat.talk import TextTalk

    llama = mlx_llama.load(base_model)
    talk = TextTalk(llama, options={"max_tokens": 0}, context={})
    for text in ("hel", "lo"):
        list(talk.answer(text, on_prefill=lambda *_: None, cancel=threading.Event()))
    assert llama.tokenizer.decode(talk._ids) == "hello"
