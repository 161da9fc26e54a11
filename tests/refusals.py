"""Errors as a reader of the terminal wants them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import mlx_llama
from mlx_llama.errors import CheckpointError, MlxLlamaError


def assert_refused(
    folder: Path,
    *words: str,
    kind: type[MlxLlamaError] = CheckpointError,
    by: Callable[[Path], object] = mlx_llama.load,
) -> None:
    """Check that what opens a folder, loading else, fails with one line that has the words."""
    with pytest.raises(kind) as caught:
        by(folder)
    message = str(caught.value)
    assert "\n" not in message, message
    for word in words:
        assert word in message, message
