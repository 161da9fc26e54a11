"""Write the tiny random checkpoint of the tests into a folder: a source for trying `convert`."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(folder: str) -> None:
    """Write it; works from a checkout, with or without an installed package."""
    for package in (".", "convert", "quantize", "apps", "tests"):
        sys.path.insert(0, str(ROOT / package))
    from tiny_models import write_meta

    write_meta(Path(folder), is_tiktoken=True)


if __name__ == "__main__":
    main(sys.argv[1])
