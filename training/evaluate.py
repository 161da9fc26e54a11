"""Measure a trained checkpoint: held-out accuracy by bits, and what quantization costs.

    python -m training.evaluate FOLDER --work /tmp/measured

converts the checkpoint (Meta's files, or the bundled one when no folder is given) to bfloat16 and
to 8, 6, 5, 4, 3 and 2 bits, asks the held-out questions and those of asked.toml, compares each with
bfloat16 by `mlx-llama compare`, feeds it inputs without sense, and prints the card's tables.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

import mlx_llama
from mlx_llama import Llama, Message
from mlx_llama_apps import bundled
from mlx_llama_apps.main import main as run_command
from training.dialogs import Guide
from training.heldout import as_asked, questions
from training.text import sample_text
from training.typed import noise

BITS = (8, 6, 5, 4, 3, 2)
ASKED_AT = ("bf16", "8", "4")
MAX_ANSWER_TOKENS = 128
RUNAWAY_TOKENS = 512
COMPARED = (
    "| bits | with scales | MB | perplexity | KL divergence | its median | 99 % "
    "| same top token, % |\n|---|---|---|---|---|---|---|---|"
)
TEXT_TURNS = 500  # of the text that compare reads: some 12,000 words


def main() -> None:
    """Convert, ask, compare and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", help="Meta's files (the bundled ones)")
    parser.add_argument("--work", type=Path, required=True, help="a folder for the conversions")
    parser.add_argument("--at", nargs="*", default=ASKED_AT, help="what is asked (bf16 8 4)")
    parser.add_argument("--no-compare", action="store_true", help="leave out compare")
    parser.add_argument("--odd-inputs", type=int, default=2000, help="inputs without sense (2000)")
    options = parser.parse_args()
    folder = options.folder or bundled.checkpoint()
    options.work.mkdir(parents=True, exist_ok=True)
    models = {name: convert(folder, name, options.work) for name in ("bf16", *map(str, BITS))}
    guide = Guide()
    asked = questions(guide)
    for wording, those in (("held-out", asked), ("as others ask", questions(as_asked(Guide())))):
        print(f"{len(those)} questions, {wording}")
        for name in options.at:
            print_accuracy(name, accuracy(models[name], those))
    if not options.no_compare:
        text = options.work / "heldout.txt"
        text.write_text(sample_text(guide, seed=7, n_turns=TEXT_TURNS, held=True), encoding="utf-8")
        print(COMPARED)
        for bits in BITS:
            print_comparison(models["bf16"], models[str(bits)], text)
    if options.odd_inputs:
        print_runaways(models["8"], guide, options.odd_inputs)


def convert(folder: Path, name: str, work: Path) -> Path:
    """Make a model directory of a checkpoint, unless it is there."""
    target = work / name
    form = ["--no-quantize"] if name == "bf16" else ["--bits", name]
    kind = ["--kind", "llama3.1-instruct", "--force", "--quiet"]
    with contextlib.redirect_stdout(io.StringIO()):
        if code := run_command(["convert", str(folder), "-o", str(target), *form, *kind]):
            sys.exit(code)
    return target


def accuracy(model: Path, asked: Sequence[dict[str, Any]]) -> dict[str, list[bool]]:
    """Ask greedily; return by group which answers match their pattern."""
    llama = mlx_llama.load(model)
    found: dict[str, list[bool]] = {}
    for entry in asked:
        is_right = says(llama, entry)
        if not is_right:
            answer = llama.chat(entry["messages"], temperature=0, max_tokens=MAX_ANSWER_TOKENS)
            is_right = re.search(entry["pattern"], answer) is not None
        found.setdefault(entry["group"], []).append(is_right)
        if not is_right:
            last = entry["messages"][-1]["content"]
            print(f"  {entry['group']}: {last!r} → {answer!r}", file=sys.stderr)
    return found


def says(llama: Llama, entry: dict[str, Any]) -> bool:
    """Whether the greedy answer is the one of the training text: one pass, where it is."""
    before = llama.prompt_format.encode([Message(**message) for message in entry["messages"]])
    answer = [
        *llama.tokenizer.encode(entry["answer"]),
        llama.tokenizer.special_tokens["<|eot_id|>"],
    ]
    ids = [*before, *answer]
    positions = list(range(len(before) - 1, len(ids) - 1))
    likeliest = mx.argmax(llama.logits(ids, positions=positions), axis=-1)
    return likeliest.tolist() == answer


def print_accuracy(name: str, found: dict[str, list[bool]]) -> None:
    """Print all, the follow-ups and each group."""
    every = [right for group in found.values() for right in group]
    follow = [right for name, group in found.items() if "follow-up" in name for right in group]
    print(f"{name}: {share(every)} right; follow-ups {share(follow)}")
    for group, results in sorted(found.items()):
        print(f"    {group:24} {share(results)}")


def share(results: Sequence[bool]) -> str:
    """Say a share and of how many."""
    return f"{sum(results) / max(len(results), 1):.1%} of {len(results)}"


def print_comparison(one: Path, other: Path, text: Path) -> None:
    """Print a row of compare's statistics."""
    out = io.StringIO()
    command = ["compare", str(one), str(other), "--text", str(text), "--json", "--no-costs"]
    with contextlib.redirect_stdout(out):
        if code := run_command(command):
            sys.exit(code)
    report = json.loads(out.getvalue())
    found, kld = report["divergence"], report["divergence"]["kld"]
    cells = [
        other.name,
        f"{report['b']['bits_per_weight']:.2f}",
        f"{report['b']['bytes'] / 1e6:.2f}",
        estimate(found["ppl_b"], 3),
        estimate(kld["mean"], 4),
        f"{kld['quantiles']['0.5']:.4f}",
        f"{kld['quantiles']['0.99']:.3f}",
        estimate({name: 100 * value for name, value in found["same_top"].items()}, 1),
    ]
    print("| " + " | ".join(cells) + " |")


def estimate(found: dict[str, float], digits: int) -> str:
    """Say a number with its standard error."""
    return f"{found['value']:.{digits}f} ± {found['error']:.{digits}f}"


def print_runaways(model: Path, guide: Guide, count: int) -> None:
    """Print how many answers to inputs without sense do not end."""
    llama = mlx_llama.load(model)
    rng = random.Random(3)
    reasons: Counter[str] = Counter()
    n_tokens, started = 0, time.monotonic()
    for _ in range(count):
        messages = [{"role": "user", "content": odd_input(rng, guide)}]
        steps = list(llama.stream_chat(messages, temperature=0, max_tokens=RUNAWAY_TOKENS))
        reasons[str(steps[-1].finish_reason)] += 1
        n_tokens += len(steps)
    elapsed_s = time.monotonic() - started
    print(f"odd inputs: {reasons['length']} of {count} answers did not end within "
          f"{RUNAWAY_TOKENS} tokens ({n_tokens / elapsed_s:.0f} tokens/s)")  # fmt: skip


def odd_input(rng: random.Random, guide: Guide) -> str:
    """Return something random, empty, very long or foreign."""
    kind = rng.randrange(4)
    if kind == 0:
        return rng.choice([*guide.foreign["ask"], *guide.foreign["held_out"]])
    if kind == 1:
        text = rng.choice([*guide.foreign["held_out"], noise(rng) + " "])
        return text * rng.randint(5, 40)
    return noise(rng)


if __name__ == "__main__":
    main()
