"""The chat at a terminal: typed at, interrupted, resized, killed, and read from its screen."""

from __future__ import annotations

import base64
import json
import os
import random
import re
import shlex
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from terminal import Terminal

Start = Callable[..., Terminal]


@pytest.fixture
def start(home: Path) -> Iterator[Start]:
    running: list[Terminal] = []

    def begin(*arguments: object, **more: object) -> Terminal:
        terminal = Terminal(home, *arguments, **more)  # pyright: ignore[reportArgumentType]
        running.append(terminal)
        terminal.prompt()
        return terminal

    yield begin
    for terminal in running:
        terminal.child.close(force=True)


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
        terminal.until(lambda b=before: terminal.n_prompts > b, "prompt", 60)
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


def test_killed_in_mid_answer_loses_at_most_the_last_sentence(
    home: Path, chat_model: Path, start: Start
) -> None:
    terminal = start(chat_model, "--ignore-eos", "--context", 2000, "--plain", "--seed", 1)
    terminal.send("hello\r")
    terminal.until(lambda: len(terminal.raw) > 2000, "long answer")
    terminal.kill()
    (path,) = saved(home)
    (_, question), (role, kept) = messages(path)
    assert (question, role) == ("hello", "assistant")
    shown = terminal.raw.rpartition("\x1b[?2004l")[2]
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown).replace("\r\n", "\n").lstrip()
    kept_plain = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", kept)
    assert shown.startswith(kept_plain[:500])
    assert len(shown) - len(kept_plain) <= 400  # the last piece, and a token's text
    terminal = start("--resume", "--max-tokens", 3)
    terminal.expect("the last answer was cut")
    terminal.enter("/continue")
    assert messages(path)[1][1].startswith(kept)
    assert len(messages(path)) == 2


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


def test_two_chats_at_once_have_files_of_their_own(
    home: Path, chat_model: Path, start: Start
) -> None:
    one = start(chat_model, "--max-tokens", 3)
    other = start(chat_model, "--max-tokens", 3)
    one.enter("hello")
    other.enter("world")
    assert sorted(messages(path)[0][1] for path in saved(home)) == ["hello", "world"]
    for path in saved(home):
        other.enter(f"/chats {path.stem}")
    other.expect("open in another window")
    assert one.leave() == other.leave() == 0


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


def test_resize_in_mid_answer_breaks_no_word(home: Path, chat_model: Path) -> None:
    """The model's words are replaced by some that can be told apart."""
    import sys

    from terminal import CODE

    words = [f"word{number:04}" for number in range(80)]
    speaking = (
        "import time; from mlx_llama import generation as g\n"
        "pieces = [half for n in range(80) for half in ('wor', f'd{n:04} ')]\n"
        "pieces = iter([*pieces, '\\n\\n', 'end', 'ed'])\n"
        "def add(self, token):\n"
        "    time.sleep(0.01)\n"
        "    return next(pieces), None\n"
        "g._Output.add = add\n" + CODE
    )
    argv = [sys.executable, "-c", speaking, "chat", str(chat_model), "--max-tokens", "163"]
    terminal = Terminal(home, argv=argv, columns=45)  # five words fill a row
    terminal.prompt()
    terminal.send("hello\r")
    terminal.expect("word0012")
    terminal.resize(72, 24)  # eight: a screen that wraps by itself breaks none
    terminal.expect("word0040")
    terminal.resize(83, 24)
    terminal.expect("ended")
    terminal.prompt()
    assert re.findall(r"w\S+", terminal.text.partition("> hello")[2].partition("ended")[0]) == words
    assert terminal.leave() == 0


@pytest.mark.parametrize("columns", [20, 40])
def test_narrow_terminals_hold_everything(
    home: Path, chat_model: Path, start: Start, columns: int
) -> None:
    terminal = start(chat_model, "--max-tokens", 40, columns=columns, lines=12, NO_COLOR="1")
    terminal.enter("/help")
    terminal.enter("日本語 🙂 " * 6)
    terminal.enter("/set")
    terminal.expect("top_p")
    terminal.send("hello\r")
    terminal.resize(columns + 15, 14)
    terminal.expect("peak", times=1)
    terminal.prompt()
    assert messages(saved(home)[0])[0][1].startswith("日本語 🙂")
    colours = re.findall(r"\x1b\[[0-9;]*m", terminal.raw)
    assert not [c for c in colours if re.search(r"[\[;](3[0-7]|38|9[0-7]|4[0-7])[;m]", c)]
    assert terminal.leave() == 0


