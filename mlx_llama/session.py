"""One conversation: its messages, the tokens behind them, and the cache that holds those tokens.

A session takes messages and yields steps. What the cache already holds is never computed again:
the new prompt is compared with the cached tokens and only the rest is prefilled. An answer keeps
the ids that the model chose, so that the next prompt begins with exactly what is cached.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_llama.cache import KVCache, load_cache, save_cache
from mlx_llama.context import Context, plan_context
from mlx_llama.errors import OptionError
from mlx_llama.generation import (
    OnForget,
    OnPrefill,
    Request,
    Step,
    generate,
    room_for_answer,
)
from mlx_llama.options import ContextOptions, generation_options
from mlx_llama.prompts import Message, PromptFormat, as_messages
from mlx_llama.sampling import Sampler, bias_by_token
from mlx_llama.turn import Turn, n_shared

if TYPE_CHECKING:
    from mlx_llama.llama import Llama


class Session:
    """A conversation with one model; owns its cache. Not safe for two threads at once.

    It has one answer at a time: beginning another ends the one before. options: how much it
    sees, and what happens beyond. is_single: whether there will be one answer only, so that the
    context need not be longer than that takes; it is decided when the answer begins.
    prompt_format: how messages become tokens (default: the model's own).
    """

    def __init__(
        self,
        llama: Llama,
        options: ContextOptions,
        *,
        is_single: bool = False,
        prompt_format: PromptFormat | None = None,
    ) -> None:
        self._llama = llama
        self._options = options
        self._is_single = is_single
        self._given_format = prompt_format
        self._turn: Turn | None = None
        self._starts: dict[int, int] = {}  # by number of messages: tokens that a turn began with
        self.messages: list[Message] = []
        self.tokens: list[int] = []
        if not is_single:
            self._decide(needed=None)

    def _decide(self, *, needed: int | None) -> None:
        """Choose the context and make its cache. needed: tokens of prompt and answer, if known."""
        llama = self._llama
        self.context: Context = plan_context(
            self._options, llama.config, dtype=llama.dtype, needed=needed
        ).require_memory()
        self.cache: KVCache = self.context.new_cache(llama.config)

    def ask(self, text: str, **options: Any) -> Iterator[Step]:
        """Add a user's message and answer it; the options are those of `stream`.

        A question whose answer was cut before it began is taken back: the model shall not see that
        it said nothing.
        """
        self._supersede()
        asked = self.messages
        if asked and asked[-1].is_cut and not asked[-1].content:
            asked = asked[:-2]
        return self.stream([*asked, Message("user", text)], **options)

    def stream(
        self,
        messages: Sequence[Message | Mapping[str, str]],
        *,
        date: str | None = None,
        on_prefill: OnPrefill | None = None,
        on_forget: OnForget | None = None,
        cancel: threading.Event | None = None,
        **options: Any,
    ) -> Iterator[Step]:
        """Answer messages, which become the session's, with the answer behind them.

        An answer that is cut (cancelled, closed early, out of tokens or time) is kept as far as it
        went, and marked; after an error the session is as it was before, and so it is when an
        answer that takes another's place is cut before its first token.
        date: shown in the system block of the formats that have one; None leaves the block out.
        """
        checked = generation_options(options)
        given = as_messages(messages)
        if not given or given[-1].role == "assistant":
            raise OptionError("messages: the last one must be there and not the assistant's")
        prompt = self.prompt_format
        ids = self._llama.prompt_ids(prompt.encode(given, date=date))
        at_start = prompt.strips_leading_space
        opening = self._opening(given, date)
        return self._steps(
            Turn(ids, checked, at_start, on_prefill, on_forget, cancel, given, opening)
        )

    def retry(self, **options: Any) -> Iterator[Step]:
        """Answer the last question anew; the options are those of `stream`.

        Raises OptionError when nothing was asked.
        """
        self._supersede()
        return self.stream(self.messages[: self._last_question() + 1], **options)

    def continue_answer(
        self,
        *,
        date: str | None = None,
        on_prefill: OnPrefill | None = None,
        on_forget: OnForget | None = None,
        cancel: threading.Event | None = None,
        **options: Any,
    ) -> Iterator[Step]:
        """Go on with an answer that was cut as if it had not been: with its seed, if none is given.

        Yields what follows. Raises OptionError when the last message is no cut answer.
        """
        self._supersede()
        if not self.can_continue:
            raise OptionError("no answer was cut: there is nothing to continue")
        given, begun, prompt = self.messages[:-1], self.messages[-1], self.prompt_format
        if options.get("seed") is None:
            options["seed"] = begun.seed
        checked = generation_options(options)
        encoded = prompt.encode(self.messages, date=date, continue_last=True)
        at_start = prompt.strips_leading_space and not begun.content
        if begun.token_ids:
            at_start = prompt.strips_leading_space
        return self._steps(
            Turn(
                self._llama.prompt_ids(encoded), checked, at_start, on_prefill, on_forget, cancel,
                given, self._opening(given, date), begun,
            )
        )  # fmt: skip

    @property
    def can_continue(self) -> bool:
        """Whether the last message is an answer that was cut."""
        return bool(self.messages) and self.messages[-1].is_cut

    def undo(self, *, date: str | None = None) -> str:
        """Take back the last question with its answer; return the question.

        The cache is trimmed to where the turn began, so that the next one prefills its own tokens.
        Raises OptionError when nothing was asked.
        """
        self._supersede()
        number = self._last_question()
        text = self.messages[number].content
        self.messages = self.messages[:number]
        if number in self._starts or not self.tokens:
            start = min(self._starts.pop(number, 0), self.cache.offset)
        else:  # said before this session took it up
            _, start = self.cached_share(date=date)
        if not self.cache.window.is_lost(start):
            self.cache.trim(self.cache.offset - start, gives_back=False)
            del self.tokens[start:]
        return text

    def begin_sliding(self) -> None:
        """Drop the oldest tokens behind the system's from now on, when the context is full."""
        self._supersede()
        self._options = replace(self._options, on_full="slide")
        self.context = replace(self.context, slides=True)
        self.cache.begin_sliding()

    def cached_share(self, *, date: str | None = None) -> tuple[int, int]:
        """Return how many tokens the cache counts, and how many of them the messages begin with.

        They are the same but for what the next answer will compute anew.
        """
        self._supersede()
        is_open = bool(self.messages) and self.messages[-1].role == "assistant"
        asked = [*self.messages, Message("user", "a")] if is_open or not self.messages else None
        ids = self.prompt_format.encode(asked or self.messages, date=date)
        return len(self.tokens), n_shared(self.tokens, ids)

    def complete(
        self,
        prompt: str | Sequence[int],
        *,
        on_prefill: OnPrefill | None = None,
        on_forget: OnForget | None = None,
        cancel: threading.Event | None = None,
        **options: Any,
    ) -> Iterator[Step]:
        """Continue a plain text (BOS is put before it) or token ids (taken as they are)."""
        checked = generation_options(options)
        ids = self._llama.prompt_ids(prompt)
        tokenizer = self._llama.tokenizer
        # A text's first space is the tokenizer's own; behind other text it is the answer's.
        at_start = not any(tokenizer.token_bytes(token) for token in ids)
        return self._steps(Turn(ids, checked, at_start, on_prefill, on_forget, cancel))

    def clear(self) -> None:
        """Forget everything: messages, tokens and cache."""
        self._supersede()
        self.messages = []
        self.tokens.clear()
        self._starts.clear()
        self.cache.clear()

    def save_cache(self, path: str | Path) -> None:
        """Write the tokens and what the cache holds of them; an answer on its way is ended.

        Raises OSError as the disk gives it, with nothing half written.
        """
        self._supersede()
        fingerprint = self._llama.fingerprint
        save_cache(Path(path), self.cache, tokens=self.tokens, fingerprint=fingerprint)

    def load_cache(self, path: str | Path) -> None:
        """Take up what `save_cache` wrote, so that a text that begins so is not computed again.

        The messages are the caller's to restore. Raises CheckpointError, with the reason, for a
        file of another model, another context or none; the session is as it was then.
        """
        self._supersede()
        self.tokens = load_cache(
            Path(path),
            self.cache,
            dtype=self._llama.dtype,
            fingerprint=self._llama.fingerprint,
            keep=self.context.keep,
        )

    def fork(self) -> Session:
        """Return the same conversation; each side goes on by itself.

        Both share what is cached until one of them writes to it.
        """
        self._supersede()
        other = copy.copy(self)
        other.messages, other.tokens = list(self.messages), list(self.tokens)
        other._starts = dict(self._starts)
        other.cache = self.cache.fork()
        return other

    @property
    def prompt_format(self) -> PromptFormat:
        """How messages become tokens; UnsupportedModelError for a base model's own format."""
        return self._given_format or self._llama.prompt_format

    def _last_question(self) -> int:
        """Return the number of the last message that is the user's."""
        for number in range(len(self.messages) - 1, -1, -1):
            if self.messages[number].role == "user":
                return number
        raise OptionError("nothing was asked yet")

    def _opening(self, messages: Sequence[Message], date: str | None) -> int:
        """Return how many tokens stand before the first message's text: the system's part."""
        if self._options.on_full != "slide":
            return 0
        system = [m for m in messages[:1] if m.role == "system"]
        encode = self.prompt_format.encode
        texts = [encode([*system, Message("user", text)], date=date) for text in ("a", "b")]
        return n_shared(*texts)

    def _steps(self, turn: Turn) -> Iterator[Step]:
        """Generate; afterwards `tokens` and `messages` are what was computed and said."""
        self._supersede()
        self._turn = turn
        turn.before = self.messages
        if turn.given is not None:
            self.messages = turn.given
        try:
            if self._is_single:
                limit = turn.options.max_tokens
                self._decide(needed=None if limit is None else len(turn.ids) + max(limit, 1))
            request = self._request(turn)
            room_for_answer(self.cache, len(turn.ids))  # before anything is trimmed
            self._reuse(turn)
            if turn.given and turn.begun is None:
                number, start = len(turn.given) - 1, self.cache.offset
                self._starts[number] = min(start, self._starts.get(number, start))
            turn.steps = generate(self._llama.model, self.cache, request)
            for step in turn.steps:
                if (taken := turn.take(step)) is not None:
                    yield taken
        except GeneratorExit:
            raise
        except BaseException:
            turn.trimmed = []  # a token that was queued may have been written over the old rows
            raise
        finally:
            if self._turn is turn:
                self._settle(turn)

    def _supersede(self) -> None:
        """End the answer that is still on its way; who iterates over it gets no more steps."""
        if self._turn is not None:
            self._settle(self._turn)

    def _settle(self, turn: Turn) -> None:
        """Close a turn's generator; bring tokens and messages in line with what it did."""
        self._turn = None
        if turn.given is not None:
            self.messages = turn.messages()
        if turn.steps is None:
            return
        turn.steps.close()
        known = [*turn.ids, *turn.answer]
        is_as_before = bool(turn.trimmed) and not turn.answer and self.messages is turn.before
        # A step that was queued early may have cached a token that was never read.
        surplus = max(0, self.cache.offset - len(known))
        self.cache.trim(surplus, gives_back=not is_as_before)
        self.tokens = known[: self.cache.offset]
        if is_as_before:
            # Only rows of the same tokens were written to: those behind them are as they were.
            self.tokens = turn.trimmed
            self.cache.recount(len(self.tokens) - self.cache.offset)

    def _request(self, turn: Turn) -> Request:
        llama = self._llama
        filled = llama.sampling_defaults.fill(turn.options)
        turn.seed = filled.seed
        begun = turn.begun.token_ids or () if turn.begun is not None else ()
        sampler = Sampler(
            filled,
            vocab_size=llama.config.vocab_size,
            prompt=turn.ids[: len(turn.ids) - len(begun)],
            bias=bias_by_token(filled.logit_bias, llama.tokenizer),
            begun=begun,
        )
        return Request(
            ids=turn.ids,
            options=filled,
            sampler=sampler,
            detokenizer=llama.tokenizer.detokenizer(at_start=turn.at_start),
            stop_ids=llama.stop_ids,
            chunk=self.context.chunk,
            on_prefill=turn.on_prefill,
            on_forget=turn.on_forget,
            cancel=turn.cancel,
            begun=begun,
            n_shown=len(turn.begun.content) if turn.begun is not None and begun else 0,
        )

    def _reuse(self, turn: Turn) -> None:
        """Trim the cache to what it shares with a turn's ids; the last id is always computed."""
        cache, ids, keep = self.cache, turn.ids, self.context.kept(turn.opening)
        shared = n_shared(self.tokens, ids[:-1])
        is_retry = 0 < len(ids) - 1 == shared < cache.offset and cache.window.is_straight
        if is_retry and self.tokens[shared] == ids[shared]:
            turn.trimmed = list(self.tokens)
        is_missing = cache.forgotten > 0 and keep != cache.keep
        if is_missing or cache.window.is_lost(shared):
            # What was forgotten is computed anew, from where nothing is missing.
            shared = min(shared, keep, cache.keep)
        cache.trim(cache.offset - shared, gives_back=not turn.trimmed)
        cache.keep_first(keep)
        del self.tokens[shared:]
