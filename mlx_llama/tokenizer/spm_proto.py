"""The SentencePiece model file: the parts of its protobuf that a Llama's tokenizer uses.

Owns reading (strictly, so that the C++ library never sees a damaged file) and writing. Knows
nothing of encoding text.

Source: google/sentencepiece, src/sentencepiece_model.proto, for field numbers and defaults.
"""

from __future__ import annotations

import struct
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum

SPACE = "\u2581"
BPE = 2
MODEL_TYPES = {1: "Unigram", BPE: "BPE", 3: "word", 4: "character"}
UNK_SURFACE = " \u2047 "
MAX_PIECES = 1 << 21


class PieceType(IntEnum):
    """What a piece is; only NORMAL ones come from merging text."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of the vocabulary; its place in the list is its id."""

    text: str
    score: float
    type: PieceType


@dataclass(frozen=True, slots=True)
class SpmModel:
    """A SentencePiece model: its pieces by id and the settings that change tokens."""

    pieces: tuple[Piece, ...]
    model_type: int = BPE
    byte_fallback: bool = True
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = False
    escape_whitespaces: bool = True
    has_charsmap: bool = False


def parse_model(data: bytes) -> SpmModel:
    """Read a ModelProto; ValueError says in a few words what is wrong with it."""
    pieces: list[Piece] = []
    trainer: Mapping[int, int | bytes] = {}
    normalizer: Mapping[int, int | bytes] = {}
    for number, value in _fields(data):
        if number not in (1, 2, 3):
            continue
        if not isinstance(value, bytes):
            raise ValueError(f"field {number} is not a message")
        if number == 1:
            if len(pieces) == MAX_PIECES:
                raise ValueError(f"it holds more than {MAX_PIECES} pieces")
            pieces.append(_parse_piece(value, len(pieces)))
        elif number == 2:
            trainer = dict(_fields(value))
        else:
            normalizer = dict(_fields(value))
    if not trainer:
        raise ValueError("it ends before the settings that follow its pieces")
    if not pieces:
        raise ValueError("it holds no pieces")
    if len({piece.text for piece in pieces}) < len(pieces):
        raise ValueError("a piece occurs twice")
    return SpmModel(
        pieces=tuple(pieces),
        model_type=_number(trainer, 3, 1),
        byte_fallback=bool(_number(trainer, 35, 0)),
        add_dummy_prefix=bool(_number(normalizer, 3, 1)),
        remove_extra_whitespaces=bool(_number(normalizer, 4, 1)),
        escape_whitespaces=bool(_number(normalizer, 5, 1)),
        has_charsmap=bool(normalizer.get(2)),
    )


def serialize_model(model: SpmModel, *, unk: str, bos: str, eos: str) -> bytes:
    """Write a BPE ModelProto without padding; unk, bos, eos: the pieces in these roles."""
    ids = {piece.text: index for index, piece in enumerate(model.pieces)}
    out = [_message(1, _serialize_piece(piece)) for piece in model.pieces]
    trainer = [
        _varint_field(3, model.model_type),
        _varint_field(4, len(model.pieces)),
        _varint_field(35, int(model.byte_fallback)),
        *(_varint_field(40 + i, ids[text]) for i, text in enumerate((unk, bos, eos))),
        _varint_field(43, (1 << 64) - 1),  # -1: no padding
        *(_message(44 + i, s.encode()) for i, s in enumerate((UNK_SURFACE, unk, bos, eos))),
    ]
    normalizer = [
        _message(1, b"identity"),
        _varint_field(3, int(model.add_dummy_prefix)),
        _varint_field(4, int(model.remove_extra_whitespaces)),
        _varint_field(5, int(model.escape_whitespaces)),
    ]
    out += [_message(2, b"".join(trainer)), _message(3, b"".join(normalizer))]
    return b"".join(out)


def merges_of(model: SpmModel) -> list[tuple[str, str]]:
    """Return every pair of pieces that joins to a piece, the pair that is merged first first.

    SentencePiece joins the neighbours whose joint piece scores highest, whatever the pair; a list
    of pairs says the same when it holds them all. The order of the pairs of one piece changes
    nothing (tried on random vocabularies).
    """
    normal = [p for p in model.pieces if p.type in (PieceType.NORMAL, PieceType.UNUSED)]
    known = {piece.text for piece in normal}
    pairs: list[tuple[str, str]] = []
    for piece in sorted(normal, key=lambda piece: -piece.score):
        pairs += splits(piece.text, known)
    return pairs


def splits(text: str, known: Container[str]) -> list[tuple[str, str]]:
    """Return the ways to cut `text` into two known pieces."""
    return [
        (text[:at], text[at:])
        for at in range(1, len(text))
        if text[:at] in known and text[at:] in known
    ]


def _parse_piece(data: bytes, index: int) -> Piece:
    text, score, kind = b"", 0.0, 1
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            text = value
        elif number == 2 and isinstance(value, bytes) and len(value) == 4:
            (score,) = struct.unpack("<f", value)
        elif number == 3 and isinstance(value, int):
            kind = value
    try:
        piece = Piece(text.decode(), score, PieceType(kind))
    except ValueError as error:
        raise ValueError(f"piece {index} is damaged") from error
    if not piece.text or score != score:
        raise ValueError(f"piece {index} is empty or has no score")
    if piece.type is PieceType.BYTE and not is_byte_name(piece.text):
        raise ValueError(f"piece {index} is no byte")
    return piece


def is_byte_name(text: str) -> bool:
    """Return whether `text` is the name of a byte token, such as `<0x0A>`."""
    return text in _BYTE_NAMES


_BYTE_NAMES = {f"<0x{value:02X}>": value for value in range(256)}


def byte_of(name: str) -> bytes:
    """Return the byte that a byte token stands for."""
    return bytes((_BYTE_NAMES[name],))


def _serialize_piece(piece: Piece) -> bytes:
    score = b"\x15" + struct.pack("<f", piece.score)
    return _message(1, piece.text.encode()) + score + _varint_field(3, piece.type)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (field number, value) of one message; fixed-size numbers stay bytes."""
    at, end = 0, len(data)
    while at < end:
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"unknown wire type {wire} at byte {at}")
        if at + size > end:
            raise ValueError(f"it ends early, {at + size - end} bytes are missing")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("it ends early, inside a number")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError(f"a number is too long at byte {at}")


def _number(fields: Mapping[int, int | bytes], number: int, default: int) -> int:
    value = fields.get(number, default)
    if not isinstance(value, int):
        raise ValueError(f"setting {number} is not a number")
    return value


def _message(number: int, data: bytes) -> bytes:
    return _write_varint(number << 3 | 2) + _write_varint(len(data)) + data


def _varint_field(number: int, value: int) -> bytes:
    return _write_varint(number << 3) + _write_varint(value)


def _write_varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
