"""The cache against a slow oracle: random operations, and small cases worked by hand."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from cache_oracle import CacheOracle
from mlx_llama import ops
from mlx_llama.cache import KVBits, KVCache, load_cache, save_cache
from mlx_llama.config import ModelConfig, config_from_hf
from mlx_llama.errors import ContextOverflowError, OptionError
from mlx_llama.rope import rope_periods
from random_models import CASES, random_model

N_LAYERS, N_HEADS, N_KV_HEADS = 2, 4, 2
THETA = 50.0  # every pair of features turns within a few tokens
DENSE_HEAD_DIM, PACKED_HEAD_DIM = 8, 32  # one group of 32 is the least that MLX packs
# Results lie within 4. At positions below 100 an angle is off by 1e-5 in float32 and each turn adds
# as much; a token seen too much or placed one off shows as 1e-2 and more.
DENSE_TOLERANCE = 1e-4
# The mean of whole numbers, of the largest of them: float32 sums in another order.
MEAN_TOLERANCE = 2e-6
# What packing does to one standard normal number: 32 of them span 4.2 on average, and rounding to
# 2**bits - 1 steps of that leaves an error of a step over sqrt(12). The oracle follows it to each
# result, for which the root mean square of a pass is 1 then. Room for passes with few results, for
# spans above the average and for MLX's steps, which it widens to store 0 exactly (measured over
# 15000 passes for each of PACKINGS: 2.1 at most, and 7.2 for a single result).
SPAN_OF_32 = 4.2
PACKED_ROOM, PACKED_ROOM_FOR_ONE = 2.5, 9.0

DENSE = KVBits(16, 16)
PACKINGS = (KVBits(8, 8), KVBits(4, 4), KVBits(8, 4), KVBits(16, 8))
POLICIES = ("stop", "slide", "slide at the end of the context")
CONTEXTS = (12, 24, 33, 64)


@dataclass(frozen=True, slots=True)
class Shape:
    """What one cache is made with."""

    max_context: int
    capacity: int
    keep: int = 0
    slides: bool = True
    bits: KVBits = DENSE
    packed_from: int = 0

    @property
    def packs(self) -> bool:
        return min(self.bits.keys, self.bits.values) < 16

    @property
    def head_dim(self) -> int:
        return PACKED_HEAD_DIM if self.packs else DENSE_HEAD_DIM

    @property
    def config(self) -> ModelConfig:
        return replace(
            CONFIG, head_dim=self.head_dim, max_context=self.max_context, rope_theta=THETA
        )

    def cache(self) -> KVCache:
        return KVCache(
            self.config,
            capacity=self.capacity,
            keep=self.keep,
            slides=self.slides,
            bits=self.bits,
            packed_from=self.packed_from,
        )

    def oracle(self) -> CacheOracle:
        return CacheOracle(
            THETA,
            self.max_context,
            self.capacity,
            self.keep,
            self.slides,
            packed_from=self.packed_from if self.packs else 0,
            key_error=packing_error(self.bits.keys),
            value_error=packing_error(self.bits.values),
        )


def packing_error(bits: int) -> float:
    return 0.0 if bits == 16 else SPAN_OF_32 / (2**bits - 1) / math.sqrt(12)


CONFIG = replace(
    config_from_hf(random_model(CASES["llama2"])[1], kind="llama2", is_tied=None),
    n_layers=N_LAYERS,
    n_heads=N_HEADS,
    n_kv_heads=N_KV_HEADS,
)


@dataclass(frozen=True, slots=True)
class Tokens:
    """What the projections of all layers give for some tokens, float32, RoPE not applied.

    q: (layers, H, L, D). k, v: (layers, K, L, D).
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray

    def __len__(self) -> int:
        return self.k.shape[2]

    def __getitem__(self, part: slice) -> Tokens:
        return Tokens(self.q[:, :, part], self.k[:, :, part], self.v[:, :, part])


