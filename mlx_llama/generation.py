"""Prompt ids in, steps out: prefill by slices, then one token a step, the next one queued early.

Text exists only behind the detokenizer. Knows nothing of messages or terminals.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import cast

import mlx.core as mx

from mlx_llama import ops
from mlx_llama.cache import KVCache
from mlx_llama.errors import ContextOverflowError
from mlx_llama.model import LAST, LlamaModel
from mlx_llama.options import GenerationOptions
from mlx_llama.sampling import Sampler
from mlx_llama.tokenizer import Detokenizer

RESERVE_AHEAD = 512  # tokens of an open-ended answer that get their room at once
SLICE_S = 0.05  # what a prompt evaluates at once shall take so long: cancelling waits for it

OnPrefill = Callable[[int, int], None]
OnForget = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Stats:
    """What one answer cost. Times in seconds, rates in tokens per second.

    prompt_tokens counts the whole prompt, cached_tokens what needed no computing again.
    peak_memory_bytes: MLX's, weights included. context_tokens: held at the end, of context_limit.
    forgotten_tokens: of the whole text, what a sliding context has dropped.
    """

    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int
    prompt_tokens_per_s: float
    answer_tokens_per_s: float
    time_to_first_token_s: float
    elapsed_s: float
    peak_memory_bytes: int
    context_tokens: int
    context_limit: int
    forgotten_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class Step:
    """One token of an answer, with the text that it completed.

    text may be empty (half a character, the beginning of a stop text) or cover earlier tokens.
    token_id is None only in a last step that follows no new token. logprob is the natural logarithm
    of the token's probability before penalties and temperature, when asked for. finish_reason is
    set in the last step alone: eos, stop, length, context, timeout or cancelled.
    """

    token_id: int | None
    text: str
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: str | None = None
    stats: Stats | None = None


@dataclass(slots=True)
class Request:
    """What `generate` needs beside the model.

    ids: the whole prompt, of which the cache may hold the beginning. stop_ids end the answer and
    are not printed. chunk: tokens of the prompt that are computed at once. on_prefill(done, total)
    counts prompt tokens; on_forget(n) tells, each time it grows, how many tokens a sliding context
    has dropped. begun: the last of the ids, when they are an answer that goes on, of whose text
    n_shown characters were given out before.
    """

    ids: Sequence[int]
    options: GenerationOptions
    sampler: Sampler
    detokenizer: Detokenizer
    stop_ids: frozenset[int]
    chunk: int
    on_prefill: OnPrefill | None = None
    on_forget: OnForget | None = None
    cancel: threading.Event | None = None
    begun: Sequence[int] = ()
    n_shown: int = 0
    forgotten: int = 0  # as last told
    started: float = field(default_factory=time.monotonic)

    @property
    def ending(self) -> str | None:
        """Why the answer is to end here, if it is: the caller wants no more, or time is up."""
        if self.cancel is not None and self.cancel.is_set():
            return "cancelled"
        timeout = self.options.timeout
        is_late = timeout is not None and time.monotonic() - self.started >= timeout
        return "timeout" if is_late else None


@dataclass(slots=True)
class _Clock:
    """Measures one answer."""

    cached_tokens: int
    started: float = field(default_factory=time.perf_counter)
    first: float | None = None
    answer_tokens: int = 0

    def count(self) -> None:
        self.answer_tokens += 1
        if self.first is None:
            self.first = time.perf_counter()

    def last_step(self, reason: str | None, request: Request, cache: KVCache) -> Step:
        """Return what ends an answer behind its last token."""
        return Step(None, "", finish_reason=reason, stats=self.stats(request, cache))

    def stats(self, request: Request, cache: KVCache) -> Stats:
        now = time.perf_counter()
        first = self.first or now
        later = self.answer_tokens - 1
        prefilled = min(cache.offset, len(request.ids)) - self.cached_tokens  # less when cancelled
        return Stats(
            prompt_tokens=len(request.ids),
            cached_tokens=self.cached_tokens,
            answer_tokens=self.answer_tokens,
            prompt_tokens_per_s=prefilled / max(first - self.started, 1e-9),
            answer_tokens_per_s=later / max(now - first, 1e-9) if later > 0 else 0.0,
            time_to_first_token_s=first - self.started,
            elapsed_s=now - self.started,
            peak_memory_bytes=mx.get_peak_memory(),
            context_tokens=min(cache.held, len(request.ids) + self.answer_tokens),
            context_limit=cache.capacity,
            forgotten_tokens=cache.forgotten,
            seed=request.options.seed or 0,
        )


class StopText:
    """Lets text through up to a stop text; holds back what could become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Return the text that may be shown and whether a stop text has been met."""
        if not self._stops:
            return text, False
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            return self._held[: min(found)], True
        keep = self._possible_beginning()
        shown, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        return shown, False

    def rest(self) -> str:
        """Return what was held back for nothing."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self) -> int:
        longest = min(max(map(len, self._stops)) - 1, len(self._held))
        for size in range(longest, 0, -1):
            tail = self._held[-size:]
            if any(stop.startswith(tail) for stop in self._stops):
                return size
        return 0


