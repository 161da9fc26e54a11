"""The cache: what is stored where, how it grows, and that nothing is copied in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_llama.cache import KVBits, KVCache, NoCache, kv
from mlx_llama.cache.kv import STEP
from mlx_llama.cache.rows import Stored
from mlx_llama.cache.view import Sees, View
from mlx_llama.config import ModelConfig, config_from_hf
from mlx_llama.errors import OptionError
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


def config_of(n_layers: int = 2, **changes: Any) -> ModelConfig:
    _, raw = random_model(TINY)
    config = config_from_hf(raw, kind="llama2", is_tied=None)
    return replace(config, n_layers=n_layers, **changes)


def cache_of(n_layers: int = 2, capacity: int = 100_000, **options: Any) -> KVCache:
    return KVCache(config_of(n_layers), capacity=capacity, **options)


def rows_of(view: View) -> tuple[mx.array, mx.array]:
    """Return the keys and values that a view shows."""
    parts = [(k.dense(k.arrays[0].dtype), v.dense(v.arrays[0].dtype)) for k, v in view.parts]
    return tuple(mx.concatenate(each, axis=2) for each in zip(*parts, strict=True))  # pyright: ignore


def append(cache: KVCache, n_tokens: int, n_layers: int = 2) -> list[tuple[mx.array, mx.array]]:
    """Do what one forward pass does."""
    cache.begin(n_tokens)
    new = keys(n_tokens, start=cache.offset)
    seen = [rows_of(cache.append(layer, new + 1000 * layer, -new)) for layer in range(n_layers)]
    cache.advance(n_tokens)
    mx.eval(seen, cache.arrays)
    return seen


def addresses(cache: KVCache) -> list[int]:
    """Return where the buffers lie in memory."""
    mx.eval(cache.arrays)
    return [np.asarray(memoryview(a)).__array_interface__["data"][0] for a in cache.arrays]


@pytest.mark.parametrize("sizes", [(1,), (5, 1, 1), (300,), (200, 100, 300, 1), (1, 600)])
def test_append_returns_every_token_in_order(sizes: Sequence[int]) -> None:
    cache = cache_of()
    for size in sizes:
        seen = append(cache, size)
        expected = keys(cache.offset)
        for layer, (k, v) in enumerate(seen):
            assert mx.array_equal(k, expected + 1000 * layer).item()
            assert mx.array_equal(v, -expected).item()
    assert cache.offset == sum(sizes)


def test_buffers_double_when_they_are_too_small() -> None:
    cache, found = cache_of(1), []
    for _ in range(1100):
        cache.begin(1)
        cache.append(0, keys(1), keys(1))
        cache.advance(1)
        found.append(cache.rows)
    assert sorted(set(found)) == [STEP, 2 * STEP, 4 * STEP, 8 * STEP]
    assert found.index(2 * STEP) == STEP  # the first token that did not fit


@pytest.mark.parametrize(
    ("asked", "capacity", "expected"), [(1, 1000, 256), (257, 1000, 512), (9000, 300, 300)]
)
def test_reserving_makes_buffers_in_steps_within_the_capacity(
    asked: int, capacity: int, expected: int
) -> None:
    cache = cache_of(1, capacity)
    cache.reserve(asked)
    assert cache.rows == expected
    append(cache, 10, n_layers=1)
    assert all(a.shape[2] == expected for a in cache.arrays)


def test_growth_keeps_dtype_and_contents() -> None:
    cache = cache_of(1)
    cache.begin(200)
    cache.append(0, keys(200, dtype=mx.bfloat16), keys(200, dtype=mx.bfloat16))
    cache.advance(200)
    cache.begin(100)
    new = keys(100, start=200, dtype=mx.bfloat16)
    k, _ = rows_of(cache.append(0, new, keys(100, dtype=mx.bfloat16)))
    assert k.dtype == mx.bfloat16 and k.shape[2] == 300
    assert mx.array_equal(k, keys(300, dtype=mx.bfloat16)).item()


def test_tokens_are_written_in_place_within_the_capacity() -> None:
    cache = cache_of()
    cache.reserve(1000)
    append(cache, 3)
    before = addresses(cache)
    for _ in range(50):
        append(cache, 1)
        append(cache, 7)
        assert addresses(cache) == before
    assert cache.offset == 403


def test_decoding_allocates_no_second_buffer() -> None:
    """A copy of one layer's keys would show as 16 MiB on top."""
    cache = cache_of(4, 65536)
    cache.reserve(65536)
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
    model = tiny_model()
    cache = KVCache(model.config, capacity=1000)
    cache.reserve(1000)
    mx.eval(model(mx.array(TINY.ids)[None], cache))
    before = addresses(cache)
    for token in TINY.ids[:20]:
        mx.eval(model(mx.array([[token]]), cache))
    assert addresses(cache) == before


