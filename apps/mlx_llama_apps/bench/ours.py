"""This project as an engine of the benchmark: a session on the inference thread.

The context before a test is filled with random keys and values: what a token costs does not depend
on them, and reading thousands of tokens would take longer than the test.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import mlx_llama
from mlx_llama.options import ContextOptions, LoadOptions
from mlx_llama_apps.bench.cases import Case, Sample
from mlx_llama_apps.bench.machine import peak_of
from mlx_llama_apps.inference import Inference, model_loader
from mlx_llama_apps.terminal import StatusLine

if TYPE_CHECKING:
    from pathlib import Path

    from mlx_llama import Llama, Session
    from mlx_llama_apps.bench.rounding import Cost

NAME = "mlx-llama"
FILLED_AT_ONCE = 1024


class OurEngine:
    """Loads a model when it is made; MemoryShortError for a context that does not fit."""

    def __init__(
        self, path: Path, load_options: LoadOptions, options: ContextOptions, status: StatusLine
    ) -> None:
        self.name, self.version = NAME, mlx_llama.__version__
        self._options = options
        self._session: tuple[int, Session] | None = None
        self._inference = Inference(model_loader(path, load_options, options, status))
        self._inference.__enter__()

    def run(self, case: Case) -> Sample:
        """Run a test once; the cache of a depth stays for the next one of the same depth."""
        return self._inference.call(lambda llama: self._measure(llama, case))

    def process_peak(self) -> int | None:
        """Return the largest resident set of this process, in bytes."""
        return peak_of(os.getpid())

    def close(self) -> None:
        """Ask the thread to end."""
        self._inference.__exit__(None, None, None)

    def read_bytes(self, case: Case) -> int | None:
        """Return the bytes that generating one token of a test reads, on the average."""
        if case.is_prompt:  # limited by arithmetic
            return None
        return self._inference.call(lambda llama: self._read_bytes(llama, case))

    def cost_of_rounding(self, status: StatusLine) -> Cost:
        """Return how far the model's predictions are from those with float activations."""
        from mlx_llama.cache import KVBits
        from mlx_llama_apps.bench.rounding import measure_cost

        bits = KVBits(*self._options.key_value_bits)

        def on_window(number: int, total: int) -> None:
            status.show(f"measuring what rounded activations cost: window {number} of {total}")

        return self._inference.call(lambda llama: measure_cost(llama, bits, on_window))

    def _measure(self, llama: Llama, case: Case) -> Sample:
        session = self._at_depth(llama, case.depth)
        n_new = case.n_tokens if case.is_prompt else 1
        ids = [*session.tokens, *_some_ids(n_new, llama.config.vocab_size)]
        n_answer = 1 if case.is_prompt else case.n_tokens + 1
        steps = session.complete(ids, max_tokens=n_answer, temperature=0.0, ignore_eos=True)
        stats = [*steps][-1].stats
        assert stats is not None
        session.cache.trim(session.cache.offset - case.depth, gives_back=False)
        del session.tokens[case.depth :]
        if case.is_prompt:
            return Sample(stats.time_to_first_token_s, stats.peak_memory_bytes)
        return Sample(case.n_tokens / stats.answer_tokens_per_s, stats.peak_memory_bytes)

    def _at_depth(self, llama: Llama, depth: int) -> Session:
        if self._session is None or self._session[0] != depth:
            self._session = None  # its memory first
            session = llama.session(**_given(self._options))
            _fill(llama, session, depth)
            self._session = depth, session
        return self._session[1]

    def _read_bytes(self, llama: Llama, case: Case) -> int:
        from mlx_llama.cache import KVBits
        from mlx_llama.memory import cache_bytes_per_token

        model = llama.model
        weights = sum(array.nbytes for array in model.arrays())
        if model.output is not model.tok_embeddings:  # one row of it
            weights -= sum(array.nbytes for array in model.tok_embeddings.arrays())
        bits = KVBits(*self._options.key_value_bits)
        row = cache_bytes_per_token(llama.config, bits, llama.dtype)
        return weights + row * (case.depth + 1 + case.n_tokens // 2)


def _given(options: ContextOptions) -> dict[str, object]:
    return {
        "context": options.context,
        "kv_bits": options.kv_bits,
        "prefill_chunk": options.prefill_chunk,
    }


def _some_ids(n_tokens: int, n_vocab: int) -> Sequence[int]:
    return random.Random(0).choices(range(n_vocab), k=n_tokens)


def _fill(llama: Llama, session: Session, depth: int) -> None:
    """Pretend that a text of so many tokens has been read."""
    import mlx.core as mx

    config, cache = llama.config, session.cache
    n_rows = min(depth, FILLED_AT_ONCE)
    shape = (2, 1, config.n_kv_heads, n_rows, config.head_dim)
    rows = mx.random.normal(shape, key=mx.random.key(0)).astype(llama.dtype)
    mx.eval(rows)
    if depth:
        cache.reserve(cache.capacity)
    while cache.offset < depth:
        n_tokens = min(n_rows, depth - cache.offset)
        cache.begin(n_tokens)
        for layer in range(config.n_layers):
            cache.append(layer, *rows[..., :n_tokens, :])
        cache.advance(n_tokens)
        mx.eval(cache.arrays)
    session.tokens = [*_some_ids(depth, config.vocab_size)]
