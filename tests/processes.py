"""Our programs as processes of their own: what they see, how they are begun and interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

PATIENCE_S = 120  # so long that only what hangs meets it, on a machine that does other work too


def environment(home: Path) -> dict[str, str]:
    """Return this process's environment with our packages on the path and files in a home."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MLX_LLAMA_HOME": str(home)}


def command(*arguments: str | Path) -> list[str]:
    """Return the installed command, as a process of its own runs it."""
    code = "from mlx_llama_apps.entry import run_main; run_main()"
    return [sys.executable, "-c", code, *map(str, arguments)]


def start(code: str, *arguments: str | Path, home: Path) -> subprocess.Popen[str]:
    """Run Python code with arguments, its output in pipes."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def interrupt(process: subprocess.Popen[str], *, at: str) -> tuple[str, str]:
    """Press Ctrl-C when its first line is `at`; return what else it writes, both outputs."""
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"{at}\n"
        process.send_signal(signal.SIGINT)
        return process.communicate(timeout=PATIENCE_S)
