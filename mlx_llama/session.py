"""One conversation: its messages, the tokens behind them, and the cache that holds those tokens.

A session takes messages and yields steps. What the cache already holds is never computed again:
the new prompt is compared with the cached tokens and only the rest is prefilled. An answer keeps
the ids that the model chose, so that the next prompt begins with exactly what is cached.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlx_llama.cache import KVCache
from mlx_llama.errors import OptionError
from mlx_llama.generation import OnPrefill, Request, Step, generate
from mlx_llama.options import GenerationOptions, generation_options
from mlx_llama.prompts import Message, as_messages
from mlx_llama.sampling import Sampler, bias_by_token

if TYPE_CHECKING:
    from mlx_llama.llama import Llama


class Session:
    """A conversation with one model; owns its cache. Not safe for two threads at once."""

    def __init__(self, llama: Llama) -> None:
        self._llama = llama
        self.messages: list[Message] = []
        self.tokens: list[int] = []
        self.cache = self._new_cache()

    def ask(self, text: str, **options: Any) -> Iterator[Step]:
        """Add a user's message and answer it; the options are those of `stream`."""
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

        An answer that is cut (cancelled, closed early, out of tokens) is kept as far as it went.
        date: shown in the system block of the formats that have one; None leaves the block out.
        """
        checked = generation_options(options)
        given = as_messages(messages)
        if not given or given[-1].role == "assistant":
            raise OptionError("messages: the last one must be there and not the assistant's")
        prompt = self._llama.prompt_format
        ids = prompt.encode(given, date=date)
        return self._answer(given, ids, checked, prompt.strips_leading_space, on_prefill, cancel)

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
        return self._steps(ids, checked, at_start, on_prefill, cancel, [])

    def clear(self) -> None:
        """Forget everything: messages, tokens and cache."""
        self.messages.clear()
        self.tokens.clear()
        self.cache = self._new_cache()

    def _new_cache(self) -> KVCache:
        config = self._llama.config
        return KVCache(config.n_layers, limit=config.max_context)

    def _answer(
        self,
        given: list[Message],
        ids: list[int],
        options: GenerationOptions,
        at_start: bool,
        on_prefill: OnPrefill | None,
        cancel: threading.Event | None,
    ) -> Iterator[Step]:
        answer: list[int] = []
        text: list[str] = []
        reason: str | None = None
        self.messages = given
        try:
            for step in self._steps(ids, options, at_start, on_prefill, cancel, answer):
                text.append(step.text)
                reason = step.finish_reason
                yield step
        finally:
            if reason == "eos":
                answer.pop()
            # A stop text is not part of the answer, but its tokens are among the ids.
            kept = None if reason == "stop" else tuple(answer)
            if text:
                self.messages = [*given, Message("assistant", "".join(text), kept)]

    def _steps(
        self,
        ids: list[int],
        options: GenerationOptions,
        at_start: bool,
        on_prefill: OnPrefill | None,
        cancel: threading.Event | None,
        answer: list[int],
    ) -> Iterator[Step]:
        """Generate, collecting the answer's ids; afterwards `tokens` is what the cache holds."""
        llama = self._llama
        filled = llama.sampling_defaults.fill(options)
        request = Request(
            ids=ids,
            options=filled,
            sampler=Sampler(
                filled,
                vocab_size=llama.config.vocab_size,
                prompt=ids,
                bias=bias_by_token(filled.logit_bias, llama.tokenizer),
            ),
            detokenizer=llama.tokenizer.detokenizer(at_start=at_start),
            stop_ids=llama.stop_ids,
            context_limit=llama.config.max_context,
            on_prefill=on_prefill,
            cancel=cancel,
        )
        self._reuse(ids)
        steps = generate(llama.model, self.cache, request)
        try:
            for step in steps:
                if step.token_id is not None:
                    answer.append(step.token_id)
                yield step
        finally:
            steps.close()  # pyright: ignore[reportAttributeAccessIssue]
            known = [*ids, *answer]
            # A step that was queued early may have cached a token that was never read.
            self.cache.trim(max(0, self.cache.offset - len(known)))
            self.tokens = known[: self.cache.offset]

    def _reuse(self, ids: Sequence[int]) -> None:
        """Trim the cache to what it shares with ids; the last id is always computed."""
        shared = 0
        for cached, wanted in zip(self.tokens, ids[:-1], strict=False):
            if cached != wanted:
                break
            shared += 1
        self.cache.trim(self.cache.offset - shared)
        del self.tokens[shared:]
