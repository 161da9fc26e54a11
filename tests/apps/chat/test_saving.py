"""What a chat leaves on the disk, and what a crash, a full disk or a second chat does to it."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path

import pytest
from terminal import CODE, Start, Terminal, messages, said, saved


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


@pytest.mark.parametrize("is_answering", [True, False])
def test_window_that_is_closed_keeps_all_that_was_said_and_its_cache(
    home: Path, chat_model: Path, start: Start, is_answering: bool
) -> None:
    """Once it ended the program at once: the last sentence and the cache were lost."""
    terminal = start(chat_model, "--ignore-eos", "--context", 4000, "--max-tokens", 3000)
    terminal.send("hello\r")
    terminal.until(lambda: any(messages(path)[1:] for path in saved(home)), "answer")
    if not is_answering:
        terminal.interrupt()
        terminal.prompt()
    terminal.child.kill(signal.SIGHUP)
    assert terminal.ended() == 128 + signal.SIGHUP
    resumed = start("--resume")
    resumed.expect("nothing of them is read anew")
    resumed.expect("the last answer was cut")
    assert resumed.leave() == 0


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


def test_numbers_of_chats_hold_before_the_list_was_shown(
    home: Path, chat_model: Path, start: Start
) -> None:
    """They were taken as beginnings of IDs: 2 for the only chat, or "6 chats begin so"."""
    terminal = start(chat_model, "--max-tokens", 3, columns=120)
    terminal.enter("older")
    terminal.enter("/clear")
    (older,) = saved(home)
    terminal.enter("/chats delete 2")
    terminal.expect("2: the list has 1 chat; /chats shows it")
    terminal.enter("hello")
    terminal.enter("/chats 2")
    terminal.expect(f"{older.stem}, 2 messages")
    terminal.enter("/chats 0")
    terminal.expect("0: the list has 2 chats; /chats shows it")
    terminal.enter(f"/chats {older.stem[:4]}")  # a year is the beginning of an ID
    terminal.expect("2 chats begin so")
    assert "y/N" not in terminal.text
    assert terminal.leave() == 0


def test_numbers_are_those_of_the_list_that_was_shown(
    home: Path, chat_model: Path, start: Start
) -> None:
    terminal = start(chat_model, "--max-tokens", 3, columns=120)
    terminal.enter("older")
    terminal.enter("/clear")
    (older,) = saved(home)
    terminal.enter("/chats")
    terminal.enter("newer")
    terminal.enter("/chats 1")  # the first of the list that stands there, not of one of now
    terminal.expect(f"{older.stem}, 2 messages")
    assert terminal.leave() == 0


def test_a_file_that_waits_does_not_follow_into_another_chat(
    home: Path, tmp_path: Path, chat_model: Path, start: Start
) -> None:
    """It went with the first message of a chat that it was not meant for."""
    notes, kept = tmp_path / "notes.txt", tmp_path / "chat.json"
    notes.write_text("the world", encoding="utf-8")
    dropped = "no file goes with the next message any more (notes.txt)"
    terminal = start(chat_model, "--max-tokens", 3, columns=120)
    terminal.enter("hello")
    terminal.enter(f"/save {kept}")
    (path,) = saved(home)
    for number, change in enumerate(("/clear", f"/load {kept}", f"/chats {path.stem}"), 1):
        terminal.enter(f"/read {notes}")
        terminal.enter(f"/load {tmp_path}/none.json")  # refused: all stays as it was
        assert terminal.flat.count(dropped) == number - 1
        terminal.enter(change)
        terminal.expect(dropped, times=number)
    terminal.enter("hello")
    assert said(home)[-2] == "hello"
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


def test_caches_that_may_take_nothing_are_not_kept(
    home: Path, chat_model: Path, start: Start
) -> None:
    terminal = start(chat_model, "--max-tokens", 3, "--chat-cache-bytes", 0)
    terminal.enter("hello")
    assert terminal.leave() == 0
    assert not list((home / "cache").rglob("*.safetensors"))
    resumed = start(chat_model, "--resume", "--max-tokens", 3)
    resumed.expect("its cache was not kept: it is read anew")
    resumed.enter("world")
    assert resumed.leave() == 0
    assert len(list((home / "cache").rglob("*.safetensors"))) == 1
