from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from mlx_llama.errors import OptionError
from mlx_llama.options import ConvertOptions, GenerationOptions, generation_options
from mlx_llama.sampling import SamplingDefaults


@pytest.mark.parametrize("options", [GenerationOptions, ConvertOptions])
def test_every_option_has_help(options: type) -> None:
    assert all(spec.metadata["help"] for spec in fields(options))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"temperature": -0.1}, "--temperature: found -0.1, expected from 0.0"),
        ({"temperature": float("nan")}, "--temperature: found nan"),
        ({"temperature": "hot"}, "--temperature: found 'hot'"),
        ({"top_p": 1.5}, "--top-p: found 1.5, expected from 0.0 to 1.0"),
        ({"top_k": -1}, "--top-k: found -1, expected at least 0"),
        ({"min_p": 2}, "--min-p"),
        ({"repetition_penalty": 0}, "--repetition-penalty"),
        ({"max_tokens": -1}, "--max-tokens"),
        ({"seed": 2**32}, "--seed"),
        ({"seed": True}, "--seed"),
        ({"stop": [""]}, "--stop: an empty text"),
        ({"stop": "abc"}, "--stop: expected a list"),
        ({"logit_bias": {"a": float("nan")}}, "--logit-bias: 'a'"),
        ({"temprature": 1}, "did you mean 'temperature'"),
        ({"zzz": 1}, "choose from"),
    ],
)
def test_wrong_options_are_refused_by_name(given: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError) as caught:
        generation_options(given)
    assert text in str(caught.value)


def test_choices_are_listed() -> None:
    with pytest.raises(OptionError, match="--bits: found 7, expected one of 2, 3, 4, 5, 6, 8"):
        ConvertOptions(bits=7)


def test_order_of_defaults_is_option_then_model_then_metas() -> None:
    model = SamplingDefaults(temperature=0.8, top_k=7)
    filled = model.fill(GenerationOptions(temperature=0.1, seed=3))
    assert (filled.temperature, filled.top_p, filled.top_k) == (0.1, 0.9, 7)
    assert (filled.repetition_penalty, filled.seed) == (1.0, 3)
    assert SamplingDefaults().fill(GenerationOptions()).temperature == 0.6
    assert SamplingDefaults().fill(GenerationOptions()).seed is not None
