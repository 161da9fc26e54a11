"""Peak memory and rate of converting large shapes: 8B in one file, 405B's width in eight.

    python benchmarks/convert_large.py 8b WORK
    python benchmarks/convert_large.py 405b-width WORK

The weights are zeros, which take as long to read and to pack as any others. 405b-width has two
layers, every other shape as Llama 3.1 405B has it. Needs 16 and 21 GB on the disk for the source.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from random_checkpoint import N_SPECIAL, write_tiktoken
from torch_zip import write_pth

VOCAB = 128256
ZEROS = memoryview(bytes(16 << 20))
SHAPES = {
    "8b": ({"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 1024}, 1.3, 14336, 1),
    "405b-width": (
        {"dim": 16384, "n_layers": 2, "n_heads": 128, "multiple_of": 4096},
        1.2,
        53248,
        8,
    ),
}
PEAK_BOUND_GB = {"8b": 1.5, "405b-width": 4.0}


def shard_shapes(params: dict[str, int], hidden: int, ranks: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of one rank's tensors."""
    dim, head_dim = params["dim"], params["dim"] // params["n_heads"]
    kv_rows, rows = 8 * head_dim // ranks, dim // ranks
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (VOCAB // ranks, dim)}
    for layer in range(params["n_layers"]):
        at = f"layers.{layer}"
        shapes |= {f"{at}.attention.w{n}.weight": (kv_rows, dim) for n in "kv"}
        shapes |= {f"{at}.feed_forward.w{n}.weight": (hidden // ranks, dim) for n in "13"}
        shapes[f"{at}.attention.wq.weight"] = (rows, dim)
        shapes[f"{at}.attention.wo.weight"] = (dim, rows)
        shapes[f"{at}.feed_forward.w2.weight"] = (dim, hidden // ranks)
        shapes |= {f"{at}.{n}_norm.weight": (dim,) for n in ("attention", "ffn")}
    return {**shapes, "norm.weight": (dim,), "output.weight": (VOCAB // ranks, dim)}


def zeros(nbytes: int) -> Iterable[memoryview]:
    """Yield so many bytes."""
    for start in range(0, nbytes, len(ZEROS)):
        yield ZEROS[: min(len(ZEROS), nbytes - start)]


def write_checkpoint(name: str, folder: Path) -> None:
    """Write Meta's layout."""
    params, multiplier, hidden, ranks = SHAPES[name]
    folder.mkdir(parents=True)
    write_tiktoken(folder / "tokenizer.model", VOCAB - N_SPECIAL)
    shapes = shard_shapes(params, hidden, ranks)
    sizes = {n: 2 * s[0] * (s[1] if len(s) > 1 else 1) for n, s in shapes.items()}
    for rank in range(ranks):
        path = folder / f"consolidated.{rank:02d}.pth"
        write_pth(path, shapes, lambda n: zeros(sizes[n]), aliases={})
    more = {"n_kv_heads": 8, "ffn_dim_multiplier": multiplier, "vocab_size": VOCAB}
    more |= {"norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True}
    (folder / "params.json").write_text(json.dumps({**params, **more}))


def main(name: str, work: str) -> None:
    source, target = Path(work) / name, Path(work) / f"{name}-4bit"
    if not source.exists():
        write_checkpoint(name, source)
    shutil.rmtree(target, ignore_errors=True)
    command = [str(Path(sys.executable).with_name("mlx-llama")), "convert", str(source)]
    started = time.perf_counter()
    process = subprocess.Popen([*command, "-o", str(target), "--bits", "4", "--quiet"])
    _, status, usage = os.wait4(process.pid, 0)
    elapsed = time.perf_counter() - started
    if status:
        sys.exit(f"the conversion failed with {status}")
    read = sum(path.stat().st_size for path in source.iterdir())
    written = sum(path.stat().st_size for path in target.iterdir())
    peak = usage.ru_maxrss * 1024 / 1e9  # kB on Linux
    print(f"{name}: {elapsed:.1f} s, CPU {usage.ru_utime + usage.ru_stime:.1f} s")
    print(
        f"read {read / 1e9:.1f} GB ({read / 1e9 / elapsed:.2f} GB/s), wrote {written / 1e9:.1f} GB"
    )
    print(f"peak {peak:.2f} GB (at most {PEAK_BOUND_GB[name]})")


if __name__ == "__main__":
    main(*sys.argv[1:])
