"""The cache: what is stored where, how it grows, and that nothing is copied in between."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest

from mlx_llama.cache import STEP, KVCache, NoCache
from mlx_llama.config import config_from_hf
from mlx_llama.model import LlamaModel
from mlx_llama.weights import build_model
from model_folders import TINY, arrays_of
from random_models import random_model

# Of the largest logit: the same float32 sums in another order.
ORDER_TOLERANCE = 2e-5


def keys(n_tokens: int, *, start: int = 0, dtype: mx.Dtype = mx.float32) -> mx.array:
    """Return (1, 2, L, 4) that holds its positions."""
    positions = mx.arange(start, start + n_tokens).astype(dtype)
    return mx.broadcast_to(positions[None, None, :, None], (1, 2, n_tokens, 4)) + 0


def append(cache: KVCache, n_tokens: int, n_layers: int = 2) -> list[tuple[mx.array, mx.array]]:
    """Do what one forward pass does."""
    cache.reserve(n_tokens)
    new = keys(n_tokens, start=cache.offset)
    seen = [cache.append(layer, new + 1000 * layer, -new) for layer in range(n_layers)]
    cache.advance(n_tokens)
    mx.eval(seen, cache.arrays)
    return seen


def addresses(cache: KVCache) -> list[int]:
    """Return where the buffers lie in memory."""
    mx.eval(cache.arrays)
    return [np.asarray(memoryview(a)).__array_interface__["data"][0] for a in cache.arrays]


@pytest.mark.parametrize("sizes", [(1,), (5, 1, 1), (300,), (200, 100, 300, 1), (1, 600)])
def test_append_returns_every_token_in_order(sizes: Sequence[int]) -> None:
    cache = KVCache(2)
    for size in sizes:
        seen = append(cache, size)
        expected = keys(cache.offset)
        for layer, (k, v) in enumerate(seen):
            assert mx.array_equal(k, expected + 1000 * layer).item()
            assert mx.array_equal(v, -expected).item()
    assert cache.offset == sum(sizes)


def test_capacity_doubles_when_it_is_too_small() -> None:
    cache = KVCache(1)
    assert cache.capacity == STEP
    found = []
    for _ in range(1100):
        cache.reserve(1)
        cache.append(0, keys(1), keys(1))
        cache.advance(1)
        found.append(cache.capacity)
    assert sorted(set(found)) == [STEP, 2 * STEP, 4 * STEP, 8 * STEP]
    assert found.index(2 * STEP) == STEP  # the first token that did not fit


def test_a_jump_beyond_twice_the_capacity_is_reserved_at_once() -> None:
    cache = KVCache(1)
    append(cache, 10, n_layers=1)
    cache.reserve(5000)
    assert cache.capacity == 20 * STEP
    assert all(a.shape[2] == 20 * STEP for a in cache.arrays)


@pytest.mark.parametrize(
    ("asked", "limit", "expected"),
    [(1, None, 256), (256, None, 256), (257, None, 512), (0, None, 256), (9000, 300, 512),
     (10, 300, 256)],
)  # fmt: skip
def test_capacity_is_rounded_to_steps_within_the_limit(
    asked: int, limit: int | None, expected: int
) -> None:
    assert KVCache(1, capacity=asked, limit=limit).capacity == expected


def test_doubling_ends_at_the_limit() -> None:
    cache = KVCache(1, capacity=600, limit=1000)
    assert cache.capacity == 768
    append(cache, 700, n_layers=1)
    cache.reserve(200)
    assert cache.capacity == 1024


def test_growth_keeps_dtype_and_contents_and_frees_nothing_seen() -> None:
    cache = KVCache(1)
    cache.append(0, keys(200, dtype=mx.bfloat16), keys(200, dtype=mx.bfloat16))
    cache.advance(200)
    cache.reserve(100)
    k, _ = cache.append(0, keys(100, start=200, dtype=mx.bfloat16), keys(100, dtype=mx.bfloat16))
    assert k.dtype == mx.bfloat16 and k.shape[2] == 300
    assert mx.array_equal(k, keys(300, dtype=mx.bfloat16)).item()


def test_tokens_are_written_in_place_within_the_capacity() -> None:
    cache = KVCache(2, capacity=1000)
    append(cache, 3)
    before = addresses(cache)
    for _ in range(50):
        append(cache, 1)
        append(cache, 7)
        assert addresses(cache) == before
    assert cache.offset == 403


def test_decoding_allocates_no_second_buffer() -> None:
    """A copy of one layer's keys would show as 16 MiB on top."""
    cache = KVCache(4, capacity=65536)
    append(cache, 3, n_layers=4)
    mx.eval(cache.arrays)
    assert cache.nbytes == 4 * 2 * 2 * 65536 * 4 * 4
    buffer_nbytes = cache.nbytes // 8
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(20):
        append(cache, 1, n_layers=4)
    assert mx.get_peak_memory() - held < buffer_nbytes // 4


