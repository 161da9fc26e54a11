"""Measures what drawing a token costs over a large vocabulary: CPU time of one draw, in turns.

    python benchmarks/sampling.py [--vocabulary 128256] [--rounds 31]

top-p by sorting, which is what most engines do, stands here to be compared with. Every kind of
logits prints how many tokens each of the two keeps.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from time import process_time

import mlx.core as mx
from measuring import print_table, ratio, spread

from mlx_llama.options import GenerationOptions
from mlx_llama.sampling import Sampler, SamplingDefaults, keep_likeliest

TOP_P = 0.9
SPREADS = {"flat": 0.1, "of an open answer": 2.0, "of a sure answer": 6.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--rounds", type=int, default=31)
    given = parser.parse_args()
    mx.random.seed(1)
    for name, deviation in SPREADS.items():
        logits = mx.random.normal((given.vocabulary,)) * deviation
        mx.eval(logits)
        measure(name, logits, given.rounds)


def measure(name: str, logits: mx.array, n_rounds: int) -> None:
    """Print a table for one kind of logits (V,)."""
    cases: dict[str, Callable[[], mx.array]] = {
        "top-p by sorting": partial(sorted_top_p, logits),
        "top-p": partial(keep_likeliest, logits, top_k=0, top_p=TOP_P, min_p=0.0),
        "a draw, greedy": partial(draw, logits, temperature=0.0),
        "a draw": partial(draw, logits, top_p=1.0),
        "a draw, top-p": partial(draw, logits, top_p=TOP_P),
        "a draw, top-k 40, top-p": partial(draw, logits, top_p=TOP_P, top_k=40),
    }
    times_ms: dict[str, list[float]] = {what: [] for what in cases}
    for number in range(n_rounds + 1):
        for what, case in cases.items():
            started = process_time()
            mx.eval(case())
            if number:  # the first one allocates
                times_ms[what].append((process_time() - started) * 1e3)
    kept = [mx.sum(mx.isfinite(cases[what]())).item() for what in list(cases)[:2]]
    print(f"\nLogits {name}: {kept[1]} tokens kept, {kept[0]} by sorting\n")
    base = times_ms["top-p by sorting"]
    print_table(
        ["what", "CPU ms", "against sorting"],
        [[what, spread(times, 2), ratio(times, base)] for what, times in times_ms.items()],
    )


def sorted_top_p(logits: mx.array) -> mx.array:
    """Set all but the likeliest to minus infinity, by sorting the vocabulary."""
    probabilities = mx.softmax(logits)
    falling = mx.sort(probabilities)[::-1]
    before = mx.cumsum(falling) - falling
    least = mx.min(mx.where(before <= TOP_P, falling, math.inf))
    return mx.where(probabilities >= least, logits, -math.inf)


def draw(
    logits: mx.array, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
) -> mx.array:
    """Draw one token with a fresh sampler."""
    asked = GenerationOptions(temperature=temperature, top_p=top_p, top_k=top_k, seed=1)
    sampler = Sampler(
        SamplingDefaults().fill(asked), vocab_size=logits.size, prompt=(), bias={}, begun=()
    )
    return sampler(logits)


if __name__ == "__main__":
    main()
