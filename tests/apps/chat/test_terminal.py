"""The chat at a terminal: typed at, edited, completed, and read from its screen."""

from __future__ import annotations

import base64
import os
import re
import stat
import sys
import time
from pathlib import Path

import pytest
from terminal import CODE, Start, Terminal, messages, new_tokens, records, saved


def test_retry_with_nothing_asked_says_that_alone(chat_model: Path, start: Start) -> None:
    terminal = start(chat_model, "--temperature", 0)
    terminal.expect("llama3.1-instruct")
    terminal.enter("/retry")
    terminal.expect("nothing was asked yet")
    assert "another seed" not in terminal.raw


def test_what_a_token_takes_is_told_of_the_bits_in_use(base_model: Path, start: Start) -> None:
    """Two layers, two key/value heads of 16: too narrow to be packed, so 32 bits are told apart."""
    terminal = start(base_model, "--kv-bits", 32)
    terminal.expect("base model")
    terminal.enter("/show")
    terminal.expect("512 bytes each")


def test_opening_line_says_what_the_memory_is_for(chat_model: Path, start: Start) -> None:
    terminal = start(chat_model, "--context", 64, columns=100)
    said = re.search(
        r"context 64 tokens \(.*?\): model and context take at most [\d.]+ [kM]B of memory, "
        r"[\d.]+ [MG]B are free; a context of up to \d+ tokens would fit; /help",
        terminal.flat,
    )
    assert said, terminal.text


def test_show_says_what_a_full_context_does_as_set_has_it(chat_model: Path, start: Start) -> None:
    """It once said "stops when full" where on_full was ask."""
    terminal = start(chat_model, columns=100)
    terminal.enter("/show")
    terminal.expect("asks when full")
    for value in ("stop", "slide"):
        terminal.enter(f"/set on_full {value}")
        terminal.enter("/show")
        terminal.expect(f"{value}s when full")


def test_conversation_is_saved_and_resumed_with_its_cache(
    home: Path, chat_model: Path, start: Start
) -> None:
    terminal = start(chat_model, "--max-tokens", 12, "--system", "the", "--temperature", 1)
    terminal.expect("llama3.1-instruct")
    terminal.enter("hello")
    terminal.enter("world")
    first, second = new_tokens(terminal)
    assert second < first  # the second turn reads its own tokens alone
    terminal.enter("/helo")
    terminal.expect("did you mean /help")
    terminal.enter("/retry")
    assert new_tokens(terminal)[-1] == 1
    terminal.enter("/undo")
    terminal.expect("taken back: world")
    terminal.enter("/stats")
    terminal.expect("begin the history")
    terminal.enter("/set temperature 0")
    assert terminal.leave() == 0
    (path,) = saved(home)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    said = messages(path)
    assert [role for role, _ in said] == ["system", "user", "assistant"]

    resumed = start("--resume")
    resumed.expect("nothing of them is read anew")
    resumed.expect("> hello")
    resumed.enter("/set temperature")
    resumed.expect("chat")
    resumed.enter("world")
    assert new_tokens(resumed) == [second]  # the past was not read again
    resumed.enter("/clear")
    resumed.enter("hello")
    assert new_tokens(resumed)[-1] == first
    resumed.enter("/chats")
    resumed.expect("1 turn")
    assert resumed.leave() == 0
    assert len(saved(home)) == 2
    assert messages(path)[:3] == said


def test_paste_of_two_hundred_lines_is_one_message(
    home: Path, chat_model: Path, start: Start
) -> None:
    lines = [f"line {number} of what was pasted" for number in range(200)]
    terminal = start(chat_model, "--max-tokens", 3)
    terminal.send("\x1b[200~" + "\r".join(lines) + "\x1b[201~")
    terminal.expect("line 199")
    terminal.send("\r")
    terminal.expect("peak")
    terminal.prompt()
    assert messages(saved(home)[0])[0] == ("user", "\n".join(lines))
    terminal.send("one\\\rtwo\x1b\rthree\r")  # a trailing backslash, then Alt-Enter
    terminal.expect("peak", times=2)
    terminal.prompt()
    terminal.send('"""four\rfive"""\r')
    terminal.expect("peak", times=3)
    terminal.prompt()
    terminal.enter(" secret")
    said = [content for role, content in messages(saved(home)[0]) if role == "user"]
    assert said[1:] == ["one\ntwo\nthree", "four\nfive", " secret"]
    terminal.leave()
    history = (home / "data" / "history").read_text(encoding="utf-8")
    assert history.count("# typed") == 3
    assert "secret" not in history
    again = start(chat_model)
    again.send("\x1b[A")
    again.expect("five")
    again.send("\x03\x03")
    again.prompt()
    again.send("\x12two")  # search
    again.expect("three")


