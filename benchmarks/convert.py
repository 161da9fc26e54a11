"""Measures `mlx-llama convert --bits 4` against `mlx_lm convert` of the same weights.

    python benchmarks/convert.py FOLDER --work DIR [--meta FOLDER] [--peer-python PATH]

FOLDER is a checkpoint in Hugging Face's layout, --meta the same weights in Meta's, both as
`random_checkpoint.py` makes them. DIR takes the outputs, which are removed again. Also measured:
one quantizing thread against two, in the whole conversion and alone, with nothing written or
hashed. Last, the outputs are compared tensor by tensor.

Targets: no slower than mlx-lm and at most 1.0 GB for Llama 3.2 1B; two threads quantize at twice
the rate of one. PATH is the interpreter of an environment that has mlx-lm.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from measuring import Run, interleave, print_table, ratio, run, spread

ROUNDS = 5
# Argument 1: the folder; 2: the number of threads; 3: where to write, empty to write nothing.
PYTHON = """
import sys
from pathlib import Path
from time import perf_counter
from mlx_llama.options import ConvertOptions
from mlx_llama_convert import convert_checkpoint, make_plan, open_source
from mlx_llama_quantize import quantize_weights
source, n_threads, target = sys.argv[1], int(sys.argv[2]), sys.argv[3]
options = ConvertOptions(bits=4)
plan = make_plan(open_source(Path(source), options), options)
if target:
    convert_checkpoint(plan, Path(target), n_threads=n_threads)
else:
    for _ in quantize_weights(plan.source.weights, plan.forms, dtype=None, n_threads=n_threads):
        pass
"""
OURS, META, PEER = "mlx-llama convert", "mlx-llama convert, Meta's files", "mlx_lm convert"
ONE, TWO = "convert_checkpoint, 1 thread", "convert_checkpoint, 2 threads"
ALONE_ONE, ALONE_TWO = "quantize_weights alone, 1 thread", "quantize_weights alone, 2 threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--meta", type=Path)
    parser.add_argument("--peer-python", metavar="PATH")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args()
    commands = commands_of(given.folder, given.meta, given.peer_python, given.work)
    given.work.mkdir(parents=True, exist_ok=True)
    cases = {name: fresh(argv, output(given.work, name)) for name, argv in commands.items()}
    runs = interleave(given.rounds, cases)
    base = [r.elapsed_s for r in runs[PEER if PEER in runs else OURS]]
    print_table(
        ["what", "wall s", "CPU s", "peak MB", f"against {PEER if PEER in runs else OURS}"],
        [
            [
                name,
                spread([r.elapsed_s for r in results]),
                spread([r.cpu_s for r in results]),
                spread([r.peak_bytes / 1e6 for r in results], 0),
                ratio([r.elapsed_s for r in results], base),
            ]
            for name, results in runs.items()
        ],
    )
    for one, two in ((ONE, TWO), (ALONE_ONE, ALONE_TWO)):
        faster = ratio([r.elapsed_s for r in runs[one]], [r.elapsed_s for r in runs[two]])
        print(f"{two}: {faster} the rate of one")
    for name in (META, PEER):
        if name in runs:
            print(f"{name}: {compare(output(given.work, OURS), output(given.work, name))}")
    for name in commands:
        shutil.rmtree(output(given.work, name), ignore_errors=True)


def commands_of(
    folder: Path, meta: Path | None, peer_python: str | None, work: Path
) -> dict[str, list[str]]:
    """Return what is measured, by name."""
    ours = str(Path(sys.executable).with_name("mlx-llama"))

    def convert(source: Path, name: str) -> list[str]:
        return [ours, "convert", str(source), "--bits", "4", "-o", str(output(work, name))]

    def python(n_threads: int, target: str) -> list[str]:
        return [sys.executable, "-P", "-c", PYTHON, str(folder), str(n_threads), target]

    commands = {OURS: convert(folder, OURS)}
    if peer_python:
        peer = [peer_python, "-m", "mlx_lm", "convert", "--hf-path", str(folder)]
        commands[PEER] = [*peer, "-q", "--q-bits", "4", "--mlx-path", str(output(work, PEER))]
    if meta:
        commands[META] = convert(meta, META)
    return commands | {
        ONE: python(1, str(output(work, ONE))),
        TWO: python(2, str(output(work, TWO))),
        ALONE_ONE: python(1, ""),
        ALONE_TWO: python(2, ""),
    }


def output(work: Path, name: str) -> Path:
    """Return where a case writes."""
    return work / "".join(letter if letter.isalnum() else "-" for letter in name)


def fresh(argv: Sequence[str], target: Path) -> Callable[[], Run]:
    """Return a case that removes the last round's output before it starts."""

    def case() -> Run:
        shutil.rmtree(target, ignore_errors=True)
        return run(argv)

    return case


def compare(first: Path, second: Path) -> str:
    """Compare two model directories bit by bit; imports MLX, so only after the measuring."""
    from mlx_llama.loading import open_shards
    from mlx_llama_convert.tensors import equal_content

    tensors, others = open_shards(first), open_shards(second)
    pairs = [(tensors[name], others[name]) for name in tensors if name in others]
    equal = sum(equal_content(*pair) for pair in pairs)
    return f"{equal} of {len(tensors)} tensors hold the same bytes as ours"


if __name__ == "__main__":
    main()
