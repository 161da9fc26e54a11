"""How fast this machine reads memory: measured, and by what is known of an Apple chip.

The test is a program of its own, so that its buffer is in nobody's peak: it takes the largest of a
buffer that no cache holds, on every thread, several times, and the best time counts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

BUFFER_BYTES, LEAST_BYTES = 1 << 30, 64 << 20
PASSES = 6
TIMEOUT_S = 120

# GB/s by Apple's specifications. Where one name has two widths, by the number of CPU cores.
APPLE: Mapping[str, int | Mapping[int, int]] = {
    "M1": 68, "M1 Pro": 200, "M1 Max": 400, "M1 Ultra": 800,
    "M2": 100, "M2 Pro": 200, "M2 Max": 400, "M2 Ultra": 800,
    "M3": 100, "M3 Pro": 150, "M3 Max": {14: 300, 16: 400}, "M3 Ultra": 819,
    "M4": 120, "M4 Pro": 273, "M4 Max": {14: 410, 16: 546},
    "M5": 153,
}  # fmt: skip


def chip_bandwidth(name: str, n_cores: int | None) -> float | None:
    """Return the bytes a second that Apple gives for a chip, such as "Apple M4 Pro"."""
    found = APPLE.get(name.removeprefix("Apple ").strip())
    if isinstance(found, Mapping):
        found = found.get(n_cores or 0)
    return None if found is None else found * 1e9


def measured_bandwidth(*, threads: int, is_gpu: bool) -> float | None:
    """Return the bytes a second that are read from memory; None where the test could not run."""
    command = [sys.executable, "-P", "-c", _PROGRAM, str(threads), "gpu" if is_gpu else "cpu"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, timeout=TIMEOUT_S, check=True
        )
        return float(json.loads(done.stdout))
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


_PROGRAM = "from mlx_llama_apps.bench.bandwidth import main; main()"


def main() -> None:
    """Print the bytes a second that one buffer is read with."""
    threads, device = int(sys.argv[1]), sys.argv[2]
    from mlx_llama.memory import available_memory

    free = available_memory()
    n_bytes = BUFFER_BYTES if free is None else max(LEAST_BYTES, min(BUFFER_BYTES, free // 4))
    print(json.dumps(_on_gpu(n_bytes) if device == "gpu" else _on_cpu(n_bytes, threads)))


def _on_cpu(n_bytes: int, threads: int) -> float:
    """Read with NumPy, which leaves Python alone while it works and uses the widest registers."""
    import numpy as np

    # Written by the threads that read it: where memory has nodes, each has its own.
    size = n_bytes // threads // 4
    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(lambda n: np.full(size, n, np.uint32), range(threads)))
        best = 0.0
        for _ in range(PASSES):
            started = perf_counter()
            list(pool.map(np.max, parts))
            best = max(best, sum(part.nbytes for part in parts) / (perf_counter() - started))
    return best


def _on_gpu(n_bytes: int) -> float:
    import mlx.core as mx

    buffer = mx.ones((n_bytes // 4,), dtype=mx.uint32)
    mx.eval(buffer)
    best = 0.0
    for _ in range(PASSES):
        started = perf_counter()
        mx.eval(buffer.max())
        best = max(best, buffer.nbytes / (perf_counter() - started))
    return best


if __name__ == "__main__":
    main()
