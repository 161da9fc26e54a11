"""Quantizes a model by every method and prints what each lost, on texts that none has seen.

    python benchmarks/quantize_quality.py bundled --work DIR --peer-python PATH
    python benchmarks/quantize_quality.py FOLDER --work DIR [--group-size 64] [--text FILE ...]
        [--calibration FILE] [--methods mse gptq] [--peer-python PATH]

FOLDER is a checkpoint; DIR takes the outputs, which are removed again. Every result is compared
with the unquantized model by `mlx-llama compare`, in float32: on the certificate's text, and for
the bundled model on answers in wordings that it was never taught, too. Ratios are against rtn at 4
bits; times are of quantizing alone.

PATH is a Python that has mlx-lm and the same release of MLX: its AWQ, GPTQ and dynamic quantization
read the same weights and learn from the same text, which stands where they keep what they download.
They compute in float32, because the second moments of its GPTQ lose their least eigenvalues in
bfloat16, and what they write is stored in bfloat16 then, as everything else here.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import Run, print_table, run

from mlx_llama_quantize.texts import CALIBRATION, CERTIFICATE, read_text, shipped

BITS, TARGET, FINE = 4, 4.5, 8
METHODS = ("mse", "awq", "gptq", "awq+gptq", "auto")  # besides rtn
AT_TARGET, AT_FINE = ("mse", "auto"), ("rtn", "mse", "auto")
BUNDLED = "bundled"
STORED = ("--quiet", "--force", "--no-quantize", "--dtype")
PYTHON = "from mlx_llama_apps.entry import run_main; run_main()"
ROOT = Path(__file__).resolve().parent.parent
# Argument 1: the file. As the model card's own text, but shorter.
UNTAUGHT = """
import sys
from training.dialogs import Guide
from training.text import sample_text
with open(sys.argv[1], "w", encoding="utf-8") as file:
    file.write(sample_text(Guide(), seed=7, n_turns=150, held=True))
"""
# Argument 1: a model directory; its scales, norms and dense matrices become bfloat16.
STORE = """
import sys
from pathlib import Path
import mlx.core as mx
for path in Path(sys.argv[1]).glob("*.safetensors"):
    arrays = {n: a.astype(mx.bfloat16) if a.dtype == mx.float32 else a
              for n, a in mx.load(str(path)).items()}
    mx.eval(arrays)
    mx.save_safetensors(str(path), arrays, {"format": "mlx"})
"""
PEERS = {  # mlx-lm's modules and their arguments
    "awq": ["--bits", BITS, "--group-size", "G", "--embed-bits", BITS, "--embed-group-size", "G"],
    "gptq": ["--bits", BITS, "--group-size", "G", "--fallback-bits", BITS,
             "--fallback-group-size", "G"],
    "dynamic_quant": ["--target-bpw", TARGET, "--low-bits", 3],
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """What one method made. divergences: by text, as `compare --json` has them."""

    title: str
    bits_per_weight: float
    divergences: list[dict[str, Any]]
    done: Run

    def kld(self, text: int) -> float:
        """Return the mean KL divergence on a text, nats."""
        return self.divergences[text]["kld"]["mean"]["value"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", metavar="FOLDER")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--text", type=Path, nargs="+")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--peer-python", type=Path)
    given = parser.parse_args()
    given.work = given.work.resolve()
    # A cache of its own: what was measured before would be found again, and cost no time.
    home = given.work / "home"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    os.environ["MLX_LLAMA_HOME"] = str(home)
    texts = _texts(given)
    dense = given.work / "dense"
    _command(
        "convert", given.source, "-o", dense, "--no-quantize", "--dtype", "bfloat16", "--force"
    )
    rows = [
        _ours(given, dense, texts, size, method)
        for size, methods in (
            (["--bits", BITS, "--group-size", given.group_size], ["rtn", *given.methods]),
            (["--target-bpw", TARGET], AT_TARGET),
            (["--bits", FINE, "--group-size", given.group_size], AT_FINE),
        )
        for method in methods
    ]
    peers = _peers(given, dense, texts) if given.peer_python else []
    _print(rows + peers, [text.name for text in texts])
    _print_aims(rows, peers, len(texts))
    shutil.rmtree(dense)
    shutil.rmtree(home)


def _command(*words: object) -> Run:
    return run([sys.executable, "-c", PYTHON, *map(str, words)])


def _texts(given: argparse.Namespace) -> list[Path]:
    """Return the files of the texts that are judged by."""
    if given.text:
        return given.text
    first = given.work / CERTIFICATE
    first.write_text(shipped(CERTIFICATE).content, encoding="utf-8")
    if given.source != BUNDLED:
        return [first]
    second = given.work / "untaught.txt"
    run([sys.executable, "-c", UNTAUGHT, str(second)], env={"PYTHONPATH": str(ROOT)})
    return [first, second]


def _ours(
    given: argparse.Namespace, dense: Path, texts: list[Path], size: list[object], method: str
) -> Row:
    out = given.work / "ours"
    learns = given.calibration and (method not in ("rtn", "mse") or "--target-bpw" in size)
    done = _command(
        "quantize", given.source, "-o", out, "--dtype", "bfloat16", "--method", method, *size,
        "--no-report", "--quiet", *(["--calibration", given.calibration] if learns else []),
    )  # fmt: skip
    return _row(f"{' '.join(map(str, size))} --method {method}", dense, out, texts, done)


def _peers(given: argparse.Namespace, dense: Path, texts: list[Path]) -> list[Row]:
    """Run mlx-lm's learned methods on the same weights in float32."""
    wide, home = given.work / "wide", given.work / "peer-home"
    _command("convert", given.source, "-o", wide, *STORED, "float32")
    cache = home / ".cache" / "mlx-lm"
    cache.mkdir(parents=True, exist_ok=True)
    text = read_text(given.calibration) if given.calibration else shipped(CALIBRATION)
    (cache / "calibration_v5.txt").write_text(text.content, encoding="utf-8")
    rows: list[Row] = []
    for name, arguments in PEERS.items():
        out = given.work / f"mlx-lm-{name}"
        asked = [str(given.group_size if each == "G" else each) for each in arguments]
        start = f"from mlx_lm.quant.{name} import main; main()"  # not all of them are run by -m
        command = [str(given.peer_python.absolute()), "-c", start, "--model", str(wide)]
        command += ["--mlx-path", str(out), *asked]
        done = run(command, env={"HOME": str(home), "HF_HUB_OFFLINE": "1"}, cwd=home)
        for file in wide.glob("*token*"):  # mlx-lm writes its tokens anew, and some differ
            shutil.copy(file, out)
        run([sys.executable, "-c", STORE, str(out)])
        rows.append(_row(f"mlx-lm {name} {' '.join(asked)}", dense, out, texts, done))
    shutil.rmtree(wide)
    shutil.rmtree(home)
    return rows


