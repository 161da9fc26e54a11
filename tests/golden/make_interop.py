"""Make tests/golden/interop.json: what mlx-lm and transformers say to our model directories.

Converts stories260k and a random model of Llama 3.2's form with the command line, from Meta's
layout; mlx-lm loads the 4-bit result, transformers the unquantized one, each with its own loader
and tokenizer, and each continues a few prompts greedily. Source and computation are float32.
Needs torch, transformers and mlx-lm (made with 2.13, 5.23 and 0.32.2), which the tests do not:
`python tests/golden/make_interop.py PYTHON SHARED`, an interpreter that has this project, and the
folder that holds `checkpoints/stories260k`.
Refuses to write where two tokens score so alike that rounding could decide between them, or where
an answer repeats itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.utils import load
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

from interop_prompts import N_TOKENS, PROMPTS, RANDOM_CASE  # noqa: E402
from pth_writer import write_checkpoint  # noqa: E402
from random_models import meta_params, meta_weights, random_model  # noqa: E402
from tiny_tokenizers import write_tiktoken  # noqa: E402

MARGIN = 1e-4  # of the largest logit; the same sums in another order differ by a tenth of it
N_DISTINCT = 16
Logits = Callable[[list[int]], np.ndarray]


def write_random(folder: Path) -> Path:
    weights, _ = random_model(RANDOM_CASE)
    tensors = meta_weights(weights, head_dim=RANDOM_CASE.head_dim)
    write_checkpoint(folder, tensors, params=meta_params(RANDOM_CASE))
    write_tiktoken(folder / "tokenizer.model", merges=())
    return folder


def convert(python: str, source: Path, target: Path, *flags: str) -> Path:
    command = "from mlx_llama_apps.main import run_main; run_main()"
    environment = {**os.environ, "MLX_LLAMA_HOME": str(target.parent / "home")}
    arguments = ["convert", str(source), "-o", str(target), *flags]
    subprocess.run([python, "-c", command, *arguments], check=True, env=environment)
    return target


def continue_greedily(logits_of: Logits, ids: list[int], where: str) -> list[int]:
    tokens: list[int] = []
    for _ in range(N_TOKENS):
        logits = logits_of([*ids, *tokens])
        second, best = np.sort(logits)[-2:]
        margin = float((best - second) / np.abs(logits).max())
        if margin < MARGIN:
            raise SystemExit(f"{where}: token {len(tokens)} leads by {margin:.1e} only")
        tokens.append(int(logits.argmax()))
    if len(set(tokens)) < N_DISTINCT:
        raise SystemExit(f"{where}: says the same {len(set(tokens))} tokens over and over")
    return tokens


def by_mlx_lm(folder: Path, prompts: tuple[str, ...]) -> list[dict[str, Any]]:
    model, tokenizer = load(str(folder))
    scales = model.model.layers[0].self_attn.q_proj.scales
    assert scales.dtype == mx.float32

    def logits_of(ids: list[int]) -> np.ndarray:
        return np.asarray(model(mx.array([ids]))[0, -1].astype(mx.float32))

    return answers(tokenizer.encode, logits_of, prompts, f"mlx-lm, {folder.name}")


def by_transformers(folder: Path, prompts: tuple[str, ...]) -> list[dict[str, Any]]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert model.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def logits_of(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, -1].numpy()

    return answers(tokenizer.encode, logits_of, prompts, f"transformers, {folder.name}")


def answers(
    encode: Callable[[str], list[int]], logits_of: Logits, prompts: tuple[str, ...], where: str
) -> list[dict[str, Any]]:
    found = []
    for prompt in prompts:
        ids = [int(i) for i in encode(prompt)]
        tokens = continue_greedily(logits_of, ids, f"{where}, {prompt!r}")
        found.append({"prompt": prompt, "ids": ids, "tokens": tokens})
    return found


def main() -> None:
    python, shared = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(2)
    golden = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = {
            "stories260k": shared / "checkpoints/stories260k",
            "random": write_random(folder / "random"),
        }
        for source, path in sources.items():
            packed = convert(python, path, folder / f"{source}-4bit", "--bits", "4")
            plain = convert(python, path, folder / f"{source}-plain", "--no-quantize")
            golden[source] = {
                "mlx-lm, 4 bits": by_mlx_lm(packed, PROMPTS[source]),
                "transformers": by_transformers(plain, PROMPTS[source]),
            }
    text = json.dumps(golden, ensure_ascii=False, separators=(",", ":"))
    (HERE / "interop.json").write_text(text.replace('{"prompt"', '\n{"prompt"') + "\n")


if __name__ == "__main__":
    main()
