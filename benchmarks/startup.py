"""Measures how long the command and the imports take to start: median wall time of fresh processes.

    python benchmarks/startup.py [--model MODEL] [--peer-python PATH] [--rounds 15]

Targets: --help under 0.25 s, `import mlx_llama` under 0.2 s, a 1B model of 4 bits ready in 0.5 s
from a warm disk: the start of Python, the imports, the tokenizer and the weights. PATH is the
interpreter of an environment that has mlx-lm.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from measuring import interleave, print_table, ratio, run, spread

ROUNDS = 15
BARE = "python -c pass"
OPEN = "import sys; from mlx_llama.tokenizer import open_tokenizer as o; o(sys.argv[1])"
LOAD = "import sys; from mlx_llama import load; load(sys.argv[1])"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", metavar="MODEL", help="a model directory to load")
    parser.add_argument("--peer-python", metavar="PATH")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args()
    command = str(Path(sys.executable).with_name("mlx-llama"))
    commands = {
        BARE: [sys.executable, "-P", "-c", "pass"],
        "mlx-llama --help": [command, "--help"],
        "mlx-llama run --help": [command, "run", "--help"],
        "import mlx_llama": [sys.executable, "-P", "-c", "import mlx_llama"],
        "from mlx_llama import load": [sys.executable, "-P", "-c", "from mlx_llama import load"],
    }
    if given.model:
        for name, code in (("tokenizer", OPEN), ("model", LOAD)):
            commands[f"{name} ready"] = [sys.executable, "-P", "-c", code, given.model]
    if given.peer_python:
        commands["import mlx_lm"] = [given.peer_python, "-c", "import mlx_lm"]
        commands["mlx_lm --help"] = [given.peer_python, "-m", "mlx_lm", "--help"]
    for argv in commands.values():
        run(argv)  # once before the clock: compiled modules, disk cache
    runs = interleave(given.rounds, {name: partial(run, argv) for name, argv in commands.items()})
    base = [r.elapsed_s for r in runs[BARE]]
    print_table(
        ["what", "wall s", "CPU s", "peak MB", "against bare Python"],
        [
            [
                name,
                spread([r.elapsed_s for r in results], 3),
                spread([r.cpu_s for r in results], 3),
                spread([r.peak_bytes / 1e6 for r in results], 0),
                ratio([r.elapsed_s for r in results], base),
            ]
            for name, results in runs.items()
        ],
    )


if __name__ == "__main__":
    main()
