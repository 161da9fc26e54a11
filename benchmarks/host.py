"""Measures what Python costs a decoded token: the calling thread's CPU time beside the process's.

    python benchmarks/host.py MODEL [--tokens 48] [--rounds 3]

The arithmetic runs on MLX's thread and the kernels', with one kernel thread here. The calling
thread takes Python's time and that of making and queueing MLX's graph, while the step before
computes. CPU times are read, not wall times: other programs leave the shares as they are.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from time import process_time, thread_time
from typing import Any

from measuring import print_table, spread

from mlx_llama import Llama, load

PROMPT = [1] * 16
WARM_UP = 4
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature 0.6, top-p 0.9": {"temperature": 0.6, "top_p": 0.9, "seed": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    model = load(given.model, threads=1)
    caller: dict[str, list[float]] = {name: [] for name in CASES}
    process: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(given.rounds):
        for name, options in CASES.items():
            measure(model, options, given.tokens, caller[name], process[name])
    print_table(
        ["what", "calling thread, CPU ms a token", "process, CPU ms a token", "share"],
        [
            [
                name,
                spread(caller[name], 2),
                spread(process[name], 2),
                f"{100 * median(caller[name]) / median(process[name]):.1f} %",
            ]
            for name in CASES
        ],
    )


def measure(
    model: Llama, options: dict[str, Any], n_tokens: int, caller: list[float], all_: list[float]
) -> None:
    """Answer once; add the milliseconds of each token."""
    before = thread_time(), process_time()
    steps = model.stream(PROMPT, max_tokens=n_tokens + WARM_UP, ignore_eos=True, **options)
    for number, _ in enumerate(steps):
        now = thread_time(), process_time()
        if number >= WARM_UP:
            caller.append(1e3 * (now[0] - before[0]))
            all_.append(1e3 * (now[1] - before[1]))
        before = now


if __name__ == "__main__":
    main()
