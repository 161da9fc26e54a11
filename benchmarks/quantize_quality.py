"""Quantizes a model by every method and prints what each lost, on a text that none has seen.

    python benchmarks/quantize_quality.py FOLDER --work DIR [--bits 4 8] [--group-size 64]
        [--target-bpw 4.5] [--text FILE] [--calibration FILE] [--peer-python PATH]

FOLDER is a checkpoint; DIR takes the outputs, which are removed again. The KL divergence is that of
the certificate, the ratio is against rtn at the first number of bits. PATH is a Python that has
mlx-lm: its AWQ, GPTQ and dynamic quantization read the same weights and learn from the same text,
which stands where they keep what they download.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from measuring import Run, print_table, run

from mlx_llama_quantize.texts import CALIBRATION, CERTIFICATE, read_text, shipped

PYTHON = "from mlx_llama_apps.entry import run_main; run_main()"
METHODS = ("rtn", "mse", "awq", "gptq", "awq+gptq", "auto")


HEADER = ("what", "bits a weight", "mean KLD", "of rtn", "same top", "PPL ratio", "s", "peak MB")
PEERS = {  # mlx-lm's modules and what of their arguments depends on us
    "awq": lambda g: ["--bits", g.bits[0], "--group-size", g.group_size, "--embed-bits", g.bits[0],
                      "--embed-group-size", g.group_size],
    "gptq": lambda g: ["--bits", g.bits[0], "--group-size", g.group_size,
                       "--fallback-bits", g.bits[0], "--fallback-group-size", g.group_size],
    "dynamic_quant": lambda g: ["--target-bpw", g.target_bpw or 4.5, "--low-bits", 3],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--target-bpw", type=float)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--peer-python", type=Path)
    given = parser.parse_args()
    sizes = [["--bits", str(bits), "--group-size", str(given.group_size)] for bits in given.bits]
    sizes += [["--target-bpw", str(given.target_bpw)]] if given.target_bpw else []
    rows = [
        _ours(given, f"{size[0][2:]} {size[1]}, {method}", size, method)
        for size in sizes
        for method in given.methods
    ]
    if given.peer_python:
        rows += _peers(given)
    base = rows[0][0]
    print_table(HEADER, [[row[0], row[1], row[2], f"{k / base:.2f}x", *row[3:]] for k, row in rows])


Row = tuple[float, list[str]]  # the mean KL divergence, and what is printed


def _ours(given: argparse.Namespace, title: str, size: list[str], method: str) -> Row:
    out = given.work / "ours"
    command = [sys.executable, "-c", PYTHON, "quantize", str(given.folder), "-o", str(out)]
    command += ["--method", method, "--quiet", *size]
    command += ["--text", str(given.text)] if given.text else []
    if given.calibration and (method not in ("rtn", "mse") or "--target-bpw" in size):
        command += ["--calibration", str(given.calibration)]
    done = run(command)
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    shutil.rmtree(out)
    found = manifest["certificate"]["divergence"]
    return _row(title, manifest["bits_per_weight"], found, done)


def _peers(given: argparse.Namespace) -> list[Row]:
    """Run mlx-lm's learned methods on the unquantized model, and compare as a certificate does."""
    dense, home = given.work / "dense", given.work / "peer-home"
    run([sys.executable, "-c", PYTHON, "convert", str(given.folder), "-o", str(dense),
         "--no-quantize", "--quiet"])  # fmt: skip
    cache = home / ".cache" / "mlx-lm"
    cache.mkdir(parents=True, exist_ok=True)
    text = read_text(given.calibration) if given.calibration else shipped(CALIBRATION)
    (cache / "calibration_v5.txt").write_text(text.content, encoding="utf-8")
    judged = given.work / "judged.txt"
    words = read_text(given.text) if given.text else shipped(CERTIFICATE)
    judged.write_text(words.content, encoding="utf-8")
    rows: list[Row] = []
    for name, arguments in PEERS.items():
        out = given.work / f"mlx-lm-{name}"
        asked = [str(each) for each in arguments(given)]
        start = f"from mlx_lm.quant.{name} import main; main()"  # not all of them are run by -m
        command = [str(given.peer_python), "-c", start, "--model", str(dense)]
        command += ["--mlx-path", str(out), *asked]
        done = run(command, env={"HOME": str(home), "HF_HUB_OFFLINE": "1"})
        for file in dense.glob("*token*"):  # mlx-lm writes its tokens anew, and some differ
            shutil.copy(file, out)
        compared = run([sys.executable, "-c", PYTHON, "compare", str(dense), str(out), "--text",
                        str(judged), "--json", "--no-costs", "--dtype", "float32"])  # fmt: skip
        report = json.loads(compared.output)
        title = f"mlx-lm {name} {' '.join(asked)}"
        rows.append(_row(title, report["b"]["bits_per_weight"], report["divergence"], done))
        shutil.rmtree(out)
    shutil.rmtree(dense)
    shutil.rmtree(home)
    return rows


def _row(title: str, bits: float, found: dict[str, Any], done: Run) -> Row:
    kld = found["kld"]["mean"]
    print(f"{title}: {kld['value']:.5f}", file=sys.stderr, flush=True)
    return kld["value"], [
        title,
        f"{bits:.2f}",
        f"{kld['value']:.5f} ± {kld['error']:.5f}",
        f"{100 * found['same_top']['value']:.1f} %",
        f"{found['ratio']['value']:.4f}",
        f"{done.elapsed_s:.0f}",
        f"{done.peak_bytes / 1e6:.0f}",
    ]


if __name__ == "__main__":
    main()
