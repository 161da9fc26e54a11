"""Tokenizers of every kind, and the files that a conversion writes of them, by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from mlx_llama.kinds import kind_named
from mlx_llama.tokenizer import Tokenizer, open_tokenizer
from mlx_llama.tokenizer.spm_proto import Piece, PieceType, SpmModel, parse_model
from mlx_llama_convert.tokenizer_files import write_tokenizer_files
from shared_data import shared
from tiny_tokenizers import tiny_spm, write_spm, write_tiktoken


@dataclass(frozen=True)
class Written:
    """A source, the folder made from it, and what reads that folder."""

    source: Tokenizer
    folder: Path
    names: list[str]
    peer: tokenizers.Tokenizer


SOURCES: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "tiny llama3": ("llama3.1-instruct", lambda d: write_tiktoken(d / "a.model")),
    "tiny llama2": ("llama2-chat", lambda d: write_spm(d / "b.model")),
    "tiny codellama": (
        "codellama-70b-instruct",
        lambda d: write_spm(d / "c.model", tiny_spm(specials=("<step>",))),
    ),
    "tiny extra": (
        "llama2",
        lambda d: write_spm(d / "d.model", tiny_spm(remove_extra_whitespaces=True)),
    ),
    "tiny bare": ("llama2", lambda d: write_spm(d / "e.model", tiny_spm(add_dummy_prefix=False))),
    "llama2": ("llama2-chat", lambda _: shared("tokenizers/llama2.model")),
    "llama3": ("llama3-instruct", lambda _: shared("tokenizers/llama3.model")),
    "llama3.1": ("llama3.1-instruct", lambda _: shared("tokenizers/llama3.model")),
    "stories": ("llama2", lambda _: shared("checkpoints/stories260k/tokenizer.model")),
    "codellama": ("codellama-70b-instruct", lambda d: write_spm(d / "f.model", with_step())),
}
_written: dict[tuple[str, Path], Written] = {}


def with_step() -> SpmModel:
    pieces = parse_model(shared("tokenizers/llama2.model").read_bytes()).pieces
    return SpmModel((*pieces, Piece("<step>", 0.0, PieceType.CONTROL)))


def written(name: str, base: Path) -> Written:
    """Write a source's files once, and open them with the `tokenizers` library."""
    if (name, base) not in _written:
        kind, make = SOURCES[name]
        source = open_tokenizer(make(base))
        folder = base / name
        folder.mkdir()
        names = write_tokenizer_files(source, kind_named(kind), folder, max_context=4096)
        peer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        _written[name, base] = Written(source, folder, names, peer)
    return _written[name, base]


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