def test_paste_that_comes_too_early_is_one_message(
    home: Path, chat_model: Path, start: Start
) -> None:
    """While the model is loaded, or an answer streams, each line was once a message of its own."""
    terminal = Terminal(home, chat_model, "--max-tokens", 60, "--ignore-eos")

    def paste(*lines: str) -> None:
        """Do what a terminal does: mark it where that was asked for, else type it."""
        asked = terminal.raw.rpartition("\x1b[?2004")[2][:1] == "h"
        frame = ("\x1b[200~", "\x1b[201~") if asked else ("", "")
        terminal.send("\r".join(lines).join(frame))

    terminal.until(lambda: "\x1b[?2004" in terminal.raw, "beginning")
    paste("one", "two")
    terminal.expect("> one two")
    terminal.send("\r")
    terminal.until(lambda: any(messages(path)[1:] for path in saved(home)), "answer")
    terminal.feed(0)
    paste("three", "four", "five")
    terminal.expect("> three four five")
    terminal.send("\r")
    terminal.expect("peak", times=2)
    terminal.prompt()
    said = [content for role, content in messages(saved(home)[0]) if role == "user"]
    assert said == ["one\ntwo", "three\nfour\nfive"]
    assert terminal.leave() == 0


def test_editor_opens_the_draft_and_tab_completes(
    home: Path, tmp_path: Path, chat_model: Path, start: Start
) -> None:
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\nprintf "%s and more" "$(cat "$1")" > "$1"\n', encoding="utf-8")
    editor.chmod(0o755)
    terminal = start(chat_model, "--max-tokens", 3, VISUAL=str(editor))
    terminal.send("draft\x18\x05")
    terminal.expect("draft and more")
    terminal.send("\x15/sys\t")
    terminal.expect("/system")
    terminal.send("\x15/set temper\t")
    terminal.expect("/set temperature")
    terminal.send("\x15")
    note = tmp_path / "note.txt"
    note.write_text("in the thing", encoding="utf-8")
    terminal.send(f"/read {tmp_path}/no\t\r")
    terminal.expect("tokens go with the next message")
    (tmp_path / "data.bin").write_bytes(b"\0\1")
    terminal.send(f"/read {tmp_path}/data.bin\r")
    terminal.expect("binary")
    terminal.enter("hello")
    assert messages(saved(home)[0])[0][1] == "note.txt:\nin the thing\n\nhello"
    terminal.send("/edit\r")
    terminal.expect("> note.txt:")
    terminal.send(" again\r")
    terminal.expect("peak", times=2)
    assert [role for role, _ in messages(saved(home)[0])] == ["user", "assistant"]
    assert messages(saved(home)[0])[0][1].endswith("hello again")


def test_long_prompt_shows_how_far_it_is_read_and_how_long_it_takes(
    home: Path, chat_model: Path
) -> None:
    slow = (
        "import time; from mlx_llama import generation as g; run = g._prefill_pass\n"
        "def late(*arguments):\n"
        "    time.sleep(0.1)\n"
        "    return run(*arguments)\n"
        "g._prefill_pass = late\n" + CODE
    )
    argv = [sys.executable, "-c", slow, "chat", str(chat_model), "--max-tokens", "3"]
    terminal = Terminal(home, argv=[*argv, "--prefill-chunk", "8"])
    terminal.prompt()
    terminal.send("thing " * 60 + "\r")
    pattern = r"reading the prompt: \d+ of \d+ tokens, \d+ a second, \d+ s left"
    terminal.until(lambda: re.search(pattern, terminal.flat) is not None, "progress")
    terminal.expect("peak")
    assert "reading the prompt" not in terminal.flat  # it has gone
    assert terminal.leave() == 0


