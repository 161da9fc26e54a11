"""What is said of the disk is known: threads that wait for it are told from all others."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_llama_apps import disk_wait
from mlx_llama_apps.disk_wait import DiskWait
from processes import PATIENCE_S

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")


def looked_at(process: subprocess.Popen[bytes], is_seen: Callable[[DiskWait], bool]) -> DiskWait:
    """Watch a process until something is seen."""
    started = time.monotonic()
    with DiskWait(process.pid) as wait:
        while not is_seen(wait):
            assert time.monotonic() - started < PATIENCE_S
            time.sleep(0.05)
    return wait


def test_a_process_that_waits_as_for_a_disk_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """posix_spawn waits uninterruptibly until its child runs, which waits for a pipe's writer."""
    monkeypatch.setattr(disk_wait, "LEAST_SECONDS", 0.0)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    code = (
        "import os, sys\n"
        "actions = [(os.POSIX_SPAWN_OPEN, 3, sys.argv[1], os.O_RDONLY, 0)]\n"
        "os.posix_spawn('/bin/true', ['true'], {}, file_actions=actions)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(pipe)]) as process:
        wait = looked_at(process, lambda wait: wait.is_the_limit or process.poll() is not None)
        pipe.write_text("go on")
    assert wait.is_the_limit
    monkeypatch.setattr(disk_wait, "LEAST_SECONDS", wait.seconds + 1)
    assert not wait.is_the_limit  # too short to tell


@pytest.mark.parametrize("code", ["import time; time.sleep(600)", "while True: pass"])
def test_idling_and_computing_are_no_disk(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_wait, "LEAST_SECONDS", 0.0)
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", code]) as process:
        wait = looked_at(process, lambda wait: wait._n_looks >= 10)
        process.kill()
    assert not wait.is_the_limit
