"""Sampling against a plain numpy oracle of the documented order."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_llama.errors import OptionError
from mlx_llama.options import GenerationOptions
from mlx_llama.sampling import (
    Sampler,
    SamplingDefaults,
    _by_arrays,
    bias_by_token,
    keep_likeliest,
)
from mlx_llama.tokenizer import open_tokenizer
from tiny_tokenizers import write_spm, write_tiktoken

VOCAB = 12
# The native kernels' choice, where they are installed, and that of MLX's operations.
choosers = st.sampled_from([keep_likeliest, _by_arrays])


def sampler(
    prompt: list[int] | None = None, bias: dict[int, float] | None = None, **options: Any
) -> Sampler:
    filled = SamplingDefaults().fill(GenerationOptions(**{"seed": 0, **options}))
    return Sampler(filled, vocab_size=VOCAB, prompt=prompt or [], bias=bias or {})


def draw(made: Sampler, logits: list[float]) -> int:
    return cast(int, made(mx.array(logits)).item())


def kept_by_oracle(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> set[int]:
    """Apply the filters one by one over sorted probabilities, in float64."""

    def softmax(values: np.ndarray) -> np.ndarray:
        powers = np.exp(values - values.max())
        return powers / powers.sum()

    logits = logits.astype(np.float64)
    if 0 < top_k < len(logits):
        least = np.sort(logits)[-top_k]
        logits = np.where(logits >= least, logits, -np.inf)
    if top_p < 1:
        p = softmax(logits)
        order = np.argsort(-p)
        before = np.cumsum(p[order]) - p[order]
        least = p[order][before <= top_p].min()
        logits = np.where(p >= least, logits, -np.inf)
    if min_p > 0:
        p = softmax(logits)
        logits = np.where(p >= min_p * p.max(), logits, -np.inf)
    return set(np.flatnonzero(np.isfinite(logits)).tolist())


@settings(max_examples=60, deadline=None)
@given(
    choose=choosers,
    logits=st.permutations(range(VOCAB)),
    scale=st.floats(0.05, 1.5),
    top_k=st.integers(0, VOCAB + 2),
    top_p=st.sampled_from([0.0, 0.13, 0.5, 0.77, 0.91, 1.0]),
    min_p=st.sampled_from([0.0, 0.03, 0.31, 1.0]),
)
def test_filters_keep_what_the_oracle_keeps(
    choose: Callable[..., mx.array],
    logits: list[int],
    scale: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> None:
    values = np.array(logits, dtype=np.float32) * np.float32(scale)
    kept = choose(mx.array(values), top_k=top_k, top_p=top_p, min_p=min_p)
    found = set(np.flatnonzero(np.isfinite(np.array(kept))).tolist())
    assert found == kept_by_oracle(values, top_k, top_p, min_p)
    assert int(np.argmax(values)) in found


def masses_above(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each token's probability, and that of all that are likelier, in float64."""
    values = logits.astype(np.float64)
    p = np.exp(values - values.max())
    p /= p.sum()
    falling = np.sort(p)[::-1]
    before = np.concatenate([[0.0], np.cumsum(falling)])
    return p, before[np.searchsorted(-falling, -p, side="left")]