def generate(model: LlamaModel, cache: KVCache, request: Request) -> Generator[Step]:
    """Answer a prompt whose first `cache.offset` tokens are cached.

    Evaluates. When it ends, or is closed, the cache holds a beginning of prompt and answer; it may
    hold the last token of the answer or not (`cache.offset` tells).
    Raises ContextOverflowError when prompt and one token do not fit.
    """
    n_prompt, asked = len(request.ids), request.options.max_tokens
    room = room_for_answer(cache, n_prompt)
    budget, full = (room, "context") if asked is None or asked > room else (int(asked), "length")
    mx.reset_peak_memory()
    clock = _Clock(cached_tokens=cache.offset)
    output = _Output(request)
    cache.reserve(n_prompt - cache.offset + int(min(budget - 1, RESERVE_AHEAD)))
    logits = prefill(model, cache, request)
    if logits is None:
        yield clock.last_step(request.ending, request, cache)
        return
    draw = _Draw.of(logits, request)
    n_answer = 0
    while True:
        if not _keep_up(cache, request):
            # Half a character stays held back: it is whole when the answer is continued.
            yield clock.last_step(request.ending, request, cache)
            return
        n_answer += 1
        following = None
        if n_answer < budget:
            # Queued before the current token is read: the device never waits for Python.
            following = _Draw.of(model(draw.token[None], cache, positions=LAST)[0, 0], request)
            _tell_forgotten(cache, request)
        token_id = draw.read()
        clock.count()
        text, reason = output.add(token_id)
        if reason is None and following is None:
            reason, text = full, text + output.rest()
        stats = clock.stats(request, cache) if reason else None
        yield Step(token_id, text, *draw.logprobs(token_id), reason, stats)
        if reason is not None or following is None:
            return
        draw = following


def room_for_answer(cache: KVCache, n_prompt: int) -> float:
    """Return how many tokens an answer may have; infinitely many where the context slides.

    Raises ContextOverflowError when there is none for even one.
    """
    if cache.slides:
        return math.inf
    if n_prompt >= cache.capacity:
        longer = ", raise --context," if cache.capacity < cache.window.max_position else ""
        raise ContextOverflowError(
            f"the prompt has {n_prompt} tokens, the context holds {cache.capacity}, one of them "
            f"for an answer: shorten the prompt{longer} or take --on-full slide"
        )
    return cache.capacity - n_prompt


def _keep_up(cache: KVCache, request: Request) -> bool:
    """Do a cache's upkeep, unless the answer is to end first; say whether it goes on."""
    if request.ending is not None:
        return False
    return all(request.ending is None for _ in cache.upkeep())


def _tell_forgotten(cache: KVCache, request: Request) -> None:
    if cache.forgotten > request.forgotten:
        request.forgotten = cache.forgotten
        if request.on_forget is not None:
            request.on_forget(cache.forgotten)


def prefill(model: LlamaModel, cache: KVCache, request: Request) -> mx.array | None:
    """Compute the prompt's uncached tokens slice by slice; return the last one's logits (V,).

    Returns None when it is to end; the cache then holds whole slices. Evaluates all but the logits.
    """
    ids, pace = request.ids, _Pace()
    hidden: mx.array | None = None
    while cache.offset < len(ids):
        if not _keep_up(cache, request):
            return None
        start = cache.offset
        stop = min(start + min(request.chunk, cache.pass_limit), len(ids))
        chunk = mx.array(list(ids[start:stop]), dtype=mx.uint32)[None]
        hidden = _prefill_pass(model, cache, chunk, request, pace)
        if hidden is None:
            return None
        if request.on_prefill is not None:
            request.on_prefill(cache.offset, len(ids))
        _tell_forgotten(cache, request)
    if hidden is None:
        raise ValueError(
            "the cache already holds the whole prompt; its last token must be computed"
        )
    return model.logits(hidden[0, -1])


