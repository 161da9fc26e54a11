"""Meta's checklists: digests that a download can be compared with.

`checklist.chk` (and `tokenizer_checklist.chk`, one level up in old releases) has a line of digest
and file name for each file: MD5 in Meta's own downloads, SHA-256 in some later ones.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mlx_llama.errors import CheckpointError

CHECKLISTS = ("checklist.chk", "tokenizer_checklist.chk")
MAX_BYTES = 1 << 20
_LINE = re.compile(r"([0-9a-fA-F]{32}|[0-9a-fA-F]{64})[ \t]+\*?(\S.*?)\s*")


def expected_digests(files: Sequence[Path]) -> dict[Path, tuple[str, str]]:
    """Return (name of the digest, hexadecimal) for each of the files that a checklist names.

    The kind of digest is told by its length. Raises CheckpointError for a list that is none.
    """
    expected: dict[Path, tuple[str, str]] = {}
    for folder in {file.parent for file in files}:
        for name in CHECKLISTS:
            listed = _read(folder / name)
            for file in files:
                if file.parent == folder and file.name in listed:
                    digest = listed[file.name]
                    expected[file] = ("md5" if len(digest) == 32 else "sha256", digest)
    return expected


def compare(path: Path, algorithm: str, *, expected: str, found: str) -> None:
    """Raise CheckpointError when a file is not the one that its checklist speaks of."""
    if found != expected:
        raise CheckpointError(
            f"{path}: {algorithm} is {found}, the checklist beside it says {expected}; the "
            "download is damaged, fetch this file again"
        )


def _read(path: Path) -> dict[str, str]:
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        return {}
    listed: dict[str, str] = {}
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise CheckpointError(
                f"{path}: line {number} is no digest and file name; remove the file to go on "
                "without its check"
            )
        listed[match[2]] = match[1].lower()
    return listed
