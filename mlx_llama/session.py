"""One conversation: its messages, the tokens behind them, and the cache that holds those tokens.

A session takes messages and yields steps. What the cache already holds is never computed again:
the new prompt is compared with the cached tokens and only the rest is prefilled. An answer keeps
the ids that the model chose, so that the next prompt begins with exactly what is cached.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlx_llama.cache import KVCache
from mlx_llama.errors import OptionError
from mlx_llama.generation import OnPrefill, Request, Step, generate
from mlx_llama.options import GenerationOptions, generation_options
from mlx_llama.prompts import Message, as_messages
from mlx_llama.sampling import Sampler, bias_by_token

if TYPE_CHECKING:
    from mlx_llama.llama import Llama


@dataclass(slots=True)
class _Turn:
    """One answer on its way. given: the messages it answers, None for a plain text.

    steps: set when it has begun. taken: what it has yielded.
    """

    ids: list[int]
    options: GenerationOptions
    at_start: bool
    on_prefill: OnPrefill | None
    cancel: threading.Event | None
    given: list[Message] | None = None
    steps: Generator[Step] | None = None
    taken: list[Step] = field(default_factory=list)


class Session:
    """A conversation with one model; owns its cache. Not safe for two threads at once.

    It has one answer at a time: beginning another ends the one before.
    """

    def __init__(self, llama: Llama) -> None:
        self._llama = llama
        self._turn: _Turn | None = None
        self.messages: list[Message] = []
        self.tokens: list[int] = []
        self.cache = self._new_cache()

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
        return self._steps(_Turn(ids, checked, at_start, on_prefill, cancel, given))

    def complete(
        self,
        prompt: str | Sequence[int],
        *,
        on_prefill: OnPrefill | None = None,
        cancel: threading.Event | None = None,
        **options: Any,
    ) -> Iterator[Step]:
        """Continue a plain text (BOS is put before it) or token ids (taken as they are)."""
        checked = generation_options(options)
        ids = self._llama.prompt_ids(prompt)
        tokenizer = self._llama.tokenizer
        # A text's first space is the tokenizer's own; behind other text it is the answer's.
        at_start = not any(tokenizer.token_bytes(token) for token in ids)
        return self._steps(_Turn(ids, checked, at_start, on_prefill, cancel))

    def clear(self) -> None:
        """Forget everything: messages, tokens and cache."""
        self._supersede()
        self.messages.clear()
        self.tokens.clear()
        self.cache = self._new_cache()

    def _new_cache(self) -> KVCache:
        config = self._llama.config
        return KVCache(config.n_layers, limit=config.max_context)

    def _steps(self, turn: _Turn) -> Iterator[Step]:
        """Generate; afterwards `tokens` and `messages` are what was computed and said."""
        self._supersede()
        self._turn = turn
        before = self.messages
        if turn.given is not None:
            self.messages = turn.given
        try:
            turn.steps = generate(self._llama.model, self.cache, self._request(turn))
            self._reuse(turn.ids)
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
            context_limit=llama.config.max_context,
            on_prefill=turn.on_prefill,
            cancel=turn.cancel,
        )

    def _reuse(self, ids: Sequence[int]) -> None:
        """Trim the cache to what it shares with ids; the last id is always computed."""
        shared = 0
        for cached, wanted in zip(self.tokens, ids[:-1], strict=False):
            if cached != wanted:
                break
            shared += 1
        self.cache.trim(self.cache.offset - shared)
        del self.tokens[shared:]
