"""Runs child processes and measures them; turns repetitions into a table.

Where the system tells (Linux), waits for a quiet moment before each run and reports how much of the
processors other programs took during the runs.

Imports nothing large: on Linux a child's peak memory is at least that of its parent when it was
started, so a benchmark that measures memory must stay small itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter, sleep

RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
PROCESSORS = Path("/proc/stat")
QUIET_PROCESSORS, QUIET_WAIT_S = 0.1, 30  # others may take so much; wait no longer than that


@dataclass(frozen=True, slots=True)
class Run:
    """One finished child process.

    peak_bytes: its largest resident set. others: processors that other programs took meanwhile.
    """

    elapsed_s: float
    cpu_s: float
    peak_bytes: int
    others: float
    output: str


def run(
    command: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Run:
    """Run a command to its end; SystemExit with its complaint when it fails.

    env: what is added to the environment. cwd: where it runs.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        busy_s = all_busy_s()
        started = perf_counter()
        child = subprocess.Popen(
            command,
            stdout=output,
            stderr=errors,
            env={**os.environ, **(env or {})},
            cwd=cwd,
        )
        _, status, usage = os.wait4(child.pid, 0)
        elapsed_s = perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            errors.seek(0)
            raise SystemExit(f"{' '.join(command)}: exit code {child.returncode}\n{errors.read()}")
        output.seek(0)
        cpu_s = usage.ru_utime + usage.ru_stime
        others = max(0.0, all_busy_s() - busy_s - cpu_s) / elapsed_s
        return Run(elapsed_s, cpu_s, usage.ru_maxrss * RSS_UNIT, others, output.read())


def all_busy_s() -> float:
    """Return the seconds that all processors together have worked; 0 where nobody tells."""
    if not PROCESSORS.exists():
        return 0.0
    user, nice, system, _idle, _wait, *others = PROCESSORS.read_text().split()[1:9]
    return sum(map(int, (user, nice, system, *others))) / os.sysconf("SC_CLK_TCK")


def await_quiet(most_s: int) -> None:
    """Wait for a second in which other programs hardly work, but no longer than most_s."""
    for _ in range(most_s if PROCESSORS.exists() else 0):
        busy_s = all_busy_s()
        sleep(1)
        if all_busy_s() - busy_s < QUIET_PROCESSORS:
            return


def interleave(
    n_rounds: int, cases: Mapping[str, Callable[[], Run]], *, quiet_wait_s: int = QUIET_WAIT_S
) -> dict[str, list[Run]]:
    """Run every case once a round, so that a slow spell of the machine meets all of them.

    quiet_wait_s: how long each run waits for a quiet moment at most.
    """
    runs: dict[str, list[Run]] = {name: [] for name in cases}
    for number in range(n_rounds):
        for name, case in cases.items():
            if sys.stderr.isatty():
                print(f"\rround {number + 1} of {n_rounds}: {name:<40}", end="", file=sys.stderr)
            await_quiet(quiet_wait_s)
            runs[name].append(case())
    if sys.stderr.isatty():
        print("\r" + " " * 60, end="\r", file=sys.stderr)
    others = [run.others for results in runs.values() for run in results]
    print(f"\nprocessors taken by other programs: {spread(others)} of {os.cpu_count()}\n")
    return runs


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Show repetitions as `median (least-most)`."""
    low, middle, high = (f"{x:.{digits}f}" for x in (min(values), median(values), max(values)))
    return f"{middle} ({low}-{high})"


def ratio(values: Sequence[float], base: Sequence[float]) -> str:
    """Show how many times base the values are: the median over rounds of each round's ratio."""
    return f"{median(a / b for a, b in zip(values, base, strict=True)):.2f}x"


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table."""
    cells = [header, *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        " | ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)) for row in cells
    ]
    lines.insert(1, " | ".join("-" * width for width in widths))
    print("\n".join(f"| {line} |" for line in lines))
