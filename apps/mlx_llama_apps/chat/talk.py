"""A conversation as the inference thread holds it: the session, its file and its cache.

Knows no terminal. What the person must be told meanwhile goes into `notices`; `meter` may be read
by any thread.
"""

from __future__ import annotations

import hashlib
import queue
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_llama import Llama, Message, Session, Stats, Step
from mlx_llama.errors import MlxLlamaError, OptionError
from mlx_llama.options import ContextOptions
from mlx_llama.prompts import PlainFormat
from mlx_llama.sampling import bias_by_token
from mlx_llama_apps.chat.folders import cache_file, prune_caches
from mlx_llama_apps.chat.settings import Settings
from mlx_llama_apps.chat.store import ChatFile, SavedChat
from mlx_llama_apps.terminal import size

OnPrefill = Callable[[int, int], None]
Load = Callable[[Mapping[str, Any]], Llama]

LONGEST_PART = 200  # characters of an answer that are written even without a sentence's end

_SENTENCE_END = re.compile(r"[.!?…。！？][\"')\]]*\s|\n")


@dataclass(frozen=True, slots=True)
class Folders:
    """Where chats and their caches are kept; None: they are not."""

    chats: Path | None
    caches: Path


class Talk:
    """One model and one conversation with it; belongs to the thread that made it."""

    def __init__(self, load: Load, settings: Settings, folders: Folders) -> None:
        self._load = load
        self._settings = settings
        self._folders = folders
        self._load_options = settings.group("load")
        self.notices: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.llama = load(self._load_options)
        self.session: Session
        self.last: Stats | None = None
        self.seed: int | None = None
        self.resumed = ""  # how a saved chat was taken up
        self.meter = (0, 0)  # tokens held, tokens that the context holds
        self._file: ChatFile | None = None
        self._ends: dict[int, int] = {}  # by number of messages: tokens that they take
        self._told_forgotten = 0
        self.take_recommended()
        self._new_session()
        self._opening()  # what cannot work is refused before the first question
        self.clear()

    # --- answers ---------------------------------------------------------------------------------

    def ask(
        self, text: str, cancel: threading.Event, on_prefill: OnPrefill, *, is_again: bool = False
    ) -> Iterator[Step]:
        """Add what the user typed and answer it.

        is_again: it was stopped before anything of its answer was seen. Should the answer have
        begun all the same, it is answered anew and not asked twice.
        """
        if is_again and [m.content for m in self.session.messages[-2:-1]] == [text]:
            return self.retry(cancel, on_prefill)
        return self._recorded(self.session.ask(text, **self._hooks(cancel, on_prefill)), begun=None)

    def retry(
        self, cancel: threading.Event, on_prefill: OnPrefill, *, text: str | None = None
    ) -> Iterator[Step]:
        """Answer the last question anew with another seed, or another question in its place."""
        before = self.session.messages
        if not any(message.role == "user" for message in before):
            raise OptionError("nothing was asked yet")
        number = max(n for n, message in enumerate(before) if message.role == "user")
        question = before[number] if text is None else Message("user", text)
        asked = [*before[:number], question]
        hooks = self._hooks(cancel, on_prefill)
        if text is None and hooks.get("seed") is not None and hooks["seed"] == self.seed:
            hooks["seed"] = (hooks["seed"] + 1) % 2**32
        return self._recorded(self.session.stream(asked, **hooks), begun=None)

    def continue_answer(self, cancel: threading.Event, on_prefill: OnPrefill) -> Iterator[Step]:
        """Go on with an answer that was cut, with its own seed."""
        hooks = self._hooks(cancel, on_prefill)
        if self.seed is not None:
            hooks["seed"] = self.seed
        begun = self.session.messages[-1] if self.session.can_continue else None
        return self._recorded(self.session.continue_answer(**hooks), begun=begun)

    def _hooks(self, cancel: threading.Event, on_prefill: OnPrefill) -> dict[str, Any]:
        return {
            **self._settings.group("generation"),
            "date": self._settings.value("date"),
            "cancel": cancel,
            "on_prefill": on_prefill,
        }

    def _recorded(self, steps: Iterator[Step], *, begun: Message | None) -> Iterator[Step]:
        """Yield steps; write each sentence as it ends, and the whole when the answer is over."""
        text, ids = (begun.content, list(begun.token_ids or ())) if begun else ("", [])
        are_ids_known = begun is None or begun.token_ids is not None
        is_begun = False
        try:
            for step in steps:
                if not is_begun:
                    is_begun = True
                    self._sync(self.session.messages)  # what is answered
                text += step.text
                if step.token_id is not None:
                    ids.append(step.token_id)
                if step.stats is not None:
                    self.last, self.seed = step.stats, step.stats.seed
                self._measure()
                is_due = len(text) >= LONGEST_PART or _SENTENCE_END.search(text)
                if self._file is not None and is_due:
                    self._file.part(text, ids if are_ids_known else None)
                    text, ids = "", []
                yield step
        finally:
            self._measure()
            if is_begun:
                self._ends[len(self.session.messages)] = len(self.session.tokens)
            self._tell_forgotten()
            self._sync(self.session.messages)

    def _sync(self, messages: list[Message]) -> None:
        if self._file is not None:
            self._file.sync(messages, seed=self.seed)

    def _measure(self) -> None:
        cache = self.session.cache
        self.meter = (cache.held, cache.capacity)

    def _tell_forgotten(self) -> None:
        """Say aloud what a sliding context has dropped since it was last said."""
        cache = self.session.cache
        if cache.forgotten <= self._told_forgotten:
            self._told_forgotten = cache.forgotten
            return
        self._told_forgotten = cache.forgotten
        until, n_turns = cache.keep + cache.forgotten, 0
        messages = self.session.messages
        for number, message in enumerate(messages, 1):
            if message.role == "assistant":
                n_turns += self._end_of(number) <= until
        turns = {0: "part of 1 turn", 1: "1 turn"}.get(n_turns, f"{n_turns} turns")
        has_system = bool(messages) and messages[0].role == "system"
        kept = "the system prompt is" if has_system else "its first tokens are"
        self.notices.put(
            f"the context is full: the oldest {cache.forgotten} tokens ({turns}) are dropped, "
            f"{kept} kept"
        )

    def _end_of(self, number: int) -> int:
        if number not in self._ends:
            messages = self.session.messages[:number]
            encode = self.session.prompt_format.encode
            self._ends[number] = len(
                encode([*messages, Message("user", "")], date=self._settings.value("date"))
            )
        return self._ends[number]

    # --- turning back ----------------------------------------------------------------------------

    def undo(self) -> str:
        """Take back the last question and its answer; return the question."""
        text = self.session.undo()
        self._sync(self.session.messages)
        self._measure()
        return text

    def clear(self) -> None:
        """Begin a new chat with the same settings; the one before stays as it was saved."""
        opening = self._opening()  # first: what may be refused must not cost the talk
        self.keep_cache()
        self._close()
        self.session.clear()
        self.session.messages = opening
        self._begin_file()
        self._forget_counts()

    def _forget_counts(self) -> None:
        self._ends.clear()
        self._told_forgotten = 0
        self.last = self.seed = None
        self._measure()

    def _opening(self) -> list[Message]:
        """Return the system message, if there is one; OptionError when the format has no place."""
        system = self._settings.value("system")
        date = self._settings.value("date")
        if self.llama.kind.is_base and (system is not None or date is not None):
            raise OptionError(
                f"--system and --date: {self.llama.path.name} is a base model "
                f"({self.llama.kind.name}), which has no chat format"
            )
        messages = [] if system is None else [Message("system", system)]
        self.session.prompt_format.encode([*messages, Message("user", "")], date=date)
        return messages

    # --- settings --------------------------------------------------------------------------------

    def take_recommended(self) -> None:
        """Let the settings know what the model directory recommends."""
        defaults = self.llama.sampling_defaults
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        found = {name: getattr(defaults, name) for name in names}
        self._settings.recommended = {n: v for n, v in found.items() if v is not None}
        bias_by_token(
            self._settings.group("generation").get("logit_bias", {}), self.llama.tokenizer
        )

    def apply(self, group: str, name: str) -> None:
        """Bring what was set into effect; OptionError, with all as it was, when that cannot be."""
        match group:
            case "text":
                opening = self._opening()
                rest = self.session.messages
                rest = rest[1:] if rest and rest[0].role == "system" else rest
                self.session.messages = [*opening, *rest]
                self._ends.clear()
                if self._file is not None and self.session.messages:
                    self._sync(self.session.messages)
            case "context" if name == "on_full" and self._settings.value("on_full") == "slide":
                self.session.begin_sliding()
            case "context" if name == "on_full" and not self.session.context.slides:
                pass
            case "context":
                self._new_session()
            case "load":
                self._reload()
            case _:
                bias_by_token(
                    self._settings.group("generation").get("logit_bias", {}), self.llama.tokenizer
                )
        if self._file is not None and group != "load":
            self._file.settings(self._settings.explicit())

    def _new_session(self) -> None:
        """Make a session of the settings; what was said is read anew with the next answer."""
        plain = PlainFormat(self.llama.tokenizer) if self.llama.kind.is_base else None
        options = ContextOptions(**self._settings.group("context"))
        before = getattr(self, "session", None)
        session = Session(self.llama, options, prompt_format=plain)
        if before is not None:
            session.messages = before.messages
            before.clear()  # its memory is given back
        self.session = session
        self._told_forgotten = 0
        self._measure()

    def _reload(self) -> None:
        wanted, before = self._settings.group("load"), self._load_options
        messages = self.session.messages
        del self.session, self.llama  # two models may not fit
        try:
            self.llama, self._load_options = self._load(wanted), wanted
        except BaseException:
            self.llama = self._load(before)
            raise
        finally:
            self._new_session()
            self.session.messages = messages

    # --- saving and resuming ---------------------------------------------------------------------

    @property
    def chat_id(self) -> str | None:
        """What the chat is called; None as long as it has no file."""
        return None if self._file is None else self._file.id

    def _begin_file(self) -> None:
        if self._folders.chats is None:
            return
        header = {
            "model": str(self.llama.path.absolute()),
            "kind": self.llama.kind.name,
            "created": _now(),
            "tokenizer": self.tokenizer,
            "settings": self._settings.explicit(),
        }
        self._file = ChatFile.new(self._folders.chats, header=header, on_trouble=self.notices.put)
        self._file.sync(self.session.messages)

    def resume(self, chat: SavedChat, *, is_saved: bool = True) -> str:
        """Take up a saved chat; return how. is_saved: what follows goes into its file."""
        messages = chat.messages
        if chat.tokenizer != self.tokenizer:  # the ids would mean something else
            messages = [replace(m, token_ids=None) for m in messages]
        system = self._settings.find("system")
        if system.source in ("flag", "/set"):
            rest = messages[1:] if messages and messages[0].role == "system" else messages
            messages = [*self._opening(), *rest]
        elif messages and messages[0].role == "system":
            if self.llama.kind.is_base:
                raise OptionError(
                    f"chat {chat.id} has a system prompt, and {self.llama.path.name} is a base "
                    "model, which has no place for one; open it with an instruct model"
                )
            self._settings.of_chat["system"] = messages[0].content
        file = None
        if is_saved and self._folders.chats is not None:
            file = ChatFile.resume(chat, self.notices.put)
        self.keep_cache()
        self._close()
        self.session.clear()
        self.session.messages = list(messages)
        self._forget_counts()
        self.seed = chat.seed
        if is_saved:
            self._file = file
            if file is not None and chat.model != str(self.llama.path.absolute()):
                file.model(self.llama.path.absolute(), self.tokenizer)
        else:
            self._begin_file()
        self._sync(self.session.messages)
        return self._restore_cache(chat)

    @property
    def tokenizer(self) -> str:
        """A digest of what gives token ids their meaning."""
        with self.llama.tokenizer.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:32]

    def _restore_cache(self, chat: SavedChat) -> str:
        path = cache_file(self._folders.caches, chat.id)
        if not path.is_file():
            return "its cache was not kept: it is read anew"
        try:
            self.session.load_cache(path)
        except (MlxLlamaError, OSError) as error:
            return f"it is read anew: {error}"
        self._told_forgotten = self.session.cache.forgotten
        self._measure()
        held, shared = self.session.cached_share(date=self._settings.value("date"))
        if shared < held:
            return (
                f"{held} tokens restored, {shared} of them begin this chat; the rest is read anew"
            )
        return f"{held} tokens restored, nothing of them is read anew"

    def keep_cache(self) -> str | None:
        """Save the cache of the chat that is open; say why not, where that is of interest."""
        most = self._settings.value("chat_cache_bytes")
        chat_id, session = self.chat_id, self.session
        if chat_id is None or not most or not session.tokens:
            return None
        rows = max(session.cache.rows, 1)
        nbytes = session.cache.nbytes * session.cache.held // rows
        if nbytes > most:
            return f"its cache ({size(nbytes)}) is larger than chat_cache_bytes and is not kept"
        folder = self._folders.caches
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            prune_caches(folder, max(0, most - nbytes))
            session.save_cache(cache_file(folder, chat_id))
            prune_caches(folder, most)
        except OSError as error:
            return f"its cache is not kept: {folder}: {error.strerror}"
        return None

    def close(self) -> str | None:
        """Keep the cache and let the file go."""
        found = self.keep_cache()
        self._close()
        return found

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    # --- facts -----------------------------------------------------------------------------------

    def count_tokens(self, text: str) -> int:
        """Return how many tokens a text has."""
        return len(self.llama.tokenizer.encode(text))

    def agreement(self) -> tuple[int, int]:
        """Return the tokens that the cache holds, and how many of them the messages begin with."""
        return self.session.cached_share(date=self._settings.value("date"))


def _now() -> str:
    from datetime import datetime

    return datetime.now().astimezone().isoformat(timespec="seconds")
