"""Measures what Python costs a decoded token: the calling thread's CPU time beside the process's.

    python benchmarks/host.py MODEL [--tokens 48] [--rounds 3]

The arithmetic runs on MLX's thread and the kernels', with one kernel thread here. The calling
thread takes Python's time and that of making and queueing MLX's graph, while the step before
computes. CPU times are read, not wall times: other programs leave the shares as they are.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import process_time, thread_time
from typing import Any

import mlx.core as mx
from measuring import print_table, spread

from mlx_llama import Llama, load

PROMPT = [1] * 16
WARM_UP = 4
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature 0.6, top-p 0.9": {"temperature": 0.6, "top_p": 0.9, "seed": 1},
}


@dataclass(frozen=True, slots=True)
class Costs:
    """CPU milliseconds of tokens: the calling thread's, without and in MLX, and all threads'."""

    python_ms: list[float] = field(default_factory=list)
    queueing_ms: list[float] = field(default_factory=list)
    process_ms: list[float] = field(default_factory=list)

    @property
    def shares(self) -> tuple[str, str]:
        """Python's part of the whole, and that of the calling thread."""
        python, queueing, whole = map(median, (self.python_ms, self.queueing_ms, self.process_ms))
        return f"{100 * python / whole:.1f} %", f"{100 * (python + queueing) / whole:.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    model = load(given.model, threads=1)
    costs = {name: Costs() for name in CASES}
    for _ in range(given.rounds):
        for name, options in CASES.items():
            measure(model, options, given.tokens, costs[name])
    print_table(
        ["what", "Python, CPU ms a token", "queueing by MLX", "process", "Python's share", "both"],
        [
            [
                name,
                spread(cost.python_ms, 2),
                spread(cost.queueing_ms, 2),
                spread(cost.process_ms, 1),
                *cost.shares,
            ]
            for name, cost in costs.items()
        ],
    )


def measure(model: Llama, options: dict[str, Any], n_tokens: int, costs: Costs) -> None:
    """Answer once; add what each token took."""
    queueing_s, queue = 0.0, mx.async_eval

    def timed(*arrays: Any) -> None:
        nonlocal queueing_s
        started = thread_time()
        queue(*arrays)
        queueing_s += thread_time() - started

    mx.async_eval = timed
    try:
        steps = model.stream(PROMPT, max_tokens=n_tokens + WARM_UP, ignore_eos=True, **options)
        before = thread_time(), process_time()
        for number, _ in enumerate(steps):
            now = thread_time(), process_time()
            # The last step has no other one to queue.
            if WARM_UP <= number < n_tokens + WARM_UP - 1:
                costs.python_ms.append(1e3 * (now[0] - before[0] - queueing_s))
                costs.queueing_ms.append(1e3 * queueing_s)
                costs.process_ms.append(1e3 * (now[1] - before[1]))
            before, queueing_s = now, 0.0
    finally:
        mx.async_eval = queue


if __name__ == "__main__":
    main()
