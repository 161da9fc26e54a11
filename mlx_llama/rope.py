"""Rotary position embedding: the periods of one model, computed once, and keys turned back.

Rows of wq and wk are in Hugging Face's order here (half-split: a head's feature i turns with
i + D/2), not in Meta's (interleaved: 2i with 2i + 1); the converter permutes.

Frequencies are Meta's float32 values, step for step: the weights were trained with them, and
where the scaled frequency is a difference the exact ones are several float32 steps away.
They are computed on the CPU, whose divisions are rounded as IEEE 754 says. NumPy is imported where
it is needed, which is not before a cache slides: that takes a third of all imports' time.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_llama.config import LIMITS, ModelConfig, RopeScaling
from mlx_llama.errors import OptionError

if TYPE_CHECKING:
    import numpy as np

MAX_LINEAR_FACTOR = 1024.0  # RopeScaling's bound


def rope_periods(config: ModelConfig) -> mx.array:
    """Return what `mx.fast.rope` takes as `freqs`: 1/f for each pair, (D/2,) float32.

    `mx.fast.rope` turns by the float32 nearest to 1/period, which is Meta's frequency or the
    float32 next to it: not every frequency is the inverse of a float32. Passing periods is more
    accurate at long positions than passing `base`, which recomputes them in float32 every call.
    Evaluated.
    """
    with mx.stream(mx.cpu):
        periods = 1.0 / rope_frequencies(config)
    mx.eval(periods)
    return periods


def rope_frequencies(config: ModelConfig) -> mx.array:
    """Return the radians per position of each pair, (D/2,) float32, evaluated.

    Source: `precompute_freqs_cis` in meta-llama/llama-models `models/llama3/model.py` (0.3.0),
    which LLaMA 1, Llama 2 and Code Llama share up to the scaling.
    """
    with mx.stream(mx.cpu):
        exponents = mx.arange(0, config.head_dim, 2, dtype=mx.float32) / config.head_dim
        # A float32 power differs from machine to machine in the last bit; the one rounding of a
        # float64 power does not, and torch's is that but for one of the published frequencies.
        theta = mx.array(config.rope_theta, dtype=mx.float32).astype(mx.float64)
        powers = mx.power(theta, exponents.astype(mx.float64))
        frequencies = 1.0 / powers.astype(mx.float32)
    mx.eval(frequencies)
    if config.rope_scaling is None:
        return frequencies
    return scale_frequencies(frequencies, config.rope_scaling)


def scale_frequencies(frequencies: mx.array, scaling: RopeScaling) -> mx.array:
    """Stretch RoPE frequencies (radians per position, (D/2,) float32); evaluated.

    Source: `apply_scaling` in meta-llama/llama-models `models/llama3/model.py` (0.3.0), whose
    Python numbers torch rounds to float32, as MLX does here; `linear` is position
    interpolation, arXiv 2306.15595.
    """
    with mx.stream(mx.cpu):
        linear = scaling.rope_type == "linear"
        scaled = frequencies / scaling.factor if linear else _by_parts(frequencies, scaling)
    mx.eval(scaled)
    return scaled


def _by_parts(frequencies: mx.array, scaling: RopeScaling) -> mx.array:
    """Stretch the frequencies of pairs that turn slowly, and those between in part."""
    low, high, context = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_context
    # torch computes `number / tensor` as the reciprocal times the number: two roundings, not one.
    wavelengths = (1.0 / frequencies) * (2 * math.pi)
    # 0 where a pair turns too slowly to have been seen in full, 1 where it turns often.
    smooth = ((1.0 / wavelengths) * context - low) / (high - low)
    blended = (1.0 - smooth) * frequencies / scaling.factor + smooth * frequencies
    slow = mx.where(wavelengths > context / low, frequencies / scaling.factor, blended)
    return mx.where(wavelengths < context / high, frequencies, slow)


def angles_back(periods: mx.array, positions: np.ndarray, delta: int) -> tuple[mx.array, mx.array]:
    """Return cos and sin, each (S, D/2) float32, that turn keys at positions (S,) by -delta.

    `mx.fast.rope` rounds position times frequency to float32, by up to 0.004 radians at 131071.
    The difference of two such angles is what leads from one rotation to the other; the product of
    delta and the frequency is not. It is exact in float64. Evaluates periods (`rope_periods`).
    """
    import numpy as np

    frequencies = np.float32(1.0) / np.asarray(periods)
    now = positions.astype(np.float32)[:, None] * frequencies
    then = (positions - delta).astype(np.float32)[:, None] * frequencies
    angles = now.astype(np.float64) - then.astype(np.float64)
    return mx.array(np.cos(angles).astype(np.float32)), mx.array(np.sin(angles).astype(np.float32))


def turn_back(keys: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Turn rotated keys back: those of positions p become those of p - delta.

    Shapes: keys (..., S, D), half-split pairs; cos and sin from `angles_back`. Dtypes: arithmetic
    in float32, the result in that of keys.
    """
    first, second = mx.split(keys.astype(mx.float32), 2, axis=-1)  # (..., S, D/2) each
    turned = [first * cos + second * sin, second * cos - first * sin]
    return mx.concatenate(turned, axis=-1).astype(keys.dtype)  # (..., S, D)


def with_linear_scaling(config: ModelConfig, factor: float) -> ModelConfig:
    """Return config with every RoPE frequency divided by factor, its context as much longer.

    For a model without RoPE scaling (LLaMA 1, Llama 2, Code Llama, Llama 3).

    Raises: OptionError where factor is not above 1 and at most 1024, where the context would be
    longer than a configuration can hold, or where the model has a scaling already.
    """
    if config.rope_scaling is not None:
        raise OptionError(
            f"--rope-linear: the model has {config.rope_scaling.rope_type} scaling already; "
            "leave the option out"
        )
    if not 1.0 < factor <= MAX_LINEAR_FACTOR:
        raise OptionError(
            f"--rope-linear {factor}: expected a factor above 1, at most {MAX_LINEAR_FACTOR:g}"
        )
    context, most = int(config.max_context * factor), LIMITS["max_context"]
    if context > most:
        raise OptionError(
            f"--rope-linear {factor}: a context of {config.max_context} tokens would become "
            f"{context}, more than {most}; the factor can be {most / config.max_context:g} at most"
        )
    return replace(config, rope_scaling=RopeScaling("linear", float(factor)), max_context=context)
