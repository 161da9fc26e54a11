"""What the benchmark knows of the machine and its processes."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_llama_apps.bench.bandwidth import chip_bandwidth, measured_bandwidth
from mlx_llama_apps.inference import processors

if TYPE_CHECKING:
    from mlx_llama.options import LoadOptions


def machine_facts(options: LoadOptions) -> dict[str, Any]:
    """Collect what stands in the report; measures how fast memory is read. Bytes a second."""
    from mlx_llama import ops

    ops.use_threads(options.threads)
    backend, n_processors, chip = ops.backend(), processors(), ops.gpu_name()
    threads = options.threads or n_processors
    return {
        "backend": backend,
        "kernels": ops.native_summary(options.activations),
        "missing_kernels": ops.slow_reason(),
        "blas": ops.blas_name(),
        "processors": n_processors,
        "threads": options.threads,
        "chip": chip,
        "bandwidth": measured_bandwidth(threads=threads, is_gpu=backend != "cpu"),
        "chip_bandwidth": None if chip is None else chip_bandwidth(chip, os.cpu_count()),
    }


def peak_of(pid: int) -> int | None:
    """Return the largest resident set of a process in bytes; None where nobody tells.

    Not `ru_maxrss` where it can be helped: on Linux it begins with what the parent had.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        if pid != os.getpid():
            return None
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    found = (line.split() for line in lines if line.startswith("VmHWM:"))
    return next((int(words[1]) * 1024 for words in found), None)
