"""Opening a tokenizer: finds the file, tells the three formats apart by content, hands it on.

The only module of the package that reads files. A file's name is not trusted: `tokenizer.model`
is SentencePiece in Llama 2 and tiktoken text in Llama 3.
"""

from __future__ import annotations

import re
from pathlib import Path

from mlx_llama.errors import TokenizerError
from mlx_llama.tokenizer.base import Tokenizer

NAMES = ("tokenizer.model", "tokenizer.json")
MAX_NBYTES = 64 << 20  # of them Llama 3's tokenizer.json takes 17 at most
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?\n")
_WANTED = "expected a SentencePiece or tiktoken tokenizer.model, or a tokenizer.json"


def open_tokenizer(path: str | Path) -> Tokenizer:
    """Open a tokenizer file, or the one in a folder.

    Raises: TokenizerError when nothing is there, or when it is damaged or of another family.
    """
    file = _locate(Path(path))
    data = _read(file)
    match format_of(data):
        case "sentencepiece":
            from mlx_llama.tokenizer.spm import read_sentencepiece

            return read_sentencepiece(file, data)
        case "tiktoken":
            from mlx_llama.tokenizer.bpe import read_tiktoken

            return read_tiktoken(file, data)
        case "json":
            from mlx_llama.tokenizer.hf_json import read_hf_json

            return read_hf_json(file, data)
    raise TokenizerError(f"{file}: {_describe(data)}; {_WANTED}")


def format_of(data: bytes) -> str | None:
    """Return "sentencepiece", "tiktoken" or "json" by a file's first bytes, None for none."""
    if data.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{":
        return "json"
    if _TIKTOKEN_LINE.match(data):
        return "tiktoken"
    # Field 1 (the pieces) or 2 (the trainer's settings) of a ModelProto, as a message.
    if data[:1] in (b"\n", b"\x12"):
        return "sentencepiece"
    return None


def _locate(path: Path) -> Path:
    if path.is_file():
        return path
    if path.is_dir():
        for name in NAMES:
            if (path / name).is_file():
                return path / name
        raise TokenizerError(f"{path}: no {' or '.join(NAMES)} in this folder; copy it there")
    raise TokenizerError(f"{path}: no such tokenizer file or folder; check the path")


def _read(file: Path) -> bytes:
    try:
        size = file.stat().st_size
        if size > MAX_NBYTES:
            raise TokenizerError(f"{file}: {size} bytes are too many for a tokenizer; {_WANTED}")
        return file.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{file}: cannot be read: {error.strerror or error}") from error


def _describe(data: bytes) -> str:
    if not data:
        return "the file is empty"
    if data.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not the file itself (run `git lfs pull`)"
    if data[:64].lstrip()[:1] == b"<":
        return "this is a web page, not a tokenizer (the download failed)"
    return f"begins with the bytes {data[:4].hex(' ')}, which no tokenizer does"
