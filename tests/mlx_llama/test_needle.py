"""A needle in a text: what each cache still finds, and what it has forgotten."""

from __future__ import annotations

import mlx.core as mx
import pytest

from induction import FILLERS, KEYS, VALUES, ask, document, induction_model, read
from mlx_llama.cache import KVBits, KVCache
from mlx_llama.cache.window import Window
from mlx_llama.model import LlamaModel

PLAIN, PACKED, PACKED_MORE = KVBits(), KVBits(8, 8), KVBits(4, 4)
CAPACITY, KEEP = 200, 16
SPAN = CAPACITY - KEEP
LENGTH = 1003
NEVER_TURNED, TURNED = 131072, 256  # trained positions


@pytest.fixture(scope="module")
def model() -> LlamaModel:
    return induction_model()


def everywhere(n_tokens: int) -> dict[int, int]:
    """Return one needle each at the beginning, at the end and in between."""
    last = len(KEYS) - 1
    return {2 + (n_tokens - 3) * number // last: number for number in KEYS}


@pytest.mark.parametrize("bits", [PLAIN, PACKED, PACKED_MORE], ids=str)
@pytest.mark.parametrize("chunk", [37, 128, 1000])
def test_full_cache_finds_it_at_any_depth(model: LlamaModel, chunk: int, bits: KVBits) -> None:
    cache = KVCache(model.config, capacity=1100, bits=bits)
    read(model, cache, document(1000, everywhere(1000)), chunk=chunk)
    assert ask(model, cache, KEYS) == [*VALUES]


@pytest.mark.parametrize("bits", [PLAIN, PACKED], ids=str)
def test_full_cache_finds_it_in_8192_tokens(model: LlamaModel, bits: KVBits) -> None:
    cache = KVCache(model.config, capacity=8200, bits=bits)
    read(model, cache, document(8191, everywhere(8191)), chunk=512)
    assert ask(model, cache, KEYS) == [*VALUES]


def test_full_cache_finds_it_in_bfloat16() -> None:
    model = induction_model(dtype=mx.bfloat16)
    cache = KVCache(model.config, capacity=2100)
    read(model, cache, document(2000, everywhere(2000)), chunk=128)
    assert ask(model, cache, KEYS) == [*VALUES]


def test_nothing_is_found_where_nothing_was_said(model: LlamaModel) -> None:
    cache = KVCache(model.config, capacity=1100)
    read(model, cache, document(1000, {500: 3}), chunk=128)
    found = ask(model, cache, KEYS)
    assert found[3] == VALUES[3]
    assert all(token in FILLERS for number, token in enumerate(found) if number != 3)


def sliding_cache(model: LlamaModel, bits: KVBits = PLAIN, packed_from: int = 0) -> KVCache:
    return KVCache(
        model.config,
        capacity=CAPACITY,
        keep=KEEP,
        slides=True,
        bits=bits,
        packed_from=packed_from,
    )


def turns(max_context: int, n_tokens: int) -> list[int]:
    """Return before which tokens the window is turned back, by its counts alone."""
    window, found = Window(CAPACITY, KEEP, max_context, slides=True), list[int]()
    while window.offset + window.room < n_tokens:
        window.advance(window.room)
        found.append(window.offset)
        window.turn()
    return found


# Where the values stand, by how many tokens the question stands behind LENGTH: seen and not seen.
SEEN = (
    lambda _: 2,
    lambda _: KEEP - 1,
    lambda later: LENGTH + later - SPAN + 1,  # the oldest of the window
    lambda _: LENGTH - 1,
)
UNSEEN = (
    lambda _: KEEP,
    lambda _: LENGTH // 2,
    lambda later: LENGTH + later - SPAN,  # just forgotten
)


@pytest.mark.parametrize("max_context", [NEVER_TURNED, TURNED])
@pytest.mark.parametrize(
    ("chunk", "n_single", "bits", "packed_from"),
    [
        (64, 0, PLAIN, 0),
        (64, SPAN + 40, PLAIN, 0),
        (13, 20, PACKED, 0),
        (500, 0, PACKED_MORE, 0),
        (500, 0, PACKED, 150),
    ],
    ids=str,
)
def test_sliding_cache_finds_what_is_kept_or_near_and_nothing_else(
    chunk: int, n_single: int, bits: KVBits, packed_from: int, max_context: int
) -> None:
    """n_single: how many tokens come one by one at the end, as in decoding."""
    model = induction_model(max_context=max_context)
    assert bool(turns(max_context, LENGTH)) == (max_context == TURNED)
    for places, is_seen in ((SEEN, True), (UNSEEN, False)):
        numbers = range(len(places))
        for is_together in (True, False):
            cache = sliding_cache(model, bits, packed_from)
            needles = {places[number](number * is_together): number for number in numbers}
            ids = document(LENGTH, needles)
            read(model, cache, ids[: LENGTH - n_single], chunk=chunk)
            read(model, cache, ids[LENGTH - n_single :], chunk=1)
            parts = [numbers] if is_together else [[number] for number in numbers]
            found = [token for part in parts for token in ask(model, cache, part)]
            if is_seen:
                assert found == [*VALUES[: len(places)]]
            else:
                assert all(token in FILLERS for token in found)


@pytest.mark.parametrize("bits", [PLAIN, PACKED, PACKED_MORE], ids=str)
def test_turn_between_key_and_value_parts_them_not(bits: KVBits) -> None:
    """The value hears the key at a distance of one, which the key must have been turned to."""
    model = induction_model(max_context=TURNED)
    places = turns(TURNED, LENGTH)
    numbers = [index % len(KEYS) for index in range(len(places))]
    ids = document(LENGTH, dict(zip(places, numbers, strict=True)))
    cache, found = sliding_cache(model, bits), list[int]()
    for place, number in zip(places, numbers, strict=True):
        shift = cache.window.shift
        read(model, cache, ids[cache.offset : place + 1], chunk=128)
        assert cache.window.shift > shift
        found += ask(model, cache, [number])
    assert len(places) > 10 and found == [VALUES[number] for number in numbers]
    # The last three are within the window still, all but the newest turned once more since.
    last = ask(model, cache, numbers[-3:])
    assert last == found[-3:]


def test_trimmed_ring_finds_what_it_still_holds() -> None:
    model = induction_model(max_context=TURNED)
    cache = sliding_cache(model)
    needles = {KEEP - 1: 0, LENGTH - SPAN + 10: 1, LENGTH - 60: 2, LENGTH - 40: 3}
    read(model, cache, document(LENGTH, needles), chunk=64)
    assert ask(model, cache, range(4)) == [*VALUES[:4]]
    cache.trim(50)
    *found, forgotten = ask(model, cache, range(4))
    assert found == [*VALUES[:3]] and forgotten in FILLERS
    read(model, cache, document(60, {30: 4}), chunk=64)
    found = ask(model, cache, KEYS)
    assert [found[number] for number in (0, 2, 4)] == [VALUES[number] for number in (0, 2, 4)]
    assert found[3] in FILLERS
