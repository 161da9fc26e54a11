"""The cache against a slow oracle: random operations, chunks and trims."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from cache_oracle import CacheOracle
from cache_twins import (
    CONTEXTS,
    DENSE,
    DENSE_TOLERANCE,
    MEAN_TOLERANCE,
    N_LAYERS,
    PACKINGS,
    POLICIES,
    Shape,
    Tokens,
    Twins,
    counts_of,
    feed,
    last_step,
    random_tokens,
    scale_of,
)
from mlx_llama.cache import KVBits, KVCache

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
    is_device = draw(st.booleans())
    return Shape(context, capacity, keep, policy != "stop", bits, packed_from, is_device)


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
    np.testing.assert_allclose(found, expected, rtol=0, atol=shape.tolerance)
    assert counts_of(cache) == counts_of(oracle)
    if n_tokens <= shape.capacity:
        first = first[:, :, n_tokens - n_trimmed :]
        np.testing.assert_allclose(found, first, rtol=0, atol=shape.tolerance)


def feed_oracle(oracle: CacheOracle, tokens: Tokens) -> np.ndarray:
    outs, at = [], 0
    while at < len(tokens):
        part = tokens[at : at + oracle.pass_limit]
        outs.append(oracle.run(part.q, part.k, part.v, scale=scale_of(part))[0])
        at += len(part)
    return np.concatenate(outs, axis=2)
