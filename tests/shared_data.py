"""Real files beside the checkout, which the project does not ship."""

from __future__ import annotations

from pathlib import Path

import pytest

_SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared(path: str) -> Path:
    """Return a path in the shared folder, or skip the test where it is absent."""
    found = _SHARED / path
    if not found.exists():
        pytest.skip(f"shared/{path} is not beside this checkout")
    return found
