"""What is said of work on its way: how far it is, how long it takes, and of what that is."""

from __future__ import annotations

import pytest

from mlx_llama_apps.progress import Stages, duration, prefill_progress, shown


class Status:
    """A status line that remembers what it was to show."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def show(self, text: str) -> None:
        self.shown.append(text)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that have passed; the test sets them."""
    now = [0.0]
    monkeypatch.setattr("mlx_llama_apps.progress.monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("seconds", "said"), [(7.6, "8 s"), (125, "2 min 5 s"), (3780, "1 h 3 min")]
)
def test_durations_are_short(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_progress_of_a_prompt_has_rate_and_time_left(clock: list[float]) -> None:
    status = Status()
    show = prefill_progress(status)  # pyright: ignore
    clock[0] = 1.0
    show(100, 1000)
    clock[0] = 3.0
    show(300, 1000)
    assert status.shown == [
        "reading the prompt: 100 of 1000 tokens",
        "reading the prompt: 300 of 1000 tokens, 100 a second, 7 s left",
    ]


def test_time_left_is_that_of_the_work_itself(clock: list[float]) -> None:
    """It counted what was done before, and made minutes of seconds."""
    said: list[str] = []
    show = shown(said.append, "comparing")
    clock[0] = 600.0
    show(1, 11)
    clock[0] = 602.0
    show(2, 11)
    assert said == ["comparing: 9 %", "comparing: 18 %, 18 s left"]


def test_share_and_time_left_say_of_which_part_they_are(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    status = Status()
    stages = Stages(status, ["packing", "comparing"])  # pyright: ignore
    for part in ("packing", "comparing"):
        report = stages.of(part)
        for _ in range(2):
            clock[0] += 1
            report(int(clock[0]), 10)
    assert status.shown == [
        "packing, part 1 of 2: 10 %",
        "packing, part 1 of 2: 20 %, 8 s left of this part",
        "comparing, part 2 of 2: 30 %",
        "comparing, part 2 of 2: 40 %, 6 s left",
    ]
    assert stages.summary() == "done in 4.0 s: packing 2.0 s, comparing 2.0 s"
