"""The cache in small cases worked by hand, its limits, and the room it takes."""

from __future__ import annotations

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from cache_twins import (
    DENSE,
    DENSE_HEAD_DIM,
    N_HEADS,
    N_KV_HEADS,
    N_LAYERS,
    Shape,
    Tokens,
    attend,
    counts_of,
    feed,
    random_tokens,
    scale_of,
)
from mlx_llama.cache import KVBits, KVCache
from mlx_llama.errors import ContextOverflowError, OptionError

# --- worked by hand ----------------------------------------------------------------------------

# Keys and queries are the first unit vector, values the unit vector of their token: the result of
# a query at position p is the softmax of cos(p - position) over what it sees, token by token.
PROBE_DIM = 32
UNIT_TOLERANCE = 1e-5
# What a query sees: tokens and their positions, its own last.
Seen = dict[int, int]


class Probe:
    """A cache that is asked what a token sees, its oracle beside it."""

    def __init__(self, *, capacity: int, keep: int, max_context: int) -> None:
        shape = Shape(max_context, capacity, keep)
        self.config = replace(shape.config, head_dim=PROBE_DIM)
        self.cache = KVCache(self.config, capacity=capacity, keep=keep, slides=True)
        self.oracle = shape.oracle()

    def run(self, n_tokens: int, *, abandons: bool = False) -> np.ndarray:
        """Do one pass; return (n, S): the weight that each query gives to each token."""
        start = self.cache.offset
        k = np.zeros((N_LAYERS, N_KV_HEADS, n_tokens, PROBE_DIM), dtype=np.float32)
        v, q = k.copy(), np.zeros((N_LAYERS, N_HEADS, n_tokens, PROBE_DIM), dtype=np.float32)
        k[..., 0] = q[..., 0] = 1
        v[:, :, np.arange(n_tokens), np.arange(start, start + n_tokens)] = 1
        q *= math.sqrt(PROBE_DIM)
        tokens = Tokens(q, k, v)
        if abandons:
            self.cache.begin(n_tokens)
            mx.eval([attend(self.cache, layer, tokens) for layer in range(N_LAYERS)])
            return v[0, 0]
        found = feed(self.cache, tokens)
        self.oracle.run(q, k, v, scale=scale_of(tokens))
        assert np.ptp(found, axis=(0, 1)).max() < UNIT_TOLERANCE  # all layers and heads alike
        return found[0, 0]

    def expect(self, *rows: Seen) -> None:
        """Feed as many tokens as there are rows and compare what each sees."""
        during = self.oracle.fork()
        during.turn_if_due()
        found = self.run(len(rows))
        for token, (weights, seen) in enumerate(zip(found, rows, strict=True), during.offset):
            assert during.seen(token) == [*seen]
            assert [during.position_of(s) for s in seen] == [*seen.values()]
            distances = seen[token] - np.array([*seen.values()])
            expected = np.zeros(PROBE_DIM)
            expected[[*seen]] = np.exp(np.cos(distances))
            np.testing.assert_allclose(
                weights, expected / expected.sum(), rtol=0, atol=UNIT_TOLERANCE
            )

    def skip_to(self, token: int) -> None:
        while self.cache.offset < token:
            self.run(1)

    def counts(self) -> tuple[int, int, int, int]:
        """Return offset, position, held, forgotten."""
        assert counts_of(self.cache) == counts_of(self.oracle)
        cache = self.cache
        return cache.offset, cache.position, cache.held, cache.forgotten

    def trim(self, n_tokens: int) -> None:
        self.cache.trim(n_tokens)
        self.oracle.trim(n_tokens)


