"""What is kept on disk of the chat that is open: its file and, when it ends, its cache.

Knows no model but the session whose cache it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_llama import Message, Session, Step
from mlx_llama.errors import MlxLlamaError
from mlx_llama_apps.chat.folders import cache_file, prune_caches
from mlx_llama_apps.chat.store import ChatFile, SavedChat

LONGEST_PART = 200  # characters of an answer that are written even without a sentence's end

_SENTENCE_END = re.compile(r"[.!?…。！？][\"')\]]*\s|\n")


@dataclass(frozen=True, slots=True)
class Folders:
    """Where chats and their caches are kept; None: they are not."""

    chats: Path | None
    caches: Path


class Keeper:
    """The open chat's place on disk, if it has one. What goes wrong is told to `on_trouble`."""

    def __init__(self, folders: Folders, on_trouble: Callable[[str], None]) -> None:
        self._folders = folders
        self._on_trouble = on_trouble
        self._file: ChatFile | None = None

    @property
    def chat_id(self) -> str | None:
        """What the chat is called; None as long as it has no file."""
        return None if self._file is None else self._file.id

    # --- the file --------------------------------------------------------------------------------

    def open(self, chat: SavedChat) -> ChatFile | None:
        """Return a saved chat's file to go on with; ChatError when another program has it."""
        if self._folders.chats is None:
            return None
        return ChatFile.resume(chat, self._on_trouble)

    def new(self, header: Mapping[str, Any]) -> ChatFile | None:
        """Return a new chat's file, which is made with its first question."""
        if self._folders.chats is None:
            return None
        return ChatFile.new(self._folders.chats, header=header, on_trouble=self._on_trouble)

    def take(self, file: ChatFile | None) -> None:
        """Go on with another chat's file; the one before is let go."""
        if self._file is not None:
            self._file.close()
        self._file = file

    def sync(self, messages: Sequence[Message]) -> None:
        """Write what the file lacks of these messages, and what they no longer have."""
        if self._file is not None:
            self._file.sync(messages)

    def part(self, text: str, token_ids: Sequence[int] | None, *, seed: int) -> None:
        """Write the next piece of the answer that is on its way."""
        if self._file is not None:
            self._file.part(text, token_ids, seed=seed)

    def settings(self, values: Mapping[str, Any]) -> None:
        """Write settings that have changed."""
        if self._file is not None:
            self._file.settings(values)

    # --- the cache -------------------------------------------------------------------------------

    def keep_cache(self, session: Session, *, most_bytes: int) -> str | None:
        """Save the cache of the chat; say why not, where that is of interest.

        most_bytes: what all chats' caches may take together.
        """
        chat_id = self.chat_id
        if chat_id is None or not most_bytes or not session.tokens:
            return None
        nbytes = session.cache.nbytes * session.cache.held // max(session.cache.rows, 1)
        if nbytes > most_bytes:
            return (
                f"its cache has {nbytes} bytes, chat_cache_bytes allows {most_bytes}: it is not "
                "kept"
            )
        folder = self._folders.caches
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            prune_caches(folder, max(0, most_bytes - nbytes))
            session.save_cache(cache_file(folder, chat_id))
            prune_caches(folder, most_bytes)
        except OSError as error:
            return f"its cache is not kept: {folder}: {error.strerror}"
        return None

    def restore_cache(self, session: Session, chat: SavedChat, *, date: str | None) -> str:
        """Let a session take up the cache of a chat, whose messages it has; return how."""
        path = cache_file(self._folders.caches, chat.id)
        if not path.is_file():
            return "its cache was not kept: it is read anew"
        try:
            session.load_cache(path)
        except (MlxLlamaError, OSError) as error:
            return f"it is read anew: {error}"
        held, shared = session.cached_share(date=date)
        if shared < held:
            return (
                f"{held} tokens restored, {shared} of them begin this chat; the rest is read anew"
            )
        return f"{held} tokens restored, nothing of them is read anew"


class Writing:
    """Writes one answer as it comes, a sentence at a time. begun: the cut one that it continues."""

    def __init__(self, keeper: Keeper, seed: int, begun: Message | None) -> None:
        self._keeper = keeper
        self._seed = seed
        self._text = begun.content if begun else ""
        self._ids = list(begun.token_ids or ()) if begun else []
        self._are_ids_known = begun is None or begun.token_ids is not None
        self._is_due = begun is not None  # what is known already waits for no sentence's end

    def add(self, step: Step) -> None:
        """Take the next step; write what is due."""
        self._text += step.text
        if step.token_id is not None:
            self._ids.append(step.token_id)
        is_long = len(self._text) >= LONGEST_PART
        if self._is_due or is_long or _SENTENCE_END.search(self._text):
            ids = self._ids if self._are_ids_known else None
            self._keeper.part(self._text, ids, seed=self._seed)
            self._text, self._ids, self._is_due = "", [], False
