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
        ({"stop": "abc"}, "--stop: found 'abc', expected a list of texts"),
        ({"stop": None}, "--stop: found None, expected a list of texts"),
        ({"stop": ["a", 1]}, "--stop: found ['a', 1], expected a list of texts"),
        ({"max_tokens": 2.5}, "--max-tokens: found 2.5, expected a whole number"),
        ({"top_k": 2.5}, "--top-k: found 2.5, expected a whole number"),
        ({"logprobs": 1.5}, "--logprobs: found 1.5, expected a whole number"),
        ({"logprobs": None}, "--logprobs: found None, expected a whole number"),
        ({"seed": 1.5}, "--seed: found 1.5, expected a whole number"),
        ({"temperature": True}, "--temperature: found True, expected a number"),
        ({"temperature": 10**400}, "--temperature: found 1000"),
        ({"presence_penalty": None}, "--presence-penalty: found None, expected a number"),
        ({"ignore_eos": "no"}, "--ignore-eos: found 'no', expected True or False"),
        ({"ignore_eos": 1}, "--ignore-eos: found 1, expected True or False"),
        ({"logit_bias": [1]}, "--logit-bias: found [1], expected texts with a number each"),
        ({"logit_bias": {5: 1.0}}, "--logit-bias: found {5: 1.0}, expected texts with a number"),
        ({"logit_bias": {"a": None}}, "--logit-bias: found {'a': None}, expected texts with"),
        ({"logit_bias": {"a": float("nan")}}, "--logit-bias: 'a' has nan, expected a number from"),
        ({"logit_bias": {"a": float("inf")}}, "--logit-bias: 'a' has inf, expected a number from"),
        ({"logit_bias": {"a": 1e39}}, "or -inf to ban the token"),
        ({"temprature": 1}, "did you mean 'temperature'"),
        ({"zzz": 1}, "choose from"),
    ],
)
def test_wrong_options_are_refused_by_name(given: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError) as caught:
        generation_options(given)
    assert text in str(caught.value)
    (name,) = given
    assert caught.value.option == (name if text.startswith("--") or "or -inf" in text else None)


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 1, "top_p": 0},  # whole numbers are numbers
        {"stop": ("a", "b")},
        {"logit_bias": {"a": float("-inf"), "b": 2}},
        {"temperature": None, "min_p": None, "seed": None, "max_tokens": None},
    ],
)
def test_what_fits_its_type_is_taken(given: dict[str, Any]) -> None:
    options = generation_options(given)
    assert {name: getattr(options, name) for name in given} == given


@pytest.mark.parametrize(
    "given",
    [{"bits": 4.0}, {"override": "head=8"}, {"quantize": 1}, {"dtype": 16}, {"rope_factor": "8"}],
)
def test_options_of_conversions_have_types_too(given: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"found .*, expected"):
        ConvertOptions(**given)


def test_choices_are_listed() -> None:
    with pytest.raises(OptionError, match="--bits: found 7, expected one of 2, 3, 4, 5, 6, 8"):
        ConvertOptions(bits=7)


def test_order_of_defaults_is_option_then_model_then_metas() -> None:
    model = SamplingDefaults(temperature=0.8, top_k=7)
    filled = model.fill(GenerationOptions(temperature=0.1, seed=3))
    assert (filled.temperature, filled.top_p, filled.top_k) == (0.1, 0.9, 7)
    assert (filled.repetition_penalty, filled.seed) == (1.0, 3)
    assert filled.min_p == 0.0
    model = SamplingDefaults(min_p=0.05)
    assert model.fill(GenerationOptions()).min_p == 0.05
    assert model.fill(GenerationOptions(min_p=0.0)).min_p == 0.0
    assert SamplingDefaults().fill(GenerationOptions()).temperature == 0.6
    assert SamplingDefaults().fill(GenerationOptions()).seed is not None
