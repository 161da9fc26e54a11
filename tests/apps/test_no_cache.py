"""A cache that cannot be written: work that needs it says so first, other work goes on."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_llama.errors import OutputError
from mlx_llama.options import ConvertOptions
from mlx_llama_apps.main import main
from mlx_llama_convert import open_source
from mlx_llama_convert.plan import make_plan
from mlx_llama_convert.resources import needs_of, walk_bytes
from mlx_llama_convert.source import SourceModel
from tiny_models import write_meta, write_model

LARGEST = 40_000  # bytes of a file: less than the states of a walk take


@pytest.fixture
def blocked(home: Path) -> Path:
    """Put a file where the cache's folder would be."""
    home.mkdir()
    (home / "cache").write_text("")
    return home


@pytest.mark.parametrize("asked", [[], ["--method", "awq"], ["--target-bpw", "4.5"]])
def test_quantize_goes_on_and_says_so_once(
    blocked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: list[str]
) -> None:
    """All was measured and packed, and then thrown away."""
    source, out = write_meta(tmp_path / "tiny"), tmp_path / "out"
    assert main(["quantize", str(source), "-o", str(out), *asked]) == 0
    err = capsys.readouterr().err
    folders = {"certificates", *(["calibrations"] if "awq" in asked else [])}
    folders |= {"sensitivities"} if "4.5" in asked else set()
    said = [line for line in err.splitlines() if "the work goes on" in line]
    assert len(said) == len(folders), err
    assert all(any(folder in line for line in said) for folder in folders)
    assert json.loads((out / "manifest.json").read_text())["certificate"]["divergence"]


def test_what_waits_in_the_cache_is_refused_before_any_work(
    blocked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write_meta(tmp_path / "tiny"), tmp_path / "out"
    asked = ["quantize", str(source), "-o", str(out), "--method", "gptq", "--quiet"]
    assert main(asked) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "calibrations" in line
    assert "another folder in MLX_LLAMA_HOME" in line
    assert not list(tmp_path.glob("out*"))


def test_compare_goes_on(blocked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(write_model(tmp_path / "one"))
    (tmp_path / "text.txt").write_text("the thing in hello world end " * 40)
    asked = ["compare", model, model, "--text", str(tmp_path / "text.txt"), "--context", "32"]
    assert main([*asked, "--no-costs", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["divergence"]["kld"]["maximum"] == 0
    assert captured.err.count("the work goes on") == 1


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST, LARGEST))


def test_a_disk_that_refuses_in_the_middle_is_one_line(tmp_path: Path, home: Path) -> None:
    """MLX's own RuntimeError was shown as a bug of the program."""
    source = write_meta(tmp_path / "tiny")
    asked = ["--method", "awq", "--quiet"]
    code = "from mlx_llama_apps.entry import run_main; run_main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "quantize", source, "-o", tmp_path / "out", *asked],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "MLX_LLAMA_HOME": str(home),
        },
        preexec_fn=limit_files,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "File too large" in line
    assert "unexpected" not in line


def test_disk_counts_what_a_calibration_writes_down(tmp_path: Path) -> None:
    options = ConvertOptions(method="gptq")
    source: SourceModel = open_source(write_meta(tmp_path / "tiny"), options)
    plan = make_plan(source, options)
    kept = walk_bytes(plan)
    assert kept > plan.output_bytes

    def disk(folder: Path | None) -> int:
        return needs_of(
            weights=1,
            output_bytes=plan.output_bytes,
            form=None,
            target=tmp_path / "out",
            n_threads=1,
            kept=None if folder is None else (folder, kept),
        ).disk

    assert disk(tmp_path / "cache") == disk(None) + kept


def test_another_disk_is_asked_too(tmp_path: Path) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("/dev/shm is no other disk than that of the tests' folder")
    needs = needs_of(
        weights=1,
        output_bytes=1,
        form=None,
        target=tmp_path / "out",
        n_threads=1,
        kept=(other, 1 << 60),
    )
    with pytest.raises(OutputError, match="another folder in MLX_LLAMA_HOME"):
        needs.check(tmp_path / "out")
