"""The small checkpoints of every published Llama, laid out as they were published."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

from mlx_llama.tokenizer.spm_proto import SPACE, Piece, PieceType, SpmModel
from tiny_tokenizers import tiny_spm, write_spm, write_tiktoken

_GOLDEN = Path(__file__).parent / "golden"
FAMILY: dict[str, dict[str, Any]] = json.loads((_GOLDEN / "family.json").read_text("utf-8"))
SPM, CODELLAMA = 320, 336


def unpack(row: str, folder: Path) -> Path:
    """Lay out a row's files as they were published, with a tokenizer of its vocabulary."""
    with zipfile.ZipFile(_GOLDEN / "family" / f"{row}.zip") as archive:
        archive.extractall(folder)
    if row in FAMILY:
        # LLaMA 1 had one tokenizer for all sizes, in the folder above theirs.
        is_above = row.startswith("llama1")
        write_tokenizer(row, (folder.parent if is_above else folder) / "tokenizer.model")
    return folder


def write_tokenizer(row: str, path: Path) -> Path:
    vocab = FAMILY[row]["vocab"]
    return write_spm(path, spm(vocab)) if vocab in (SPM, CODELLAMA) else write_tiktoken(path, ())


def spm(vocab: int) -> SpmModel:
    """Return a SentencePiece model of the given size, with Code Llama's pieces in the large one."""
    pieces = list(tiny_spm().pieces)
    pieces += [Piece(f"<pad{n}>", 0.0, PieceType.CONTROL) for n in range(SPM - len(pieces))]
    if vocab == CODELLAMA:
        infill = [f"{SPACE}<{name}>" for name in ("PRE", "SUF", "MID", "EOT")]
        pieces += [Piece(text, 0.0, PieceType.NORMAL) for text in infill]
        pieces.append(Piece("<step>", 0.0, PieceType.CONTROL))
        pieces += [Piece(f"<fill{n}>", 0.0, PieceType.NORMAL) for n in range(vocab - len(pieces))]
    return SpmModel(tuple(pieces))


def digests(file: Path) -> dict[str, str]:
    """Return the SHA-256 of each tensor's bytes, read without any of our readers."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    return {
        name: hashlib.sha256(data[start:][slice(*entry["data_offsets"])]).hexdigest()
        for name, entry in header.items()
    }
