"""The chat as a job of a shell: stopped, in the background, and brought back."""

from __future__ import annotations

import re
import shlex
import sys
import time
from pathlib import Path

import pytest
from terminal import CODE, Start, Terminal, messages, records, saved

# Ctrl-Z comes between having looked whose the terminal is and drawing there.
LOOKING = (
    "import time; from mlx_llama_apps.chat import view; look = view.is_in_foreground; "
    "view.is_in_foreground = lambda descriptor: (look(descriptor), time.sleep(0.02))[0]; " + CODE
)


def stopped_job(home: Path, model: Path, *options: str, code: str = CODE) -> Terminal:
    """Start a chat from a shell, and stop it in mid-answer."""
    terminal = Terminal(home, argv=["bash", "--norc", "--noprofile", "-i"], PS1="shell: ")
    terminal.expect("shell:")
    chat = [sys.executable, "-c", code, "chat", str(model), "--ignore-eos", "--seed", "1"]
    terminal.send(shlex.join([*chat, *options]) + "\r")
    terminal.prompt()
    terminal.send("hello\r")
    terminal.until(lambda: any(messages(path)[1:] for path in saved(home)), "answer")
    terminal.send("\x1a")
    terminal.expect("Stopped")
    return terminal


def test_stopped_job_goes_on_where_it_was(home: Path, chat_model: Path) -> None:
    """Ctrl-Z and fg in mid-answer: the shell has its terminal, and the chat its own again."""
    terminal = stopped_job(home, chat_model, "--context", "max")
    terminal.send("echo $((40 + 2)) at the shell; stty -a; jobs\r")
    terminal.expect("42 at the shell")
    terminal.expect("Stopped", times=2)
    modes = terminal.flat.rpartition("42 at the shell")[2].split()
    assert {"icanon", "echo", "-noflsh"} <= set(modes)
    before = len(terminal.raw)
    terminal.send("fg\r")
    terminal.until(lambda: len(terminal.raw) > before + 600, "rest of the answer")
    assert "42 at the shell" in terminal.flat  # not drawn over
    terminal.send("a draft")  # waits for the prompt, and is not echoed
    time.sleep(0.1)
    terminal.interrupt()
    terminal.expect("stopped; /continue goes on")
    terminal.expect("> a draft")
    terminal.send("\x15")
    terminal.prompt()
    (path,) = saved(home)
    assert records(path)[-1]["is_cut"] is True
    terminal.send("\x1a")  # at the prompt, too
    terminal.expect("Stopped", times=3)
    before = terminal.n_prompts
    terminal.send("fg\r")
    terminal.prompt()
    terminal.enter("/stats")
    terminal.expect("begin the history")
    terminal.prompt()
    terminal.send("\x04")
    terminal.until(lambda: terminal.flat.endswith("shell:"), "shell")
    terminal.send("stty -a; echo $((40 + 3)) at the end\r")
    terminal.expect("43 at the end")
    assert "-noflsh" in terminal.flat.rpartition("stty -a;")[2]
    terminal.child.close(force=True)


@pytest.mark.parametrize(("code", "length"), [(CODE, "400"), (LOOKING, "150")], ids=["", "looking"])
def test_job_in_the_background_answers_and_waits_there(
    home: Path, chat_model: Path, code: str, length: str
) -> None:
    """Ctrl-Z and bg: the answer goes on to its end, and the shell keeps its terminal."""
    terminal = stopped_job(home, chat_model, "--max-tokens", length, code=code)
    terminal.send("bg\r")

    def answer_has_ended() -> bool:
        terminal.send("jobs\r")
        terminal.feed(0.3)
        _, asked, told = terminal.flat.rpartition("jobs")
        return bool(asked) and "Stopped" in told

    terminal.until(answer_has_ended, "job that waits for the terminal")
    terminal.send("stty -a; echo $((40 + 2)) at the shell\r")
    terminal.expect("42 at the shell")
    assert {"icanon", "echo", "-noflsh"} <= set(terminal.flat.rpartition("stty -a")[2].split())
    assert "reserved_special" not in terminal.flat.rpartition("shell: bg")[2]  # not drawn there
    terminal.send("fg\r")
    terminal.expect("reserved_special")
    terminal.expect("ended after max_tokens")
    terminal.prompt()
    terminal.enter("/stats")
    held, shared = re.findall(r"cache: (\d+) tokens, (\d+) of them", terminal.flat)[-1]
    assert held == shared
    assert records(saved(home)[0])[-1]["is_cut"] is True
    terminal.send("\x04")
    terminal.until(lambda: terminal.flat.endswith("shell:"), "shell")
    terminal.child.close(force=True)


def test_ctrl_z_without_a_shell_stops_nothing(home: Path, chat_model: Path, start: Start) -> None:
    """A program that nothing could let go on is not stopped; its terminal was echoing since."""
    terminal = start(chat_model, "--ignore-eos", "--context", "max")
    terminal.send("hello\r")
    terminal.until(lambda: any(messages(path)[1:] for path in saved(home)), "answer")
    terminal.send("\x1a")
    time.sleep(0.1)
    terminal.send("a draft")
    time.sleep(0.1)
    terminal.interrupt()
    terminal.expect("> a draft")
    assert terminal.flat.count("a draft") == 1
    terminal.send("\x15")
    terminal.prompt()
    terminal.send("\x1a")
    terminal.enter("/stats")
    terminal.expect("begin the history")
    terminal.prompt()
    assert terminal.leave() == 0
