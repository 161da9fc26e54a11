"""RoPE's periods: Meta's frequencies, the rotation that they make, and keys turned back."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_llama import ops
from mlx_llama.config import ModelConfig, RopeScaling, config_from_hf
from mlx_llama.errors import OptionError
from mlx_llama.rope import (
    angles_back,
    rope_frequencies,
    rope_periods,
    scale_frequencies,
    turn_back,
    with_linear_scaling,
)
from random_models import CASES, interleaved, random_model

# Meta's formula in torch's float32; the bits of transformers are the same (make_rope.py).
GOLDEN = np.load(Path(__file__).parents[1] / "golden/rope.npz")
# In float32 steps of Meta's frequency, for the float32 nearest to 1/period. A period's rounding is
# worth one step at most; measured: 1 for one to three pairs of a model, 0 for the others.
PERIOD_STEPS = 1
# The same for Meta's frequencies against exact ones (measured: 1.3 and 6.3): where the scaled
# frequency is a difference, float32 cancels.
PLAIN_STEPS, SCALED_STEPS = 1.5, 7.0
# Pair of theta 1e6 with head_dim 128 where torch's vectorised power is not the nearest float32, as
# its own scalar power and ours are.
UNEVEN_PAIR = 37
# How much further than Meta's own float32 rotation ours may be from the exact one.
META_RATIO = 1.5


def config_of(head_dim: int, theta: float, scaling: RopeScaling | None) -> ModelConfig:
    config = config_from_hf(random_model(CASES["llama2"])[1], kind="llama2", is_tied=None)
    return replace(config, head_dim=head_dim, rope_theta=theta, rope_scaling=scaling)


def case_of(name: str) -> tuple[int, float, RopeScaling | None]:
    head_dim, theta, factor = name.split("_")
    scaling = None if factor == "1" else RopeScaling("llama3", float(factor))
    return int(head_dim), float(theta), scaling


def named(name: str) -> ModelConfig:
    return config_of(*case_of(name))


@pytest.mark.parametrize("name", GOLDEN.files)
def test_frequencies_are_metas_to_one_float32_step(name: str) -> None:
    """They were computed in float64 and rounded once, 6 steps from those of training."""
    config = named(name)
    periods = np.asarray(rope_periods(config))
    assert periods.dtype == np.float32 and periods.shape == (config.head_dim // 2,)
    assert np.array_equal(periods, 1 / np.asarray(rope_frequencies(config)))
    # What mx.fast.rope turns by, and the period's own value.
    for ours in (1 / periods, (1 / periods.astype(np.float64)).astype(np.float32)):
        assert steps(ours, GOLDEN[name]).max() <= PERIOD_STEPS


@pytest.mark.parametrize("name", GOLDEN.files)
def test_frequencies_before_the_inversion_have_metas_bits(name: str) -> None:
    found = np.asarray(rope_frequencies(named(name)))
    assert found.dtype == np.float32
    different = np.flatnonzero(steps(found, GOLDEN[name])).tolist()
    assert different == ([UNEVEN_PAIR] if name.startswith("128_1e+06") else [])


def steps(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Count the float32 values between two; positive ones follow each other as their bits do."""
    assert found.dtype == expected.dtype == np.float32
    return np.abs(found.view(np.int32) - expected.view(np.int32))


@pytest.mark.parametrize("name", GOLDEN.files)
def test_metas_frequencies_are_those_of_the_paper(name: str) -> None:
    head_dim, theta, scaling = case_of(name)
    most = PLAIN_STEPS if scaling is None else SCALED_STEPS
    for pair, found in enumerate(np.asarray(rope_frequencies(named(name))).tolist()):
        exact = by_the_paper(theta ** (-2 * pair / head_dim), scaling)
        assert abs(found - exact) <= most * np.spacing(np.float32(exact))


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
    frequencies = (10.0 ** -np.linspace(0, 4, 40)).astype(np.float32)
    scaled = np.asarray(scale_frequencies(mx.array(frequencies), scaling))
    assert scaled.dtype == np.float32
    expected = [by_the_paper(f, scaling) for f in frequencies.tolist()]
    np.testing.assert_allclose(scaled, expected, rtol=SCALED_STEPS * 2.0**-23)


# --- the rotation ------------------------------------------------------------------------------


