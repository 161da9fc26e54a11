"""Quantizes a model by every method and prints what each lost, on a text that none has seen.

    python benchmarks/quantize_quality.py FOLDER --work DIR [--bits 4 8] [--group-size 64]
        [--text FILE] [--calibration FILE]

FOLDER is a checkpoint; DIR takes the outputs, which are removed again. All results of one table
have the same size. The KL divergence is that of the certificate; the ratio is against rtn.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from measuring import print_table, run

PYTHON = "from mlx_llama_apps.entry import run_main; run_main()"
METHODS = ("rtn", "mse", "awq", "gptq", "awq+gptq")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    given = parser.parse_args()
    rows: list[list[str]] = []
    for bits in given.bits:
        base: float | None = None
        for method in given.methods:
            out = given.work / f"{method}-{bits}"
            command = [sys.executable, "-c", PYTHON, "quantize", str(given.folder)]
            command += ["-o", str(out), "--bits", str(bits), "--method", method, "--quiet"]
            command += ["--group-size", str(given.group_size)]
            command += ["--text", str(given.text)] if given.text else []
            if given.calibration and method not in ("rtn", "mse"):
                command += ["--calibration", str(given.calibration)]
            done = run(command)
            manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
            shutil.rmtree(out)
            found = manifest["certificate"]["divergence"]
            kld = found["kld"]["mean"]
            base = base or kld["value"]
            rows.append(
                [
                    f"{bits} bits, {method}",
                    f"{manifest['bits_per_weight']:.2f}",
                    f"{kld['value']:.5f} ± {kld['error']:.5f}",
                    f"{kld['value'] / base:.2f}x",
                    f"{100 * found['same_top']['value']:.1f} %",
                    f"{found['ratio']['value']:.4f}",
                    f"{done.elapsed_s:.0f}",
                    f"{done.peak_bytes / 1e6:.0f}",
                ]
            )
    header = [
        "what",
        "bits a weight",
        "mean KLD",
        "of rtn",
        "same top",
        "PPL ratio",
        "s",
        "peak MB",
    ]
    print_table(header, rows)


if __name__ == "__main__":
    main()
