"""Llama 2's `tokenizer.json`: back from merges to a SentencePiece model.

Takes a checked `HfFile`, returns the tokenizer that Meta's own file gives. The model is written in
SentencePiece's format and read by SentencePiece, so that results are its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mlx_llama.tokenizer.hf_json import HfFile, WrongFileError, check_ids_run, names_of
from mlx_llama.tokenizer.spm import SentencePieceTokenizer, load_model
from mlx_llama.tokenizer.spm_proto import (
    SPACE,
    Piece,
    PieceType,
    SpmModel,
    is_byte_name,
    merges_of,
    serialize_model,
)

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
_PREPEND = {"type": "Prepend", "prepend": SPACE}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


def read_fallback(path: Path, file: HfFile) -> SentencePieceTokenizer:
    """Return a Llama 2 tokenizer; WrongFileError unless it gives the file's own results."""
    _check_steps(file)
    ids = _all_ids(file)
    model = SpmModel(_pieces(file, ids))
    normal = {piece.text for piece in model.pieces if piece.type is PieceType.NORMAL}
    # Some files also list merges into `</s>` and the like, which no text ever reaches.
    merges = {merge for merge in file.merges if merge.replace(" ", "") in normal}
    if merges != {" ".join(pair) for pair in merges_of(model)}:
        raise WrongFileError("its merges are not all pairs of its tokens, as SentencePiece's are")
    return load_model(path, serialize_model(model, unk=UNK, bos=BOS, eos=EOS), model)


def _check_steps(file: HfFile) -> None:
    """Raise unless spaces are treated as Llama 2 treats them."""
    if not file.pre_tokenizer and file.normalizer == (_PREPEND, _REPLACE):
        return
    if not file.normalizer and len(file.pre_tokenizer) == 1:
        step = file.pre_tokenizer[0]
        is_first = step.get("prepend_scheme", "always") in ("first", "always")
        if (
            step["type"] == "Metaspace"
            and step.get("replacement") == SPACE
            and step.get("split") is False
            and step.get("add_prefix_space", is_first) is True
            and is_first
        ):
            return
    raise WrongFileError(
        f"its normalizer is {names_of(file.normalizer)} and its pre-tokenizer "
        f"{names_of(file.pre_tokenizer)}, not as Llama 2 treats spaces"
    )


def _all_ids(file: HfFile) -> dict[str, int]:
    """Return the ids of the vocabulary and of what was added behind it."""
    for token, token_id in file.added.items():
        if file.vocab.get(token, token_id) != token_id:
            raise WrongFileError(f"added token {token!r:.40} has another id in the vocabulary")
    ids = {**file.vocab, **file.added}
    check_ids_run(ids, 0, "tokens")
    missing = [name for name in (UNK, BOS, EOS) if name not in ids]
    missing += [name for value in range(256) if (name := f"<0x{value:02X}>") not in ids]
    if missing:
        raise WrongFileError(f"no {missing[0]} among its tokens; not a Llama 2 tokenizer")
    return ids


def _pieces(file: HfFile, ids: Mapping[str, int]) -> tuple[Piece, ...]:
    """Return the pieces by id; a piece that is merged earlier scores higher."""
    places: dict[str, int] = {}
    for merge in file.merges:
        if (joint := merge.replace(" ", "")) not in ids:
            raise WrongFileError(f"merge {merge!r:.60} makes no token")
        places.setdefault(joint, len(places))
    last = len(places)
    pieces = []
    for text in sorted(ids, key=ids.__getitem__):
        kind = _type_of(text, is_added=text in file.added, is_merged=text in places)
        score = -float(places.get(text, last)) if kind is PieceType.NORMAL else 0.0
        pieces.append(Piece(text, score, kind))
    return tuple(pieces)


def _type_of(text: str, *, is_added: bool, is_merged: bool) -> PieceType:
    if text == UNK:
        return PieceType.UNKNOWN
    if is_byte_name(text):
        return PieceType.BYTE
    # Code Llama's infilling tokens are ordinary pieces that Hugging Face lists as added.
    if text in (BOS, EOS) or (is_added and not is_merged):
        return PieceType.CONTROL
    return PieceType.NORMAL
