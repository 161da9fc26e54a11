"""Control groups of Linux: where those of this process lie, and how many processors they leave.

Imports no MLX: the answer is wanted before it is loaded.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def group_folders(controller: str) -> list[Path]:
    """Return the folders of the process's groups, of both versions, up to the roots.

    controller: what they control, such as "memory" or "cpu".
    """
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    folders: list[Path] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUPS / controller if controllers else CGROUPS
        # Inside a container the path may be the host's, of which only the root is mounted.
        inner = Path(path.lstrip("/"))
        folders += [root / part for part in (inner, *inner.parents)]
    return folders


def usable_processors() -> int:
    """Return how many processors this process may use: its affinity and its groups' quotas."""
    if hasattr(os, "sched_getaffinity"):
        n_processors = len(os.sched_getaffinity(0))
    else:
        n_processors = os.cpu_count() or 1
    return min([n_processors, *filter(None, map(_quota, group_folders("cpu")))])


def _quota(folder: Path) -> int | None:
    """Return the processors that a group may use, rounded up; None where it sets no limit."""
    try:
        quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        try:
            quota = (folder / "cpu.cfs_quota_us").read_text(encoding="ascii")
            period = (folder / "cpu.cfs_period_us").read_text(encoding="ascii")
        except (OSError, ValueError):
            return None
    try:
        return max(1, math.ceil(int(quota) / int(period))) if int(quota) > 0 else None
    except (ValueError, ZeroDivisionError):  # "max"
        return None
