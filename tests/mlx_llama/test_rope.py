"""RoPE's periods: Meta's frequencies, and the rotation that they make."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_llama import ops
from mlx_llama.config import ModelConfig, RopeScaling, config_from_hf
from mlx_llama.rope import rope_periods, scale_frequencies
from random_models import CASES, interleaved, random_model

GOLDEN = np.load(Path(__file__).parents[1] / "golden/rope.npz")
# In float32 steps of the peer's frequency. Ours are computed in float64 and rounded once; Meta's
# code rounds at each of its steps (measured: 1 at most), and where the scaled frequency is a
# difference, bits cancel (measured: 3 with Meta's factor 8, 6 with 32 in transformers).
PLAIN_STEPS = 1
SCALED_STEPS = 6


def config_of(head_dim: int, theta: float, scaling: RopeScaling | None) -> ModelConfig:
    config = config_from_hf(random_model(CASES["llama2"])[1], kind="llama2", is_tied=None)
    return replace(config, head_dim=head_dim, rope_theta=theta, rope_scaling=scaling)


def case_of(name: str) -> tuple[int, float, RopeScaling | None]:
    head_dim, theta, factor = name.split("_")
    scaling = None if factor == "1" else RopeScaling("llama3", float(factor))
    return int(head_dim), float(theta), scaling


@pytest.mark.parametrize("name", GOLDEN.files)
def test_frequencies_are_those_of_metas_code(name: str) -> None:
    head_dim, theta, scaling = case_of(name)
    periods = np.asarray(rope_periods(config_of(head_dim, theta, scaling)))
    assert periods.dtype == np.float32 and periods.shape == (head_dim // 2,)
    ours = (1.0 / periods.astype(np.float64)).astype(np.float32)
    # Positive floats follow each other as their bits do: the difference counts the steps.
    steps = np.abs(ours.view(np.int32) - GOLDEN[name].view(np.int32))
    assert steps.max() <= (PLAIN_STEPS if scaling is None else SCALED_STEPS)


@pytest.mark.parametrize("name", GOLDEN.files)
def test_periods_are_the_float32_next_to_the_exact_ones(name: str) -> None:
    head_dim, theta, scaling = case_of(name)
    periods = np.asarray(rope_periods(config_of(head_dim, theta, scaling)))
    for pair, period in enumerate(periods.tolist()):
        exact = 1.0 / by_the_paper(theta ** (-2 * pair / head_dim), scaling)
        assert abs(period - exact) <= np.spacing(np.float32(exact)) / 2 * (1 + 1e-6)


def by_the_paper(frequency: float, scaling: RopeScaling | None) -> float:
    """Scale one frequency with the wavelengths of Meta's `apply_scaling`, in float64."""
    if scaling is None:
        return frequency
    wavelength = 2 * math.pi / frequency
    if wavelength < scaling.original_context / scaling.high_freq_factor:
        return frequency
    if wavelength > scaling.original_context / scaling.low_freq_factor:
        return frequency / scaling.factor
    spread = scaling.high_freq_factor - scaling.low_freq_factor
    smooth = (scaling.original_context / wavelength - scaling.low_freq_factor) / spread
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def test_the_constants_of_the_scaling_are_configuration() -> None:
    scaling = RopeScaling(
        "llama3", 5.0, low_freq_factor=2.0, high_freq_factor=3.0, original_context=100
    )
    frequencies = 10.0 ** -np.linspace(0, 4, 40)
    expected = [by_the_paper(f, scaling) for f in frequencies.tolist()]
    np.testing.assert_allclose(scale_frequencies(frequencies, scaling), expected, rtol=1e-14)


def test_linear_scaling_divides_every_frequency() -> None:
    plain = np.asarray(rope_periods(config_of(64, 1e4, None)))
    scaled = np.asarray(rope_periods(config_of(64, 1e4, RopeScaling("linear", 4.0))))
    assert np.array_equal(scaled, plain * 4)


# --- the rotation ------------------------------------------------------------------------------


def rotated_by_meta(x: np.ndarray, frequencies: np.ndarray, offset: int) -> np.ndarray:
    """Turn pairs 2i, 2i + 1 as complex numbers, as Meta's `apply_rotary_emb`; x (heads, L, D)."""
    pairs = x.astype(np.float64)[..., 0::2] + 1j * x.astype(np.float64)[..., 1::2]
    positions = np.arange(offset, offset + x.shape[-2])
    turned = pairs * np.exp(1j * positions[:, None] * frequencies)
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


@pytest.mark.parametrize(("offset", "tolerance"), [(0, 1e-6), (5, 2e-6), (9000, 2e-3)])
def test_rotation_is_metas_with_rows_in_half_split_order(offset: int, tolerance: float) -> None:
    """The tolerance at position 9000 is float32's: half a step of a period, 9000 radians on."""
    config = config_of(64, 5e5, RopeScaling("llama3", 8.0))
    frequencies = [by_the_paper(5e5 ** (-2 * i / 64), config.rope_scaling) for i in range(32)]
    half_split = np.random.RandomState(0).standard_normal((3, 7, 64)).astype(np.float32)
    order = interleaved(np.arange(64), head_dim=64)
    expected = rotated_by_meta(half_split[..., order], np.asarray(frequencies), offset)
    found = ops.rotate(mx.array(half_split)[None], rope_periods(config), offset)
    np.testing.assert_allclose(np.asarray(found)[0][..., order], expected, atol=tolerance)


def test_rotation_keeps_scores_under_a_shift_of_positions() -> None:
    """A score depends on the distance of query and key alone."""
    rng = np.random.RandomState(1)
    q, k = (mx.array(rng.standard_normal((1, 1, 1, 128)).astype(np.float32)) for _ in range(2))
    periods = rope_periods(config_of(128, 5e5, RopeScaling("llama3", 32.0)))

    def score(at: int) -> float:
        return float(mx.sum(ops.rotate(q, periods, at + 3) * ops.rotate(k, periods, at)).item())

    scores = [score(at) for at in (0, 1, 100, 8000)]
    # The scores are near 10; at 8000 an angle is off by 5e-4 in float32.
    assert max(scores) - min(scores) < 0.02