def test_trimmed_tokens_are_forgotten_and_their_room_is_kept() -> None:
    cache = cache_of()
    append(cache, 300)
    before = addresses(cache)
    cache.trim(250)
    assert (cache.offset, cache.rows) == (50, 512)
    k, v = append(cache, 10)[0]
    assert mx.array_equal(k, keys(60)).item() and mx.array_equal(v, -keys(60)).item()
    assert addresses(cache) == before
    cache.trim(60)
    assert cache.offset == 0


@pytest.mark.parametrize("n_tokens", [-1, 6, 10**9])
def test_trim_refuses_what_is_not_cached(n_tokens: int) -> None:
    cache = cache_of()
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
    cache = KVCache(model.config, capacity=2000)
    model(mx.array(ids[:first])[None], cache)
    cache.trim(dropped)
    found = model(mx.array(other)[None], cache)[0]
    assert cache.offset == len(kept) + len(other)
    expected = model(mx.array(kept + other)[None])[0, len(kept) :]
    assert mx.max(mx.abs(found - expected)).item() < ORDER_TOLERANCE * mx.max(expected).item()


def test_growth_in_the_middle_of_a_text_changes_nothing() -> None:
    model = tiny_model()
    ids = mx.array(np.random.RandomState(4).randint(0, 256, 300))[None]
    grown, ample = (KVCache(model.config, capacity=2000) for _ in range(2))
    ample.reserve(2000)
    for start in range(0, 300, 50):
        chunk = ids[:, start : start + 50]
        assert mx.array_equal(model(chunk, grown), model(chunk, ample)).item()
    assert grown.rows == 512 and ample.rows == 2000


def test_no_cache_keeps_nothing() -> None:
    cache = NoCache()
    cache.begin(5)
    view = cache.append(0, keys(5), -keys(5))
    cache.advance(5)
    k, v = rows_of(view)
    assert mx.array_equal(k, keys(5)).item() and mx.array_equal(v, -keys(5)).item()
    assert cache.position == 0


def test_a_query_that_sees_everything_needs_no_mask() -> None:
    cache = cache_of(1, 8, keep=2, slides=True)
    for n_tokens in (5, 1):  # before the ring is full
        cache.begin(n_tokens)
        view = cache.append(0, keys(n_tokens), keys(n_tokens))
        assert view.mask(1) is Sees.ALL and view.sight.is_causal
        cache.advance(n_tokens)
    for _ in range(20):  # and after
        cache.begin(1)
        assert cache.append(0, keys(1), keys(1)).mask(1) is Sees.ALL
        cache.advance(1)


def test_heads_that_cannot_be_packed_are_refused_by_name() -> None:
    with pytest.raises(OptionError, match="heads of 24 numbers"):
        KVCache(config_of(head_dim=24), capacity=10, bits=KVBits(8, 8))


