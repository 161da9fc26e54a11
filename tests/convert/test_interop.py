"""Peers load what we convert: mlx-lm and transformers say the tokens that we say.

The peers' answers are golden values, see golden/make_interop.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import mlx_llama
from interop_prompts import N_TOKENS, PROMPTS, RANDOM_CASE
from model_folders import convert, write_meta
from shared_data import shared

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "golden/interop.json").read_text(encoding="utf-8")
)
OPTIONS: dict[str, dict[str, Any]] = {
    "mlx-lm, 4 bits": {"bits": 4},
    "transformers": {"quantize": False},
}
SOURCES = ("stories260k", "random")


def source(name: str, folder: Path) -> Path:
    if name == "random":
        return write_meta(folder / "random", RANDOM_CASE)
    return shared("checkpoints/stories260k")


@pytest.mark.parametrize("peer", OPTIONS)
@pytest.mark.parametrize("name", SOURCES)
def test_greedy_tokens_are_the_peers(name: str, peer: str, tmp_path: Path) -> None:
    model = convert(source(name, tmp_path), tmp_path / "model", **OPTIONS[peer])
    llama = mlx_llama.load(model, dtype="float32")
    golden = GOLDEN[name][peer]
    assert [entry["prompt"] for entry in golden] == list(PROMPTS[name])
    for entry in golden:
        assert llama.prompt_ids(entry["prompt"]) == entry["ids"]
        # In float32 throughout: a random model's likeliest tokens are near ties.
        steps = llama.stream(
            entry["prompt"], temperature=0.0, max_tokens=N_TOKENS, ignore_eos=True, kv_bits=32
        )
        assert [step.token_id for step in steps] == entry["tokens"]
