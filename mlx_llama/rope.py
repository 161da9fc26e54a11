"""Rotary position embedding: the periods of one model, computed once.

Rows of wq and wk are in Hugging Face's order here (half-split: a head's feature i turns with
i + D/2), not in Meta's (interleaved: 2i with 2i + 1); the converter permutes.
"""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from mlx_llama.config import ModelConfig, RopeScaling


def rope_periods(config: ModelConfig) -> mx.array:
    """Return what `mx.fast.rope` takes as `freqs`: 1/f for each pair, (D/2,) float32.

    Computed in float64 and rounded once. Passing periods is more accurate at long positions than
    passing `base`, which recomputes them in float32 for every call.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies = config.rope_theta**-exponents
    if config.rope_scaling is not None:
        frequencies = scale_frequencies(frequencies, config.rope_scaling)
    return mx.array((1.0 / frequencies).astype(np.float32))


def scale_frequencies(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Stretch RoPE frequencies (radians per position, (D/2,) float64).

    Source: `apply_scaling` in meta-llama/llama-models `models/llama3/model.py`; `linear` is
    position interpolation, arXiv 2306.15595.
    """
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_context * frequencies / (2 * math.pi)
    # 0 where a pair turns too slowly to have been seen in full, 1 where it turns often.
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (smooth + (1.0 - smooth) / scaling.factor)
