"""Texts to measure and to calibrate on: two that ship, and whatever a user has.

The two have no sentence in common: what is measured was never calibrated on.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from mlx_llama.errors import CheckpointError
from mlx_llama.strict_json import load_jsonl, load_text

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
    if path.suffix != ".jsonl":
        return Text(path.name, load_text(path, max_bytes=MAX_BYTES))
    found: list[str] = []
    for where, record in load_jsonl(path, max_bytes=MAX_BYTES):
        text = record.get("text")
        if not isinstance(text, str):
            raise CheckpointError(f"{where}: expected an object with text, which is a string")
        found.append(text)
    return Text(path.name, "\n\n".join(found))
