"""Spending a budget: never over it, and no further from the best than the bound says."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_llama.config import QuantFormat
from mlx_llama.errors import OptionError
from mlx_llama_quantize.allocation import Choice, allocate

FORMS = [QuantFormat(bits, 64) for bits in (2, 3, 4, 8)]
ROUNDING = 1e-9  # of sums of a few floats

choice_lists = st.lists(
    st.lists(st.tuples(st.integers(1, 60), st.floats(0, 10)), min_size=1, max_size=4),
    min_size=1,
    max_size=4,
)


def named(lists: list[list[tuple[int, float]]]) -> dict[str, list[Choice]]:
    return {
        f"m{number}": [Choice(FORMS[place], *each) for place, each in enumerate(found)]
        for number, found in enumerate(lists)
    }


@given(choice_lists, st.integers(0, 200))
def test_never_over_budget_and_within_the_bound(
    lists: list[list[tuple[int, float]]], budget: int
) -> None:
    choices = named(lists)
    fitting = [
        sum(choice.cost for choice in combination)
        for combination in product(*choices.values())
        if sum(choice.nbytes for choice in combination) <= budget
    ]
    if not fitting:
        with pytest.raises(OptionError, match="too small"):
            allocate(choices, budget)
        return
    found = allocate(choices, budget)
    chosen = [
        next(each for each in choices[name] if each.form == form)
        for name, form in found.forms.items()
    ]
    assert sum(choice.nbytes for choice in chosen) == found.nbytes <= budget
    assert sum(choice.cost for choice in chosen) == pytest.approx(found.cost)
    assert found.bound - ROUNDING <= min(fitting) <= found.cost + ROUNDING


def test_bits_go_where_a_byte_gains_most() -> None:
    choices = {
        "much": [Choice(FORMS[0], 10, 9.0), Choice(FORMS[2], 20, 1.0)],
        "little": [Choice(FORMS[0], 10, 1.0), Choice(FORMS[2], 20, 0.1)],
    }
    assert allocate(choices, 30).forms == {"much": FORMS[2], "little": FORMS[0]}
    assert allocate(choices, 40).bound == allocate(choices, 40).cost


def test_what_is_left_is_filled_off_the_hull() -> None:
    """The next step of the hull does not fit; a smaller one beside the hull does."""
    choices = {
        "a": [Choice(FORMS[0], 10, 9.0), Choice(FORMS[1], 12, 8.9), Choice(FORMS[2], 20, 1.0)]
    }
    found = allocate(choices, 15)
    assert found.forms["a"] == FORMS[1]
    assert found.bound <= found.cost
