"""Measures what `--method mse` costs: the streaming quantizer on a checkpoint, nothing written.

    python benchmarks/quantize.py FOLDER [--bits 4] [--rounds 5]

FOLDER is a checkpoint, as `random_checkpoint.py` makes one. Target: at 4 bits at most 3 times the
time of rounding to nearest.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from measuring import interleave, print_table, ratio, run, spread

# Argument 1: the folder; 2: bits; 3: method.
PYTHON = """
import sys
from pathlib import Path
from time import perf_counter
from mlx_llama.options import ConvertOptions
from mlx_llama_convert import make_plan, open_source
from mlx_llama_quantize import quantize_weights
options = ConvertOptions(bits=int(sys.argv[2]), method=sys.argv[3])
plan = make_plan(open_source(Path(sys.argv[1]), options), options)
started = perf_counter()
for _ in quantize_weights(
    plan.source.weights, plan.forms, dtype=None, n_threads=2, method=options.method
):
    pass
print(perf_counter() - started)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    cases = {
        method: lambda method=method: run(
            [sys.executable, "-c", PYTHON, str(given.folder), str(given.bits), method]
        )
        for method in ("rtn", "mse")
    }
    runs = interleave(given.rounds, cases)
    times = {name: [float(r.output) for r in results] for name, results in runs.items()}
    print_table(
        ["method", "quantizing, s", "CPU s", "peak MB", "against rtn"],
        [
            [
                name,
                spread(times[name]),
                spread([r.cpu_s for r in results]),
                spread([r.peak_bytes / 1e6 for r in results], 0),
                ratio(times[name], times["rtn"]),
            ]
            for name, results in runs.items()
        ],
    )


if __name__ == "__main__":
    main()
