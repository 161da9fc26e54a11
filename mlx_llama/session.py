"""One conversation: its messages, the tokens behind them, and the cache that holds those tokens.

A session takes messages and yields steps. What the cache already holds is never computed again:
the new prompt is compared with the cached tokens and only the rest is prefilled. An answer keeps
the ids that the model chose, so that the next prompt begins with exactly what is cached.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_llama.cache import KVCache, load_cache, save_cache
from mlx_llama.context import Context, plan_context
from mlx_llama.errors import OptionError
from mlx_llama.generation import OnForget, OnPrefill, Request, Step, generate
from mlx_llama.options import ContextOptions, GenerationOptions, generation_options
from mlx_llama.prompts import Message, as_messages
from mlx_llama.sampling import Sampler, bias_by_token

if TYPE_CHECKING:
    from mlx_llama.llama import Llama


@dataclass(slots=True)
class _Turn:
    """One answer on its way. given: the messages it answers, None for a plain text.

    opening: how many first ids are the system's, and kept when the context slides. steps: set when
    it has begun. taken: what it has yielded.
    """

    ids: list[int]
    options: GenerationOptions
    at_start: bool
    on_prefill: OnPrefill | None
    on_forget: OnForget | None
    cancel: threading.Event | None
    given: list[Message] | None = None
    opening: int = 0
    steps: Generator[Step] | None = None
    taken: list[Step] = field(default_factory=list)


class Session:
    """A conversation with one model; owns its cache. Not safe for two threads at once.

    It has one answer at a time: beginning another ends the one before. options: how much it
    sees, and what happens beyond. is_single: whether there will be one answer only, so that the
    context need not be longer than that takes; it is decided when the answer begins.
    """

    def __init__(self, llama: Llama, options: ContextOptions, *, is_single: bool = False) -> None:
        self._llama = llama
        self._options = options
        self._is_single = is_single
        self._turn: _Turn | None = None
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
        """Add a user's message and answer it; the options are those of `stream`."""
        self._supersede()
        return self.stream([*self.messages, Message("user", text)], **options)

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

        An answer that is cut (cancelled, closed early, out of tokens) is kept as far as it went;
        after an error the session is as it was before.
        date: shown in the system block of the formats that have one; None leaves the block out.
        """
        checked = generation_options(options)
        given = as_messages(messages)
        if not given or given[-1].role == "assistant":
            raise OptionError("messages: the last one must be there and not the assistant's")
        prompt = self._llama.prompt_format
        ids = self._llama.prompt_ids(prompt.encode(given, date=date))
        at_start = prompt.strips_leading_space
        opening = self._opening(given, date)
        return self._steps(
            _Turn(ids, checked, at_start, on_prefill, on_forget, cancel, given, opening)
        )

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
        return self._steps(_Turn(ids, checked, at_start, on_prefill, on_forget, cancel))

    def clear(self) -> None:
        """Forget everything: messages, tokens and cache."""
        self._supersede()
        self.messages.clear()
        self.tokens.clear()
        self.cache.clear()

    def save_cache(self, path: Path) -> None:
        """Write the tokens and what the cache holds of them; an answer on its way is ended.

        Raises OSError as the disk gives it, with nothing half written.
        """
        self._supersede()
        save_cache(path, self.cache, tokens=self.tokens, fingerprint=self._llama.fingerprint)

    def load_cache(self, path: Path) -> None:
        """Take up what `save_cache` wrote, so that a text that begins so is not computed again.

        The messages are the caller's to restore. Raises CheckpointError, with the reason, for a
        file of another model, another context or none; the session is as it was then.
        """
        self._supersede()
        llama = self._llama
        self.tokens = load_cache(path, self.cache, dtype=llama.dtype, fingerprint=llama.fingerprint)

    def _opening(self, messages: Sequence[Message], date: str | None) -> int:
        """Return how many tokens stand before the first message's text: the system's part."""
        if self._options.on_full != "slide":
            return 0
        system = [m for m in messages[:1] if m.role == "system"]
        encode = self._llama.prompt_format.encode
        texts = [encode([*system, Message("user", text)], date=date) for text in ("a", "b")]
        return _shared(*texts)

    def _steps(self, turn: _Turn) -> Iterator[Step]:
        """Generate; afterwards `tokens` and `messages` are what was computed and said."""
        self._supersede()
        self._turn = turn
        before = self.messages
        if turn.given is not None:
            self.messages = turn.given
        try:
            if self._is_single:
                limit = turn.options.max_tokens
                self._decide(needed=None if limit is None else len(turn.ids) + max(limit, 1))
            request = self._request(turn)
            self._reuse(turn.ids, self.context.kept(turn.opening))
            turn.steps = generate(self._llama.model, self.cache, request)
            for step in turn.steps:
                turn.taken.append(step)
                yield step
        finally:
            if self._turn is turn:
                self._settle(turn)
                if not turn.taken:
                    self.messages = before

    def _supersede(self) -> None:
        """End the answer that is still on its way; who iterates over it gets no more steps."""
        if self._turn is not None:
            self._settle(self._turn)

    def _settle(self, turn: _Turn) -> None:
        """Close a turn's generator; bring tokens and messages in line with what it did."""
        self._turn = None
        if turn.steps is None:
            return
        turn.steps.close()
        answer = [step.token_id for step in turn.taken if step.token_id is not None]
        known = [*turn.ids, *answer]
        # A step that was queued early may have cached a token that was never read.
        self.cache.trim(max(0, self.cache.offset - len(known)))
        self.tokens = known[: self.cache.offset]
        if turn.given is None or not turn.taken:
            return
        reason = turn.taken[-1].finish_reason
        # A stop text is not part of the answer, but its tokens are among the ids.
        kept = None if reason == "stop" else tuple(answer[:-1] if reason == "eos" else answer)
        text = "".join(step.text for step in turn.taken)
        self.messages = [*turn.given, Message("assistant", text, kept)]

    def _request(self, turn: _Turn) -> Request:
        llama = self._llama
        filled = llama.sampling_defaults.fill(turn.options)
        sampler = Sampler(
            filled,
            vocab_size=llama.config.vocab_size,
            prompt=turn.ids,
            bias=bias_by_token(filled.logit_bias, llama.tokenizer),
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
        )

    def _reuse(self, ids: Sequence[int], keep: int) -> None:
        """Trim the cache to what it shares with ids; the last id is always computed."""
        shared = _shared(self.tokens, ids[:-1])
        cache = self.cache
        is_missing = cache.forgotten > 0 and keep != cache.keep
        if is_missing or cache.window.is_lost(shared):
            # What was forgotten is computed anew, from where nothing is missing.
            shared = min(shared, keep, cache.keep)
        cache.trim(cache.offset - shared)
        cache.keep_first(keep)
        del self.tokens[shared:]


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many first ids two texts have in common."""
    for number, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return number
    return min(len(one), len(other))