def test_full_context_asks(home: Path, chat_model: Path, start: Start) -> None:
    terminal = start(chat_model, "--context", 80, "--ignore-eos", "--system", "the")
    terminal.send("hello\r")
    terminal.expect("The context is full")
    terminal.send("\r")
    terminal.prompt()
    terminal.send("world\r")
    terminal.expect("the prompt has")
    terminal.expect("The context is full", times=2)
    terminal.send("s\r")
    terminal.expect("on_full is slide")
    time.sleep(0.5)
    terminal.interrupt()
    terminal.prompt()
    terminal.send("\r")  # what came too late for the answer is said before the next prompt
    terminal.expect("the system prompt is kept")
    assert re.search(r"oldest \d+ tokens", terminal.flat)


def test_answer_is_drawn_as_markdown_and_copied_raw(
    home: Path, base_model: Path, start: Start
) -> None:
    terminal = start(base_model, "--max-tokens", 1, "--stop", "hello")
    terminal.enter("/help copy")
    terminal.enter("hello")
    terminal.send("/copy\r")
    terminal.expect("characters handed")
    code = re.findall(r"\x1b\]52;c;([A-Za-z0-9+/=]*)\x07", terminal.raw)[-1]
    assert base64.b64decode(code).decode() == messages(saved(home)[0])[1][1]


def test_base_model_continues_the_text(home: Path, base_model: Path, start: Start) -> None:
    terminal = start(base_model, "--max-tokens", 5, "--ignore-eos")
    terminal.expect("it continues your text")
    terminal.enter("hello")
    terminal.enter("the")
    assert terminal.leave() == 0
    assert [role for role, _ in messages(saved(home)[0])] == ["user", "assistant"] * 2


def test_preset_leaves_out_what_the_model_has_no_place_for(
    home: Path, base_model: Path, start: Start
) -> None:
    """Once a base model was refused for a preset's system prompt, which other models have."""
    (home / "config").mkdir(parents=True)
    preset = '[presets.coder]\nsystem = "Answer with code."\ntop_p = 0.25\n'
    (home / "config" / "config.toml").write_text(preset, encoding="utf-8")
    terminal = start(base_model, "--preset", "coder", "--max-tokens", 3)
    terminal.expect("system of preset coder is left out")
    terminal.enter("/system")
    terminal.expect("there is no system prompt")
    terminal.enter("/set top_p")
    terminal.expect("preset coder", times=2)
    terminal.enter("hello")
    assert terminal.leave() == 0
    again = start("--resume", "--preset", "coder")
    again.expect("nothing of them is read anew")
    assert again.leave() == 0


def test_errors_do_not_end_the_conversation(
    home: Path, llama2_chat_model: Path, start: Start
) -> None:
    terminal = start(llama2_chat_model, "--max-tokens", 5)
    terminal.enter("hello")
    terminal.send("what is [INST] for?\r")
    terminal.expect("holds [INST]")
    terminal.expect("> what is [INST] for?", times=2)  # offered again
    terminal.send("\x15")
    terminal.enter("the")
    assert [role for role, _ in messages(saved(home)[0])] == ["user", "assistant"] * 2
    assert terminal.leave() == 0


def test_model_is_chosen_from_what_is_at_hand(home: Path, chat_model: Path, start: Start) -> None:
    models = home / "data" / "models"
    models.mkdir(parents=True)
    (models / "mine").symlink_to(chat_model)
    terminal = Terminal(home, "--max-tokens", 3, HF_HUB_CACHE=str(home / "hub"))
    terminal.expect("1 mine")
    terminal.send("\r")
    terminal.until(lambda: terminal.has_prompt, "prompt")
    terminal.enter("hello")
    assert terminal.leave() == 0
    assert os.fspath(models / "mine") in str(records(saved(home)[0])[0]["model"])


@pytest.mark.parametrize("key", ["\x03", "\x04"])
def test_a_wrong_choice_of_a_model_is_asked_again(home: Path, chat_model: Path, key: str) -> None:
    """It ended the program."""
    models = home / "data" / "models"
    models.mkdir(parents=True)
    (models / "mine").symlink_to(chat_model)
    terminal = Terminal(home, HF_HUB_CACHE=str(home / "hub"))
    for number, wrong in enumerate(("9", "0", "abc"), 1):
        terminal.expect("Which model?", times=number)
        terminal.send(f"{wrong}\r")
        terminal.expect(f"{wrong!r} is none of those; give a number from 1 to")
    terminal.expect("Which model?", times=4)
    terminal.send(key)
    assert terminal.ended() == 130
