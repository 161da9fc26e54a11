"""A conversation as the inference thread holds it: the session, its settings, what is kept of it.

Knows no terminal. What the person must be told meanwhile goes into `notices`; `meter` may be read
by any thread.
"""

from __future__ import annotations

import hashlib
import queue
import secrets
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mlx_llama import Llama, Message, Session, Stats, Step
from mlx_llama.errors import OptionError
from mlx_llama.options import ContextOptions
from mlx_llama.prompts import PlainFormat
from mlx_llama.sampling import bias_by_token
from mlx_llama_apps.chat.dropped import Dropped
from mlx_llama_apps.chat.keeping import Folders, Keeper, Writing
from mlx_llama_apps.chat.settings import Setting, Settings
from mlx_llama_apps.chat.store import SavedChat

OnPrefill = Callable[[int, int], None]
Load = Callable[[Mapping[str, Any]], Llama]

SEEDS = 2**32


class Talk:
    """One model and one conversation with it; belongs to the thread that made it."""

    def __init__(self, load: Load, settings: Settings, folders: Folders) -> None:
        self._load = load
        self._settings = settings
        self.notices: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.llama = load(settings.group("load"))
        self._load_options = settings.group("load")  # without what this model was loaded without
        self.session: Session
        self.last: Stats | None = None
        self.resumed = ""  # how a saved chat was taken up
        self.meter = (0, 0)  # tokens held, tokens that the context holds
        self._keeper = Keeper(folders, self.notices.put)
        self._seeds: set[int] = set()  # that the last question was answered with
        self._dropped = Dropped()
        self._new_session()
        self._ask_the_model()
        self._opening()  # what cannot work is refused before the first question
        self.clear()

    # --- answers ---------------------------------------------------------------------------------

    def ask(
        self,
        text: str,
        cancel: threading.Event,
        on_prefill: OnPrefill,
        *,
        instead_of: Collection[str] = (),
    ) -> Iterator[Step]:
        """Add what the user typed and answer it.

        instead_of: what the last question may be for this one to take its place: it is changed, or
        was stopped before anything of its answer was seen.
        """
        self._seeds.clear()
        options, messages = self._options(), self.session.messages
        number = self._last_question()
        if number is not None and messages[number].content in instead_of:
            asked = [*messages[:number], Message("user", text)]
            steps = self.session.stream(asked, cancel=cancel, on_prefill=on_prefill, **options)
            return self._recorded(steps, options["seed"])

        def on_read(done: int, total: int) -> None:
            self._keeper.sync(self.session.messages)  # the question is kept while it is read
            on_prefill(done, total)

        steps = self.session.ask(text, cancel=cancel, on_prefill=on_read, **options)
        return self._recorded(steps, options["seed"])

    def retry(self, cancel: threading.Event, on_prefill: OnPrefill) -> Iterator[Step]:
        """Answer the last question anew, with a seed that it was not answered with."""
        options, answer = self._options(), self.session.messages[-1:]
        self._seeds |= {message.seed for message in answer if message.seed is not None}
        while options["seed"] in self._seeds:
            options["seed"] = (options["seed"] + 1) % SEEDS
        steps = self.session.retry(cancel=cancel, on_prefill=on_prefill, **options)
        return self._recorded(steps, options["seed"])

    def continue_answer(self, cancel: threading.Event, on_prefill: OnPrefill) -> Iterator[Step]:
        """Go on with an answer that was cut, with its own seed."""
        options, begun = self._options(), None
        if self.session.can_continue:
            begun = self.session.messages[-1]
            options["seed"] = options["seed"] if begun.seed is None else begun.seed
        steps = self.session.continue_answer(cancel=cancel, on_prefill=on_prefill, **options)
        return self._recorded(steps, options["seed"], begun=begun)

    def _options(self) -> dict[str, Any]:
        """Return the settings for one answer, a seed among them."""
        chosen = {"seed": secrets.randbelow(SEEDS), **self._settings.group("generation")}
        return {**chosen, "date": self._settings.value("date")}

    def _last_question(self) -> int | None:
        roles = [message.role for message in self.session.messages]
        return len(roles) - 1 - roles[::-1].index("user") if "user" in roles else None

    def _recorded(
        self, steps: Iterator[Step], seed: int, *, begun: Message | None = None
    ) -> Iterator[Step]:
        """Yield steps; write each sentence as it ends, and the whole when the answer is over."""
        writing = None
        try:
            for step in steps:
                if step.stats is not None:
                    self.last = step.stats
                self._measure()
                yield step  # first: a disk may take longer than who stops an answer waits for it
                if writing is None and step.token_id is not None:
                    # Not before: an answer that nothing takes the place of stays in the file.
                    self._seeds.add(seed)
                    self._keeper.sync(self.session.messages)  # what is answered
                    writing = Writing(self._keeper, seed, begun)
                if writing is not None:
                    writing.add(step)
        finally:
            self._measure()
            if writing is not None:
                self._dropped.note_end(self.session)
            said = self._dropped.said(self.session, date=self._settings.value("date"))
            if said is not None:
                self.notices.put(said)
            self._keeper.sync(self.session.messages)

    def _measure(self) -> None:
        cache = self.session.cache
        self.meter = (cache.held or self._unread(), cache.capacity)

    def _unread(self) -> int:
        """Return how many tokens the messages have: what the next answer reads of them anew."""
        messages = self.session.messages
        if all(message.role == "system" for message in messages):
            return 0
        date, encode = self._settings.value("date"), self.session.prompt_format.encode
        return len(encode(messages, date=date, continue_last=messages[-1].role == "assistant"))

    # --- turning back ----------------------------------------------------------------------------

    def undo(self) -> str:
        """Take back the last question and its answer; return the question."""
        text = self.session.undo(date=self._settings.value("date"))
        self._seeds.clear()
        self._keeper.sync(self.session.messages)
        self._measure()
        return text

    def clear(self) -> None:
        """Begin a new chat with the same settings; the one before stays as it was saved."""
        opening = self._opening()  # first: what may be refused must not cost the talk
        self.keep_cache()
        self._begin(opening)
        self._keeper.take(self._keeper.new(self._header()))
        self._keeper.sync(opening)

    def _begin(self, messages: list[Message]) -> None:
        """Let the session hold these messages, and forget what was counted of others."""
        self.session.clear()
        self.session.messages = messages
        self._dropped = Dropped()
        self._seeds.clear()
        self.last = None
        self._measure()

    def _opening(self) -> list[Message]:
        """Return the system message, if there is one; OptionError when the format has no place."""
        system, date = (self._settings.find(name) for name in ("system", "date"))
        for setting in (system, date):
            if setting.value is not None and self.llama.kind.is_base:
                raise OptionError(
                    f"{setting.written}: {self.llama.path.name} is a base model "
                    f"({self.llama.kind.name}), which has no chat format"
                )
        messages = [] if system.value is None else [Message("system", system.value)]
        self.session.prompt_format.encode([*messages, Message("user", "")], date=date.value)
        return messages

    # --- settings --------------------------------------------------------------------------------

    def _ask_the_model(self) -> None:
        """Let the settings know what the model directory recommends and has no place for."""
        defaults = self.llama.sampling_defaults
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        found = {name: getattr(defaults, name) for name in names}
        self._settings.recommended = {n: v for n, v in found.items() if v is not None}
        has_place = {
            "system": self._can_encode([Message("system", "a"), Message("user", "a")]),
            "date": self._can_encode([Message("user", "a")], date="26 Jul 2024"),
        }
        self._settings.unfit |= {name for name, can in has_place.items() if not can}
        for name in self._settings.left_out():
            self.notices.put(
                f"{name} of preset {self._settings.preset} is left out: {self.llama.path.name} "
                f"({self.llama.kind.name}) has no place for one"
            )
        self._check_biases()

    def _can_encode(self, messages: list[Message], *, date: str | None = None) -> bool:
        try:
            self.session.prompt_format.encode(messages, date=date)
        except OptionError:
            return False
        return True

    def _check_biases(self) -> None:
        biases = self._settings.group("generation").get("logit_bias", {})
        bias_by_token(biases, self.llama.tokenizer)

    def set(self, name: str, text: str) -> Setting:
        """Take a setting as it was typed, into effect; after an error all is as it was."""
        before, was_read = self._settings.state(), bool(self.session.tokens)
        setting = self._settings.set(name, text)
        try:
            self._apply(setting.key.group, setting.key.name)
        except BaseException:
            self._settings.go_back(before)
            raise
        n_tokens, capacity = self.meter
        if was_read and n_tokens and not self.session.tokens:
            less = "" if n_tokens < capacity else f", and the context holds {capacity}"
            self.notices.put(
                f"the cache was emptied: the next answer reads {n_tokens} tokens of the "
                f"conversation again{less}"
            )
        return setting

    def _apply(self, group: str, name: str) -> None:
        match group:
            case "chat":
                return
            case "text":
                opening = self._opening()
                rest = self.session.messages
                rest = rest[1:] if rest and rest[0].role == "system" else rest
                self.session.messages = [*opening, *rest]
                self._dropped.forget_ends()
                self._keeper.sync(self.session.messages)
            case "context" if name == "on_full" and self._settings.value("on_full") == "slide":
                self.session.begin_sliding()
            case "context" if name == "on_full" and not self.session.context.slides:
                pass
            case "context":
                self._new_session()
            case "load":
                self._reload()
                return
            case _:
                self._check_biases()
        self._keeper.settings(self._settings.explicit())

    def _new_session(self, messages: Sequence[Message] = ()) -> None:
        """Make a session of the settings; what was said is read anew with the next answer.

        messages: what was said, where the session before is gone.
        """
        plain = PlainFormat(self.llama.tokenizer) if self.llama.kind.is_base else None
        options = ContextOptions(**self._settings.group("context"))
        before = getattr(self, "session", None)
        session = Session(self.llama, options, prompt_format=plain)
        session.messages = [*messages]
        if before is not None:
            session.messages = before.messages
            before.clear()  # its memory is given back
        self.session = session
        self._dropped = Dropped()
        self._measure()

    def _reload(self) -> None:
        wanted, before = self._settings.group("load"), self._load_options
        messages = self.session.messages
        del self.session, self.llama  # two models may not fit
        try:
            self.llama = self._load(wanted)
            self._load_options = self._settings.group("load")
        except BaseException:
            self.llama = self._load(before)
            raise
        finally:
            self._new_session(messages)

    # --- saving and resuming ---------------------------------------------------------------------

    @property
    def chat_id(self) -> str | None:
        """What the chat is called; None as long as it has no file."""
        return self._keeper.chat_id

    def _header(self) -> dict[str, Any]:
        return {
            "model": str(self.llama.path.absolute()),
            "kind": self.llama.kind.name,
            "created": _now(),
            "tokenizer": self.tokenizer,
            "settings": self._settings.explicit(),
        }

    def resume(
        self, chat: SavedChat, *, is_saved: bool = True, settings: Mapping[str, Any] | None = None
    ) -> str:
        """Take up a saved chat; return how. After an error all is as it was.

        is_saved: what follows goes into its file. settings: what it was said with, where that is to
        be taken up too.
        """
        if is_saved and chat.id == self.chat_id:
            raise OptionError(f"chat {chat.id} is the one that is open here")
        before = self._settings.state()
        try:
            if settings is not None:
                self._settings.of_chat = dict(settings)
                self._settings.check()
            messages = self._messages_of(chat)
            file = self._keeper.open(chat) if is_saved else self._keeper.new(self._header())
        except BaseException:
            self._settings.go_back(before)
            raise
        self.keep_cache()
        self._begin(messages)
        self._keeper.take(file)
        if is_saved and file is not None and chat.model != str(self.llama.path.absolute()):
            file.model(self.llama.path.absolute(), self.tokenizer)
        self._keeper.sync(messages)
        how = self._keeper.restore_cache(self.session, chat, date=self._settings.value("date"))
        self._dropped.are_told(self.session)
        self._measure()
        return how

    def _messages_of(self, chat: SavedChat) -> list[Message]:
        """Return a chat's messages as they go on here; OptionError where they cannot."""
        messages = list(chat.messages)
        if chat.tokenizer != self.tokenizer:  # the ids would mean something else
            messages = [replace(m, token_ids=None) for m in messages]
        has_system = bool(messages) and messages[0].role == "system"
        if self._settings.find("system").source in ("flag", "/set"):
            messages = [*self._opening(), *messages[has_system:]]
        elif has_system:
            if self.llama.kind.is_base:
                raise OptionError(
                    f"chat {chat.id} has a system prompt, and {self.llama.path.name} is a base "
                    "model, which has no place for one; open it with an instruct model"
                )
            self._settings.of_chat["system"] = messages[0].content
        elif self._settings.value("system") is not None:
            self._settings.of_chat["system"] = None
        is_answered = bool(messages) and messages[-1].role == "assistant"
        asked = [*messages, Message("user", "a")] if is_answered else messages
        if asked and asked[-1].role == "user":
            self.session.prompt_format.encode(asked, date=self._settings.value("date"))
        return messages

    @property
    def tokenizer(self) -> str:
        """A digest of what gives token ids their meaning."""
        with self.llama.tokenizer.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:32]

    def keep_cache(self) -> str | None:
        """Save the cache of the chat that is open; say why not, where that is of interest."""
        most = self._settings.value("chat_cache_bytes")
        return self._keeper.keep_cache(self.session, most_bytes=most)

    def close(self) -> str | None:
        """Keep the cache and let the file go."""
        found = self.keep_cache()
        self._keeper.take(None)
        return found

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
