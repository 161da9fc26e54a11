"""Llama 3's `tokenizer.json`: back from printable stand-ins and merges to ranks.

Takes a checked `HfFile`, returns the tokenizer that Meta's own file gives.
"""

from __future__ import annotations

import codecs
import operator
import re
from collections.abc import Container, Sequence
from functools import partial
from itertools import compress
from pathlib import Path
from struct import Struct

from mlx_llama.tokenizer.bpe import PATTERN, BpeTokenizer, check_bytes
from mlx_llama.tokenizer.hf_json import HfFile, WrongFileError, check_ids_run, names_of
from mlx_llama.tokenizer.spm_proto import splits

# So many tokens at least have all their splits looked up among the merges: enough to know a list
# that was derived from ranks from one that was trained, at little of the time.
_SAMPLE = 2048
_NEEDED = ("<|begin_of_text|>", "<|end_of_text|>")


def byte_alphabet() -> list[str]:
    """Return GPT-2's printable stand-in for each byte.

    Source: openai/gpt-2, src/encoder.py, bytes_to_unicode.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [value for value in range(256) if value not in printable]
    stand_in = {value: 256 + index for index, value in enumerate(others)}
    return [chr(stand_in.get(value, value)) for value in range(256)]


_STAND_INS = codecs.charmap_build("".join(byte_alphabet()))
_WRITTEN = re.compile(f"[{re.escape(''.join(byte_alphabet()))}]*")


def read_byte_level(path: Path, file: HfFile) -> BpeTokenizer:
    """Return a Llama 3 tokenizer; WrongFileError unless it gives the file's own results."""
    _check_steps(file)
    vocab = dict(file.vocab)
    for token in file.added:
        vocab.pop(token, None)
    check_ids_run(vocab, 0, "tokens")
    check_ids_run(file.added, len(vocab), "added tokens")
    for name in _NEEDED:
        if name not in file.added:
            raise WrongFileError(f"no {name} among its added tokens; not a Llama 3 tokenizer")
    tokens = list(vocab)
    if list(vocab.values()) != list(range(len(vocab))):
        tokens.sort(key=vocab.__getitem__)
    _check_letters(tokens)
    check_bytes(path, sum(stand_in in vocab for stand_in in byte_alphabet()), len(vocab))
    _check_merges(tokens, vocab, file.merges)
    specials = sorted(file.added, key=file.added.__getitem__)
    return BpeTokenizer(path, len(vocab), specials, partial(_ranks, tokens))


def _check_steps(file: HfFile) -> None:
    """Raise unless text is split as Llama 3 splits it."""
    if file.normalizer:
        raise WrongFileError(f"its normalizer is {names_of(file.normalizer)}; Llama 3 has none")
    if [step["type"] for step in file.pre_tokenizer] != ["Split", "ByteLevel"]:
        raise WrongFileError(
            f"its pre-tokenizer is {names_of(file.pre_tokenizer)}; Llama 3's is Split + ByteLevel"
        )
    split, byte_level = file.pre_tokenizer
    if split.get("pattern") != {"Regex": PATTERN}:
        raise WrongFileError("its pattern for splitting text is not Llama 3's")
    settings = (
        split.get("behavior"),
        split.get("invert", False),
        byte_level.get("add_prefix_space", True),
        byte_level.get("use_regex", True),
    )
    if settings != ("Isolated", False, False, False):
        raise WrongFileError("the settings of its pre-tokenizer are not Llama 3's")


# A file has 128,000 tokens and 280,000 merges, so that they are looked at by functions that run
# over whole lists.


def _ranks(tokens: Sequence[str]) -> dict[bytes, int]:
    """Return the rank of each token's bytes; tokens: in the order of their ids."""
    # All at once: a character is a byte, so that what is cut here is cut there.
    data, _ = codecs.charmap_encode("".join(tokens), "strict", _STAND_INS)
    lengths = list(map(len, tokens))
    fields = [f"{n}s" for n in range(max(lengths, default=0) + 1)]
    cut = Struct("".join(map(fields.__getitem__, lengths))).unpack(data)
    return dict(zip(cut, range(len(cut)), strict=True))


def _check_letters(tokens: Sequence[str]) -> None:
    """Raise unless every token is written in the byte alphabet."""
    if not _WRITTEN.fullmatch("".join(tokens)):
        wrong = next(token for token in tokens if not _WRITTEN.fullmatch(token))
        raise WrongFileError(f"token {wrong!r:.40} is not written in the byte alphabet")


def _check_merges(tokens: Sequence[str], vocab: Container[str], merges: Sequence[str]) -> None:
    """Raise unless the merges say what tiktoken does: any pair that joins, lowest id first."""
    joined = "\n".join(merges).replace(" ", "").split("\n") if merges else []
    if len(joined) != len(merges):
        raise WrongFileError("one of its merges has a line break")
    results = joined[:1] + list(compress(joined[1:], map(operator.ne, joined[1:], joined)))
    unseen = iter(tokens)  # a search leaves it behind what was found
    if not all(result in unseen for result in results):
        raise WrongFileError("its merges do not follow the order of its ids, as Llama 3's do")
    sample = tokens[:: max(1, len(tokens) // _SAMPLE)]
    pairs = {f"{left} {right}" for token in sample for left, right in splits(token, vocab)}
    if pairs.difference(merges):
        raise WrongFileError("its merges leave out pairs that Llama 3's list has")