def test_endless_generation_turns_back_and_takes_no_more_memory() -> None:
    """20,000 tokens in a trained range of 1024: the position never leaves it."""
    cache = KVCache(config_of(1, max_context=1024, head_dim=4), capacity=200, keep=4, slides=True)
    new, turns, sizes = keys(1), 0, set[int]()
    for _ in range(20_000):
        before = cache.position
        cache.begin(1)
        turns += cache.position < before
        cache.append(0, new, new)
        assert cache.position < 1024
        cache.advance(1)
        mx.eval(cache.arrays)
        sizes.add(cache.nbytes)
    assert turns >= 20 and max(sizes) == 200 * 2 * 2 * 4 * 4
    assert (cache.offset, cache.held) == (20_000, 200)


# --- upkeep --------------------------------------------------------------------------------------


class StoppedError(Exception):
    """Stands for Ctrl-C, or for memory that is not there."""


def due_cache(kind: str) -> KVCache:
    """Return a cache of two layers whose next pass must turn back, or pack."""
    config = config_of(2, max_context=64)
    if kind == "turn":
        cache = KVCache(config, capacity=48, keep=4, slides=True)
    elif kind == "packed turn":
        cache = KVCache(config, capacity=48, keep=4, slides=True, bits=KVBits(8, 8))
    else:
        cache = KVCache(config, capacity=64, bits=KVBits(8, 4), packed_from=40)
    while cache.offset < (40 if kind == "pack" else 64):
        feed_one(cache)
    return cache


def feed_one(cache: KVCache) -> list[np.ndarray]:
    """Feed one token whose numbers depend on its place; return what is shown of all rows."""
    mx.random.seed(cache.offset)
    cache.begin(1)
    shown = []
    for layer in range(2):
        k, v = mx.random.normal((2, 1, 1, 1, cache.config.head_dim))
        shown += [np.asarray(rows) for rows in rows_of(cache.append(layer, k, v))]
    cache.advance(1)
    return shown


@pytest.mark.parametrize("kind", ["turn", "packed turn", "pack"])
@pytest.mark.parametrize("n_pieces", [1, 2, 3])
def test_upkeep_that_was_left_goes_on_there(
    kind: str, n_pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv, "TURN_ROWS", 20)
    whole, stopped = due_cache(kind), due_cache(kind)
    pieces = stopped.upkeep()
    for _ in range(min(n_pieces, 2) if kind == "pack" else n_pieces):
        next(pieces)
    pieces.close()
    other = stopped.fork()
    expected = feed_one(whole)
    for cache in (stopped, other):
        for found, wanted in zip(feed_one(cache), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)
        assert cache.window == whole.window


@pytest.mark.parametrize(
    ("kind", "step"), [("turn", "with_numbers"), ("packed turn", "with_numbers"), ("pack", "kept")]
)
def test_upkeep_that_failed_is_done_by_the_next_pass(kind: str, step: str) -> None:
    whole, stopped = due_cache(kind), due_cache(kind)
    real, calls = getattr(Stored, step), 0

    def fails_once(*args: Any) -> Stored:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise StoppedError
        return real(*args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Stored, step, fails_once)
        with pytest.raises(StoppedError):
            stopped.begin(1)
    for found, wanted in zip(feed_one(stopped), feed_one(whole), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_trimming_ends_what_was_left_first() -> None:
    whole, stopped = due_cache("pack"), due_cache("pack")
    next(stopped.upkeep())
    stopped.trim(10)
    for _ in whole.upkeep():
        pass
    whole.trim(10)
    for found, wanted in zip(feed_one(stopped), feed_one(whole), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_plain_buffers_are_no_longer_than_what_comes_before_packing() -> None:
    cache = cache_of(2, 5000, bits=KVBits(8, 8), packed_from=300)
    cache.reserve(4000)
    assert cache.rows == 2 * STEP
    for _ in range(3):
        append_packable(cache, 100)
    assert cache.rows == 2 * STEP
    append_packable(cache, 1)
    assert cache.is_packed and cache.rows == 16 * STEP


def append_packable(cache: KVCache, n_tokens: int) -> None:
    cache.begin(n_tokens)
    new = mx.random.normal((1, 1, n_tokens, cache.config.head_dim))
    for layer in range(2):
        cache.append(layer, new, new)
    cache.advance(n_tokens)
