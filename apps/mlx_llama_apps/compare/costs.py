"""What a model costs to run: time to load, speed and memory, of one short answer."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

from mlx_llama.errors import MemoryShortError
from mlx_llama.options import ContextOptions, LoadOptions
from mlx_llama_apps.inference import Inference, model_loader
from mlx_llama_apps.terminal import StatusLine

if TYPE_CHECKING:
    from mlx_llama import Llama, Stats
    from mlx_llama.loading import ModelDirectory

PROMPT_TOKENS, ANSWER_TOKENS = 128, 16


@dataclass(frozen=True, slots=True)
class Costs:
    """load_s: seconds. Rates in tokens per second. peak_bytes: MLX's, weights included.

    reason: why nothing was measured; the numbers are None then.
    """

    load_s: float | None = None
    prompt_tokens_per_s: float | None = None
    answer_tokens_per_s: float | None = None
    peak_bytes: int | None = None
    reason: str | None = None


def measure(directory: ModelDirectory, dtype: str | None, status: StatusLine) -> Costs:
    """Load a model, let it read a prompt of random tokens and answer, and forget it."""
    context = min(PROMPT_TOKENS + ANSWER_TOKENS, directory.config.max_context)
    loader = model_loader(
        directory.path, LoadOptions(dtype=dtype), ContextOptions(context=context), status
    )
    started = perf_counter()
    try:
        with Inference(loader) as inference:
            load_s = perf_counter() - started
            status.show(f"measuring the speed of {directory.path.name}")
            stats = inference.call(lambda llama: _answer(llama, context))
    except MemoryShortError as error:
        return Costs(reason=str(error))
    return Costs(
        load_s,
        stats.prompt_tokens_per_s,
        stats.answer_tokens_per_s,
        stats.peak_memory_bytes,
    )


def _answer(llama: Llama, context: int) -> Stats:
    # Whatever ids: none of this is looked at, and they are no special ones.
    ids = [1 + n % 200 for n in range(max(1, context - ANSWER_TOKENS))]
    steps = llama.stream(ids, max_tokens=ANSWER_TOKENS, temperature=0, ignore_eos=True)
    stats = list(steps)[-1].stats
    assert stats is not None
    return stats
