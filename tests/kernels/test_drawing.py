"""Choosing a token natively: as MLX's own operations choose."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels_oracle import INSTALLED, many, needs_kernels, seeds

sizes = st.one_of(st.integers(1, 40), st.integers(41, 5000))


def scores_of(random: np.random.Generator, n_tokens: int, share: float) -> np.ndarray:
    """Return scores of which about a share is not minus infinity, one at least."""
    scores = random.normal(size=n_tokens, scale=random.uniform(0.1, 6)).astype(np.float32)
    scores[random.random(n_tokens) > share] = -math.inf
    scores[random.integers(n_tokens)] = 1
    return scores


@needs_kernels
@many
@given(seeds, sizes)
def test_the_likeliest_is_the_first_of_the_largest(seed: int, n_tokens: int) -> None:
    random = np.random.default_rng(seed)
    scores = np.round(scores_of(random, n_tokens, 0.8))  # so that some are as large
    assert INSTALLED is not None
    found = INSTALLED.likeliest(mx.array(scores))
    assert (found.dtype, found.shape) == (mx.uint32, (1,))
    assert found.item() == int(np.argmax(scores))


@needs_kernels
def test_the_likeliest_of_no_numbers_is_a_token() -> None:
    assert INSTALLED is not None
    for scores, expected in (
        ([math.nan, 1.0, 2.0, math.nan], 2),
        ([-math.inf] * 9, 0),
        ([math.nan] * 3, 0),
        ([0.0, math.inf, math.inf], 1),
    ):
        assert INSTALLED.likeliest(mx.array(scores)).item() == expected
        drawn = INSTALLED.draw(mx.array(scores), mx.array([1, 2], dtype=mx.uint32)).item()
        assert 0 <= drawn < len(scores)


@needs_kernels
@many
@given(seeds, sizes, st.sampled_from([0.01, 0.3, 1.0]))
def test_a_draw_is_where_so_much_of_all_weights_stands(
    seed: int, n_tokens: int, share: float
) -> None:
    """MLX draws so, too, but adds in float32: the two may differ where rounding decides."""
    random = np.random.default_rng(seed)
    scores = scores_of(random, n_tokens, share)
    key = mx.array(random.integers(0, 2**32, 2).astype(np.uint32))
    assert INSTALLED is not None
    drawn = int(INSTALLED.draw(mx.array(scores), key).item())
    weights = np.exp(scores.astype(np.float64) - scores.max())
    up_to = np.cumsum(weights) / weights.sum()
    uniform = float(mx.random.uniform(shape=(1,), key=key).item())
    assert scores[drawn] > -math.inf
    assert up_to[drawn] >= uniform - 1e-5
    assert up_to[drawn] - weights[drawn] / weights.sum() <= uniform + 1e-5


@needs_kernels
def test_draws_are_those_of_mlx() -> None:
    random = np.random.default_rng(0)
    assert INSTALLED is not None
    same = 0
    for _ in range(300):
        scores = mx.array(scores_of(random, int(random.integers(1, 600)), 0.5))
        key = mx.array(random.integers(0, 2**32, 2).astype(np.uint32))
        expected = mx.random.categorical(scores[None], key=key)
        same += INSTALLED.draw(scores, key).item() == expected.item()
    assert same >= 299


@needs_kernels
def test_what_is_no_row_of_scores_is_refused() -> None:
    assert INSTALLED is not None
    key = mx.array([1, 2], dtype=mx.uint32)
    for scores in (mx.ones((2, 3)), mx.ones((3,), dtype=mx.bfloat16), mx.ones((0,))):
        with pytest.raises(ValueError, match="scores: expected"):
            INSTALLED.likeliest(scores)
        with pytest.raises(ValueError, match="scores: expected"):
            INSTALLED.draw(scores, key)
    with pytest.raises(ValueError, match="key: expected"):
        INSTALLED.draw(mx.ones((3,)), mx.array([1, 2]))