def rotated(x: np.ndarray, frequencies: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Turn half-split pairs of x (..., L, D) in float64: pair i by position * frequency i."""
    turns = np.exp(1j * np.outer(positions.astype(np.float64), frequencies.astype(np.float64)))
    return turned(x.astype(np.float64), turns)


def rotated_in_float32(x: np.ndarray, frequencies: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Turn as Meta's code does: positions, angles, their table and the product in float32."""
    angles = np.outer(positions.astype(np.float32), frequencies)
    assert angles.dtype == np.float32
    turns = np.cos(angles) + 1j * np.sin(angles)
    assert turns.dtype == np.complex64
    return turned(x, turns)


def turned(x: np.ndarray, turns: np.ndarray) -> np.ndarray:
    half = x.shape[-1] // 2
    pairs = (x[..., :half] + 1j * x[..., half:]) * turns
    assert pairs.dtype == turns.dtype
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


def random_rows(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def rotate(x: np.ndarray, config: ModelConfig, offset: int) -> np.ndarray:
    return np.asarray(ops.rotate(mx.array(x)[None], rope_periods(config), offset))[0]


@pytest.mark.parametrize("last", [1024, 8192, 32768, 131071])
@pytest.mark.parametrize("name", GOLDEN.files)
def test_rotation_is_as_exact_as_metas_in_float32(name: str, last: int) -> None:
    """Largest error of 64 positions up to the last, Meta's frequencies taken as exact.

    Measured: 1.000 of Meta's; both are off by the rounding of the angle, up to 1.5e-2 at 131071.
    """
    config = named(name)
    positions = np.arange(last - 63, last + 1)
    x = random_rows(8, 64, config.head_dim)
    exact = rotated(x, GOLDEN[name], positions)
    ours = np.abs(rotate(x, config, last - 63) - exact).max()
    metas = np.abs(rotated_in_float32(x, GOLDEN[name], positions) - exact).max()
    assert ours <= META_RATIO * metas


@pytest.mark.parametrize("position", [1024, 8192, 32768])
@pytest.mark.parametrize("name", GOLDEN.files)
def test_rotation_at_a_power_of_two_is_off_by_the_rounding_of_a_period(
    name: str, position: int
) -> None:
    """Meta's float32 angles are exact there; ours lack one step of a slow pair's frequency."""
    config = named(name)
    x = random_rows(8, 1, config.head_dim)
    exact = rotated(x, GOLDEN[name], np.array([position]))
    off = position * np.abs(1 / np.asarray(rope_periods(config)) - GOLDEN[name]).max()
    assert off < 1e-5
    largest = np.abs(x).max() * math.sqrt(2)
    assert np.abs(rotate(x, config, position) - exact).max() <= largest * off + 1e-6


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


# --- linear scaling ----------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [2.0, 4.0, 16.0, 1024.0])
@pytest.mark.parametrize("name", ["64_10000_1", "128_10000_1", "128_1e+06_1"])
def test_linear_scaling_turns_as_much_as_the_divided_position(name: str, factor: float) -> None:
    """A power of two divides without rounding: not a bit differs."""
    plain = named(name)
    linear = replace(plain, rope_scaling=RopeScaling("linear", factor))
    assert np.array_equal(
        np.asarray(rope_periods(linear)), np.asarray(rope_periods(plain)) * np.float32(factor)
    )
    x = random_rows(2, 1, plain.head_dim)
    for position in (0, 1, 7, 1000, 4095):
        ours = rotate(x, linear, int(position * factor))
        assert np.array_equal(ours, rotate(x, plain, position))


@pytest.mark.parametrize("factor", [1.5, 2.0, 3.0, 4.0, 7.3])
@pytest.mark.parametrize("name", ["64_10000_1", "128_10000_1", "128_1e+06_1"])
def test_linear_scaling_turns_by_position_over_factor(name: str, factor: float) -> None:
    linear = replace(named(name), rope_scaling=RopeScaling("linear", factor))
    for offset in (0, 100, 10000):
        positions = np.arange(offset, offset + 64)
        x = random_rows(4, 64, linear.head_dim)
        expected = rotated(x, GOLDEN[name], positions / factor)
        # The roundings of frequency, period and angle turn a pair of length 6 at most too far.
        tolerance = 6 * (3 * 2.0**-24 * positions[-1] / factor) + 2e-6
        np.testing.assert_allclose(rotate(x, linear, offset), expected, rtol=0, atol=tolerance)


def test_a_plain_model_is_given_linear_scaling_and_its_longer_context() -> None:
    config = replace(config_of(128, 1e4, None), max_context=4096)
    scaled = with_linear_scaling(config, 4)
    assert scaled == replace(config, rope_scaling=RopeScaling("linear", 4.0), max_context=16384)
    assert isinstance(scaled.max_context, int)
    assert with_linear_scaling(config, 2.5).max_context == 10240
    assert with_linear_scaling(config, 1.0001).max_context == 4096
    assert with_linear_scaling(config, 1024).max_context == 1 << 22
    assert config.rope_scaling is None and config.max_context == 4096


@pytest.mark.parametrize("rope_type", ["llama3", "linear"])
def test_linear_scaling_refuses_a_model_that_has_scaling(rope_type: str) -> None:
    config = config_of(128, 5e5, RopeScaling(rope_type, 8.0))
    with pytest.raises(OptionError) as caught:
        with_linear_scaling(config, 2.0)
    assert str(caught.value) == (
        f"--rope-linear: the model has {rope_type} scaling already; leave the option out"
    )


@pytest.mark.parametrize("factor", [1.0, 0.5, 0.0, -2.0, 1024.5, math.inf, -math.inf, math.nan])
def test_linear_scaling_refuses_a_factor_out_of_bounds(factor: float) -> None:
    with pytest.raises(OptionError) as caught:
        with_linear_scaling(config_of(128, 1e4, None), factor)
    assert str(caught.value) == (f"--rope-linear {factor}: expected a factor above 1, at most 1024")


def test_linear_scaling_refuses_a_context_that_no_configuration_can_hold() -> None:
    config = replace(config_of(128, 5e5, None), max_context=131072)
    assert with_linear_scaling(config, 128.0).max_context == 1 << 24
    with pytest.raises(OptionError) as caught:
        with_linear_scaling(config, 256.0)
    assert str(caught.value) == (
        "--rope-linear 256.0: a context of 131072 tokens would become 33554432, more than "
        "16777216; the factor can be 128 at most"
    )


# --- keys turned back --------------------------------------------------------------------------

TURNED = ("64_10000_1", "128_10000_1", "64_1e+06_1", "128_1e+06_1", "64_500000_1", "128_500000_1")
TURNED += ("64_500000_8", "128_500000_8", "64_500000_32", "128_500000_32")
DELTAS = (1, 7, 100, 1000, 4096, 30000, 65536, 100000, 131008)
STARTS = (64, 1000, 4032, 8128, 32704, 65472, 98765, 131008)
# Norm of the difference by the norm of the key that was rotated at the new position, worst key
# (measured on a CPU: 1.7e-7 and 8.7e-3; MLX rounds cos and sin to bfloat16 as well there).
TURN_TOLERANCE = {mx.float32: 2e-3, mx.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("name", TURNED)
def test_a_key_turned_back_is_the_key_rotated_there(name: str, dtype: mx.Dtype) -> None:
    config = named(name)
    periods = rope_periods(config)
    keys = mx.array(random_rows(1, 4, 64, config.head_dim)).astype(dtype)
    for start in STARTS:
        at_start = ops.rotate(keys, periods, start)
        positions = np.arange(start, start + 64)
        for delta in (delta for delta in DELTAS if delta <= start):
            found = turn_back(at_start, *angles_back(periods, positions, delta))
            assert found.dtype == dtype and found.shape == keys.shape
            directly = ops.rotate(keys, periods, start - delta)
            assert worst(float64(found), float64(directly)) < TURN_TOLERANCE[dtype], (start, delta)


def worst(found: np.ndarray, expected: np.ndarray) -> float:
    lengths = np.linalg.norm(expected, axis=-1)
    return float((np.linalg.norm(found - expected, axis=-1) / lengths).max())


def float64(x: mx.array) -> np.ndarray:
    return np.asarray(x.astype(mx.float32)).astype(np.float64)


def test_turning_back_adds_no_error_of_its_own() -> None:
    """Turning by delta times the frequency was 4e-3 off: it ignored how each angle was rounded."""
    periods = rope_periods(named("64_500000_32"))
    keys = mx.array(random_rows(1, 4, 64, 64))
    positions = np.arange(131008, 131072)
    found = turn_back(ops.rotate(keys, periods, 131008), *angles_back(periods, positions, 122_880))
    assert worst(float64(found), float64(ops.rotate(keys, periods, 8128))) < 1e-6


def test_turns_back_add_up_and_keep_the_rows_apart() -> None:
    periods = rope_periods(named("128_500000_8"))
    keys = mx.array(random_rows(2, 3, 5, 128))
    positions = np.array([5000, 1024, 1030, 9, 2000])

    def turned(rows: mx.array, at: np.ndarray, delta: int) -> mx.array:
        return turn_back(rows, *angles_back(periods, at, delta))

    twice = turned(turned(keys, positions, 1000), positions - 1000, 24)
    assert worst(float64(twice), float64(turned(keys, positions, 1024))) < 5e-7
    assert mx.array_equal(turned(keys, positions, 0), keys).item()
    alone = turned(keys[1:, 2:, 3:4], positions[3:4], 1000)
    assert mx.array_equal(alone, turned(keys, positions, 1000)[1:, 2:, 3:4]).item()


def test_turned_keys_have_their_dtype() -> None:
    angles = angles_back(rope_periods(named("64_10000_1")), np.array([7, 8, 9]), 5)
    for dtype in (mx.float32, mx.bfloat16, mx.float16):
        assert turn_back(mx.array(random_rows(3, 64)).astype(dtype), *angles).dtype == dtype
