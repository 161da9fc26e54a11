"""One token's way through a whole model in one operation."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kernels_oracle import INSTALLED, float64, needs_kernels
from mlx_llama import ops
from mlx_llama.cache import KVBits, KVCache
from mlx_llama.config import QuantFormat, config_from_hf
from mlx_llama.linear import Dense, Packed, Stack
from mlx_llama.model import Block, LlamaModel
from mlx_llama.weights import build_model
from model_folders import arrays_of
from numpy_llama import llama_logits
from random_models import SPM_VOCAB, Case, random_model

CASE = Case(5, 6, 2, 32, 1e4, dim=96, n_layers=3, vocab_size=SPM_VOCAB)
WEIGHTS, RAW = random_model(CASE)
CONFIG = config_from_hf(RAW, kind="llama3", is_tied=None)
IDS = CASE.ids[:40]


def model_of(dtype: mx.Dtype = mx.float32, *, stored: mx.Dtype = mx.float32) -> LlamaModel:
    arrays = {name: array.astype(stored) for name, array in arrays_of(WEIGHTS).items()}
    return build_model(CONFIG, arrays, dtype=dtype)


def packed(matrix: Any, bits: int) -> Packed:
    words, scales, biases = mx.quantize(matrix.weight, group_size=32, bits=bits)
    return Packed(words, scales, biases, QuantFormat(bits, 32), mx.float32)


def packed_model(bits: int, *, mixed: bool = False) -> LlamaModel:
    """Return the model in so many bits; mixed: queries and gates in 8, apart from the others."""
    model = model_of()
    n_q, n_gate = CASE.n_heads * CASE.head_dim, RAW["intermediate_size"]

    def side(matrix: Any, n_first: int) -> Any:
        if not mixed:
            return packed(matrix, bits)
        first, rest = Dense(matrix.weight[:n_first]), Dense(matrix.weight[n_first:])
        return Stack((packed(first, 8), packed(rest, bits)))

    return LlamaModel(
        CONFIG,
        tok_embeddings=packed(model.tok_embeddings, bits),
        blocks=[
            Block(
                b.attention_norm, side(b.wqkv, n_q), packed(b.wo, bits), b.ffn_norm,
                side(b.w13, n_gate), packed(b.w2, bits),
            )
            for b in model.blocks
        ],
        norm=model.norm,
        output=packed(model.output, bits),
    )  # fmt: skip


def cache_of(bits: KVBits, *, capacity: int = 512, keep: int = 0) -> KVCache:
    return KVCache(
        CONFIG, capacity=capacity, keep=keep, slides=capacity < 100, bits=bits,
        storage=ops.cache_storage(mx.float32, bits),
    )  # fmt: skip


def logits(model: LlamaModel, cache: KVCache, token: int, *, at_once: bool) -> mx.array:
    """Return the scores behind one more token, at once or by single operations."""
    ids = mx.array([[token]], dtype=mx.uint32)
    found = model(ids, cache) if at_once else model.logits(model.hidden(ids, cache))
    mx.eval(found, cache.arrays)
    return found[0, 0]


def stored(cache: KVCache) -> list[np.ndarray]:
    """Return copies of all that a cache holds."""
    return [np.array(a.astype(mx.float32)) for layer in cache.fork().layers() for a in layer.arrays]


@needs_kernels
def test_scores_are_those_of_numpy_in_float64(kernels: object) -> None:
    model, cache = model_of(), cache_of(KVBits(32, 32))
    expected = llama_logits(WEIGHTS, RAW, IDS)
    mx.eval(model(mx.array(IDS[:30])[None], cache), cache.arrays)
    assert cache.has_slots
    for at in range(30, 40):
        found = float64(logits(model, cache, IDS[at], at_once=True))
        np.testing.assert_allclose(found, expected[at], atol=2e-5 * np.abs(expected).max())
    assert cache.offset == 40


@needs_kernels
@pytest.mark.parametrize("kv", [(32, 32), (16, 16), (8, 8), (4, 4), (8, 4), (16, 8)], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        model_of,
        lambda: model_of(stored=mx.bfloat16),
        lambda: packed_model(4),
        lambda: packed_model(3),
        lambda: packed_model(8),
        lambda: packed_model(4, mixed=True),
    ],
    ids=["dense", "bfloat16", "4", "3", "8", "mixed"],
)
def test_scores_and_cache_are_those_of_single_operations(make: Any, kv: tuple[int, int]) -> None:
    model, bits = make(), KVBits(*kv)
    at_once, apart = cache_of(bits), cache_of(bits)
    for cache in (at_once, apart):
        mx.eval(model(mx.array(IDS[:9])[None], cache), cache.arrays)
    for token in IDS[9:]:
        found = logits(model, at_once, token, at_once=True)
        expected = logits(model, apart, token, at_once=False)
        assert (found == expected).all().item()
    for a, b in zip(stored(at_once), stored(apart), strict=True):
        np.testing.assert_array_equal(a, b)


@needs_kernels
@pytest.mark.parametrize("keep", [0, 3])
def test_a_sliding_context_is_that_of_single_operations(keep: int) -> None:
    model = packed_model(4)
    at_once, apart = (cache_of(KVBits(), capacity=16, keep=keep) for _ in range(2))
    for cache in (at_once, apart):
        mx.eval(model(mx.array(IDS[:9])[None], cache), cache.arrays)
    for token in IDS[9:]:
        found = logits(model, at_once, token, at_once=True)
        expected = logits(model, apart, token, at_once=False)
        assert (found == expected).all().item()
    assert at_once.forgotten == apart.forgotten > 0
    for a, b in zip(stored(at_once), stored(apart), strict=True):
        np.testing.assert_array_equal(a, b)


@needs_kernels
def test_what_a_fork_or_a_reader_holds_is_not_written_to() -> None:
    model, cache = packed_model(4), cache_of(KVBits())
    mx.eval(model(mx.array(IDS[:9])[None], cache), cache.arrays)
    logits(model, cache, IDS[9], at_once=True)  # the buffers are its own now
    other, held = cache.fork(), cache.layers()
    before = stored(other)
    cache.trim(5)
    for token in IDS[20:30]:
        logits(model, cache, token, at_once=True)
    mx.eval([layer.arrays for layer in held])
    for a, b in zip(stored(other), before, strict=True):
        np.testing.assert_array_equal(a, b)
    for layer, pair in zip(held, zip(before[::2], before[1::2], strict=True), strict=True):
        for a, b in zip(layer.arrays, pair, strict=True):
            np.testing.assert_array_equal(np.array(a.astype(mx.float32)), b)
    fresh = cache_of(KVBits())
    mx.eval(model(mx.array([*IDS[:5], *IDS[20:29]])[None], fresh), fresh.arrays)
    expected = logits(model, fresh, IDS[29], at_once=False)
    cache.trim(1)
    found = logits(model, cache, IDS[29], at_once=True)
    np.testing.assert_allclose(float64(found), float64(expected), atol=2e-3)


@needs_kernels
def test_tokens_that_are_queued_behind_one_another_write_in_place() -> None:
    model, cache = packed_model(4), cache_of(KVBits())
    cache.reserve(500)
    mx.eval(model(mx.array(IDS[:9])[None], cache), cache.arrays)
    logits(model, cache, IDS[9], at_once=True)
    mx.synchronize()
    mx.reset_peak_memory()
    before, token = mx.get_active_memory(), mx.array([[IDS[10]]], dtype=mx.uint32)
    for _ in range(20):
        token = mx.argmax(model(token, cache), axis=-1).astype(mx.uint32)
        mx.async_eval(token)
    mx.eval(token, cache.arrays)
    one_layer = cache.nbytes // CASE.n_layers
    assert mx.get_peak_memory() - before < one_layer


@needs_kernels
def test_a_cache_without_rows_and_other_activations_go_by_single_operations() -> None:
    cache = cache_of(KVBits())
    assert not cache.has_slots
    model = packed_model(4)
    token = mx.array([[IDS[0]]], dtype=mx.uint32)
    assert model._pass_token(token, cache) is None
    assert model(token, cache).shape == (1, 1, SPM_VOCAB)
    assert cache.has_slots and cache.offset == 1
    half = model_of(mx.bfloat16)
    assert half._token_pass is None


@needs_kernels
def test_what_does_not_fit_together_is_refused() -> None:
    assert INSTALLED is not None
    row, norm, periods = mx.ones((8, 32)), mx.ones((32,)), mx.ones((8,))

    def dense(rows: int, columns: int = 32) -> list[Any]:
        return [([mx.ones((rows, columns))], 0, 0)]

    def make(**changes: Any) -> Any:
        layer = {"wqkv": dense(64), "wo": dense(32), "w13": dense(48), "w2": dense(32, 24)}
        layer |= {name: part for name, part in changes.items() if name in layer}
        layers = [(norm, layer["wqkv"], layer["wo"], norm, layer["w13"], layer["w2"])]
        return INSTALLED.TokenPass(
            ([row], 0, 0), layers, changes.get("norm", norm), dense(8), periods, 2, 1, 1e-5, 0.25
        )

    whole = make()
    for changes, text in (
        ({"wqkv": dense(65)}, "wqkv: 65 rows, expected 64"),
        ({"wo": dense(32, 33)}, r"wo: expected \(out, 32\)"),
        ({"w13": dense(47)}, "w13: 47 rows, expected gates"),
        ({"w2": dense(33, 24)}, "w2: 33 rows, expected 32"),
        ({"w2": [([mx.ones((32, 24))], 32, 4)]}, "w2: found 1 arrays, expected 3"),
        ({"norm": mx.ones((31,))}, "norm: expected 32 numbers"),
    ):
        with pytest.raises(ValueError, match=text):
            make(**changes)
    token, rows = mx.zeros((1, 1), dtype=mx.uint32), [[mx.zeros((1, 1, 4, 16))]]
    ok = (rows, rows, 3, 4, 3, None, None, False)
    assert whole(token, *ok)[0].shape == (1, 1, 8)
    for args, text in (
        ((rows, rows, 4, 4, 3, None, None, False), "keys: expected"),
        (([], rows, 3, 4, 3, None, None, False), "keys and values: found 0 and 1"),
        (([[mx.zeros((1, 1, 4, 8))]], rows, 3, 4, 3, None, None, False), "keys: rows of 8"),
        ((rows, rows, 3, 4, 3, mx.zeros((2, 3), dtype=mx.int32), None, False), "sight: expected"),
    ):
        with pytest.raises(ValueError, match=text):
            whole(token, *args)
    beyond = whole(mx.array([[8]], dtype=mx.uint32), *ok)[0]
    assert mx.isnan(beyond).all().item()


def peak_above(before: int, work: Any) -> int:
    """Return how far memory rises above what it was."""
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    work()
    mx.synchronize()
    return mx.get_peak_memory() - before


@needs_kernels
def test_buffers_are_given_away_once_passes_of_one_token_are_over() -> None:
    """A prompt behind them copied the whole cache, and nothing gave it back."""
    model, cache = model_of(), cache_of(KVBits(32, 32), capacity=60_000)
    before = mx.get_active_memory()
    cache.reserve(50_000)
    ids = mx.array(IDS[:9])[None]
    mx.eval(model(ids, cache), cache.arrays)
    for token in IDS[9:15]:
        logits(model, cache, token, at_once=True)
    held, one_layer = cache.nbytes, cache.nbytes // CASE.n_layers
    peak = peak_above(before, lambda: mx.eval(model(ids, cache), cache.arrays))
    assert held <= peak < held + one_layer // 2
    logits(model, cache, IDS[0], at_once=True)
    cache.clear()
    assert mx.get_active_memory() - before < one_layer // 2


@needs_kernels
def test_a_cache_that_grows_holds_old_and_new_of_one_layer_at_a_time() -> None:
    model, cache = model_of(), cache_of(KVBits(32, 32), capacity=60_000)
    before = mx.get_active_memory()
    cache.reserve(20_000)
    mx.eval(model(mx.array(IDS[:9])[None], cache), cache.arrays)
    logits(model, cache, IDS[9], at_once=True)
    old = cache.nbytes
    cache.reserve(50_000)
    peak = peak_above(before, lambda: logits(model, cache, IDS[10], at_once=True))
    assert cache.nbytes > 2 * old
    assert peak < cache.nbytes + cache.nbytes // CASE.n_layers + (1 << 20)