def _row(title: str, dense: Path, out: Path, texts: list[Path], done: Run) -> Row:
    """Compare a result with the unquantized model, and remove it."""
    reports = [
        json.loads(
            _command(
                "compare", dense, out, "--text", text, "--json", "--no-costs", "--dtype", "float32"
            ).output
        )
        for text in texts
    ]
    shutil.rmtree(out)
    divergences = [report["divergence"] for report in reports]
    row = Row(title, reports[0]["b"]["bits_per_weight"], divergences, done)
    print(f"| {' | '.join(_cells(row))} |", file=sys.stderr, flush=True)  # should it be stopped
    return row


def _cells(row: Row, base: Row | None = None) -> list[str]:
    """Return what is printed of a row; base: what the ratios are against."""
    cells = [row.title, f"{row.bits_per_weight:.3f}"]
    for number, found in enumerate(row.divergences):
        mean = found["kld"]["mean"]
        cells += [
            f"{mean['value']:.5f} ± {mean['error']:.5f}",
            "" if base is None else f"{row.kld(number) / base.kld(number):.2f}x",
            f"{100 * found['same_top']['value']:.1f} %",
            f"{found['ratio']['value']:.4f}",
        ]
    done = row.done
    return [*cells, f"{done.elapsed_s:.0f}", f"{done.cpu_s:.0f}", f"{done.peak_bytes / 1e6:.0f}"]


def _print(rows: list[Row], names: list[str]) -> None:
    header = ["what", "bits a weight"]
    for name in names:
        header += [f"mean KLD, {name}", "of rtn", "same top", "PPL ratio"]
    print_table([*header, "s", "CPU s", "peak MB"], [_cells(row, rows[0]) for row in rows])


def _print_aims(rows: list[Row], peers: list[Row], n_texts: int) -> None:
    """Say what was to be reached, by text."""

    def ratios(one: Row, other: Row) -> str:
        return ", ".join(f"{one.kld(n) / other.kld(n):.2f}x" for n in range(n_texts))

    def by(size: object, method: str) -> Row | None:
        wanted = [r for r in rows if f" {size} " in r.title and r.title.endswith(f" {method}")]
        return wanted[0] if wanted else None

    print()
    coarse = [row for row in rows if row.title.startswith(f"--bits {BITS} ")]
    best = min(coarse, key=lambda row: row.kld(0))
    print(f"* {best.title}, the best, of rtn (at most 0.6): {ratios(best, coarse[0])}")
    for peer in peers:
        print(f"* of {peer.title} (below 1): {ratios(best, peer)}")
    for method in AT_TARGET:
        sized, uniform = by(TARGET, method), by(BITS, method)
        if sized and uniform:
            print(f"* {sized.title} of {uniform.title} (at most 0.7): {ratios(sized, uniform)}")
    for row in (by(FINE, method) for method in AT_FINE):
        if row:
            shares = ", ".join(f"{100 * d['same_top']['value']:.2f} %" for d in row.divergences)
            klds = ", ".join(f"{row.kld(n):.5f}" for n in range(n_texts))
            print(f"* {row.title}: same top {shares} (99 % at least), KLD {klds} (below 0.002)")


if __name__ == "__main__":
    main()
