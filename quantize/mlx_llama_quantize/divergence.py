"""How far one model's predictions are from another's: scores of each token, and their sums.

Named and defined as llama.cpp's llama-perplexity does: A is the base, B is what is judged.
Natural logarithms everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import mlx.core as mx
import numpy as np

QUANTILES = (0.999, 0.99, 0.95, 0.9, 0.5, 0.1, 0.05, 0.01, 0.001)
# Below this difference of logarithms p*d - p + q loses all its digits.
NEAR = 0.5


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What two models say of each scored token; arrays (N,).

    nll_a, nll_b: -log of the token's probability. kld: divergence of B's distribution from A's.
    dp: change of the token's probability, B's minus A's. same_top: whether both find the same token
    likeliest.
    """

    nll_a: np.ndarray
    nll_b: np.ndarray
    kld: np.ndarray
    dp: np.ndarray
    same_top: np.ndarray

    def __len__(self) -> int:
        return len(self.kld)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Put the scores of parts of a text behind one another."""
        names = [spec.name for spec in fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def score_tokens(logits_a: mx.array, logits_b: mx.array, targets: mx.array) -> TokenScores:
    """Compare two predictions of each token. logits: (N, V) float32; targets: (N,)."""
    log_a, log_b = log_softmax(logits_a), log_softmax(logits_b)
    kld = divergences(log_a, log_b)
    pick = targets[:, None]
    own_a, own_b = (mx.take_along_axis(x, pick, axis=-1)[:, 0] for x in (log_a, log_b))
    same = mx.argmax(logits_a, axis=-1) == mx.argmax(logits_b, axis=-1)
    found = (-own_a, -own_b, kld, mx.exp(own_b) - mx.exp(own_a), same)
    mx.eval(found)
    return TokenScores(*(np.array(each) for each in found))


def log_softmax(logits: mx.array) -> mx.array:
    """Return the logarithms of probabilities (N, V) for scores (N, V)."""
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def divergences(log_a: mx.array, log_b: mx.array) -> mx.array:
    """Return the divergence of B's predictions from A's, (N,) nats; logarithms (N, V) float32.

    The sum of p*log(p/q); p and q sum to 1 each, so that p - q may be taken off term by term. Each
    term is 0 or more then, and equal models differ by exactly 0.
    """
    p_a, p_b, d = mx.exp(log_a), mx.exp(log_b), log_a - log_b
    terms = mx.where(mx.abs(d) < NEAR, p_a * (d + mx.expm1(-d)), p_a * d - p_a + p_b)
    return mx.maximum(terms.sum(axis=-1), 0)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over the text and its standard error."""

    value: float
    error: float


@dataclass(frozen=True, slots=True)
class Distribution:
    """A mean with its error, the extremes, and quantiles by their share ("0.99")."""

    mean: Estimate
    maximum: float
    quantiles: dict[str, float]
    minimum: float


@dataclass(frozen=True, slots=True)
class Divergence:
    """What `compare` measures of a text. dp: in probability, not percent.

    log_ratio: of perplexities, B's over A's, its mean logarithm. correlation: of the tokens'
    logarithms. rms_dp: root mean square of dp. same_top: share of tokens.
    """

    n_tokens: int
    ppl_a: Estimate
    ppl_b: Estimate
    log_ratio: Estimate
    ratio: Estimate
    difference: Estimate
    correlation: float
    kld: Distribution
    dp: Distribution
    rms_dp: Estimate
    same_top: Estimate


# Perplexities beyond every number are infinite, and differences of such are none.
@np.errstate(over="ignore", invalid="ignore")
def summarize(scores: TokenScores) -> Divergence:
    """Add up the scores of at least one token."""
    a, b = scores.nll_a.astype(np.float64), scores.nll_b.astype(np.float64)
    ppl_a, ppl_b = _perplexity(a), _perplexity(b)
    log_ratio, covariance = _mean(b - a), _covariance(a, b)
    ratio = float(np.exp(log_ratio.value))
    squares_of_errors = ppl_a.error * ppl_a.error + ppl_b.error * ppl_b.error
    variances = squares_of_errors - 2 * ppl_a.value * ppl_b.value * covariance
    squares = _mean(scores.dp.astype(np.float64) ** 2)
    rms = float(np.sqrt(squares.value))
    spread = float(a.std() * b.std())
    return Divergence(
        n_tokens=len(scores),
        ppl_a=ppl_a,
        ppl_b=ppl_b,
        log_ratio=log_ratio,
        ratio=Estimate(ratio, ratio * log_ratio.error),
        difference=Estimate(ppl_b.value - ppl_a.value, float(np.sqrt(max(variances, 0.0)))),
        correlation=float(((a - a.mean()) * (b - b.mean())).mean() / spread) if spread else 1.0,
        kld=_distribution(scores.kld),
        dp=_distribution(scores.dp),
        rms_dp=Estimate(rms, squares.error / (2 * rms) if rms else 0.0),
        same_top=_mean(scores.same_top.astype(np.float64)),
    )


def _mean(values: np.ndarray) -> Estimate:
    n = len(values)
    return Estimate(float(values.mean()), float(values.std() / np.sqrt(n - 1)) if n > 1 else 0.0)


def _perplexity(nll: np.ndarray) -> Estimate:
    mean = _mean(nll)
    value = float(np.exp(mean.value))
    return Estimate(value, value * mean.error)


def _covariance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the covariance of two means."""
    n = len(a)
    return float(((a - a.mean()) * (b - b.mean())).mean() / (n - 1)) if n > 1 else 0.0


def _distribution(values: np.ndarray) -> Distribution:
    values = values.astype(np.float64)
    found = np.quantile(values, QUANTILES)
    quantiles = {f"{share:g}": float(x) for share, x in zip(QUANTILES, found, strict=True)}
    return Distribution(_mean(values), float(values.max()), quantiles, float(values.min()))
