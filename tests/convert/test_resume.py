"""Conversions that are killed go on where they stopped, to the same bytes."""

from __future__ import annotations

import hashlib
import random
import subprocess
import time
from pathlib import Path

import pytest

from mlx_llama_convert.output import JOURNAL
from processes import PATIENCE_S, start
from tiny_models import write_meta

# A conversion of many small files, each of which takes a moment.
SLOW = """
import sys, time
from mlx_llama_convert import conversion
from mlx_llama_quantize import packing
conversion.MAX_SHARD_BYTES = 20000
pack = packing._pack
packing._pack = lambda *a: (time.sleep(0.01), pack(*a))[1]
sys.argv[0] = "mlx-llama"
from mlx_llama_apps.entry import run_main
run_main()
"""


def finish(source: Path, target: Path, home: Path) -> str:
    with start(SLOW, "convert", source, "-o", target, home=home) as process:
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors
    return errors


def digests(folder: Path) -> dict[str, str]:
    """Hash what a directory holds; a kill right after the rename may leave the journal there."""
    files = (p for p in folder.iterdir() if p.name != JOURNAL)
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def wait_for_files(journal: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Wait until so many files are finished, or the process has ended."""
    while process.poll() is None:
        if journal.is_file() and journal.read_text(encoding="utf-8").count('"file"') >= count:
            return
        time.sleep(0.002)


def kill_and_resume(tmp_path: Path, home: Path, *, times: int, seed: int) -> int:
    """Kill conversions at random moments; return how many left files that were kept."""
    source, target = write_meta(tmp_path / "m"), tmp_path / "out"
    finish(source, target, home)
    expected = digests(target)
    n_files = sum(name.endswith(".safetensors") for name in expected)
    moments, kept = random.Random(seed), 0
    for _ in range(times):
        for path in target.iterdir():
            path.unlink()
        target.rmdir()
        with start(SLOW, "convert", source, "-o", target, home=home) as process:
            wait_for_files(tmp_path / "out.partial" / JOURNAL, moments.randrange(n_files), process)
            time.sleep(moments.uniform(0, 0.05))
            process.kill()
        if not target.exists():
            kept += "which the last run finished" in finish(source, target, home)
        assert digests(target) == expected
        assert sorted(p.name for p in tmp_path.iterdir() if p.name != "home") == ["m", "out"]
    return kept


def test_killed_conversions_resume_to_the_same_bytes(tmp_path: Path, home: Path) -> None:
    assert kill_and_resume(tmp_path, home, times=4, seed=1) > 0


@pytest.mark.slow
def test_fifty_killed_conversions_resume_to_the_same_bytes(tmp_path: Path, home: Path) -> None:
    assert kill_and_resume(tmp_path, home, times=50, seed=2) > 5
