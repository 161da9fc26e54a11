"""A `.pth` around any pickle, and what the reader says of one that it must refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlx_llama.errors import CheckpointError
from mlx_llama_convert.pth import open_pth
from pth_writer import storage_id, write_pth

WEIGHTS = np.arange(12, dtype=np.float32).reshape(3, 4)
ONE = storage_id("FloatStorage", "0", 12)  # the storage of WEIGHTS


def refused(path: Path) -> str:
    """Open a file that must be refused and return the message, one line with the path."""
    with pytest.raises(CheckpointError) as caught:
        open_pth(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 600
    return message


def write_raw(path: Path, data: bytes) -> Path:
    """Write a `.pth` that holds the storage of WEIGHTS and any pickle."""
    write_pth(path, {"w": WEIGHTS}, pickle=data)
    return path
