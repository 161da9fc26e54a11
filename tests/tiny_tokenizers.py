"""Tiny tokenizer files built in code, for tests that have none of Meta's files."""

from __future__ import annotations

import base64
from pathlib import Path

from mlx_llama.tokenizer.spm_proto import SPACE, Piece, PieceType, SpmModel, serialize_model

BPE_MERGES = (
    b"he", b"ll", b"hell", b"hello", b" w", b"or", b" wor", b"ld", b" world", b"aa", b"aaa",
    b"in", b"ing", b"  ", b"    ", b"\n\n", b"user", b"\xe6\x97", b"\xe6\x97\xa5", b"\xf0\x9f",
    b"\xf0\x9f\x98", b"12", b"123", b"=="
)  # fmt: skip
SPM_MERGES = (
    f"{SPACE}{SPACE}", f"{SPACE}t", f"{SPACE}{SPACE}{SPACE}{SPACE}", "he", "in", f"{SPACE}the",
    "ll", "llo", "hello", f"{SPACE}w", f"{SPACE}hello", "ST", "INST", "aa", "aaa", "ing",
)  # fmt: skip
SPM_CHARS = f"{SPACE}abcdefghijklmnopqrstuvwxyzINST[]/.<>é日"


def write_tiktoken(path: Path, merges: tuple[bytes, ...] = BPE_MERGES) -> Path:
    """Write a tiktoken file of the 256 bytes and a few merges; returns `path`."""
    tokens = [*(bytes((value,)) for value in range(256)), *merges]
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))
    path.write_bytes(b"".join(lines))
    return path


def tiny_spm(*, specials: tuple[str, ...] = (), **settings: bool) -> SpmModel:
    """Return a SentencePiece model: 3 special pieces, 256 bytes, merges, letters, `specials`."""
    pieces = [
        Piece("<unk>", 0.0, PieceType.UNKNOWN),
        Piece("<s>", 0.0, PieceType.CONTROL),
        Piece("</s>", 0.0, PieceType.CONTROL),
        *(Piece(f"<0x{value:02X}>", 0.0, PieceType.BYTE) for value in range(256)),
    ]
    texts = (*SPM_MERGES, *SPM_CHARS)
    pieces += [Piece(text, -float(rank), PieceType.NORMAL) for rank, text in enumerate(texts)]
    pieces += [Piece(text, 0.0, PieceType.CONTROL) for text in specials]
    return SpmModel(tuple(pieces), **settings)


def write_spm(path: Path, model: SpmModel | None = None) -> Path:
    """Write a SentencePiece file; returns `path`."""
    data = serialize_model(model or tiny_spm(), unk="<unk>", bos="<s>", eos="</s>")
    path.write_bytes(data)
    return path
