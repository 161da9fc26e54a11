"""What every tokenizer offers, and text that appears token by token.

Owns the protocol `Tokenizer` and the `Detokenizer`; knows no file format.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from mlx_llama.errors import TokenizerError

# What the error handler "surrogateescape" leaves in place of each byte that is not UTF-8.
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")


class Tokenizer(Protocol):
    """Text to token ids and back, exactly as Meta's code for the same file does it.

    path: the file that was read. family: "sentencepiece" or "tiktoken". vocab_size: special tokens
    included. special_tokens: ids by name; several names may share an id.
    """

    @property
    def path(self) -> Path:
        """Return the file that was read."""
        ...

    @property
    def family(self) -> str:
        """Return "sentencepiece" or "tiktoken"."""
        ...

    @property
    def vocab_size(self) -> int:
        """Return the number of ids, special tokens included."""
        ...

    @property
    def bos_id(self) -> int:
        """Return the token that begins a text."""
        ...

    @property
    def eos_id(self) -> int:
        """Return the token that ends a text."""
        ...

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Return the ids of tokens that no user text produces, by every name they go by."""
        ...

    def prepare(self) -> None:
        """Do now, on any thread, what else the first `encode` or `decode` would do."""
        ...

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Return the ids of `text`; names of special tokens in it are plain text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; broken bytes become U+FFFD."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that one token stands for, leading space included."""
        ...

    def detokenizer(self, *, at_start: bool) -> Detokenizer:
        """Return a fresh stream decoder; at_start: whether the text begins here."""
        ...


class Detokenizer:
    """Turns tokens into text as they come, in whole characters only.

    Takes time linear in the number of tokens. `decode` of all ids gives the same text.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], *, errors: str) -> None:
        """Take what gives the bytes of the next token.

        errors: "replace" makes one U+FFFD of a broken character, "surrogateescape" one of each
        of its bytes.
        """
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)

    def add(self, token_id: int) -> str:
        """Take one token and return the text that it completes, often none."""
        data = self._token_bytes(token_id)
        # A token without bytes (BOS in SentencePiece) stands between characters.
        return self._text(data, final=not data)

    def finish(self) -> str:
        """Return what is held back; an incomplete character becomes U+FFFD."""
        return self._text(b"", final=True)

    def _text(self, data: bytes, *, final: bool) -> str:
        text = self._decoder.decode(data, final)
        return text if text.isascii() else _ESCAPED_BYTE.sub("\ufffd", text)


def check_ids(ids: Sequence[int], vocab_size: int, path: Path) -> None:
    """Raise TokenizerError unless every id is in the vocabulary."""
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        raise TokenizerError(f"{path}: token id {wrong} is not between 0 and {vocab_size - 1}")


def with_ends(ids: list[int], *, bos: int | None, eos: int | None) -> list[int]:
    """Return `ids` with the given end tokens round them."""
    if bos is not None:
        ids.insert(0, bos)
    if eos is not None:
        ids.append(eos)
    return ids
