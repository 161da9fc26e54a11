"""What two predictions of each token say, by the definitions, float64."""

from __future__ import annotations

import numpy as np

from mlx_llama_quantize.divergence import TokenScores


def oracle(a: np.ndarray, b: np.ndarray, targets: np.ndarray) -> TokenScores:
    """Compare logits (N, V) of two models and the tokens (N,) that came."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64)
        x = x - x.max(axis=-1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))

    log_a, log_b = log_softmax(a), log_softmax(b)
    rows = np.arange(len(targets))
    own_a, own_b = log_a[rows, targets], log_b[rows, targets]
    return TokenScores(
        -own_a,
        -own_b,
        (np.exp(log_a) * (log_a - log_b)).sum(axis=-1),
        np.exp(own_b) - np.exp(own_a),
        a.argmax(axis=-1) == b.argmax(axis=-1),
    )
