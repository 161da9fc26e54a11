"""Chats on disk: what a crash leaves, what a hostile file does, who may write."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from mlx_llama.prompts import Message
from mlx_llama_apps.chat import export, folders
from mlx_llama_apps.chat.folders import find_chat, is_open, prune_caches, saved_chats
from mlx_llama_apps.chat.store import ChatError, ChatFile, SavedChat, read_chat

TALK = [
    Message("system", "be brief"),
    Message("user", "hello\nthere"),
    Message("assistant", "日本 🙂", (1, 2, 3), seed=7),
]
HEADER = {"model": "/m", "created": "now", "tokenizer": "a", "settings": {}}


def begin(folder: Path, troubles: list[str] | None = None) -> ChatFile:
    told = (troubles if troubles is not None else []).append
    return ChatFile.new(folder, header=HEADER, on_trouble=told)


def test_chat_without_a_question_has_no_file(tmp_path: Path) -> None:
    file = begin(tmp_path / "chats")
    file.sync(TALK[:1])
    assert not (tmp_path / "chats").exists()
    file.sync(TALK[:2])
    (path,) = (tmp_path / "chats").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_what_is_synced_is_what_is_read(tmp_path: Path) -> None:
    file = begin(tmp_path)
    other = [*TALK, Message("user", "again"), Message("assistant", "cu", (4,), is_cut=True)]
    history = [TALK, other, other[:4], TALK, TALK[:1], other, [Message("system", "x"), *other[1:]]]
    for messages in history:
        file.sync(messages)
        assert read_chat(file.path).messages == messages


def test_answer_on_its_way_is_kept_up_to_the_last_part(tmp_path: Path) -> None:
    file = begin(tmp_path)
    file.sync(TALK[:2])
    file.part("One. ", [5, 6], seed=3)
    file.part("Two. ", [7], seed=3)
    found = read_chat(file.path)
    assert found.messages[-1] == Message("assistant", "One. Two. ", (5, 6, 7), is_cut=True)
    assert found.messages[-1].seed == 3
    file.sync(TALK)  # the whole answer takes the parts' place
    assert read_chat(file.path).messages == TALK
    file.part("Three. ", [8])
    file.close()
    again = ChatFile.resume(read_chat(file.path), lambda _: None)
    again.sync([*read_chat(file.path).messages, Message("user", "go on")])
    assert [m.content for m in read_chat(file.path).messages[3:]] == ["Three. ", "go on"]


@pytest.mark.parametrize("n_lost", [1, 5, 30])
def test_torn_last_line_is_left_out(tmp_path: Path, n_lost: int) -> None:
    file = begin(tmp_path)
    file.sync(TALK)
    file.close()
    data = file.path.read_bytes()
    file.path.write_bytes(data[:-n_lost])
    found = read_chat(file.path)
    assert found.messages == (TALK if n_lost == 1 else TALK[:2])
    assert found.n_damaged == 0
    again = ChatFile.resume(found, lambda _: None)
    again.sync(TALK)
    assert read_chat(file.path).messages == TALK


def test_open_chat_is_nobody_elses(tmp_path: Path) -> None:
    one, other = begin(tmp_path), begin(tmp_path)
    one.sync(TALK)
    other.sync(TALK)
    assert one.path != other.path
    found = read_chat(one.path)
    assert is_open(found)
    with pytest.raises(ChatError, match="open in another window"):
        ChatFile.resume(found, lambda _: None)
    one.close()
    assert not is_open(found)
    ChatFile.resume(found, lambda _: None).close()


def test_disk_that_refuses_is_told_once_and_loses_nothing(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("", encoding="utf-8")
    troubles: list[str] = []
    file = begin(blocked / "chats", troubles)
    file.sync(TALK[:2])
    file.part("One. ", [1])
    file.sync(TALK)
    assert len(troubles) == 1
    blocked.unlink()
    file.sync([*TALK, Message("user", "more")])
    assert len(troubles) == 2
    assert [m.content for m in read_chat(file.path).messages][-1] == "more"


HOSTILE = [
    b"",
    b"\x00\xff",
    b'{"type":"message","role":"user","content":"x"}\n',
    b"[1,2]\n",
    b"[" * 100_000,
    b'{"type":"chat","version":9}\n',
]


@pytest.mark.parametrize("data", HOSTILE)
def test_file_that_is_no_chat_is_refused_or_empty(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(data)
    try:
        assert read_chat(path).messages == []
    except ChatError as error:
        assert len(str(error).splitlines()) == 1
    assert len(saved_chats(tmp_path)) <= 1


BAD_LINES = [
    {"type": "message", "role": "root", "content": "x"},
    {"type": "message", "role": "user", "content": 3},
    {"type": "message", "role": "assistant", "content": "x", "token_ids": [1.5]},
    {"type": "message", "role": "assistant", "content": "x", "token_ids": [-1]},
    {"type": "keep", "n": -1},
    {"type": "keep"},
    {"type": "what"},
]


def test_damaged_lines_are_counted_and_left_out(tmp_path: Path) -> None:
    file = begin(tmp_path)
    file.sync(TALK)
    with file.path.open("a", encoding="utf-8") as out:
        out.writelines(json.dumps(line) + "\n" for line in BAD_LINES)
    found = read_chat(file.path)
    assert found.messages == TALK
    assert found.n_damaged == len(BAD_LINES)


def test_chats_are_found_by_their_beginning(tmp_path: Path) -> None:
    for name in ("20260101-101010", "20260101-111111", "20260202-101010"):
        file = begin(tmp_path)
        file.sync(TALK)
        file.close()
        file.path.rename(tmp_path / f"{name}.jsonl")
    assert find_chat(tmp_path, "202602").id == "20260202-101010"
    assert find_chat(tmp_path, "20260101-101010").id == "20260101-101010"
    wrong = {"20260101": "2 chats begin so", "x": "no chat", "../x": "no chat", "": "is missing"}
    for name, problem in wrong.items():
        with pytest.raises(ChatError, match=problem):
            find_chat(tmp_path, name)
    os.utime(tmp_path / "20260101-101010.jsonl", (2e9, 2e9))
    assert find_chat(tmp_path, "last").id == "20260101-101010"
    with pytest.raises(ChatError, match="no chat is saved"):
        find_chat(tmp_path / "none", "last")


@pytest.mark.parametrize("name", ["last", "20260103-101010", "20260103"])
def test_chat_that_is_not_asked_for_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for day in (1, 2, 3):
        file = begin(tmp_path)
        file.sync(TALK)
        file.close()
        path = file.path.rename(tmp_path / f"2026010{day}-101010.jsonl")
        os.utime(path, (day, day))
    read: list[str] = []

    def noted(path: Path) -> SavedChat:
        read.append(path.stem)
        return read_chat(path)

    monkeypatch.setattr(folders, "read_chat", noted)
    assert find_chat(tmp_path, name).id == "20260103-101010"
    assert read == ["20260103-101010"]


def test_oldest_caches_go_first(tmp_path: Path) -> None:
    for age, name in enumerate("abcd"):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(bytes(100))
        os.utime(path, (1e9 - age, 1e9 - age))
    prune_caches(tmp_path, 250)
    assert sorted(p.stem for p in tmp_path.iterdir()) == ["a", "b"]
    prune_caches(tmp_path, 0)
    assert not list(tmp_path.iterdir())


def test_export_is_loaded_again(tmp_path: Path) -> None:
    more = {"model": "m", "settings": {"seed": 3}, "tokenizer": "a"}
    path = tmp_path / "chat.json"
    export.write_private(path, export.render(path, TALK, **more))  # pyright: ignore
    found = export.load(path)
    assert (found.messages, found.settings) == (TALK, {"seed": 3})
    assert [m.seed for m in found.messages] == [None, None, 7]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    text = export.render(tmp_path / "chat.md", TALK, **more)  # pyright: ignore
    assert "## You\n\nhello\nthere\n" in text
    for name, content in (
        ("a.json", "{}"),
        ("b.json", "[]"),
        ("c.md", "x"),
        ("d.json", "[" * 99999),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8")
        with pytest.raises(ChatError):
            export.load(tmp_path / name)


def test_disk_that_cannot_say_that_it_has_it_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    troubles: list[str] = []
    file = begin(tmp_path, troubles)
    file.sync(TALK[:2])

    def refuse(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    file.sync(TALK)
    file.sync([*TALK, Message("user", "again")])
    assert len(troubles) == 1
    assert read_chat(file.path).messages == [*TALK, Message("user", "again")]


def test_first_write_that_fails_leaves_no_empty_chat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, write = begin(tmp_path), os.write

    def refuse(fd: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", refuse)
    file.sync(TALK)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(os, "write", write)
    file.sync([*TALK, Message("user", "again")])
    assert read_chat(file.path).messages == [*TALK, Message("user", "again")]


def test_empty_file_is_no_chat(tmp_path: Path) -> None:
    (tmp_path / "20260101-000000.jsonl").touch()
    begin(tmp_path).sync(TALK)
    assert find_chat(tmp_path, "last").messages == TALK


def test_chat_that_cannot_be_written_goes_on_whole_in_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = begin(tmp_path)
    file.sync(TALK)
    file.close()
    real, troubles = os.open, list[str]()

    def refuse(path: Path, flags: int, mode: int = 0o777) -> int:
        if path == file.path and not flags & os.O_CREAT and flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse)
    other = ChatFile.resume(read_chat(file.path), troubles.append)
    other.sync([*TALK, Message("user", "again")])
    assert other.path != file.path and len(troubles) == 1
    assert read_chat(other.path).messages == [*TALK, Message("user", "again")]
    assert read_chat(file.path).messages == TALK


def test_nothing_older_than_a_removed_cache_stays(tmp_path: Path) -> None:
    for age, (name, nbytes) in enumerate([("new", 150), ("middle", 100), ("old", 30)]):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(b"x" * nbytes)
        os.utime(path, (1000 - age, 1000 - age))
    (tmp_path / "x.safetensorsabc.partial").touch()
    os.utime(tmp_path / "x.safetensorsabc.partial", (1000, 1000))
    prune_caches(tmp_path, 200)
    assert [path.name for path in tmp_path.iterdir()] == ["new.safetensors"]
