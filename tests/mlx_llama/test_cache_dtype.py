"""What a cache of half precision costs a model: little, and never what is finite."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlx_llama
from mlx_llama import ops
from mlx_llama.cache import KVBits, KVCache
from mlx_llama.cache.rows import Storage
from mlx_llama.config import config_from_hf
from mlx_llama.errors import OptionError
from mlx_llama.memory import cache_bytes_per_token
from mlx_llama.model import LlamaModel
from mlx_llama.weights import build_model
from mlx_llama_apps.main import main
from model_folders import arrays_of, write_hf
from random_models import CASES, random_model
from shared_data import shared

PLAIN, WIDE = KVBits(16, 16), KVBits(32, 32)
CASE = CASES["llama3"]
DIVERGENCE = 1e-4  # what the default may cost, mean over a text
needs_kernels = pytest.mark.skipif(ops.kernels() is None, reason="no native kernels")


def logits(model: LlamaModel, ids: list[int], bits: KVBits, chunk: int) -> np.ndarray:
    """Return what a text's tokens are followed by, (L, V), by way of a cache."""
    storage = ops.cache_storage(mx.float32, bits)
    cache = KVCache(model.config, capacity=len(ids), bits=bits, storage=storage)
    parts = [
        np.array(model(mx.array([ids[start : start + chunk]]), cache)[0], dtype=np.float64)
        for start in range(0, len(ids), chunk)
    ]
    return np.concatenate(parts)


