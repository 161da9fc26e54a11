"""Measures what `--method mse` costs: the streaming quantizer on a checkpoint, nothing written.

    python benchmarks/quantize.py FOLDER [--bits 4] [--rounds 5]

FOLDER is a checkpoint, as `random_checkpoint.py` makes one. Target: at 4 bits at most 3 times the
time of rounding to nearest. Times are of quantizing alone, on two threads, once a small part has
gone before, with the native kernels and without them (NumPy searches and MLX rounds then).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from measuring import interleave, print_table, ratio, run, spread

WITHOUT = "without the kernels"
# Argument 1: the folder; 2: bits; 3: method; 4, where there is one: without the native kernels.
PYTHON = """
import sys
from pathlib import Path
from time import perf_counter, process_time
from mlx_llama import native
from mlx_llama.options import ConvertOptions
from mlx_llama_convert import make_plan, open_source
from mlx_llama_quantize import quantize_weights
if sys.argv[4:]:
    native.kernels = lambda: None
options = ConvertOptions(bits=int(sys.argv[2]), method=sys.argv[3])
plan = make_plan(open_source(Path(sys.argv[1]), options), options)
def quantize(names):
    started, cpu_started = perf_counter(), process_time()
    for _ in quantize_weights(
        plan.source.weights, plan.forms, dtype=None, n_threads=2, method=options.method, names=names
    ):
        pass
    return perf_counter() - started, process_time() - cpu_started
quantize([name for name in plan.source.weights.names() if name.startswith("layers.0.")])
print(*quantize(None))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    bases = {"rtn": "rtn", "mse": "rtn"}
    bases |= {f"{name}, {WITHOUT}": f"{base}, {WITHOUT}" for name, base in bases.items()}
    cases = {
        name: lambda name=name: run(
            [sys.executable, "-c", PYTHON, str(given.folder), str(given.bits), *name.split(", ")]
        )
        for name in bases
    }
    runs = interleave(given.rounds, cases)
    times, cpu_times = (
        {name: [float(r.output.split()[at]) for r in results] for name, results in runs.items()}
        for at in (0, 1)
    )
    print_table(
        ["method", "quantizing, s", "CPU s", "peak MB", "against rtn"],
        [
            [
                name,
                spread(times[name]),
                spread(cpu_times[name]),
                spread([r.peak_bytes / 1e6 for r in results], 0),
                ratio(times[name], times[bases[name]]),
            ]
            for name, results in runs.items()
        ],
    )


if __name__ == "__main__":
    main()