def peaked(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.standard_normal(size) + np.where(rng.random(size) < 3 / size, 20.0, 0.0)


SHAPES = {
    "random": lambda rng, size: rng.standard_normal(size) * rng.uniform(0.5, 8),
    "peaked": peaked,
    "one alone": lambda rng, size: np.where(np.arange(size) == size // 2, 200.0, 0.0),
    "nearly flat": lambda rng, size: rng.standard_normal(size) * 1e-3,
    "flat": lambda rng, size: np.full(size, 3.5),
    "tied": lambda rng, size: rng.integers(0, 5, size).astype(float),
    "tied in bfloat16": lambda rng, size: np.round(rng.standard_normal(size) * 16) / 8,
    "falling for ever": lambda rng, size: -np.arange(size) * 0.01,
}


@settings(max_examples=150, deadline=None)
@given(
    choose=choosers,
    shape=st.sampled_from(sorted(SHAPES)),
    size=st.sampled_from([1, 2, 33, 1000, 4096, 4097, 32000, 128256]),
    top_p=st.one_of(st.sampled_from([0.0, 0.25, 0.5, 0.9, 0.95, 0.999999]), st.floats(0, 0.9999)),
    banned=st.sampled_from([0.0, 0.1, 0.9]),
    seed=st.integers(0, 1 << 30),
)
def test_top_p_keeps_what_sorting_keeps(
    choose: Callable[..., mx.array], shape: str, size: int, top_p: float, banned: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    logits = SHAPES[shape](rng, size).astype(np.float32)
    logits[(rng.random(size) < banned) & (np.arange(size) != rng.integers(size))] = -np.inf
    kept = np.array(choose(mx.array(logits), top_k=0, top_p=top_p, min_p=0.0))
    is_kept, (p, above) = np.isfinite(kept), masses_above(logits)
    np.testing.assert_array_equal(kept[is_kept], logits[is_kept])
    # A sum within what rounding to whole masses adds up to may fall on either side of top_p, and
    # in float32 such near neighbours are equals.
    off = 1e-6 + size * 2.0**-33
    is_open = (np.abs(above - top_p) < off) | (np.abs(p / p[is_kept].min() - 1) < 5e-7)
    expected = (above <= top_p) & np.isfinite(logits)
    np.testing.assert_array_equal(is_kept[~is_open], expected[~is_open])
    assert is_kept[logits == logits.max()].all()
    assert not is_kept[logits < logits[is_kept].min()].any(), "a less likely one stayed"
    assert is_kept[logits == logits[is_kept].min()].all(), "of equals some went"


@pytest.mark.parametrize("size", [33, 1000, 4096])
def test_histograms_keep_what_sorting_keeps_to_the_token(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(size)
    for shape in sorted(SHAPES):
        logits = mx.array(SHAPES[shape](rng, size).astype(np.float32))
        for top_p in (0.0, 0.1, 0.5, 0.9, 0.9999):
            kept = []
            for few in (0, size):
                monkeypatch.setattr("mlx_llama.sampling._FEW", few)
                kept.append(np.array(keep_likeliest(logits, top_k=0, top_p=top_p, min_p=0.0)))
            np.testing.assert_array_equal(*kept, err_msg=f"{shape}, {top_p}")


@pytest.mark.parametrize("size", [300, 30000])
def test_top_p_of_no_number_is_no_accident(size: int) -> None:
    logits = mx.array([0.0, math.nan, 1.0] * (size // 3))
    assert keep_likeliest(logits, top_k=0, top_p=0.9, min_p=0.0).shape == (size,)


def test_seeds_draw_what_they_drew_by_sorting() -> None:
    rng = np.random.default_rng(5)
    for seed in range(40):
        logits = mx.array(rng.standard_normal(VOCAB).astype(np.float32) * 3)
        allowed = kept_by_oracle(np.array(logits), 0, 0.8, 0.0)
        by_sorting = mx.where(mx.array([t in allowed for t in range(VOCAB)]), logits, -math.inf)
        key = mx.array([seed, 0], dtype=mx.uint32)
        expected = cast(int, mx.random.categorical(by_sorting[None], key=key).item())
        made = sampler(temperature=1.0, top_p=0.8, seed=seed)
        assert draw(made, cast(list[float], logits.tolist())) == expected


def test_temperature_zero_takes_the_likeliest() -> None:
    assert draw(sampler(temperature=0), [0.0, 3.0, 1.0] + [0.0] * 9) == 1


def test_frequencies_follow_the_probabilities() -> None:
    """4000 draws at temperature 1 from (0.6, 0.3, 0.1): each within 4 standard deviations."""
    made = sampler(temperature=1.0, top_p=1.0)
    logits = [float(np.log(p)) for p in (0.6, 0.3, 0.1)] + [-1e9] * 9
    counts = Counter(draw(made, logits) for _ in range(4000))
    for token, p in enumerate((0.6, 0.3, 0.1)):
        assert abs(counts[token] - 4000 * p) < 4 * np.sqrt(4000 * p * (1 - p))


def test_seed_makes_draws_repeatable() -> None:
    logits = [0.1 * i for i in range(VOCAB)]
    runs = [[draw(made, logits) for _ in range(20)] for made in (sampler(seed=5), sampler(seed=5))]
    other = sampler(seed=6)
    assert runs[0] == runs[1]
    assert runs[0] != [draw(other, logits) for _ in range(20)]


def test_repetition_penalty_divides_positive_and_multiplies_negative_scores() -> None:
    logits = [2.0, 1.5, -1.0, -1.5] + [-9.0] * 8
    assert draw(sampler(prompt=[0], temperature=0, repetition_penalty=2.0), logits) == 1
    only_negative = [-9.0, -9.0, -1.0, -1.5] + [-9.0] * 8
    assert draw(sampler(prompt=[2], temperature=0, repetition_penalty=2.0), only_negative) == 3


def test_presence_and_frequency_count_the_answer_alone() -> None:
    logits = [2.0, 1.0] + [-9.0] * 10
    presence = sampler(prompt=[0], temperature=0, presence_penalty=1.5)
    assert [draw(presence, logits) for _ in range(3)] == [0, 1, 0]
    frequency = sampler(prompt=[0], temperature=0, frequency_penalty=0.6)
    assert [draw(frequency, logits) for _ in range(4)] == [0, 0, 1, 0]


def test_bias_comes_before_temperature_and_can_ban() -> None:
    logits = [2.0, 1.0] + [-9.0] * 10
    assert draw(sampler(bias={1: 5.0}, temperature=0), logits) == 1
    assert draw(sampler(bias={0: -np.inf}, temperature=0), logits) == 1


def test_banned_tokens_are_never_drawn_however_likely() -> None:
    """Rows behind the tokenizer's tokens were drawn, and the detokenizer ended the answer."""
    defaults = SamplingDefaults(padding=frozenset({0, 1}), unnamed_stops=frozenset({2}))
    logits = [90.0, 80.0, 70.0, 60.0] + [-9.0] * 8

    def drawn(**options: Any) -> int:
        filled = defaults.fill(GenerationOptions(seed=0, **options))
        return draw(Sampler(filled, vocab_size=VOCAB, prompt=[], bias={0: 5.0}), logits)

    for temperature in (0.0, 1.0):
        assert drawn(temperature=temperature) == 2  # it ends the answer
        assert drawn(temperature=temperature, ignore_eos=True) == 3


def test_tiny_temperature_takes_the_likeliest() -> None:
    """Logits divided by 1e-40 are infinite, and what was drawn of them was garbage."""
    logits = [float(i % 7) for i in range(VOCAB)]
    for temperature in (1e-300, 1e-40, 1e-5):
        assert draw(sampler(temperature=temperature), logits) == 6
    assert draw(sampler(temperature=1e-4), logits) == 6


def test_the_spaced_token_has_its_own_bias_where_one_is_given(tmp_path: Path) -> None:
    """The plain text's bias, which counts for the token after a space, took its place."""
    spm = open_tokenizer(write_spm(tmp_path / "tokenizer.model"))
    for texts in ({"hello": 1.0, " hello": 2.0}, {" hello": 2.0, "hello": 1.0}):
        found = bias_by_token(texts, spm)
        by_bytes = {spm.token_bytes(token): bias for token, bias in found.items()}
        assert by_bytes == {b"hello": 1.0, b" hello": 2.0}
    with pytest.raises(OptionError, match="'the' is a token after a space only"):
        bias_by_token({"the": 1.0, " the": 2.0}, spm)


def test_bias_by_text_finds_the_token_with_and_without_a_space(tmp_path: Path) -> None:
    spm = open_tokenizer(write_spm(tmp_path / "tokenizer.model"))
    found = bias_by_token({"hello": 2.0}, spm)
    assert {spm.token_bytes(token) for token in found} == {b"hello", b" hello"}
    assert set(found.values()) == {2.0}
    bpe = open_tokenizer(write_tiktoken(tmp_path / "bpe.model"))
    assert {bpe.token_bytes(t) for t in bias_by_token({"world": 1.0}, bpe)} == {b" world"}
    assert list(bias_by_token({"<|eot_id|>": 1.0}, bpe)) == [bpe.special_tokens["<|eot_id|>"]]
    with pytest.raises(OptionError, match="'hellohello' is no single token"):
        bias_by_token({"hellohello": 1.0}, spm)