def random_tokens(shape: Shape, n_tokens: int, *seed: int) -> Tokens:
    """Draw normal numbers; where the cache packs, the first head says exactly what is seen.

    Its queries are 0, so that it returns the mean of what is seen, and its values are whole
    numbers from 0 to the last step, both among them: packing keeps these as they are.
    """
    rng = np.random.RandomState(seed)

    def normal(heads: int) -> np.ndarray:
        drawn = rng.standard_normal((N_LAYERS, heads, n_tokens, shape.head_dim))
        return drawn.astype(np.float32)

    q, k, v = normal(N_HEADS), normal(N_KV_HEADS), normal(N_KV_HEADS)
    if shape.packs:
        q[:, : N_HEADS // N_KV_HEADS] = 0
        v[:, 0] = rng.randint(0, last_step(shape) + 1, v[:, 0].shape)
        v[:, 0, :, :2] = 0, last_step(shape)
    return Tokens(q, k, v)


def last_step(shape: Shape) -> int:
    return 2 ** min(shape.bits.values, 8) - 1


def feed(cache: KVCache, tokens: Tokens, n_queries: int | None = None) -> np.ndarray:
    """Do what a model does in one pass; return (layers, H, m, D) for the last m queries."""
    cache.begin(len(tokens))
    seen = [attend(cache, layer, tokens, n_queries) for layer in range(N_LAYERS)]
    cache.advance(len(tokens))
    mx.eval(seen)
    return np.stack([np.asarray(out)[0] for out in seen])


def attend(cache: KVCache, layer: int, tokens: Tokens, n_queries: int | None = None) -> mx.array:
    periods = rope_periods(cache_config(tokens))
    q, k, v = (mx.array(x[layer])[None] for x in (tokens.q, tokens.k, tokens.v))
    q, k = (ops.rotate(x, periods, cache.position) for x in (q, k))
    view = cache.append(layer, k, v)
    n_queries = len(tokens) if n_queries is None else n_queries
    return ops.attention(q[:, :, len(tokens) - n_queries :], view, scale=scale_of(tokens))


def cache_config(tokens: Tokens) -> ModelConfig:
    return replace(CONFIG, head_dim=tokens.k.shape[-1], rope_theta=THETA)


def scale_of(tokens: Tokens) -> float:
    return 1 / math.sqrt(tokens.k.shape[-1])


def counts_of(cache: KVCache | CacheOracle) -> dict[str, int]:
    names = ("offset", "position", "held", "forgotten")
    return {name: getattr(cache, name) for name in names}


class Twins:
    """A cache and its oracle, which get the same tokens and are compared after every step."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.cache = shape.cache()
        self.oracle = shape.oracle()
        self.most = 0  # tokens counted at once so far: what was packed stays so
        self.check()

    def check(self) -> None:
        assert counts_of(self.cache) == counts_of(self.oracle)
        # Trimmed below `packed_from`, what was packed may stay so: no pass need end there again.
        may_be_packed = self.most >= self.shape.packed_from
        limits = {self.oracle.pass_limit, *([self.oracle.room] if may_be_packed else [])}
        assert self.cache.pass_limit in limits
        if self.shape.slides:
            assert self.cache.rows <= self.shape.capacity

    def chunks(self, n_tokens: int) -> Iterator[int]:
        """Split as a caller does: no pass over the limit, none beyond a cache that stops."""
        while n_tokens > 0 and self.cache.pass_limit > 0:
            size = min(n_tokens, self.cache.pass_limit)
            yield size
            n_tokens -= size

    def run(self, n_tokens: int, seed: int, n_queries: int | None = None) -> None:
        for size in self.chunks(n_tokens):
            last = size if n_queries is None else min(n_queries, size)
            self.run_pass(random_tokens(self.shape, size, seed, self.oracle.offset), last)

    def run_pass(self, tokens: Tokens, n_queries: int) -> None:
        is_packed = self.shape.packs and self.most >= self.shape.packed_from
        found = feed(self.cache, tokens, n_queries)
        results = self.oracle.run(tokens.q, tokens.k, tokens.v, scale=scale_of(tokens))
        expected, deviation = (x[:, :, len(tokens) - n_queries :] for x in results)
        self.most = max(self.most, self.oracle.offset)
        self.check()
        assert found.shape == expected.shape
        if not self.shape.packs:
            np.testing.assert_allclose(found, expected, rtol=0, atol=DENSE_TOLERANCE)
            return
        exact = N_HEADS // N_KV_HEADS
        most = MEAN_TOLERANCE * last_step(self.shape)
        np.testing.assert_allclose(found[:, :exact], expected[:, :exact], rtol=0, atol=most)
        found, expected, deviation = (x[:, exact:] for x in (found, expected, deviation))
        if not is_packed:
            np.testing.assert_allclose(found, expected, rtol=0, atol=DENSE_TOLERANCE)
            return
        errors = np.maximum(np.abs(found - expected) - DENSE_TOLERANCE, 0) / (deviation + 1e-12)
        assert math.sqrt((errors**2).mean()) <= PACKED_ROOM
        assert errors.max() <= PACKED_ROOM_FOR_ONE

    def abandon(self, n_tokens: int, seed: int, n_layers: int, *, evaluates: bool) -> None:
        """Begin a pass of tokens that never come again, and leave it."""
        n_tokens = min(n_tokens, self.cache.pass_limit)
        if n_tokens == 0:
            return
        tokens = random_tokens(self.shape, n_tokens, seed)
        self.cache.begin(n_tokens)
        seen = [attend(self.cache, layer, tokens) for layer in range(n_layers)]
        if evaluates:
            mx.eval(seen)
        # A turn comes before the pass, so it may stand without it.
        if self.cache.position != self.oracle.position:
            self.oracle.turn_if_due()
        if n_tokens == 1 and self.shape.slides:
            # One token takes the row of the one that it no longer sees, whatever becomes of it.
            self.oracle.first = max(self.oracle.first, self.oracle.offset + 1 - self.oracle.window)
        self.check()

    def overflow(self, n_tokens: int) -> None:
        """Ask for more than fits: refused, and nothing else happens."""
        if self.shape.slides:
            return
        with pytest.raises(ContextOverflowError):
            self.cache.begin(self.shape.capacity - self.oracle.offset + n_tokens)
        self.check()

    def trim(self, n_tokens: int) -> None:
        self.cache.trim(n_tokens)
        self.oracle.trim(n_tokens)
        self.check()

    def reserve(self, n_tokens: int) -> None:
        if not self.shape.slides:
            n_tokens = min(n_tokens, self.shape.capacity - self.oracle.offset)
        self.cache.reserve(n_tokens)
        self.check()

    def clear(self) -> None:
        self.cache.clear()
        self.oracle, self.most = self.shape.oracle(), 0
        self.check()

    def fork(self) -> Self:
        made = type(self)(self.shape)
        made.cache, made.oracle, made.most = self.cache.fork(), self.oracle.fork(), self.most
        made.check()
        return made

    def reload(self) -> None:
        """Go through a file."""
        config = self.shape.config
        ids = [n % config.vocab_size for n in range(self.oracle.offset)]
        loaded = self.shape.cache()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cache"
            save_cache(path, self.cache, tokens=ids, fingerprint={})
            self.check()
            assert load_cache(path, loaded, dtype=mx.float32, fingerprint={}) == ids
        loaded.keep_first(self.shape.keep)  # a text that was not cut does not say
        self.cache = loaded
        self.check()


# --- random operations -------------------------------------------------------------------------

KINDS = (
    *("run", "run", "run", "decode", "decode", "trim", "trim", "trim to", "abandon", "give up one"),
    *("fork", "switch", "reserve", "clear", "overflow", "reload"),
)


@dataclass(frozen=True, slots=True)
class Operation:
    """kind: what to do. amount: tokens, or which branch. more: queries, or layers."""

    kind: str
    amount: int
    more: int = 0


operations = st.lists(
    st.builds(Operation, st.sampled_from(KINDS), st.integers(0, 40), st.integers(0, 3)),
    min_size=6,
    max_size=24,
)


@st.composite
def shapes(draw: st.DrawFn, policy: str, bits: KVBits = DENSE, *, is_late: bool = False) -> Shape:
    """Draw sizes that a cache may have; is_late: it packs after some tokens."""
    context = draw(st.sampled_from(CONTEXTS))
    margin = max(1, context // 16)
    least = 1 if policy == "stop" else 2
    if policy == "slide at the end of the context":
        capacity = draw(st.integers(context - margin + 1, context))
    else:
        capacity = draw(st.integers(least, context))
    keep = draw(st.integers(0, capacity - least))
    packed_from = draw(st.integers(1, context)) if is_late else 0
    return Shape(context, capacity, keep, policy != "stop", bits, packed_from)


def play(shape: Shape, steps: Sequence[Operation], *, is_reserved: bool) -> None:
    """Do the operations on a cache and on forks of it, each compared with its oracle."""
    branches = [Twins(shape)]
    at = 0
    if is_reserved:
        branches[0].reserve(shape.capacity)
    for seed, step in enumerate(steps):
        twins = branches[at]
        match step.kind:
            case "run":
                twins.run(1 + step.amount, seed, step.more or None)
            case "decode":
                for i in range(1 + step.amount // 4):
                    twins.run(1, 1000 * (seed + 1) + i)
            case "trim":
                twins.trim(min(step.amount // (1 + 3 * step.more), twins.oracle.offset))
            case "trim to":
                twins.trim(twins.oracle.offset - min(step.amount, twins.oracle.offset))
            case "abandon":
                n_layers = step.more % (N_LAYERS + 1)
                twins.abandon(1 + step.amount, 500 + seed, n_layers, evaluates=step.amount % 2 == 0)
            case "give up one":
                twins.abandon(1, 500 + seed, N_LAYERS, evaluates=True)
            case "fork" if len(branches) < 3:
                branches.append(twins.fork())
            case "switch":
                at = step.amount % len(branches)
            case "reserve":
                twins.reserve(step.amount)
            case "clear":
                twins.clear()
            case "overflow":
                twins.overflow(1 + step.amount)
            case "reload":
                twins.reload()
    for twins in branches:
        twins.run(3, 900)


def checked(max_examples: int) -> settings:
    return settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate, Phase.shrink],  # explaining a failure takes minutes
        suppress_health_check=[HealthCheck.too_slow],
    )


@pytest.mark.parametrize("policy", POLICIES)
@checked(50)
@given(data=st.data(), steps=operations, is_reserved=st.booleans())
def test_dense_cache_agrees_with_the_oracle(
    policy: str, data: st.DataObject, steps: list[Operation], is_reserved: bool
) -> None:
    play(data.draw(shapes(policy)), steps, is_reserved=is_reserved)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("bits", PACKINGS)
@checked(11)
@given(data=st.data(), steps=operations, is_reserved=st.booleans())
def test_packed_cache_agrees_with_the_oracle(
    policy: str,
    is_late: bool,
    bits: KVBits,
    data: st.DataObject,
    steps: list[Operation],
    is_reserved: bool,
) -> None:
    play(data.draw(shapes(policy, bits, is_late=is_late)), steps, is_reserved=is_reserved)


# --- chunks and trims --------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("bits", [DENSE, *PACKINGS])
@checked(5)
@given(
    data=st.data(),
    n_tokens=st.integers(2, 90),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8),
)
def test_chunks_do_not_change_results(
    policy: str, bits: KVBits, data: st.DataObject, n_tokens: int, sizes: list[int]
) -> None:
    shape = data.draw(shapes(policy, bits))
    if not shape.slides:
        n_tokens = min(n_tokens, shape.capacity)
    tokens = random_tokens(shape, n_tokens, 1)
    large, small = shape.cache(), shape.cache()
    expected = feed_in_chunks(large, tokens, [n_tokens])
    found = feed_in_chunks(small, tokens, sizes)
    most = MEAN_TOLERANCE * last_step(shape) if shape.packs else 0.0
    np.testing.assert_allclose(found, expected, rtol=0, atol=max(most, DENSE_TOLERANCE))
    assert counts_of(small) == counts_of(large)


def feed_in_chunks(cache: KVCache, tokens: Tokens, sizes: Sequence[int]) -> np.ndarray:
    """Feed chunks of the sizes over and over, each split where the cache asks for it."""
    outs, at = [], 0
    while at < len(tokens):
        end = min(at + sizes[len(outs) % len(sizes)], at + cache.pass_limit, len(tokens))
        outs.append(feed(cache, tokens[at:end]))
        at = end
    return np.concatenate(outs, axis=2)


@checked(50)
@given(
    data=st.data(),
    policy=st.sampled_from(POLICIES),
    n_tokens=st.integers(1, 100),
    n_trimmed=st.integers(1, 60),
)
def test_trimmed_tokens_come_again(
    data: st.DataObject, policy: str, n_tokens: int, n_trimmed: int
) -> None:
    """Where the window never left a token the results are the first ones, else the oracle's."""
    shape = data.draw(shapes(policy))
    if not shape.slides:
        n_tokens = min(n_tokens, shape.capacity)
    n_trimmed = min(n_tokens, n_trimmed)
    tokens = random_tokens(shape, n_tokens, 2)
    cache, oracle = shape.cache(), shape.oracle()
    first = feed_in_chunks(cache, tokens, [n_tokens])
    feed_oracle(oracle, tokens)
    cache.trim(n_trimmed)
    oracle.trim(n_trimmed)
    assert counts_of(cache) == counts_of(oracle)
    again = tokens[n_tokens - n_trimmed :]
    found = feed_in_chunks(cache, again, [5])
    expected = feed_oracle(oracle, again)
    np.testing.assert_allclose(found, expected, rtol=0, atol=DENSE_TOLERANCE)
    assert counts_of(cache) == counts_of(oracle)
    if n_tokens <= shape.capacity:
        first = first[:, :, n_tokens - n_trimmed :]
        np.testing.assert_allclose(found, first, rtol=0, atol=DENSE_TOLERANCE)


def feed_oracle(oracle: CacheOracle, tokens: Tokens) -> np.ndarray:
    outs, at = [], 0
    while at < len(tokens):
        part = tokens[at : at + oracle.pass_limit]
        outs.append(oracle.run(part.q, part.k, part.v, scale=scale_of(part))[0])
        at += len(part)
    return np.concatenate(outs, axis=2)


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
