"""The content of a `tokenizer.json`, made from Meta's own tokenizers.

Takes an opened tokenizer, returns what the `tokenizers` library reads and turns into the same ids.
Writes no files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mlx_llama.errors import UnsupportedModelError
from mlx_llama.tokenizer.bpe import PATTERN, BpeTokenizer
from mlx_llama.tokenizer.hf_byte_level import byte_alphabet
from mlx_llama.tokenizer.spm import SentencePieceTokenizer
from mlx_llama.tokenizer.spm_proto import SPACE, PieceType, SpmModel, merges_of, splits

Json = dict[str, Any]
_ADDED_TYPES = (PieceType.UNKNOWN, PieceType.CONTROL, PieceType.USER_DEFINED)


def bpe_json(tokenizer: BpeTokenizer, special_names: Iterable[str]) -> Json:
    """Return the file of a Llama 3 tokenizer.

    special_names: of the ids behind the ranks, in order. Merging is told by a list of pairs, here
    every pair of tokens that joins to a token; a piece of text that is a token as it stands is
    taken whole (`ignore_merges`), as tiktoken does: 588 tokens of Llama 3 are not reached by pairs.
    """
    alphabet = byte_alphabet()
    table = {value: ord(char) for value, char in enumerate(alphabet)}
    tokens = [
        tokenizer.token_bytes(rank).decode("latin-1").translate(table)
        for rank in range(tokenizer.n_ranks)
    ]
    known = set(tokens)
    merges = [f"{left} {right}" for token in tokens for left, right in splits(token, known)]
    names = list(special_names)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated"}
    return _document(
        added=[_added(name, tokenizer.n_ranks + index) for index, name in enumerate(names)],
        normalizer=None,
        pre_tokenizer=_sequence(
            "pretokenizers", [split | {"invert": False}, byte_level | {"use_regex": False}]
        ),
        post_processor=_sequence(
            "processors",
            [byte_level | {"use_regex": True}, _bos_first(names[0], tokenizer.bos_id)],
        ),
        decoder={**byte_level, "add_prefix_space": True, "use_regex": True},
        model=_bpe({token: rank for rank, token in enumerate(tokens)}, merges, ignore_merges=True),
    )


def sentencepiece_json(tokenizer: SentencePieceTokenizer) -> Json:
    """Return the file of a Llama 2 tokenizer.

    Raises: UnsupportedModelError when the model changes text in a way that has no place there.
    """
    model = tokenizer.model
    if model.has_charsmap or not model.escape_whitespaces:
        raise UnsupportedModelError(
            f"{tokenizer.path}: its SentencePiece normalizer is not the identity, as a Llama's is"
        )
    pieces = list(enumerate(model.pieces))
    unk = next((p.text for _, p in pieces if p.type is PieceType.UNKNOWN), None)
    decoders: list[Json] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if model.add_dummy_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return _document(
        added=[
            _added(piece.text, token_id, special=piece.type is not PieceType.USER_DEFINED)
            for token_id, piece in pieces
            if piece.type in _ADDED_TYPES
        ],
        normalizer=_sequence("normalizers", _space_steps(model)),
        pre_tokenizer=None,
        post_processor=_bos_first(model.pieces[tokenizer.bos_id].text, tokenizer.bos_id),
        decoder=_sequence("decoders", decoders),
        model=_bpe(
            {piece.text: token_id for token_id, piece in pieces},
            [f"{left} {right}" for left, right in merges_of(model)],
            unk_token=unk,
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
        ),
    )


def _space_steps(model: SpmModel) -> list[Json]:
    """Return the normalizer's steps, for what SentencePiece does to spaces before encoding."""
    steps: list[Json] = []
    if model.remove_extra_whitespaces:
        ends = {"Regex": rf"\A +|[ {SPACE}]+\z"}
        steps += [
            {"type": "Replace", "pattern": ends, "content": ""},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        ]
    if model.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    return [*steps, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]


def _document(**parts: object) -> Json:
    head: Json = {"version": "1.0", "truncation": None, "padding": None}
    return head | {"added_tokens": parts.pop("added")} | parts


def _bpe(vocab: Mapping[str, int], merges: list[str], **settings: object) -> Json:
    head: Json = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return head | settings | {"vocab": dict(vocab), "merges": merges}


def _added(name: str, token_id: int, *, special: bool = True) -> Json:
    return {
        "id": token_id,
        "content": name,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def _bos_first(bos: str, bos_id: int) -> Json:
    """Return the step that puts BOS before each text."""
    token = {"SpecialToken": {"id": bos, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    second = [
        {"SpecialToken": {"id": bos, "type_id": 1}},
        {"Sequence": {"id": "B", "type_id": 1}},
    ]
    return {
        "type": "TemplateProcessing",
        "single": [token, text],
        "pair": [token, text, *second],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


def _sequence(key: str, steps: list[Json]) -> Json:
    return {"type": "Sequence", key: steps}
