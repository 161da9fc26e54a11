"""Measures products of packed matrices with one row: what of the memory's bandwidth they take.

    python benchmarks/matvec.py [--shape llama-3.2-1b] [--bits 4 8] [--rounds 7]

All matrices that one token meets, in their order, on random weights; in each round plain reads of
the memory come first, because other programs may take a share of it for minutes.

Target, 1B shape: at least 85 % of the bandwidth at 4 and at 8 bits.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from time import perf_counter

import mlx.core as mx
from measuring import print_table, ratio, spread

import mlx_llama
from mlx_llama import Llama
from mlx_llama_apps.bench.bandwidth import measured_bandwidth
from mlx_llama_apps.bench.random_model import with_bits, write_random_model
from mlx_llama_apps.bench.shapes import shape_named
from mlx_llama_apps.inference import processors

REPETITIONS = 9  # of all products, of which the fastest counts, as in the test of plain reads


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", default="llama-3.2-1b")
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    table = []
    for bits in given.bits:
        with tempfile.TemporaryDirectory() as work:
            shape = with_bits(shape_named(given.shape), bits)
            llama = mlx_llama.load(write_random_model(Path(work) / "model", shape))
            rounds = [(plain_reads(), products(llama)) for _ in range(given.rounds)]
        plain, ours = ([pair[side] / 1e9 for pair in rounds] for side in (0, 1))
        table.append([str(bits), spread(plain, 1), spread(ours, 1), ratio(ours, plain)])
    print_table(["bits", "plain reads, GB/s", "products, GB/s", "ratio"], table)


def plain_reads() -> float:
    """Return how many bytes a second plain reads take, by all threads."""
    found = measured_bandwidth(threads=processors(), is_gpu=False)
    assert found is not None
    return found


def products(llama: Llama) -> float:
    """Return how many bytes of weights a second the products of one token take."""
    model = llama.model
    blocks = [m for block in model.blocks for m in (block.wqkv, block.wo, block.w13, block.w2)]
    matrices = [*blocks, model.output]
    pairs = [(m, mx.random.normal((1, width_of(m.arrays())))) for m in matrices]
    mx.eval([x for _, x in pairs])
    n_bytes = sum(array.nbytes for matrix in matrices for array in matrix.arrays())
    best = float("inf")
    for _ in range(REPETITIONS):
        started = perf_counter()
        mx.eval([matrix(x) for matrix, x in pairs])
        best = min(best, perf_counter() - started)
    return n_bytes / best


def width_of(arrays: list[mx.array]) -> int:
    """Return the columns of a packed matrix of groups of 64."""
    return arrays[1].shape[1] * 64


if __name__ == "__main__":
    main()
