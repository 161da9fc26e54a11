"""How many bits each matrix gets: the least divergence that a number of bytes can buy.

A knapsack with one choice a matrix. The divergences of matrices add up, as their errors are
independent of each other and small. Steps along each matrix's convex hull are taken by what they
gain a byte, as long as they fit; what is left is filled with the best single changes that fit. The
sum is never over budget, and Lagrange's bound says how far from the best it can be at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mlx_llama.config import QuantFormat
from mlx_llama.errors import OptionError


@dataclass(frozen=True, slots=True)
class Choice:
    """One format of a matrix: bytes as stored, scales and biases included; cost in nats."""

    form: QuantFormat
    nbytes: int
    cost: float


@dataclass(frozen=True, slots=True)
class Allocation:
    """What was chosen. cost: nats, added up; bound: what no choice within the budget is below."""

    forms: Mapping[str, QuantFormat]
    nbytes: int
    cost: float
    bound: float


def allocate(choices: Mapping[str, Sequence[Choice]], budget: int) -> Allocation:
    """Choose one format for each matrix, `budget` bytes at most in all.

    Raises OptionError where the smallest choices take more.
    """
    hulls = {name: _hull(found) for name, found in choices.items()}
    taken = {name: hull[0] for name, hull in hulls.items()}
    left = budget - sum(choice.nbytes for choice in taken.values())
    if left < 0:
        raise OptionError(f"--target-bpw: {-left} bytes too small for the fewest bits of all")
    bound: float | None = None
    ended: set[str] = set()
    for name, step in _steps(hulls):
        nbytes = step.nbytes - taken[name].nbytes
        if nbytes > left:
            if bound is None:
                share = left / nbytes
                gain = share * (taken[name].cost - step.cost)
                bound = sum(choice.cost for choice in taken.values()) - gain
            ended.add(name)
        elif name not in ended:
            taken[name] = step
            left -= nbytes
    left = _fill(choices, taken, left)
    cost = sum(choice.cost for choice in taken.values())
    forms = {name: choice.form for name, choice in taken.items()}
    return Allocation(forms, budget - left, cost, cost if bound is None else bound)


def _hull(choices: Sequence[Choice]) -> list[Choice]:
    """Return what lies on the lower convex hull, from the fewest bytes on, costs falling."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda each: (each.nbytes, each.cost)):
        if hull and choice.cost >= hull[-1].cost:
            continue
        while len(hull) > 1 and _gain(hull[-1], choice) >= _gain(hull[-2], hull[-1]):
            hull.pop()
        hull.append(choice)
    return hull


def _gain(small: Choice, large: Choice) -> float:
    """Return the nats that a byte buys on the way from one choice to another."""
    return (small.cost - large.cost) / (large.nbytes - small.nbytes)


def _steps(hulls: Mapping[str, list[Choice]]) -> Iterator[tuple[str, Choice]]:
    """Yield all steps, those that gain most a byte first; those of one matrix in their order."""
    steps = [
        (_gain(small, large), name, large)
        for name, hull in hulls.items()
        for small, large in pairwise(hull)
    ]
    for _, name, large in sorted(steps, key=lambda step: (-step[0], step[1], step[2].nbytes)):
        yield name, large


def _fill(choices: Mapping[str, Sequence[Choice]], taken: dict[str, Choice], left: int) -> int:
    """Change single matrices while that gains and fits; returns the bytes that are left."""
    while True:
        changes = [
            (taken[name].cost - choice.cost, name, choice)
            for name, found in choices.items()
            for choice in found
            if choice.nbytes - taken[name].nbytes <= left and choice.cost < taken[name].cost
        ]
        if not changes:
            return left
        _, name, choice = max(changes, key=lambda change: (change[0], change[1]))
        left -= choice.nbytes - taken[name].nbytes
        taken[name] = choice
