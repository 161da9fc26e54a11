"""The tokenizer of LLaMA 1, Llama 2, Code Llama and Llama Guard 1, with SentencePiece.

Takes the bytes of a `tokenizer.model` (or of one rebuilt from `tokenizer.json`). Owns what
SentencePiece leaves to its caller: ids checked, text made sound, streaming.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import sentencepiece

from mlx_llama.errors import TokenizerError
from mlx_llama.tokenizer.base import Detokenizer, check_ids, with_ends
from mlx_llama.tokenizer.spm_proto import (
    BPE,
    MODEL_TYPES,
    SPACE,
    PieceType,
    SpmModel,
    byte_of,
    parse_model,
)

# Ordinary pieces of Code Llama that are used by id.
INFILL_NAMES = (f"{SPACE}<PRE>", f"{SPACE}<SUF>", f"{SPACE}<MID>", f"{SPACE}<EOT>")
_SPECIAL_TYPES = (PieceType.CONTROL, PieceType.UNKNOWN, PieceType.USER_DEFINED)


class SentencePieceTokenizer:
    """A tokenizer of the Llama 2 family."""

    family = "sentencepiece"

    def __init__(self, path: Path, data: bytes, model: SpmModel) -> None:
        """Take a ModelProto and what `parse_model` read from it."""
        self.path = path
        self.model = model
        self.vocab_size = len(model.pieces)
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.special_tokens: Mapping[str, int] = MappingProxyType(
            {
                piece.text: token_id
                for token_id, piece in enumerate(model.pieces)
                if piece.type in _SPECIAL_TYPES or piece.text in INFILL_NAMES
            }
        )

    def prepare(self) -> None:
        """Do nothing: SentencePiece is ready when its file is read."""

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Return the ids of `text`; a leading space is added to it, as in training."""
        ids = self._processor.encode(_sound(text))
        return with_ends(ids, bos=self.bos_id if bos else None, eos=self.eos_id if eos else None)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, the added leading space dropped; a broken byte is U+FFFD."""
        check_ids(ids, self.vocab_size, self.path)
        return self._processor.decode(list(ids)) if ids else ""

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token; a control token has none."""
        check_ids((token_id,), self.vocab_size, self.path)
        piece = self.model.pieces[token_id]
        match piece.type:
            case PieceType.CONTROL:
                return b""
            case PieceType.BYTE:
                return byte_of(piece.text)
            case PieceType.UNKNOWN:
                return self._processor.decode([token_id]).encode()
        return piece.text.replace(SPACE, " ").encode()

    def detokenizer(self, *, at_start: bool) -> Detokenizer:
        """Return a fresh stream decoder; at_start drops the leading space, as `decode` does."""
        source = _TextStart(self) if at_start else self.token_bytes
        return Detokenizer(source, errors="surrogateescape")


class _TextStart:
    """The bytes of tokens in turn, without the space that encoding put before the first one."""

    def __init__(self, tokenizer: SentencePieceTokenizer) -> None:
        self._tokenizer = tokenizer
        self._is_at_start = True

    def __call__(self, token_id: int) -> bytes:
        data = self._tokenizer.token_bytes(token_id)
        if not self._is_at_start or not data:
            return data
        model = self._tokenizer.model
        is_spaced = model.pieces[token_id].text.startswith(SPACE)
        if is_spaced and (model.add_dummy_prefix or model.remove_extra_whitespaces):
            data = data[1:]
            # Where encoding removes extra spaces, decoding drops every leading one.
            self._is_at_start = model.remove_extra_whitespaces and not data
        else:
            self._is_at_start = False
        return data


def read_sentencepiece(path: Path, data: bytes) -> SentencePieceTokenizer:
    """Read a SentencePiece model file; it must be a BPE with BOS and EOS, as every Llama's is."""
    try:
        model = parse_model(data)
    except ValueError as error:
        raise TokenizerError(
            f"{path}: not a sound SentencePiece file: {error}; copy it again"
        ) from error
    return load_model(path, data, model)


def load_model(path: Path, data: bytes, model: SpmModel) -> SentencePieceTokenizer:
    """Return the tokenizer of a ModelProto that is parsed already."""
    if model.model_type != BPE:
        name = MODEL_TYPES.get(model.model_type, f"type {model.model_type}")
        raise TokenizerError(f"{path}: a SentencePiece {name} model; a Llama's is BPE")
    try:
        tokenizer = SentencePieceTokenizer(path, data, model)
    except (RuntimeError, OSError) as error:
        raise TokenizerError(
            f"{path}: SentencePiece refuses this file; it is damaged, copy it again"
        ) from error
    if tokenizer.bos_id < 0 or tokenizer.eos_id < 0:
        raise TokenizerError(f"{path}: this SentencePiece model has no BOS or no EOS piece")
    return tokenizer


def _sound(text: str) -> str:
    """Return `text` with what is not Unicode (lone surrogates) replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
