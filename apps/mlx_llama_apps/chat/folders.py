"""The folders of saved chats and of the newest ones' caches: finding, listing, removing."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from mlx_llama_apps.chat.store import ChatError, SavedChat, read_chat

LAST = "last"  # names the newest chat
STALE_S = 3600  # what is this old was left by a writer that was killed


def saved_chats(folder: Path) -> list[SavedChat]:
    """Return the chats in a folder, the newest first; files that are none are passed over."""
    return list(_newest_first(folder))


def _newest_first(folder: Path) -> Iterator[SavedChat]:
    """Yield chats as they were last changed; one that nobody asks for is not read."""
    found = []
    with contextlib.suppress(OSError):
        for path in folder.glob("*.jsonl"):
            with contextlib.suppress(OSError):  # removed meanwhile
                found.append((path.stat().st_mtime, path))
    for _, path in sorted(found, reverse=True):
        with contextlib.suppress(ChatError):
            yield read_chat(path)


def find_chat(folder: Path, name: str) -> SavedChat:
    """Return the chat of an ID or of its beginning, "last" for the newest. ChatError for none."""
    if name == LAST:
        chat = next(_newest_first(folder), None)
        if chat is None:
            raise ChatError(f"no chat is saved in {folder}")
        return chat
    if not name:
        raise ChatError("the ID of a chat, or its beginning, is missing; /chats lists them")
    exact = folder / f"{name}.jsonl"
    if Path(name).name == name and exact.is_file():
        return read_chat(exact)
    found = sorted(path for path in folder.glob("*.jsonl") if path.stem.startswith(name))
    if len(found) == 1:
        return read_chat(found[0])
    if found:
        names = ", ".join(path.stem for path in found[:5])
        raise ChatError(f"{name}: {len(found)} chats begin so: {names}")
    newest = ", ".join(chat.id for chat in islice(_newest_first(folder), 3)) or "none"
    raise ChatError(f"{name}: no chat of that ID in {folder}; the newest: {newest}")


def is_open(chat: SavedChat) -> bool:
    """Whether some program is writing to a chat."""
    try:
        fd = os.open(chat.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def cache_file(folder: Path, chat_id: str) -> Path:
    """Return where a chat's cache is kept."""
    return folder / f"{chat_id}.safetensors"


def prune_caches(folder: Path, most_bytes: int) -> None:
    """Keep the newest caches that take at most so many bytes together; remove all older ones.

    What a writer that was killed has left goes, too, when it is an hour old.
    """
    total = 0
    with contextlib.suppress(OSError):
        files = [(p.stat().st_mtime, p) for p in folder.glob("*.safetensors")]
        for _, path in sorted(files, reverse=True):
            total += path.stat().st_size
            if total > most_bytes:
                path.unlink()
        for path in folder.glob("*.partial"):
            if time.time() - path.stat().st_mtime > STALE_S:
                path.unlink()
