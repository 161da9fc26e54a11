"""A peer of the benchmark, for tests: it answers as mlx-lm's program does."""

from __future__ import annotations

import sys
from pathlib import Path

# A peer as the programs are: it says that it is ready, then answers tests.
PEER = """
import json, sys
print(json.dumps({{"version": "9, " + sys.argv[-1]}}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    {action}
    print(json.dumps({{"seconds": asked["n_tokens"] / 100, "peak_bytes": 5000}}), flush=True)
"""


def peer(folder: Path, action: str = "pass") -> str:
    """Write a program that takes an interpreter's place; returns its path."""
    script = folder / "peer.py"
    script.write_text(PEER.format(action=action), encoding="utf-8")
    program = folder / "python-with-peer"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    return str(program)
