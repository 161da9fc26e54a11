"""Measures attention over each kind of cache: the native kernels beside MLX's operations.

    python benchmarks/attention.py [--rows 8192 32768] [--queries 1 128]

One layer of the 1B shape (32 heads, 8 of keys, of 64 numbers), float32 queries, random rows. The
times are the process's, medians of runs that take turns.
"""

from __future__ import annotations

import argparse
from statistics import median
from time import process_time

import mlx.core as mx
from measuring import print_table

from mlx_llama import native, ops
from mlx_llama.attention import attend
from mlx_llama.cache.rows import Stored
from mlx_llama.cache.view import Sight, View

N_HEADS, N_KV_HEADS, HEAD_DIM = 32, 8, 64
KINDS = (("float32", mx.float32, 16), ("bfloat16", mx.bfloat16, 16), ("8 bits", mx.float32, 8))
KINDS += (("4 bits", mx.float32, 4),)
RUNS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=(8192, 32768))
    parser.add_argument("--queries", type=int, nargs="+", default=(1, 128))
    given = parser.parse_args()
    if native.kernels() is None:
        raise SystemExit(f"nothing to measure: {native.missing_reason()}")
    for n_rows in given.rows:
        for n_queries in given.queries:
            print(f"\n{n_queries} queries over {n_rows} rows")
            report(n_rows, n_queries)


def report(n_rows: int, n_queries: int) -> None:
    """Print a row for each kind of cache."""
    rows, plain_ms = [], 0.0
    for name, dtype, bits in KINDS:
        shape = (1, N_KV_HEADS, n_rows, HEAD_DIM)
        keys, values = (Stored.of(mx.random.normal(shape).astype(dtype), bits) for _ in range(2))
        q = mx.random.normal((1, N_HEADS, n_queries, HEAD_DIM))
        mx.eval(q, keys.arrays, values.arrays)
        view = View(((keys, values),), Sight(n_rows - n_queries, n_queries))
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(RUNS):
            for is_native, taken in times.items():
                taken.append(measure(q, view, is_native=is_native))
        nbytes = sum(array.nbytes for part in (keys, values) for array in part.arrays)
        ours_ms, theirs_ms = (1e3 * median(times[which]) for which in (True, False))
        plain_ms = plain_ms or ours_ms
        rate = f"{nbytes / ours_ms / 1e6:.1f}"
        ratios = f"{theirs_ms / ours_ms:.1f}x", f"{ours_ms / plain_ms:.2f}"
        rows.append([name, f"{ours_ms:.2f}", f"{theirs_ms:.1f}", *ratios, rate])
    columns = ["cache", "native CPU ms", "MLX CPU ms", "faster", "of float32's time", "GB/CPU s"]
    print_table(columns, rows)


def measure(q: mx.array, view: View, *, is_native: bool) -> float:
    """Return the seconds of processor time that one attention takes."""
    scale, start = HEAD_DIM**-0.5, process_time()
    if is_native:
        mx.eval(ops.attention(q, view, scale=scale))
    else:
        mx.eval(attend(q, view, scale=scale, manner=ops.attention_manner(q.dtype)))
    return process_time() - start


if __name__ == "__main__":
    main()