def test_a_models_decoding_writes_in_place() -> None:
    model, cache = tiny_model(), KVCache(TINY.n_layers, capacity=1000)
    mx.eval(model(mx.array(TINY.ids)[None], cache))
    before = addresses(cache)
    for token in TINY.ids[:20]:
        mx.eval(model(mx.array([[token]]), cache))
    assert addresses(cache) == before


def test_trimmed_tokens_are_forgotten_and_their_room_is_kept() -> None:
    cache = KVCache(2)
    append(cache, 300)
    before = addresses(cache)
    cache.trim(250)
    assert (cache.offset, cache.capacity) == (50, 512)
    k, v = append(cache, 10)[0]
    assert mx.array_equal(k, keys(60)).item() and mx.array_equal(v, -keys(60)).item()
    del k, v
    assert addresses(cache) == before
    cache.trim(0)
    cache.trim(60)
    assert cache.offset == 0


@pytest.mark.parametrize("n_tokens", [-1, 6, 10**9])
def test_trim_refuses_what_is_not_cached(n_tokens: int) -> None:
    cache = KVCache(2)
    append(cache, 5)
    with pytest.raises(ValueError, match="cannot trim"):
        cache.trim(n_tokens)
    assert cache.offset == 5


def tiny_model() -> LlamaModel:
    weights, raw = random_model(TINY)
    config = config_from_hf(raw, kind="llama2", is_tied=None)
    return build_model(config, arrays_of(weights), dtype=mx.float32)


@pytest.mark.parametrize(("first", "dropped"), [(40, 1), (40, 25), (40, 40), (300, 290)])
def test_a_trimmed_cache_continues_as_a_fresh_one(first: int, dropped: int) -> None:
    model = tiny_model()
    ids = np.random.RandomState(3).randint(0, 256, 400).tolist()
    kept, other = ids[: first - dropped], ids[first:]
    cache = KVCache(TINY.n_layers)
    model(mx.array(ids[:first])[None], cache)
    cache.trim(dropped)
    found = model(mx.array(other)[None], cache)[0]
    assert cache.offset == len(kept) + len(other)
    expected = model(mx.array(kept + other)[None])[0, len(kept) :]
    assert mx.max(mx.abs(found - expected)).item() < ORDER_TOLERANCE * mx.max(expected).item()


def test_growth_in_the_middle_of_a_text_changes_nothing() -> None:
    model = tiny_model()
    ids = mx.array(np.random.RandomState(4).randint(0, 256, 300))[None]
    grown, ample = KVCache(TINY.n_layers), KVCache(TINY.n_layers, capacity=2000)
    for start in range(0, 300, 50):
        chunk = ids[:, start : start + 50]
        assert mx.array_equal(model(chunk, grown), model(chunk, ample)).item()
    assert grown.capacity == 512


def test_no_cache_keeps_nothing() -> None:
    cache = NoCache()
    cache.reserve(5)
    k, v = cache.append(0, keys(5), -keys(5))
    cache.advance(5)
    cache.trim(3)
    assert mx.array_equal(k, keys(5)).item() and mx.array_equal(v, -keys(5)).item()
    assert cache.offset == 0 and cache.arrays == []


@pytest.mark.parametrize("cache", [NoCache(), KVCache(1)])
def test_one_query_needs_no_mask(cache: NoCache | KVCache) -> None:
    assert cache.mask(1) is None
    assert cache.mask(2) == "causal"
