"""Texts longer than the trained range: positions, memory and results stay as they should."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlx_llama
from cache_oracle import CacheOracle
from induction import read
from mlx_llama import ops
from mlx_llama.cache import KVCache, Slots
from mlx_llama.config import config_from_hf
from mlx_llama.model import LlamaModel
from mlx_llama.token_pass import TokenPass
from mlx_llama.weights import build_model
from model_folders import arrays_of
from numpy_llama import Attend, llama_logits
from random_models import SPM_VOCAB, Case, Weights, random_model

N_TOKENS = 20_000
MAX_CONTEXT, CAPACITY, KEEP = 1024, 200, 8
# A key and a value left behind for every token would be 10 MB in the end.
MOST_GROWTH = 1 << 17

MAX_META = 131072
# Angles at such positions are off by 0.004 radians in float32; a key that is placed one off or a
# token too much changes a logit by a tenth of the largest and more.
FAR_TOLERANCE = 5e-3


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Collect the first and last position of all that is rotated."""
    found: list[tuple[int, int]] = []
    rotate, pass_token = ops.rotate, TokenPass.__call__

    def noting(x: mx.array, periods: mx.array, offset: int) -> mx.array:
        found.append((offset, offset + x.shape[2] - 1))
        return rotate(x, periods, offset)

    def noting_one(
        whole: TokenPass, token: mx.array, slots: Slots, position: int, **how: Any
    ) -> Any:
        found.extend([(position, position)] * len(slots.keys))
        return pass_token(whole, token, slots, position, **how)

    monkeypatch.setattr(ops, "rotate", noting)
    monkeypatch.setattr(TokenPass, "__call__", noting_one)
    return found


@pytest.mark.parametrize(
    "n_prompt", [N_TOKENS - 4000, pytest.param(1, marks=pytest.mark.slow)], ids=["read", "said"]
)
def test_20000_tokens_in_a_trained_range_of_1024(
    tmp_path: Path, base_model: Path, spans: list[tuple[int, int]], n_prompt: int
) -> None:
    folder = shutil.copytree(base_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = MAX_CONTEXT
    (folder / "config.json").write_text(json.dumps(config))
    llama = mlx_llama.load(folder)
    session = llama.session(context=CAPACITY, on_full="slide", keep=KEEP, prefill_chunk=256)
    ids = np.random.RandomState(0).randint(3, llama.config.vocab_size, n_prompt).tolist()
    told, memory = list[int](), list[int]()
    steps = session.complete(
        ids, max_tokens=N_TOKENS - n_prompt, ignore_eos=True, temperature=1.0, seed=0, logprobs=1,
        on_forget=told.append,
    )  # fmt: skip
    for number, step in enumerate(steps, n_prompt + 1):
        assert step.logprob is not None and math.isfinite(step.logprob)
        if number % 1000 == 0:
            memory.append(mx.get_active_memory())
    cache = session.cache
    assert number == N_TOKENS and cache.offset in (N_TOKENS - 1, N_TOKENS)
    assert (cache.held, cache.forgotten) == (CAPACITY, cache.offset - CAPACITY)
    assert told == sorted(set(told)) and told[-1] == step.stats.forgotten_tokens == cache.forgotten
    assert max(last for _, last in spans) == MAX_CONTEXT - 1
    starts = [first for first, _ in spans[:: llama.config.n_layers]]
    turns = [now for before, now in pairwise(starts) if now < before]
    assert len(turns) >= 20 and set(turns) == {CAPACITY}
    assert max(memory) - memory[0] < MOST_GROWTH


# One layer: its keys are those of the tokens alone, so that the oracle needs no long past.
FAR = Case(7, 2, 1, 16, 5e5, dim=32, n_layers=1, vocab_size=SPM_VOCAB)
N_BEFORE, N_BEHIND = MAX_META - 20, 60


@pytest.fixture(scope="module")
def far() -> tuple[LlamaModel, KVCache, list[int]]:
    """A model, a cache that has read up to 20 tokens before the end of the range, and the text."""
    weights, raw = random_model(FAR)
    config = config_from_hf(raw, kind="llama3", is_tied=None)
    model = build_model(config, arrays_of(weights), dtype=mx.float32)
    cache = KVCache(config, capacity=CAPACITY, keep=KEEP, slides=True)
    ids = np.random.RandomState(1).randint(0, SPM_VOCAB, N_BEFORE + N_BEHIND).tolist()
    read(model, cache, ids[:N_BEFORE], chunk=512)
    return model, cache, ids


@pytest.mark.parametrize("sizes", [[1] * N_BEHIND, [7, 1, 40, 12], [N_BEHIND]], ids=len)
def test_text_goes_on_beyond_131072_as_the_oracle_says(
    far: tuple[LlamaModel, KVCache, list[int]], spans: list[tuple[int, int]], sizes: Sequence[int]
) -> None:
    weights, raw = random_model(FAR)
    model, before, ids = far
    cache, oracle = before.fork(), oracle_after(weights, raw, ids[:N_BEFORE])
    assert cache.position == oracle.position == MAX_META - 20
    for size in sizes:
        end = cache.offset + size
        while cache.offset < end:
            part = ids[cache.offset : min(cache.offset + cache.pass_limit, end)]
            found = np.asarray(model(mx.array(part)[None], cache)[0])
            expected = llama_logits(weights, raw, part, attend=attention_of(oracle))
            assert np.abs(found - expected).max() < FAR_TOLERANCE * np.abs(expected).max()
            assert (cache.position, cache.forgotten) == (oracle.position, oracle.forgotten)
    assert cache.position == CAPACITY + N_BEHIND - 20
    assert max(last for _, last in spans) == MAX_META - 1


def attention_of(oracle: CacheOracle) -> Attend:
    def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        return oracle.run(q[None], k[None], v[None], scale=FAR.head_dim**-0.5)[0][0]

    return attend


def oracle_after(weights: Weights, raw: dict[str, Any], ids: list[int]) -> CacheOracle:
    """Return an oracle that has seen a text; what it has forgotten by then is not computed."""
    oracle = CacheOracle(FAR.rope_theta, MAX_META, CAPACITY, KEEP, slides=True)
    llama_logits(weights, raw, ids[:KEEP] + ids[-CAPACITY:], attend=attention_of(oracle))
    n_between = len(ids) - KEEP - CAPACITY
    for rows in (oracle.keys, oracle.values):
        rows[KEEP:KEEP] = [np.full_like(rows[0], np.nan)] * n_between
    oracle.turns[KEEP:KEEP] = [0] * n_between
    oracle.first = len(ids) - oracle.window
    return oracle
