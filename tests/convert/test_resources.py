from __future__ import annotations

from pathlib import Path

import pytest

from mlx_llama.config import QuantFormat
from mlx_llama.errors import OutputError
from mlx_llama_apps.main import main
from mlx_llama_convert import resources
from mlx_llama_convert.resources import Needs, available_memory, needs_of
from tiny_models import write_meta


def test_needs_count_output_threads_and_time(tmp_path: Path) -> None:
    def needs(n_threads: int, output_bytes: int = 10**9) -> Needs:
        return needs_of(
            weights=10**9,
            output_bytes=output_bytes,
            form=QuantFormat(4, 64),
            target=tmp_path / "not" / "yet",
            n_threads=n_threads,
        )

    assert needs(1).disk > 10**9
    assert needs(4).memory > needs(1).memory
    assert needs(1).seconds > 0
    assert needs(1).disk_found > 0


def test_memory_of_this_machine_is_known() -> None:
    found = available_memory()
    assert found is not None
    assert 10**7 < found < 10**14


@pytest.mark.parametrize(
    ("memory_found", "disk_found", "text"),
    [(10**8, 10**12, r"0\.10 GB of memory are free, 1\.00 GB needed"), (None, 1, "0.00 GB free")],
)
def test_what_will_not_do_names_both_numbers(
    memory_found: int | None, disk_found: int, text: str
) -> None:
    with pytest.raises(OutputError, match=text):
        Needs(10**9, memory_found, 10**9, disk_found, 1.0).check(Path("out"))


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_conversion_stops_before_work_without_memory(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
) -> None:
    monkeypatch.setattr(resources, "available_memory", lambda: 10**6)
    source = write_meta(tmp_path / "m")
    assert main(["convert", str(source), "-o", str(tmp_path / "out"), *flags]) == 1
    assert "GB of memory are free" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.glob("out*"))