def divergence(exact: np.ndarray, other: np.ndarray) -> float:
    """Return the mean KL divergence of next-token distributions, in nats."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x - x.max(axis=-1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))

    p, q = log_softmax(exact), log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


@needs_kernels
@pytest.mark.parametrize("chunk", [1, 100])
def test_half_precision_changes_next_to_nothing_of_a_story(tmp_path: Path, chunk: int) -> None:
    source, story = (
        shared("checkpoints/stories260k"),
        shared("checkpoints/stories260k.expected.txt"),
    )
    out = tmp_path / "out"
    assert main(["convert", str(source), "--no-quantize", "-o", str(out)]) == 0
    llama = mlx_llama.load(out)
    ids = llama.prompt_ids(story.read_text(encoding="utf-8"))
    exact, half = (logits(llama.model, ids, bits, chunk) for bits in (WIDE, PLAIN))
    assert 0 < divergence(exact, half) < DIVERGENCE / 10
    np.testing.assert_array_equal(exact.argmax(axis=-1), half.argmax(axis=-1))


@needs_kernels
@pytest.mark.parametrize("projection", ["k_proj", "v_proj"])
@pytest.mark.parametrize("bits", [PLAIN, KVBits(8, 8)], ids=str)
def test_keys_and_values_beyond_half_precision_give_finite_scores(
    projection: str, bits: KVBits
) -> None:
    """They became infinite in the cache, and every score that met them NaN."""
    weights, raw = random_model(CASE)
    name = f"model.layers.1.self_attn.{projection}.weight"
    arrays = arrays_of({**weights, name: weights[name] * 1e6})
    config = config_from_hf(raw, kind="llama2", is_tied=None)
    model = build_model(config, arrays, dtype=mx.float32)
    ids = CASE.ids[:40]
    cache = KVCache(config, capacity=64, bits=bits, storage=ops.cache_storage(mx.float32, bits))
    for start in range(0, 40, 9):  # prompts and single tokens
        assert mx.isfinite(model(mx.array([ids[start : start + 8]]), cache)).all().item()
        if start + 8 < 40:
            assert mx.isfinite(model(mx.array([[ids[start + 8]]]), cache)).all().item()
    largest = max(float(mx.abs(a).max().item()) for a in cache.arrays if a.dtype == mx.float16)
    assert bits != PLAIN or largest == 65504.0


def test_32_bits_keep_what_was_computed() -> None:
    weights, raw = random_model(CASE)
    name = "model.layers.1.self_attn.k_proj.weight"
    config = config_from_hf(raw, kind="llama2", is_tied=None)
    model = build_model(config, arrays_of({**weights, name: weights[name] * 1e3}), dtype=mx.float32)
    found = logits(model, CASE.ids[:40], WIDE, 7)
    expected = np.array(model(mx.array([CASE.ids[:40]]))[0])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("bits", "compute", "with_kernels", "without"),
    [
        (PLAIN, mx.float32, 2, 4),
        (WIDE, mx.float32, 4, 4),
        (PLAIN, mx.bfloat16, 2, 2),
        (PLAIN, mx.float16, 2, 2),
    ],
)
def test_bytes_of_a_token_are_those_of_its_dtype(
    bits: KVBits,
    compute: mx.Dtype,
    with_kernels: int,
    without: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_from_hf(random_model(CASE)[1], kind="llama2", is_tied=None)
    numbers = 2 * config.n_layers * config.n_kv_heads * config.head_dim
    for kernels, size in ((object(), with_kernels), (None, without)):
        monkeypatch.setattr(ops, "kernels", lambda kernels=kernels: kernels)
        assert cache_bytes_per_token(config, bits, compute) == size * numbers


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_more_bits_than_activations_have_are_refused(base_model: Path, dtype: str) -> None:
    llama = mlx_llama.load(base_model, dtype=dtype)
    with pytest.raises(OptionError, match=f"--kv-bits 32: the model computes in {dtype}, which"):
        llama.session(kv_bits=32)


@needs_kernels
@pytest.mark.parametrize(
    ("options", "dtype"), [({}, mx.float16), ({"kv_bits": 32}, mx.float32), ({"kv_bits": 8}, None)]
)
def test_sessions_keep_what_their_options_say(
    tmp_path: Path, options: dict[str, Any], dtype: mx.Dtype | None
) -> None:
    llama = mlx_llama.load(write_hf(tmp_path / "model"), dtype="float32")  # heads of 64
    session = llama.session(**options)
    list(session.complete([1, 5, 7], max_tokens=3, ignore_eos=True))
    assert {a.dtype for a in session.cache.arrays} == (
        {mx.uint32, mx.float16} if dtype is None else {dtype}
    )
    held = sum(a.nbytes for a in session.cache.arrays) // session.cache.rows
    assert held == cache_bytes_per_token(llama.config, session.cache.bits, mx.float32)


@needs_kernels
@pytest.mark.parametrize(
    "policy", [{}, {"slides": True, "keep": 4}, {"packed_from": 20}], ids=["full", "slides", "late"]
)
def test_packed_rows_are_to_the_bit_what_mlx_packs(policy: dict[str, Any]) -> None:
    config = config_from_hf(random_model(CASE)[1], kind="llama2", is_tied=None)
    config = replace(config, n_layers=2, head_dim=64, max_context=64)
    native, bits = ops.cache_storage(mx.float32, KVBits(8, 4)), KVBits(8, 4)
    ours, theirs = (
        KVCache(config, capacity=48, bits=bits, storage=storage, **policy)
        for storage in (native, Storage(native.dtype, native.put))
    )
    random = np.random.default_rng(0)
    while ours.offset < (200 if ours.slides else 48):
        n_tokens = min(int(random.integers(1, 9)), ours.pass_limit)
        shape = (2, 2, 1, config.n_kv_heads, n_tokens, config.head_dim)
        new = mx.array(random.normal(size=shape).astype(np.float32))
        for cache in (ours, theirs):
            cache.begin(n_tokens)
            for layer, (k, v) in enumerate(new):
                cache.append(layer, k, v)
            cache.advance(n_tokens)
        assert len(ours.arrays) == len(theirs.arrays) > 0
        for found, expected in zip(ours.arrays, theirs.arrays, strict=True):
            assert found.dtype == expected.dtype
            assert mx.array_equal(found, expected)
    assert ours.is_packed and ours.position < 64


@needs_kernels
def test_forks_and_undone_turns_share_no_writing(chat_model: Path) -> None:
    """The kernels append in place, but never to rows that somebody else still reads."""
    llama = mlx_llama.load(chat_model)
    one, alone = llama.session(), llama.session()
    for session in (one, alone):
        list(session.complete("hello the thing", max_tokens=8, temperature=0, ignore_eos=True))
    before = [np.array(a) for a in one.cache.arrays]
    other = one.fork()
    list(other.complete([*other.tokens, 7, 8, 9], max_tokens=8, temperature=0, ignore_eos=True))
    for array, was in zip(one.cache.arrays, before, strict=True):
        np.testing.assert_array_equal(np.array(array), was)
    again = [*one.tokens, 3, 4]
    found, expected = (
        [s.token_id for s in session.complete(again, max_tokens=8, temperature=0, ignore_eos=True)]
        for session in (one, alone)
    )
    assert found == expected
