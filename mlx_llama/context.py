"""Which context a conversation gets: the options, the model and the machine decided together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import mlx.core as mx

from mlx_llama import ops
from mlx_llama.cache import KVBits, KVCache
from mlx_llama.config import ModelConfig
from mlx_llama.errors import OptionError
from mlx_llama.memory import Demand, MemoryPlan, memory_found, require_memory
from mlx_llama.options import ContextOptions

DEFAULT_CONTEXT = 8192  # what every Llama 3 reads well, and 1 GB of cache for an 8B
LEAST_KEPT = 4  # attention sinks: arXiv 2309.17453, table 2


@dataclass(frozen=True, slots=True)
class Context:
    """`ContextOptions` with every choice made. reason: why the capacity is what it is.

    demand and plan: what the whole context takes of the machine.
    """

    capacity: int
    slides: bool
    keep: int | None  # None: what the conversation's beginning asks for
    bits: KVBits
    packed_from: int
    chunk: int
    reason: str
    demand: Demand
    plan: MemoryPlan

    @property
    def longest(self) -> int:
        """Return the longest context that the model has and the machine had memory for."""
        return self.demand.largest_context(self.plan.found)

    def new_cache(self, config: ModelConfig) -> KVCache:
        """Make an empty cache."""
        return KVCache(
            config,
            capacity=self.capacity,
            keep=0,  # chosen when the conversation's beginning is known: `kept`
            slides=self.slides,
            bits=self.bits,
            packed_from=self.packed_from,
            storage=ops.cache_storage(self.demand.dtype, self.bits),
        )

    def require_memory(self) -> Self:
        """Return itself; MemoryShortError, with the contexts that would fit, when it does not."""
        require_memory(self.demand, self.plan)
        return self

    def kept(self, opening: int) -> int:
        """Return how many first tokens are kept of a text whose system part has so many.

        Raises OptionError when they leave no room to slide in.
        """
        if not self.slides:
            return 0
        keep = max(LEAST_KEPT, opening) if self.keep is None else self.keep
        if keep > self.capacity - 2:
            what = "--keep"
            if self.keep is None:
                what = "the system prompt and what frames it" if opening else "what begins a text"
            longer = "raise --context or " if self.capacity < self.demand.config.max_context else ""
            raise OptionError(
                f"--on-full slide: {what} keeps {keep} tokens, a context of {self.capacity} can "
                f"keep {self.capacity - 2} and go on; {longer}give a smaller --keep"
            )
        return keep


def plan_context(
    options: ContextOptions,
    config: ModelConfig,
    *,
    dtype: mx.Dtype,
    weights: int = 0,
    needed: int | None = None,
) -> Context:
    """Choose what the options leave open.

    weights: bytes still to be loaded. needed: tokens that an answer can take at most, where that is
    known; a longer context is not planned for. Whether the plan fits is not decided here: see
    `Context.require_memory`. Raises OptionError for a context that the model has not.
    """
    bits = KVBits(*options.key_value_bits)
    chunk = options.prefill_chunk or ops.prefill_chunk()
    capacity, reason = _capacity(options, config)
    slides = options.on_full == "slide"
    least = 2 + (LEAST_KEPT if options.keep is None else 0)
    if slides and capacity < least:
        raise OptionError(
            f"--context {capacity}: too short to slide, give {least} at least: what is kept, the "
            "newest token and one before it"
        )
    start, found = options.kv_start, memory_found()
    demand = Demand(config, weights, bits, dtype, chunk, slides, start)
    if options.context is None and 0 < (most := demand.largest_context(found)) < capacity:
        capacity, reason = most, "what fits into memory"
    # The last place of a context that stops is never filled: nothing comes after it.
    if start and start >= capacity - (not slides):
        raise OptionError(
            f"--kv-start {start}: the context holds {capacity} tokens, so nothing would ever be "
            "packed; lower it or leave it out"
        )
    # A text that is shorter than the context asked for may well end before it is packed.
    if needed is not None and needed <= capacity:
        capacity, reason, slides = needed, "prompt and --max-tokens", False
        demand = replace(demand, slides=False)
    plan = demand.at(capacity, found)
    context = Context(
        capacity, slides, options.keep, bits, options.kv_start, chunk, reason, demand, plan
    )
    if options.keep is not None:
        context.kept(0)  # what cannot be kept is told now, not with the first question
    return context


def _capacity(options: ContextOptions, config: ModelConfig) -> tuple[int, str]:
    """Return what is asked for, before the machine has its say, and why."""
    most = config.max_context
    if options.context == "max":
        return most, "--context max"
    if options.context is None:
        return min(most, DEFAULT_CONTEXT), "default" if most > DEFAULT_CONTEXT else "the model's"
    asked = int(options.context)
    if asked > most:
        hint = "" if config.rope_scaling else ", or stretch the model with --rope-linear"
        raise OptionError(
            f"--context {asked}: the model was trained for {most} positions; ask for at most so "
            f"many{hint}"
        )
    return asked, "--context"
