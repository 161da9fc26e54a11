"""A chat on disk: one JSONL file, written as it goes.

A line that is whole counts, a torn last one does not, so that a crash loses what was being written
and nothing else. An open chat's file is locked: two programs never write to one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from mlx_llama.errors import MlxLlamaError
from mlx_llama.prompts import Message

VERSION = 1
MAX_CHAT_BYTES = 1 << 30


class ChatError(MlxLlamaError):
    """A chat is missing, damaged, or open elsewhere."""


@dataclass(slots=True)
class SavedChat:
    """A chat as it was read. tokenizer: the digest of the one that its token ids belong to.

    n_damaged: lines that were no record and are left out.
    """

    path: Path
    model: str = ""
    created: str = ""
    tokenizer: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)
    n_damaged: int = 0
    nbytes: int = 0
    changed: float = 0.0

    @property
    def id(self) -> str:
        """What the chat is called."""
        return self.path.stem

    @property
    def title(self) -> str:
        """The first line that the user said."""
        first = next((m.content for m in self.messages if m.role == "user"), "")
        return next((line for line in first.splitlines() if line.strip()), "").strip()

    @property
    def n_turns(self) -> int:
        """How many questions it holds."""
        return sum(message.role == "user" for message in self.messages)


def as_record(message: Message) -> dict[str, Any]:
    """Return a message as it stands in a file."""
    record: dict[str, Any] = {
        "type": "message",
        "role": message.role,
        "content": message.content,
    }
    if message.token_ids is not None:
        record["token_ids"] = list(message.token_ids)
    if message.is_cut:
        record["is_cut"] = True
    if message.seed is not None:
        record["seed"] = message.seed
    return record


def as_message(record: Mapping[str, Any]) -> Message:
    """Return the message of a record; ValueError (or OptionError) for one that is none."""
    ids = record.get("token_ids")
    if ids is not None:
        if not isinstance(ids, list) or any(type(i) is not int or i < 0 for i in ids):
            raise ValueError("token_ids are no whole numbers")
        ids = tuple(ids)
    role, seed = record["role"], record.get("seed")
    seed = seed if role == "assistant" and type(seed) is int and 0 <= seed < 2**32 else None
    return Message(role, record["content"], ids, record.get("is_cut") is True, seed)


def read_chat(path: Path) -> SavedChat:
    """Read a chat; ChatError when it is none or cannot be read."""
    try:
        stat = path.stat()
        if stat.st_size > MAX_CHAT_BYTES:
            raise ChatError(f"{path}: {stat.st_size} bytes, too long for a chat")
        data = path.read_bytes()
    except OSError as error:
        raise ChatError(f"{path}: cannot be read: {error.strerror}") from error
    if not data.strip():
        raise ChatError(f"{path}: not a chat of this program: it is empty")
    chat = SavedChat(path, nbytes=stat.st_size, changed=stat.st_mtime)
    data = data.lstrip(b"\n")
    parts: list[Mapping[str, Any]] = []
    for number, line in enumerate(data.split(b"\n")):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("no object")
            if number == 0 and record.get("type") != "chat":
                raise ChatError(f"{path}: not a chat of this program: its first line is no header")
            _take(chat, record, parts)
        except (ValueError, KeyError, TypeError, RecursionError):
            if number == 0:
                raise ChatError(f"{path}: not a chat of this program") from None
            chat.n_damaged += 1
    if data and not data.endswith(b"\n") and chat.n_damaged:
        chat.n_damaged -= 1  # the line that was being written
    _end_parts(chat, parts)
    return chat


def _take(chat: SavedChat, record: dict[str, Any], parts: list[Mapping[str, Any]]) -> None:
    match record.get("type"):
        case "chat":
            if record.get("version") != VERSION:
                raise ChatError(f"{chat.path}: version {record.get('version')!s:.20} of the format")
            chat.model, chat.created = str(record.get("model", "")), str(record.get("created", ""))
            chat.tokenizer = str(record.get("tokenizer", ""))
            chat.settings = dict(_object(record.get("settings")))
        case "message":
            message = as_message(record)
            if message.role != "assistant":
                _end_parts(chat, parts)
            chat.messages.append(message)
            parts.clear()
        case "part":
            as_message({"role": "assistant", **record})
            parts.append(record)
        case "keep":
            if type(record["n"]) is not int or record["n"] < 0:
                raise ValueError("no number of messages")
            _end_parts(chat, parts)
            del chat.messages[record["n"] :]
        case "model":
            chat.model = str(record.get("model", ""))
            chat.tokenizer = str(record.get("tokenizer", ""))
        case "settings":
            chat.settings = dict(_object(record.get("settings")))
        case _:
            raise ValueError("no record of a chat")


def _end_parts(chat: SavedChat, parts: list[Mapping[str, Any]]) -> None:
    """Take up an answer in whose middle the program ended."""
    if parts:
        chat.messages.append(_joined(parts))
        parts.clear()


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _joined(parts: Sequence[Mapping[str, Any]]) -> Message:
    ids: list[int] = []
    is_known = all(part.get("token_ids") is not None for part in parts)
    for part in parts:
        ids += part.get("token_ids") or []
    text = "".join(part["content"] for part in parts)
    record = {"role": "assistant", "content": text, "is_cut": True, "seed": parts[0].get("seed")}
    return as_message({**record, "token_ids": ids if is_known else None})


class ChatFile:
    """The file of one open chat. Writing never raises: `on_trouble` is told, once a trouble.

    What could not be written is kept and written with what comes next.
    """

    def __init__(self, path: Path, on_trouble: Callable[[str], None]) -> None:
        self.path = path
        self._on_trouble = on_trouble
        self._fd: int | None = None
        self._pending: list[dict[str, Any]] = []
        self._is_failing = False
        self._written: list[Message] = []
        self._has_parts = False

    @classmethod
    def new(
        cls, folder: Path, *, header: Mapping[str, Any], on_trouble: Callable[[str], None]
    ) -> Self:
        """Return a chat that gets its file, of a name of its own, with its first message."""
        file = cls(folder / "new.jsonl", on_trouble)
        file._pending = [{"type": "chat", "version": VERSION, **header}]
        return file

    @classmethod
    def resume(cls, chat: SavedChat, on_trouble: Callable[[str], None]) -> Self:
        """Go on with a saved chat; ChatError when another program has it open."""
        file = cls(chat.path, on_trouble)
        try:
            file._fd = os.open(chat.path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
            file._lock()
            _end_last_line(file._fd)
        except BlockingIOError as error:
            file.close()
            raise ChatError(
                f"chat {chat.id} is open in another window; leave it there, or begin a new one"
            ) from error
        except OSError as error:
            file.close()
            on_trouble(f"{chat.path}: {error.strerror}; it goes on in a file of its own")
            header = {"model": chat.model, "created": chat.created, "tokenizer": chat.tokenizer}
            settings = {"settings": dict(chat.settings)}
            other = cls.new(chat.path.parent, header={**header, **settings}, on_trouble=on_trouble)
            other._pending += [as_record(message) for message in chat.messages]
            file = other
        file._written = list(chat.messages)
        return file

    @property
    def id(self) -> str | None:
        """What the chat is called, once it has a file."""
        return None if self._fd is None else self.path.stem

    def sync(self, messages: Sequence[Message]) -> None:
        """Write what the file lacks of these messages, and what they no longer have."""
        same = 0
        for old, new in zip(self._written, messages, strict=False):
            if old != new:
                break
            same += 1
        records: list[dict[str, Any]] = []
        if same < len(self._written) or (self._has_parts and same == len(messages)):
            records.append({"type": "keep", "n": same})
        records += [as_record(message) for message in messages[same:]]
        self._written, self._has_parts = list(messages), False
        if records and (self._fd is not None or any(m.role == "user" for m in messages)):
            self._append(records, is_durable=True)
        elif records:
            self._pending += records  # a chat without a question has no file

    def part(self, text: str, token_ids: Sequence[int] | None, *, seed: int | None = None) -> None:
        """Write the next piece of the answer that is on its way."""
        is_first, self._has_parts = not self._has_parts, True
        record: dict[str, Any] = {"type": "part", "content": text}
        if is_first and seed is not None:
            record["seed"] = seed
        if token_ids is not None:
            record["token_ids"] = list(token_ids)
        self._append([record], is_durable=False)

    def settings(self, values: Mapping[str, Any]) -> None:
        """Write settings that have changed."""
        self._note({"type": "settings", "settings": dict(values)})

    def model(self, path: Path, tokenizer: str) -> None:
        """Write that another model goes on."""
        self._note({"type": "model", "model": str(path), "tokenizer": tokenizer})

    def _note(self, record: dict[str, Any]) -> None:
        if self._fd is None:
            self._pending.append(record)
        else:
            self._append([record], is_durable=False)

    def close(self) -> None:
        """Let others have the file."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _append(self, records: list[dict[str, Any]], *, is_durable: bool) -> None:
        self._pending += records
        is_new = self._fd is None
        try:
            if self._fd is None:
                self._create()
            assert self._fd is not None
            lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in self._pending)
            _write_whole(self._fd, lines.encode("utf-8", "surrogatepass"))
            self._pending = []  # written, whether or not the disk says that it has it
            if is_durable:
                os.fsync(self._fd)
        except OSError as error:
            if is_new and self._pending and self._fd is not None:
                self.path.unlink(missing_ok=True)  # nobody should find an empty one
                self.close()
            if not self._is_failing:
                self._is_failing = True
                self._on_trouble(
                    f"the chat cannot be saved for now: {self.path.parent}: {error.strerror}"
                )
            return
        if self._is_failing:
            self._is_failing = False
            self._on_trouble("the chat is saved again, with what was missing")

    def _create(self) -> None:
        """Make a file that nobody else has, for its owner alone."""
        folder = self.path.parent
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
        for number in range(1, 1000):
            name = stamp if number == 1 else f"{stamp}-{number}"
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
            with contextlib.suppress(FileExistsError):
                self._fd = os.open(folder / f"{name}.jsonl", flags, 0o600)
                self.path = folder / f"{name}.jsonl"
                with contextlib.suppress(OSError):  # a file system without locks
                    self._lock()
                return
        raise FileExistsError(17, "no name is free")

    def _lock(self) -> None:
        assert self._fd is not None
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _write_whole(fd: int, data: bytes) -> None:
    """Append all of it or, when the disk refuses, none."""
    size, done = os.fstat(fd).st_size, 0
    try:
        while done < len(data):
            done += os.write(fd, data[done:])
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(fd, size)
        raise


def _end_last_line(fd: int) -> None:
    """End a line that was torn, so that the next one stands alone."""
    size = os.fstat(fd).st_size
    if size and os.pread(fd, 1, size - 1) != b"\n":
        os.write(fd, b"\n")