def test_home_that_cannot_be_written_costs_one_remark(chat_model: Path) -> None:
    terminal = Terminal(Path("/proc/nowhere"), chat_model, "--max-tokens", 3)
    terminal.prompt()
    terminal.enter("hello")
    terminal.expect("the chat cannot be saved for now")
    terminal.enter("world")
    assert terminal.flat.count("cannot be saved") == 1
    assert terminal.flat.count("peak") == 2
    assert terminal.leave() == 0


def test_full_disk_costs_one_remark_and_nothing_that_was_said(
    home: Path, chat_model: Path, start: Start
) -> None:
    """Files may have 2 kB: a longer one is refused, as on a full disk."""
    import sys

    from terminal import CODE

    limited = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); " + CODE
    )
    argv = [sys.executable, "-c", limited, "chat", str(chat_model), "--max-tokens", "60"]
    terminal = Terminal(home, argv=argv)
    terminal.prompt()
    for _ in range(4):
        terminal.enter("hello")
    terminal.expect("the chat cannot be saved for now")
    assert terminal.flat.count("cannot be saved") == 1
    assert terminal.leave() == 0
    (path,) = saved(home)
    assert messages(path)[0] == ("user", "hello")
    assert path.read_bytes().endswith(b"\n")  # nothing half written
    assert not list((home / "cache").rglob("*.partial"))


def test_base_model_continues_the_text(home: Path, base_model: Path, start: Start) -> None:
    terminal = start(base_model, "--max-tokens", 5, "--ignore-eos")
    terminal.expect("it continues your text")
    terminal.enter("hello")
    terminal.enter("the")
    assert terminal.leave() == 0
    assert [role for role, _ in messages(saved(home)[0])] == ["user", "assistant"] * 2


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


def said(home: Path) -> list[str]:
    return [content for _, content in messages(saved(home)[-1])]


def test_dropped_or_refused_edit_leaves_the_question(
    home: Path, chat_model: Path, start: Start
) -> None:
    """Once whatever came next took its place, and a refused edit was put behind it."""
    terminal = start(chat_model, "--max-tokens", 3, "--context", 120)
    terminal.enter("hello")
    terminal.send("/edit\r")
    terminal.expect("changes the last question")
    terminal.send("\x03\x03")  # the draft is dropped
    terminal.prompt()
    terminal.enter("world")
    assert said(home)[::2] == ["hello", "world"]
    terminal.send("/edit\r")
    terminal.expect("> world", times=2)
    terminal.send("\x15the\r")  # emptied, and something else typed
    terminal.expect("peak", times=3)
    assert said(home)[::2] == ["hello", "world", "the"]
    terminal.send("/edit\r")
    terminal.expect("> the", times=2)
    terminal.send(" thing" * 60 + "\r")
    terminal.expect("the prompt has")
    terminal.send("\r")  # left as it is, and offered again
    terminal.expect("changes the last question")
    assert said(home)[::2] == ["hello", "world", "the"]
    terminal.send("\x7f" * 360 + "\r")
    terminal.expect("peak", times=4)
    assert said(home)[::2] == ["hello", "world", "the"]
    assert terminal.leave() == 0


def test_retry_stopped_at_once_keeps_the_answer(home: Path, chat_model: Path, start: Start) -> None:
    terminal = start(chat_model, "--max-tokens", 9)
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


def test_chats_are_loaded_opened_and_deleted(home: Path, chat_model: Path, start: Start) -> None:
    terminal = start(chat_model, "--max-tokens", 3)
    terminal.enter("hello")
    path = home / "a chat.json"
    terminal.enter(f"/save {path}")
    terminal.enter("/clear")
    terminal.enter(f"/load {path}")
    terminal.expect("its cache was not kept")
    terminal.enter("world")
    assert len(saved(home)) == 2
    assert sorted(len(messages(each)) for each in saved(home)) == [2, 4]
    terminal.enter("/chats")
    terminal.enter("/chats 1")
    terminal.expect("is the one that is open here")
    terminal.send("/chats delete 2\r")
    terminal.expect("y/N")
    terminal.send("y\r")
    terminal.expect("is deleted")
    (left,) = saved(home)
    assert len(messages(left)) == 4
    assert terminal.leave() == 0


