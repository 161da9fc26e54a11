"""What is known of a machine's memory."""

from __future__ import annotations

import pytest

from mlx_llama_apps.bench import bandwidth
from mlx_llama_apps.bench.bandwidth import chip_bandwidth, measured_bandwidth


@pytest.mark.parametrize(
    ("name", "cores", "expected"),
    [
        ("Apple M1", 8, 68e9),
        ("Apple M4 Pro", 14, 273e9),
        ("Apple M4 Max", 14, 410e9),
        ("Apple M4 Max", 16, 546e9),
        ("Apple M4 Max", None, None),
        ("Apple M99", 8, None),
        ("NVIDIA H100", 8, None),
    ],
)
def test_chips_are_known_by_name_and_cores(
    name: str, cores: int | None, expected: float | None
) -> None:
    assert chip_bandwidth(name, cores) == expected


def test_the_read_test_measures_something(monkeypatch: pytest.MonkeyPatch) -> None:
    small = bandwidth._PROGRAM.replace("main()", "bandwidth.BUFFER_BYTES = 1 << 22; main()")
    monkeypatch.setattr(
        bandwidth, "_PROGRAM", f"from mlx_llama_apps.bench import bandwidth; {small}"
    )
    monkeypatch.setattr(bandwidth, "LEAST_BYTES", 1 << 20)
    found = measured_bandwidth(threads=2, is_gpu=False)
    assert found is not None and found > 1e6


def test_a_read_test_that_cannot_run_gives_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_PROGRAM", "raise SystemExit(1)")
    assert measured_bandwidth(threads=1, is_gpu=False) is None
