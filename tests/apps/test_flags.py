"""Flags become keywords of the option dataclasses."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest

from mlx_llama.errors import OptionError
from mlx_llama_apps.flags import GenerationFlags, given


def flags(**values: Any) -> object:
    assert "logit_bias" in {spec.name for spec in fields(GenerationFlags)}  # pyright: ignore
    return GenerationFlags(**values)


def test_only_what_was_given_is_passed_on() -> None:
    assert given(None) == {}
    assert given(flags(temperature=0.0, ignore_eos=False)) == {
        "temperature": 0.0,
        "ignore_eos": False,
    }


def test_biases_are_text_and_number() -> None:
    found = given(flags(logit_bias=["a=1", " a=-2.5", "a=b=3", "x=-inf"]))
    assert found["logit_bias"] == {"a": 1.0, " a": -2.5, "a=b": 3.0, "x": -math.inf}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a"], "expected TEXT=NUMBER"),
        (["=1"], "expected TEXT=NUMBER"),
        (["a=b"], "expected TEXT=NUMBER"),
        (["e=1", "e=2"], "--logit-bias: 'e' is given twice"),  # the first one was dropped
        (["e=1", "f=2", "e=1"], "--logit-bias: 'e' is given twice"),
    ],
)
def test_wrong_biases_are_refused(texts: list[str], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        given(flags(logit_bias=texts))
    assert message in str(caught.value)
