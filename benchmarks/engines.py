"""Measures this project, llama.cpp and mlx-lm in turns, on random weights of true shapes.

    python benchmarks/engines.py --llama-cpp-python PATH [--peer-python PATH] [--shapes 1b 110m 15m]

PATHs are interpreters that have llama-cpp-python and mlx-lm. Every engine holds its model in a
process that waits while another one works; each round runs each test once on every engine.
llama.cpp gets the same weights as Q4_0 and Q8_0, and a file of Q4_K_M where one is given (its own
quantizer makes it of other random weights: 4 bits of the same shape); mlx-lm the same directory in
our dtype, with few tokens where it would take minutes.

Targets, 1B shape: decode at 4 bits 1.5 times llama.cpp's better one, at 8 bits 1.4 times; prefill
of 512 tokens 1.5 times; decode at depth 8192 1.2 times; peak memory at most weights, cache and
0.15 GB. 110M: 1.3 times in both; 15M: 0.7 times in decode.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter

from measuring import all_busy_s, print_table, ratio, spread

from mlx_llama.options import ContextOptions, LoadOptions
from mlx_llama_apps.bench.cases import Case, Engine, Row
from mlx_llama_apps.bench.gguf import write_gguf
from mlx_llama_apps.bench.machine import machine_facts
from mlx_llama_apps.bench.ours import OurEngine
from mlx_llama_apps.bench.peers import LLAMA_CPP, MLX_LM, open_peer
from mlx_llama_apps.bench.random_model import with_bits, write_random_model
from mlx_llama_apps.bench.shapes import shape_named
from mlx_llama_apps.terminal import StatusLine

NAMES = {"1b": "llama-3.2-1b", "110m": "110m", "15m": "15m"}
CASES = {
    "1b": [Case("pp", 512), Case("tg", 64), Case("tg", 32, 8192)],
    "110m": [Case("pp", 512), Case("tg", 128)],
    "15m": [Case("pp", 512), Case("tg", 256)],
}
MOST_SLOW = {"pp": 16, "tg": 4}  # tokens for mlx-lm at 1B
DTYPE = "float32"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--llama-cpp-python", metavar="PATH")
    parser.add_argument("--peer-python", metavar="PATH")
    parser.add_argument("--shapes", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--k-quants", metavar="FILE", type=Path, help="Q4_K_M, 1B shape")
    given = parser.parse_args()
    facts = machine_facts(LoadOptions(threads=given.threads))
    print(f"{facts['kernels']}; memory reads {facts['bandwidth'] / 1e9:.1f} GB/s")
    for shape in given.shapes:
        for bits in given.bits:
            with tempfile.TemporaryDirectory() as work:
                measure(shape, bits, Path(work), given, facts["bandwidth"])


def measure(shape: str, bits: int, work: Path, given: argparse.Namespace, bandwidth: float) -> None:
    """Make the files of one shape, run all tests on all engines, print a table."""
    folder = write_random_model(work / "model", with_bits(shape_named(NAMES[shape]), bits))
    cases = CASES[shape]
    context = max(case.context for case in cases)
    status = StatusLine()
    ours = OurEngine(
        folder, LoadOptions(threads=given.threads), ContextOptions(context=context), status
    )
    engines: dict[str, Engine] = {"mlx-llama": ours}
    try:
        for name, model in peer_files(shape, bits, folder, work, given).items():
            kind = MLX_LM if name == MLX_LM else LLAMA_CPP
            program = given.peer_python if kind == MLX_LM else given.llama_cpp_python
            engines[name] = open_peer(
                kind, program, model, dtype=DTYPE, threads=given.threads, context=context
            )
        busy_s, started = all_busy_s(), perf_counter()
        rows = run(shape, cases, engines, given.rounds)
        busy = (all_busy_s() - busy_s) / (perf_counter() - started)
        report(shape, bits, engines, rows, ours, bandwidth)
        print(f"\nprocessors at work: {busy:.2f}")
    finally:
        for engine in engines.values():
            engine.close()


def peer_files(
    shape: str, bits: int, folder: Path, work: Path, given: argparse.Namespace
) -> dict[str, Path]:
    """Return what each peer loads, by its name in the table."""
    files = {}
    if given.llama_cpp_python:
        from mlx_llama.loading import open_model_directory

        name = {4: "Q4_0", 8: "Q8_0"}[bits]
        files[name] = write_gguf(open_model_directory(folder), work / "model.gguf")
        if given.k_quants and bits == 4 and shape == "1b":
            files["Q4_K_M"] = given.k_quants
    if given.peer_python:
        files[MLX_LM] = folder
    return files


def run(shape: str, cases: list[Case], engines: dict[str, Engine], rounds: int) -> list[Row]:
    """Run every case in turns; mlx-lm at 1B once, with fewer tokens, behind no context."""
    rows = []
    for case in cases:
        row = Row(case, {name: [] for name in engines})
        for repetition in range(rounds + 1):
            for name, engine in engines.items():
                asked = case if repetition else case.warm_up
                if name == MLX_LM and shape == "1b":
                    if repetition != 1 or case.depth:
                        continue
                    few = replace(case, n_tokens=MOST_SLOW[case.kind])
                    sample = engine.run(few)
                    sample = replace(sample, seconds=sample.seconds * case.n_tokens / few.n_tokens)
                    row.samples[name] += [sample] * rounds
                    continue
                if sys.stderr.isatty():
                    print(f"\r{case.name} {repetition} {name:<12}", end="", file=sys.stderr)
                sample = engine.run(asked)
                if repetition:
                    row.samples[name].append(sample)
        rows.append(row)
    return rows


def report(
    shape: str,
    bits: int,
    engines: dict[str, Engine],
    rows: list[Row],
    ours: OurEngine,
    bandwidth: float,
) -> None:
    """Print rates and ratios, the peaks, and what of the memory's bandwidth decoding takes."""
    print(f"\n{NAMES[shape]}, {bits} bits: median (least-most) tokens/s\n")
    peers = [name for name in engines if name != "mlx-llama"]
    table = []
    for row in rows:
        rates = {name: row.rates(name) for name in engines if row.samples[name]}
        digits = 0 if median(rates["mlx-llama"]) >= 100 else 2
        cells = [row.case.name, spread(rates["mlx-llama"], digits)]
        for name in peers:
            if name not in rates:
                cells += ["", ""]
                continue
            cells += [spread(rates[name], digits), ratio(rates["mlx-llama"], rates[name])]
        read = ours.read_bytes(row.case)
        rate = None if read is None else read * median(rates["mlx-llama"])
        cells.append("" if rate is None else f"{rate / 1e9:.1f} ({rate / bandwidth:.0%})")
        table.append(cells)
    header = [cell for name in peers for cell in (name, "ratio")]
    print_table(["test", "mlx-llama", *header, "GB/s (of memory)"], table)
    peaks = (f"{name} {(engine.process_peak() or 0) / 1e6:.0f}" for name, engine in engines.items())
    print(f"\npeak of the process, MB: {', '.join(peaks)}")


if __name__ == "__main__":
    main()