def test_window_of_four_behind_two_kept_tokens() -> None:
    probe = Probe(capacity=6, keep=2, max_context=10)
    probe.expect({0: 0})
    probe.expect({0: 0, 1: 1})
    probe.expect({0: 0, 1: 1, 2: 2})
    probe.skip_to(5)
    assert probe.counts() == (5, 5, 5, 0)
    probe.expect({0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5})
    assert probe.counts() == (6, 6, 6, 0)
    probe.expect({0: 0, 1: 1, 3: 3, 4: 4, 5: 5, 6: 6})
    assert probe.counts() == (7, 7, 6, 1)
    probe.skip_to(9)
    probe.expect({0: 0, 1: 1, 6: 6, 7: 7, 8: 8, 9: 9})
    # Position 10 does not exist: the window 6..9 moves to 2..5, right behind the kept tokens.
    assert probe.counts() == (10, 10, 6, 4)
    probe.expect({0: 0, 1: 1, 7: 3, 8: 4, 9: 5, 10: 6})
    assert probe.counts() == (11, 7, 6, 5)
    probe.skip_to(13)
    probe.expect({0: 0, 1: 1, 10: 6, 11: 7, 12: 8, 13: 9})
    probe.expect({0: 0, 1: 1, 11: 3, 12: 4, 13: 5, 14: 6})
    assert probe.counts() == (15, 7, 6, 9)


def test_one_pass_over_the_whole_window_and_more() -> None:
    """Each query has a window of its own, and tokens are forgotten only when the pass ends."""
    probe = Probe(capacity=5, keep=2, max_context=9)
    assert probe.cache.pass_limit == 9
    probe.expect(
        {0: 0},
        {0: 0, 1: 1},
        {0: 0, 1: 1, 2: 2},
        {0: 0, 1: 1, 2: 2, 3: 3},
        {0: 0, 1: 1, 2: 2, 3: 3, 4: 4},
        {0: 0, 1: 1, 3: 3, 4: 4, 5: 5},
        {0: 0, 1: 1, 4: 4, 5: 5, 6: 6},
    )
    assert probe.counts() == (7, 7, 5, 2)
    assert probe.cache.pass_limit == 2
    probe.expect({0: 0, 1: 1, 5: 5, 6: 6, 7: 7}, {0: 0, 1: 1, 6: 6, 7: 7, 8: 8})
    # 6, 7, 8 move from their places to 2, 3, 4: four tokens fit until the next turn.
    assert probe.counts() == (9, 9, 5, 4)
    assert probe.cache.pass_limit == 4
    probe.expect({0: 0, 1: 1, 7: 3, 8: 4, 9: 5}, {0: 0, 1: 1, 8: 4, 9: 5, 10: 6})
    assert probe.counts() == (11, 7, 5, 6)


def test_capacity_of_the_whole_context_leaves_a_margin_at_each_turn() -> None:
    """Of 8 positions a sixteenth is 0, but 1 at least: each token finds the window turned."""
    probe = Probe(capacity=8, keep=2, max_context=8)
    probe.skip_to(8)
    assert probe.counts() == (8, 8, 8, 0)
    assert probe.cache.pass_limit == 1
    probe.expect({0: 0, 1: 1, 3: 2, 4: 3, 5: 4, 6: 5, 7: 6, 8: 7})
    assert probe.counts() == (9, 8, 8, 1)
    probe.expect({0: 0, 1: 1, 4: 2, 5: 3, 6: 4, 7: 5, 8: 6, 9: 7})
    assert probe.counts() == (10, 8, 8, 2)


def test_margin_is_a_sixteenth_of_the_context() -> None:
    """Of 32 positions 2: at token 32 the two oldest are forgotten, and again at 34."""
    probe = Probe(capacity=32, keep=0, max_context=32)
    assert probe.cache.pass_limit == 32
    probe.run(32)
    assert probe.counts() == (32, 32, 32, 0)
    assert probe.cache.pass_limit == 2
    shape = Shape(32, 32)
    feed(probe.cache, replace_dim(random_tokens(shape, 1, 0)))
    cache = probe.cache
    assert (cache.offset, cache.position, cache.held, cache.forgotten) == (33, 31, 31, 2)
    assert cache.pass_limit == 1
    feed(probe.cache, replace_dim(random_tokens(shape, 1, 1)))
    assert (cache.offset, cache.position, cache.held, cache.forgotten) == (34, 32, 32, 2)
    assert cache.pass_limit == 2


