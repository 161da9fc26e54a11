"""Llama 3's tokenizer: byte-pair encoding by rank, with tiktoken.

Owns Meta's splitting of text, the cuts of very long text and the names of the special tokens.
Takes a `tokenizer.model` of lines `base64 rank`, or ranks that were rebuilt from elsewhere.

Source: meta-llama/llama-models, models/llama3/tokenizer.py at a9c89c4.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import repeat
from pathlib import Path
from threading import Lock
from types import MappingProxyType

import tiktoken

from mlx_llama.errors import TokenizerError
from mlx_llama.tokenizer.base import Detokenizer, check_ids, with_ends

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
N_SPECIAL = 256
MAX_RANKS = (1 << 21) - N_SPECIAL

# Meta encodes slices of this many characters, cut once more inside runs of white space, or of
# anything else, beyond the second number. The cuts change the tokens there.
SLICE_CHARS = 400_000
RUN_CHARS = 25_000
_RUNS = re.compile(r"\s+|\S+")


def special_names(scheme: str) -> list[str]:
    """Return the names of the 256 special tokens in id order.

    scheme: "meta" as in Meta's current code, "llama3" as first published, "llama3.1" as in the
    Hugging Face releases since 3.1. Nameless places are numbered in each scheme on its own.
    """
    named = dict(_NAMED[scheme])
    names, n_reserved = [], 0
    for index in range(N_SPECIAL):
        if index not in named:
            named[index] = f"<|reserved_special_token_{n_reserved}|>"
            n_reserved += 1
        names.append(named[index])
    return names


_LLAMA3 = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "<|eot_id|>",
}
_LLAMA31 = _LLAMA3 | {4: "<|finetune_right_pad_id|>", 8: "<|eom_id|>", 10: "<|python_tag|>"}
_NAMED: Mapping[str, Mapping[int, str]] = {
    "meta": _LLAMA31 | {5: "<|step_id|>", 11: "<|image|>"},
    "llama3.1": _LLAMA31,
    "llama3": _LLAMA3,
}


def with_aliases(names: Sequence[str], first_id: int) -> dict[str, int]:
    """Return ids by name: `names` themselves, then what other releases call the same places.

    A reserved name means different places in different releases: `names` decide, then Meta's code.
    """
    ids = {name: first_id + index for index, name in enumerate(names)}
    for scheme in _NAMED:
        for index, name in enumerate(special_names(scheme)[: len(names)]):
            ids.setdefault(name, first_id + index)
    return ids


class BpeTokenizer:
    """A tokenizer of the Llama 3 family."""

    family = "tiktoken"

    def __init__(
        self,
        path: Path,
        n_ranks: int,
        specials: Sequence[str],
        ranks: Callable[[], dict[bytes, int]],
    ) -> None:
        """Take what gives the checked ranks 0..n_ranks-1, and the names of the tokens after them.

        It is called once, when they are needed.
        """
        self.path = path
        self.n_ranks = n_ranks
        self.vocab_size = n_ranks + len(specials)
        self.special_names = tuple(specials)
        self.special_tokens: Mapping[str, int] = MappingProxyType(
            with_aliases(specials, self.n_ranks)
        )
        self.bos_id = self.special_tokens["<|begin_of_text|>"]
        self.eos_id = self.special_tokens["<|end_of_text|>"]
        self._ranks: Callable[[], dict[bytes, int]] | None = ranks
        self._made: tiktoken.Encoding | None = None
        self._making = Lock()

    def prepare(self) -> None:
        """Build tiktoken's tables now, on any thread, instead of when they are first needed."""
        with self._making:
            if self._ranks is not None:
                self._made = tiktoken.Encoding(
                    name=self.path.name,
                    pat_str=PATTERN,
                    mergeable_ranks=self._ranks(),
                    special_tokens={n: self.n_ranks + i for i, n in enumerate(self.special_names)},
                )
                self._ranks = None  # they may hold the whole list of tokens

    @property
    def _encoding(self) -> tiktoken.Encoding:
        if self._made is None:
            self.prepare()
        assert self._made is not None
        return self._made

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Return the ids of `text`; names of special tokens in it are plain text."""
        ids: list[int] = []
        for part in cut(text):
            ids += self._encoding.encode_ordinary(part)
        return with_ends(ids, bos=self.bos_id if bos else None, eos=self.eos_id if eos else None)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; a broken character becomes U+FFFD."""
        check_ids(ids, self.vocab_size, self.path)
        return self._encoding.decode(ids)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token; a special token's are its name."""
        check_ids((token_id,), self.vocab_size, self.path)
        return self._encoding.decode_single_token_bytes(token_id)

    def detokenizer(self, *, at_start: bool) -> Detokenizer:
        """Return a fresh stream decoder; no space is ever dropped in this family."""
        return Detokenizer(self.token_bytes, errors="replace")