def test_refused_chat_leaves_the_settings(
    home: Path, chat_model: Path, base_model: Path, start: Start
) -> None:
    """Once its settings were taken before it was refused."""
    one = start(chat_model, "--max-tokens", 3, "--system", "the", "--temperature", 0.25)
    one.enter("hello")
    assert one.leave() == 0
    other = start(base_model, "--max-tokens", 3)
    other.enter("/chats")
    other.enter("/chats 1")
    other.expect("has a system prompt")
    other.enter("/set temperature")
    assert "0.25" not in other.flat
    assert other.leave() == 0


def test_memory_that_runs_out_in_mid_answer_costs_no_talk(
    home: Path, chat_model: Path, start: Start
) -> None:
    import sys

    from terminal import CODE

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


def test_cache_of_another_model_is_read_anew(
    home: Path, chat_model: Path, llama2_chat_model: Path, start: Start
) -> None:
    one = start(chat_model, "--max-tokens", 3)
    one.enter("hello")
    assert one.leave() == 0
    other = start(llama2_chat_model, "--max-tokens", 3, "--resume")
    other.expect("it is read anew")
    other.enter("world")
    assert said(home)[::2] == ["hello", "world"]
    assert other.leave() == 0


def test_stopped_job_goes_on_where_it_was(home: Path, chat_model: Path) -> None:
    """Ctrl-Z and fg in mid-answer: the shell has its terminal, and the chat its own again."""
    import sys

    from terminal import CODE

    terminal = Terminal(home, argv=["bash", "--norc", "--noprofile", "-i"], PS1="shell: ")
    terminal.expect("shell:")
    chat = [sys.executable, "-c", CODE, "chat", str(chat_model), "--ignore-eos", "--seed", "1"]
    terminal.send(shlex.join([*chat, "--context", "max"]) + "\r")
    terminal.prompt()
    terminal.send("hello\r")
    terminal.until(lambda: len(terminal.raw.rpartition("\x1b[?2004l")[2]) > 300, "answer")
    terminal.send("\x1a")
    terminal.expect("Stopped")
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
    terminal.send("\x04")
    terminal.until(lambda: terminal.flat.endswith("shell:"), "shell")
    terminal.send("stty -a; echo $((40 + 3)) at the end\r")
    terminal.expect("43 at the end")
    assert "-noflsh" in terminal.flat.rpartition("stty -a;")[2]
    terminal.child.close(force=True)


def test_slow_disk_does_not_hide_the_first_token_of_a_retry(home: Path, chat_model: Path) -> None:
    """Stopped while the disk was written to, it was said to be kept and was replaced."""
    import sys

    from terminal import CODE

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


def test_ctrl_z_without_a_shell_stops_nothing(chat_model: Path, start: Start) -> None:
    """A program that nothing could let go on is not stopped; its terminal was echoing since."""
    terminal = start(chat_model, "--ignore-eos", "--context", "max")
    terminal.send("hello\r")
    terminal.until(lambda: len(terminal.raw.rpartition("\x1b[?2004l")[2]) > 100, "answer")
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
    assert terminal.leave() == 0


def test_draft_of_a_message_with_a_slash_is_offered_as_it_is_typed(
    home: Path, chat_model: Path, start: Start
) -> None:
    terminal = start(chat_model, "--max-tokens", 3)
    terminal.enter("//stats is a word")
    assert said(home)[0] == "/stats is a word"
    terminal.send("/edit\r")
    terminal.expect("> //stats is a word", times=2)
    terminal.send(" too\r")
    terminal.expect("peak", times=2)
    terminal.prompt()
    assert said(home)[::2] == ["/stats is a word too"]
    assert terminal.leave() == 0


def test_retry_of_a_fixed_seed_takes_others_and_the_next_question_the_fixed_one(
    home: Path, chat_model: Path, start: Start
) -> None:
    from mlx_llama_apps.chat.store import read_chat

    terminal = start(chat_model, "--max-tokens", 6, "--ignore-eos", "--seed", 7, "--temperature", 2)
    answers = []
    for wish in ("hello", "/retry", "/retry", "/undo", "hello"):
        terminal.enter(wish)
        if wish != "/undo":
            answers.append(read_chat(saved(home)[0]).messages[-1])
    assert [message.seed for message in answers] == [7, 8, 9, 7]
    assert len({message.token_ids for message in answers}) == 3
    assert answers[0] == answers[-1]
    terminal.enter("world")
    assert read_chat(saved(home)[0]).messages[-1].seed == 7
    assert terminal.leave() == 0