def replace_dim(tokens: Tokens) -> Tokens:
    q, k, v = (np.tile(x, PROBE_DIM // x.shape[-1]) for x in (tokens.q, tokens.k, tokens.v))
    return Tokens(q, k, v)


def test_trim_leaves_what_the_window_had() -> None:
    """What the window left behind does not come back; what it had is seen again."""
    probe = Probe(capacity=6, keep=2, max_context=10)
    probe.skip_to(9)
    assert probe.counts() == (9, 9, 6, 3)
    probe.trim(2)
    assert probe.counts() == (7, 7, 4, 3)
    probe.expect({0: 0, 1: 1, 5: 5, 6: 6, 7: 7}, {0: 0, 1: 1, 5: 5, 6: 6, 7: 7, 8: 8})
    assert probe.counts() == (9, 9, 6, 3)
    probe.trim(5)
    assert probe.counts() == (4, 4, 2, 2)
    probe.expect({0: 0, 1: 1, 4: 4}, {0: 0, 1: 1, 4: 4, 5: 5})
    assert probe.counts() == (6, 6, 4, 2)
    probe.trim(4)
    assert probe.counts() == (2, 2, 2, 0)
    probe.expect({0: 0, 1: 1, 2: 2}, {0: 0, 1: 1, 2: 2, 3: 3})
    assert probe.counts() == (4, 4, 4, 0)


def test_trim_after_a_turn_goes_no_lower_than_the_kept_tokens() -> None:
    probe = Probe(capacity=6, keep=2, max_context=10)
    probe.skip_to(12)  # turned at 10: a token of the window stands 4 below its number
    assert probe.counts() == (12, 8, 6, 6)
    probe.trim(3)
    assert probe.counts() == (9, 5, 3, 6)
    probe.expect({0: 0, 1: 1, 8: 4, 9: 5})
    probe.trim(5)
    assert probe.counts() == (5, 2, 2, 3)
    probe.expect({0: 0, 1: 1, 5: 2}, {0: 0, 1: 1, 5: 2, 6: 3})
    probe.trim(5)
    assert probe.counts() == (2, 2, 2, 0)
    probe.expect({0: 0, 1: 1, 2: 2})


def test_abandoned_pass_takes_no_token_from_a_trim_after_it() -> None:
    """A pass that came to nothing must not lie where the oldest of the window did."""
    probe = Probe(capacity=6, keep=2, max_context=20)
    probe.skip_to(9)
    probe.run(3, abandons=True)
    assert probe.counts() == (9, 9, 6, 3)
    probe.trim(1)
    assert probe.counts() == (8, 8, 5, 3)
    probe.expect({0: 0, 1: 1, 5: 5, 6: 6, 7: 7, 8: 8})


def test_abandoned_token_has_taken_the_row_of_the_oldest_and_says_so() -> None:
    probe = Probe(capacity=6, keep=2, max_context=20)
    probe.skip_to(9)
    probe.run(1, abandons=True)
    cache = probe.cache
    assert (cache.offset, cache.position, cache.held, cache.forgotten) == (9, 9, 5, 4)


def test_fork_and_original_go_on_apart() -> None:
    probe, other = (Probe(capacity=6, keep=2, max_context=10) for _ in range(2))
    probe.skip_to(9)
    other.cache, other.oracle = probe.cache.fork(), probe.oracle.fork()
    other.trim(2)
    probe.expect({0: 0, 1: 1, 6: 6, 7: 7, 8: 8, 9: 9})
    other.expect({0: 0, 1: 1, 5: 5, 6: 6, 7: 7})
    probe.expect({0: 0, 1: 1, 7: 3, 8: 4, 9: 5, 10: 6})
    other.expect({0: 0, 1: 1, 5: 5, 6: 6, 7: 7, 8: 8})
    assert probe.counts() == (11, 7, 6, 5)
    assert other.counts() == (9, 9, 6, 3)


# --- limits, room ------------------------------------------------------------------------------


def test_passes_end_where_packing_starts() -> None:
    shape = Shape(64, 64, slides=False, bits=KVBits(8, 8), packed_from=10)
    cache = shape.cache()
    assert cache.pass_limit == 10
    feed(cache, random_tokens(shape, 7, 0))
    assert cache.pass_limit == 3
    feed(cache, random_tokens(shape, 3, 1))
    assert cache.pass_limit == 54


def test_packing_starts_when_so_many_tokens_are_counted() -> None:
    """Dense results until then, and memory falls then."""
    shape = Shape(64, 64, slides=False, bits=KVBits(4, 4), packed_from=32)
    late, dense = shape.cache(), replace(shape, bits=DENSE)
    assert dense.head_dim == DENSE_HEAD_DIM
    plain = KVCache(shape.config, capacity=64)
    tokens = random_tokens(shape, 33, 0)
    assert np.array_equal(feed(late, tokens[:32]), feed(plain, tokens[:32]))
    assert not np.array_equal(feed(late, tokens[32:]), feed(plain, tokens[32:]))


def test_stopping_cache_refuses_what_does_not_fit() -> None:
    shape = Shape(20, 12, slides=False)
    cache = shape.cache()
    with pytest.raises(ContextOverflowError):
        cache.begin(13)
    feed(cache, random_tokens(shape, 11, 0))
    assert cache.pass_limit == 1
    with pytest.raises(ContextOverflowError):
        cache.begin(2)
    feed(cache, random_tokens(shape, 1, 1))
    assert cache.pass_limit == 0
    with pytest.raises(ContextOverflowError):
        cache.begin(1)
    assert (cache.offset, cache.position, cache.held, cache.forgotten) == (12, 12, 12, 0)


@pytest.mark.parametrize(
    ("capacity", "keep", "slides"),
    [(33, 0, False), (33, 0, True), (8, 8, False), (8, 9, False), (8, 7, True), (1, 0, True)],
)
def test_sizes_that_cannot_be_are_refused(capacity: int, keep: int, slides: bool) -> None:
    with pytest.raises(OptionError):
        Shape(32, capacity, keep, slides).cache()


@pytest.mark.parametrize("n_tokens", [-1, 10, 10**9])
@pytest.mark.parametrize("slides", [False, True])
def test_trim_refuses_what_was_not_counted(n_tokens: int, slides: bool) -> None:
    shape = Shape(20, 12, slides=slides)
    cache = shape.cache()
    feed(cache, random_tokens(shape, 9, 0))
    with pytest.raises(ValueError, match="trim"):
        cache.trim(n_tokens)
    assert (cache.offset, cache.position, cache.held, cache.forgotten) == (9, 9, 9, 0)


@pytest.mark.parametrize("bits", [DENSE, KVBits(4, 4)])
@pytest.mark.parametrize(
    ("slides", "n_tokens", "n_left"), [(False, 2900, 10), (True, 2900, 10), (True, 3400, 5)]
)
def test_rows_go_back_when_little_is_left(
    bits: KVBits, slides: bool, n_tokens: int, n_left: int
) -> None:
    """Once nothing is missing any more: of 3400 tokens 400 were forgotten, behind the first 5."""
    shape = Shape(4096, 3000, 5, slides, bits)
    cache = shape.cache()
    before = cache.rows
    feed(cache, random_tokens(shape, n_tokens, 0), 1)
    full = cache.rows
    assert before < full and min(n_tokens, 3000) <= full <= 3000
    fork = cache.fork()
    for smaller, give_back in ((cache, lambda: cache.trim(n_tokens - n_left)), (fork, fork.clear)):
        give_back()
        assert smaller.rows < full / 2
        feed(smaller, random_tokens(shape, 3, 1))
        assert smaller.rows < full / 2


@pytest.mark.parametrize("slides", [False, True])
def test_reserved_room_is_enough(slides: bool) -> None:
    shape = Shape(4096, 3000, 5, slides)
    cache = shape.cache()
    feed(cache, random_tokens(shape, 20, 0))
    cache.reserve(2000)
    reserved = cache.rows
    assert 2020 <= reserved <= 3000
    for seed in range(20):
        feed(cache, random_tokens(shape, 100, seed), 1)
        assert cache.rows == reserved