def cut(text: str) -> Iterator[str]:
    """Yield the parts that Meta encodes one by one; nearly every text is a single part."""
    for start in range(0, len(text), SLICE_CHARS):
        part = text if len(text) <= SLICE_CHARS else text[start : start + SLICE_CHARS]
        if len(part) > RUN_CHARS and _may_hold_long_run(part):
            yield from _cut_runs(part)
        else:
            yield part


def _may_hold_long_run(text: str) -> bool:
    """Return False only if no run exceeds RUN_CHARS, looking at little of the text.

    A longer run would fill a whole block of half that size.
    """
    size = RUN_CHARS // 2
    for start in range(0, len(text) - size + 1, size):
        block = text[start : start + size]
        if block.isspace() or len(block.split(None, 1)[0]) == size:
            return True
    return False


def _cut_runs(text: str) -> Iterator[str]:
    start = 0
    for run in _RUNS.finditer(text):
        for position in range(run.start() + RUN_CHARS, run.end(), RUN_CHARS):
            yield text[start:position]
            start = position
    yield text[start:]


def read_tiktoken(path: Path, data: bytes) -> BpeTokenizer:
    """Read lines of `base64 rank`; the special tokens follow as in Meta's code."""
    if (n_lines := data.count(b"\n")) > MAX_RANKS:
        raise TokenizerError(f"{path}: {n_lines} lines, at most {MAX_RANKS} are sane")
    lines = data.splitlines()
    ranks = _sound_ranks(lines) or _checked_ranks(path, lines)
    check_bytes(path, sum(bytes((value,)) in ranks for value in range(256)), len(ranks))
    return BpeTokenizer(path, len(ranks), special_names("meta"), lambda: ranks)


def _sound_ranks(lines: Sequence[bytes]) -> dict[bytes, int] | None:
    """Return the ranks of a file without a fault, by functions that run over whole lists.

    None where anything is not as expected.
    """
    if set(map(bytes.count, lines, repeat(b" "))) != {1}:
        return None
    parts = b" ".join(lines).split(b" ")
    if parts[1::2] != list(map(b"%d".__mod__, range(len(lines)))):
        return None
    try:
        tokens = list(map(partial(binascii.a2b_base64, strict_mode=True), parts[::2]))
    except binascii.Error:
        return None
    ranks = dict(zip(tokens, range(len(tokens)), strict=True))
    return ranks if len(ranks) == len(tokens) and b"" not in ranks else None


def _checked_ranks(path: Path, lines: Sequence[bytes]) -> dict[bytes, int]:
    """Return the ranks, looking at line by line; TokenizerError names the first at fault."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines):
        token, _, rank = line.partition(b" ")
        if rank != b"%d" % number:
            raise _damaged(path, number, f"rank {_shown(rank)}, expected {number}")
        try:
            token = binascii.a2b_base64(token, strict_mode=True)
        except binascii.Error as error:
            raise _damaged(path, number, f"no base64 in {_shown(token)}") from error
        if not token or token in ranks:
            raise _damaged(path, number, "the same token twice" if token else "an empty token")
        ranks[token] = number
    return ranks


def check_bytes(path: Path, n_bytes: int, n_tokens: int) -> None:
    """Raise TokenizerError unless every single byte is a token."""
    if n_bytes < 256:
        raise TokenizerError(
            f"{path}: only {n_bytes} of the 256 single bytes are among its {n_tokens} tokens; "
            "the file is incomplete, copy it again"
        )


def _damaged(path: Path, number: int, found: str) -> TokenizerError:
    return TokenizerError(f"{path}: line {number + 1} has {found}; damaged, copy it again")


def _shown(data: bytes) -> str:
    return repr(data[:24].decode("ascii", "backslashreplace"))
