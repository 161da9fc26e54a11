"""Texts to measure and to calibrate on: two that ship, and whatever a user has.

The two have no sentence in common: what is measured was never calibrated on.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from mlx_llama.errors import CheckpointError

CERTIFICATE, CALIBRATION = "certificate.txt", "calibration.txt"
MAX_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Text:
    """A text and what it is called."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        """Digest of its UTF-8 bytes."""
        return hashlib.sha256(self.content.encode()).hexdigest()


def shipped(name: str) -> Text:
    """Return one of the texts that come with the project."""
    content = files("mlx_llama_quantize.texts").joinpath(name).read_text(encoding="utf-8")
    return Text(f"mlx-llama's {name}", content)


def read_text(path: Path) -> Text:
    """Read a UTF-8 text, or the `text` of each line of a JSONL file. Raises CheckpointError."""
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise CheckpointError(f"{path}: larger than {MAX_BYTES >> 20} MiB; take a part of it")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 text at byte {error.start}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if path.suffix == ".jsonl":
        content = "\n\n".join(_texts(path, content))
    return Text(path.name, content)


def _texts(path: Path, content: str) -> list[str]:
    found: list[str] = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}:{number}: expected an object with text") from error
        if not isinstance(text, str):
            raise CheckpointError(f"{path}:{number}: text is no text")
        found.append(text)
    return found
