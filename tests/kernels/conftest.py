"""The kernels of each instruction set, with one thread and with several."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kernels_oracle import INSTALLED, INSTRUCTIONS


@pytest.fixture(
    params=[(name, n) for name in INSTRUCTIONS for n in (1, 3)], ids=str, scope="module"
)
def kernels(request: pytest.FixtureRequest) -> Iterator[object]:
    assert INSTALLED is not None
    name, threads = request.param
    before = INSTALLED.instructions(), INSTALLED.threads()
    if not INSTALLED.use_instructions(name):
        pytest.skip(f"this processor has no {name}")
    INSTALLED.use_threads(threads)
    yield INSTALLED
    INSTALLED.use_instructions(before[0])
    INSTALLED.use_threads(before[1])
