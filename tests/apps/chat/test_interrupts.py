"""Ctrl-C whenever it comes, and what else cuts an answer: nothing that was said is lost."""

from __future__ import annotations

import json
import random
import re
import sys
import time
from pathlib import Path

from terminal import CODE, Start, Terminal, messages, records, said, saved


def test_ctrl_c_gives_the_prompt_back_and_keeps_what_was_said(
    home: Path, chat_model: Path, start: Start
) -> None:
    terminal = start(chat_model, "--ignore-eos")
    terminal.send("hello\r")
    time.sleep(0.5)
    terminal.feed()
    terminal.send("a draft")  # typed while the answer streams
    time.sleep(0.1)
    terminal.interrupt()
    terminal.expect("stopped; /continue goes on")
    terminal.expect("> a draft")
    terminal.interrupt()
    terminal.expect("the draft is kept")
    terminal.expect("> a draft")
    terminal.interrupt()
    terminal.prompt()
    terminal.send("\x1b[A")  # Up
    terminal.expect("> ")
    terminal.until(lambda: "a draft" in terminal.screen.display[terminal.screen.cursor.y], "draft")
    terminal.send("\x15")
    terminal.prompt()
    (path,) = saved(home)
    cut = [r for r in records(path) if r.get("role") == "assistant"][-1]
    assert cut["is_cut"] is True
    before = terminal.n_prompts
    terminal.send("/continue\r")
    time.sleep(0.3)
    terminal.interrupt()
    terminal.next_prompt(before)
    going_on = messages(path)[-1][1]
    assert going_on.startswith(str(cut["content"]))
    assert len(going_on) > len(str(cut["content"]))
    terminal.interrupt()
    terminal.expect("Ctrl-C again or Ctrl-D leaves")
    terminal.interrupt()
    assert terminal.ended() == 130


def test_ctrl_c_at_a_hundred_random_moments_leaves_all_in_agreement(
    home: Path, chat_model: Path, start: Start
) -> None:
    """History, cache and file agree token for token, whenever an answer was stopped."""
    dice = random.Random(3)
    terminal = start(chat_model, "--ignore-eos", "--context", "max", "--seed", 1)
    terminal.child.delaybeforesend = None  # before the first token, too
    for number in range(100):
        wish = dice.choice(["a question", "a question", "/continue", "/retry"])
        before = terminal.n_prompts
        terminal.send(wish + "\r")
        time.sleep(dice.random() * 0.12)
        terminal.interrupt()
        terminal.until(lambda b=before: terminal.n_prompts > b, "prompt")
        terminal.send("\x15")  # a message that was stopped before its answer is offered again
        terminal.prompt()
        # Every token of the cache is the history's; the history's messages and ids the file's.
        terminal.send("/stats\r")
        terminal.until(lambda n=number: terminal.raw.count("begin the history") > n, "agreement")
        terminal.prompt()
        agreement = re.findall(r"cache: (\d+) tokens, (\d+) of them begin", terminal.raw)
        assert len(agreement) == number + 1
        held, shared = agreement[-1]
        assert held == shared, (number, wish, terminal.text[-2000:])
        if number % 10 == 9:
            assert_saved_as_held(terminal, home)
            terminal.enter("/clear" if number == 59 else "/undo")
    assert_saved_as_held(terminal, home)
    assert terminal.leave() == 0


def assert_saved_as_held(terminal: Terminal, home: Path) -> None:
    """The chat's own file has the messages that the session has, with their tokens and seeds."""
    from mlx_llama_apps.chat.store import as_message, read_chat

    path = home / "chat.json"
    path.unlink(missing_ok=True)
    terminal.send(f"/save {path}\r")
    terminal.until(path.exists, "saved chat")
    terminal.prompt()
    held = json.loads(path.read_text(encoding="utf-8"))["messages"]
    assert read_chat(saved(home)[-1]).messages == [as_message(record) for record in held]
    assert all("token_ids" in record for record in held if record["role"] == "assistant")


def test_retry_stopped_at_once_keeps_the_answer(home: Path, chat_model: Path, start: Start) -> None:
    terminal = start(chat_model, "--max-tokens", 9, "--ignore-eos", "--seed", 1)
    terminal.enter("hello")
    before = said(home)
    terminal.send("/retry\r\x03")
    terminal.expect("what was said before is kept")
    terminal.prompt()
    terminal.enter("/stats")
    held, shared = re.findall(r"cache: (\d+) tokens, (\d+) of them", terminal.flat)[-1]
    assert int(held) - int(shared) <= 1
    assert said(home) == before
    terminal.enter("world")
    assert said(home)[:2] == before
    assert terminal.leave() == 0


def test_slow_disk_does_not_hide_the_first_token_of_a_retry(home: Path, chat_model: Path) -> None:
    """Stopped while the disk was written to, it was said to be kept and was replaced."""
    slow = (
        "import time; from mlx_llama_apps.chat import keeping as k; sync = k.Keeper.sync\n"
        "def late(self, messages):\n"
        "    time.sleep(0.4)\n"
        "    sync(self, messages)\n"
        "k.Keeper.sync = late\n" + CODE
    )
    argv = [sys.executable, "-c", slow, "chat", str(chat_model), "--max-tokens", "9"]
    terminal = Terminal(home, argv=[*argv, "--ignore-eos", "--seed", "1", "--temperature", "2"])
    terminal.prompt()
    terminal.enter("hello")
    before = said(home)
    terminal.send("/retry\r")
    time.sleep(0.2)
    terminal.interrupt()
    terminal.prompt()
    terminal.enter("/stats")
    terminal.expect("begin the history")
    assert ("what was said before is kept" in terminal.flat) == (said(home) == before)
    assert terminal.leave() == 0


def test_memory_that_runs_out_in_mid_answer_costs_no_talk(
    home: Path, chat_model: Path, start: Start
) -> None:
    failing = (
        "from mlx_llama import generation as g; read, n = g._Draw.read, [0]\n"
        "def fail(self):\n"
        "    n[0] += 1\n"
        "    if n[0] == 4: raise RuntimeError('[malloc] Unable to allocate 8 bytes')\n"
        "    return read(self)\n"
        "g._Draw.read = fail\n" + CODE
    )
    argv = [sys.executable, "-c", failing, "chat", str(chat_model), "--max-tokens", "9"]
    terminal = Terminal(home, argv=[*argv, "--ignore-eos"])
    terminal.prompt()
    terminal.enter("hello")
    terminal.expect("the machine is out of memory; the chat is kept")
    assert records(saved(home)[0])[-1]["is_cut"] is True
    terminal.enter("world")
    assert said(home)[::2] == ["hello", "world"]
    assert terminal.leave() == 0