def _prefill_pass(
    model: LlamaModel, cache: KVCache, tokens: mx.array, request: Request, pace: _Pace
) -> mx.array | None:
    """Run tokens (1, L) through the model, some half blocks at a time; None when cancelled."""
    started = time.perf_counter()
    hidden, n_halves = None, 2 * len(model.blocks)
    for number, hidden in enumerate(model.by_halves(tokens, cache, positions=LAST), 1):
        if number % pace.halves == 0 or number == n_halves:
            if request.ending is not None:
                return None
            mx.eval(hidden, cache.arrays)
    mx.eval(cache.arrays)  # a full ring is written now that nobody reads it, else it is copied
    if not ops.runs_ahead():  # else two half blocks would take memory for both
        pace.learn(n_halves, time.perf_counter() - started)
    return hidden


@dataclass(slots=True)
class _Pace:
    """How many half blocks are evaluated at once, so that each slice takes about SLICE_S."""

    halves: int = 1

    def learn(self, n_halves: int, elapsed_s: float) -> None:
        """Size the next pass's slices by a pass that is over."""
        self.halves = max(1, int(SLICE_S * n_halves / max(elapsed_s, 1e-6)))


@dataclass(slots=True)
class _Draw:
    """A token on its way, and the scores it was drawn from when they are asked for."""

    token: mx.array
    log_probabilities: mx.array | None
    top: int

    @classmethod
    def of(cls, logits: mx.array, request: Request) -> _Draw:
        token = request.sampler(logits)
        top = request.options.logprobs
        scores = logits - mx.logsumexp(logits) if top else None
        mx.async_eval(token, *([] if scores is None else [scores]))
        return cls(token, scores, top)

    def read(self) -> int:
        """Wait for the token."""
        return cast(int, self.token.item())

    def logprobs(self, token_id: int) -> tuple[float | None, tuple[tuple[int, float], ...]]:
        """Return the token's own and the likeliest tokens' log-probabilities, best first."""
        if self.log_probabilities is None:
            return None, ()
        scores = self.log_probabilities
        best = mx.argpartition(-scores, min(self.top, scores.size) - 1)[: self.top]
        best = best[mx.argsort(-scores[best])]  # few of a large vocabulary
        ids, values = cast(list[int], best.tolist()), cast(list[float], scores[best].tolist())
        return cast(float, scores[token_id].item()), tuple(zip(ids, values, strict=True))


class _Output:
    """Turns token ids into the text to show and the reason to stop."""

    def __init__(self, request: Request) -> None:
        self._detokenizer = request.detokenizer
        self._stop_text = StopText(request.options.stop)
        self._stop_ids = frozenset() if request.options.ignore_eos else request.stop_ids
        # An answer that goes on: its tokens are read again, for half a character or the beginning
        # of a stop text that they end with.
        before = sum(len(self._next(token)[0]) for token in request.begun)
        self._owed = max(0, request.n_shown - before)

    def add(self, token_id: int) -> tuple[str, str | None]:
        if token_id in self._stop_ids:
            return self.finish(), "eos"
        text, is_met = self._next(token_id)
        return self._unshown(text), "stop" if is_met else None

    def finish(self) -> str:
        """Return what has been held back; a stop text may still hide in it."""
        text, is_met = self._stop_text.add(self._detokenizer.finish())
        return self._unshown(text if is_met else text + self._stop_text.rest())

    def rest(self) -> str:
        """Return what is held back but for half a character, at the end of a cut answer."""
        return self._unshown(self._stop_text.rest())

    def _next(self, token_id: int) -> tuple[str, bool]:
        return self._stop_text.add(self._detokenizer.add(token_id))

    def _unshown(self, text: str) -> str:
        """Return a text without what was given out before the answer was cut."""
        shown = text[self._owed :]
        self._owed = max(0, self._owed - len(text))
        return shown
