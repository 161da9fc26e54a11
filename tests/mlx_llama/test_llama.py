"""What `Llama` checks before the model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlx_llama
from mlx_llama import Llama
from mlx_llama.errors import OptionError

IDS = [1, 5, 6, 7]


@pytest.fixture(scope="module")
def llama(base_model: Path) -> Llama:
    return mlx_llama.load(base_model)


def test_positions_are_those_of_python(llama: Llama) -> None:
    everything = np.array(llama.logits(IDS))
    found = np.array(llama.logits(IDS, positions=[-1, 0, -4, 3]))
    # A BLAS sums in an order that depends on how many rows there are.
    np.testing.assert_allclose(found, everything[[3, 0, 0, 3]], rtol=0, atol=1e-5)
    of_numpy = llama.logits(np.array(IDS), positions=np.array([1]))  # pyright: ignore
    np.testing.assert_allclose(of_numpy, everything[[1]], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("positions", "text"),
    [
        ([100], "positions: 100 is not from -4 to 3, the text has 4 tokens"),
        ([0, -5], "positions: -5 is not from -4 to 3"),
        ([], "positions: none given"),
        ([1.5], "positions: found [1.5], expected whole numbers"),
    ],
)
def test_positions_outside_the_text_are_refused(
    llama: Llama, positions: list[Any], text: str
) -> None:
    """100 gave the logits of 100 % 4, and no positions a ValueError of MLX."""
    with pytest.raises(OptionError) as caught:
        llama.logits(IDS, positions=positions)
    assert text in str(caught.value)


@pytest.mark.parametrize("prompt", [["a"], [1.0], [None]])
def test_prompts_of_something_else_are_refused(llama: Llama, prompt: list[Any]) -> None:
    with pytest.raises(OptionError, match=r"prompt: found .*, expected a text or token ids"):
        llama.generate(prompt)
