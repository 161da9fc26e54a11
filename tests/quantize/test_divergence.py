"""Scores of tokens against float64, and their sums against the definitions."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from divergence_oracle import oracle
from mlx_llama_quantize.divergence import Estimate, TokenScores, score_tokens, summarize


def scored(a: np.ndarray, b: np.ndarray, targets: np.ndarray) -> TokenScores:
    return score_tokens(mx.array(a), mx.array(b), mx.array(targets.astype(np.uint32)))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([0.1, 3.0, 30.0]),
    change=st.sampled_from([0.0, 1e-3, 0.1, 2.0, 60.0]),
    n_tokens=st.integers(1, 5),
)
def test_scores_agree_with_float64(seed: int, spread: float, change: float, n_tokens: int) -> None:
    rng = np.random.RandomState(seed)
    a = (spread * rng.standard_normal((n_tokens, 300))).astype(np.float32)
    b = (a + change * rng.standard_normal(a.shape)).astype(np.float32)
    targets = rng.randint(0, 300, n_tokens)
    found, expected = scored(a, b, targets), oracle(a, b, targets)
    np.testing.assert_allclose(found.nll_a, expected.nll_a, rtol=1e-5, atol=3e-5)
    np.testing.assert_allclose(found.nll_b, expected.nll_b, rtol=1e-5, atol=3e-5)
    np.testing.assert_allclose(found.kld, expected.kld, rtol=1e-3, atol=2e-6)
    np.testing.assert_allclose(found.dp, expected.dp, atol=1e-5)
    assert found.same_top.tolist() == expected.same_top.tolist()
    assert (found.kld >= 0).all()


def test_small_divergence_keeps_its_digits() -> None:
    rng = np.random.RandomState(0)
    a = (3 * rng.standard_normal((4, 30000))).astype(np.float32)
    b = (a + 1e-3 * rng.standard_normal(a.shape)).astype(np.float32)
    found, expected = (f(a, b, np.arange(4)) for f in (scored, oracle))
    assert 1e-7 < expected.kld.max() < 1e-6
    np.testing.assert_allclose(found.kld, expected.kld, rtol=0.02)


def test_equal_models_differ_by_exactly_nothing() -> None:
    a = np.random.RandomState(0).standard_normal((8, 1000)).astype(np.float32)
    found = summarize(scored(a, a, np.arange(8)))
    assert found.kld.maximum == found.rms_dp.value == 0
    assert (found.ratio, found.same_top) == (Estimate(1, 0), Estimate(1, 0))


def test_two_choices_worked_by_hand() -> None:
    # A says 3/4 to 1/4, B says 1/2 to 1/2.
    a, b = np.log([[3.0, 1.0]]).astype(np.float32), np.zeros((1, 2), dtype=np.float32)
    found = scored(a, b, np.array([0]))
    assert found.kld[0] == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)
    assert found.dp[0] == pytest.approx(-0.25)


def scores_of(nll_a: list[float], nll_b: list[float]) -> TokenScores:
    a, b = np.array(nll_a), np.array(nll_b)
    return TokenScores(a, b, np.abs(b - a), np.exp(-b) - np.exp(-a), np.array([True, False] * 2))


def test_sums_follow_their_definitions() -> None:
    found = summarize(scores_of([1.0, 2.0, 3.0, 2.0], [1.5, 2.0, 3.0, 3.5]))
    assert found.n_tokens == 4
    assert found.ppl_a.value == pytest.approx(math.exp(2))
    # The standard error of a mean of four: sqrt(variance / 3), here sqrt(0.5 / 3).
    assert found.ppl_a.error == pytest.approx(math.exp(2) * math.sqrt(0.5 / 3))
    assert found.log_ratio.value == pytest.approx(0.5)
    assert found.ratio.value == pytest.approx(math.exp(0.5))
    assert found.difference.value == pytest.approx(math.exp(2.5) - math.exp(2))
    assert found.same_top.value == 0.5
    assert found.same_top.error == pytest.approx(math.sqrt(0.25 / 3))
    assert found.kld.mean.value == pytest.approx(0.5)
    assert (found.kld.maximum, found.kld.minimum, found.kld.quantiles["0.5"]) == (1.5, 0.0, 0.25)
    assert found.correlation == pytest.approx(np.corrcoef([1, 2, 3, 2], [1.5, 2, 3, 3.5])[0, 1])


def test_errors_hold_what_repeated_draws_show() -> None:
    """Each stated standard error is the deviation of its number over many texts, within 10 %."""
    rng = np.random.RandomState(1)
    drawn = []
    for _ in range(600):
        a = rng.gamma(2.0, 1.0, 400)
        b = a + rng.normal(0.02, 0.1, 400)
        dp = rng.normal(0, 0.03, 400)
        drawn.append(summarize(TokenScores(a, b, np.abs(b - a), dp, rng.rand(400) < 0.9)))
    for name in ("ppl_a", "ppl_b", "log_ratio", "ratio", "difference", "rms_dp", "same_top"):
        values = np.array([getattr(each, name).value for each in drawn])
        errors = np.array([getattr(each, name).error for each in drawn])
        assert errors.mean() == pytest.approx(values.std(), rel=0.1), name


def test_one_token_has_no_error() -> None:
    one = TokenScores(*(np.array([0.5]) for _ in range(4)), np.array([True]))
    assert summarize(one).ppl_a.error == 0
