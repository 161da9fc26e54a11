"""Hugging Face's `tokenizer.json`, of the two families that Llamas use.

Owns the checks of what is a stranger's JSON and the choice of the family. `hf_byte_level.py` and
`hf_fallback.py` go back to what Meta's own file would hold; everything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

from mlx_llama.errors import CheckpointError, TokenizerError
from mlx_llama.strict_json import parse_json_bytes
from mlx_llama.tokenizer.base import Tokenizer

MAX_TOKENS = 1 << 21
MAX_TOKEN_CHARS = 512


class WrongFileError(Exception):
    """What is wrong with a file, said without its path; never leaves this package."""


@dataclass(frozen=True, slots=True)
class HfFile:
    """The parts of a `tokenizer.json` that change tokens, their shapes checked.

    vocab: ids by token. merges: pairs "left right" in order. added: ids of added tokens, which may
    be in the vocabulary too. normalizer, pre_tokenizer: the steps in order, sequences flattened.
    """

    vocab: Mapping[str, int]
    merges: Sequence[str]
    added: Mapping[str, int]
    normalizer: tuple[Mapping[str, Any], ...]
    pre_tokenizer: tuple[Mapping[str, Any], ...]
    byte_fallback: bool


def read_hf_json(path: Path, data: bytes) -> Tokenizer:
    """Read a `tokenizer.json`; TokenizerError unless it is one of a Llama."""
    try:
        file = parse_hf(parse_json_bytes(data, where=str(path)))
        if any(step["type"] == "ByteLevel" for step in file.pre_tokenizer):
            from mlx_llama.tokenizer.hf_byte_level import read_byte_level

            return read_byte_level(path, file)
        if file.byte_fallback:
            from mlx_llama.tokenizer.hf_fallback import read_fallback

            return read_fallback(path, file)
    except CheckpointError as error:
        raise TokenizerError(str(error)) from error
    except WrongFileError as error:
        raise TokenizerError(f"{path}: {error}") from error
    raise TokenizerError(
        f"{path}: a BPE tokenizer with neither byte-level tokens nor byte fallback; not a Llama's"
    )


def parse_hf(root: Mapping[str, Any]) -> HfFile:
    """Check the shapes of a `tokenizer.json`; WrongFileError names what is not as expected."""
    model = root.get("model")
    if not isinstance(model, dict) or "vocab" not in model:
        raise WrongFileError('JSON without a "model" and its vocabulary, not a tokenizer.json')
    kind = model.get("type", "BPE")
    if kind != "BPE":
        raise WrongFileError(f"a tokenizer of type {kind!r:.40}; a Llama's is BPE")
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(setting):
            raise WrongFileError(f"a BPE tokenizer with {setting}; a Llama's has none")
    return HfFile(
        vocab=_vocab(model["vocab"]),
        merges=_merges(model.get("merges")),
        added=_added(root.get("added_tokens")),
        normalizer=_steps(root, "normalizer", "normalizers"),
        pre_tokenizer=_steps(root, "pre_tokenizer", "pretokenizers"),
        byte_fallback=model.get("byte_fallback") is True,
    )


def check_ids_run(ids: Mapping[str, int], first: int, what: str) -> None:
    """Raise WrongFileError unless the ids are first, first + 1, ... without a gap."""
    if sorted(ids.values()) != list(range(first, first + len(ids))):
        raise WrongFileError(f"the ids of its {len(ids)} {what} do not run from {first} up")


def _vocab(raw: object) -> dict[str, int]:
    if not isinstance(raw, dict):
        raise WrongFileError("a vocabulary that is no table of token and id")
    if len(raw) > MAX_TOKENS:
        raise WrongFileError(f"{len(raw)} tokens, at most {MAX_TOKENS} are sane")
    if set(map(type, raw.values())) - {int} or max(map(len, raw), default=0) > MAX_TOKEN_CHARS:
        wrong = next(t for t, i in raw.items() if type(i) is not int or len(t) > MAX_TOKEN_CHARS)
        raise WrongFileError(f"token {wrong!r:.40} has no whole number as id, or is too long")
    return raw


def _merges(raw: object) -> list[str]:
    """Return pairs as "left right", from that form or [left, right] as written since 2024.

    A file has 280,000 of them, so that they are looked at by functions that run over the list.
    """
    if not isinstance(raw, list):
        raise WrongFileError("no list of merges")
    merges: list[str] = []
    kinds = set(map(type, raw))
    if kinds == {list} and set(map(len, raw)) == {2}:
        with suppress(TypeError):
            merges = list(map(" ".join, raw))
    elif kinds == {str}:
        merges = raw
    # No token holds a space: byte-level and SentencePiece both write another character for it.
    if len(merges) < len(raw) or not set(map(str.count, merges, repeat(" "))) <= {1}:
        wrong = next((merge for merge in raw if not _is_pair(merge)), raw[0])
        raise WrongFileError(f"merge {wrong!r:.60} is not a pair of tokens")
    return merges


def _is_pair(merge: object) -> bool:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    return (
        isinstance(parts, list)
        and len(parts) == 2
        and all(isinstance(part, str) and " " not in part for part in parts)
    )


def _added(raw: object) -> dict[str, int]:
    added: dict[str, int] = {}
    for item in raw if isinstance(raw, list) else []:
        text = item.get("content") if isinstance(item, dict) else None
        token_id = item.get("id") if isinstance(item, dict) else None
        if not isinstance(text, str) or not text or type(token_id) is not int or text in added:
            raise WrongFileError(f"added token {item!r:.60} has no name and id of its own")
        added[text] = token_id
    return added


def _steps(root: Mapping[str, Any], key: str, plural: str) -> tuple[Mapping[str, Any], ...]:
    """Return the steps of the normalizer or the pre-tokenizer, one level of sequence opened."""
    raw = root.get(key)
    if raw is None:
        return ()
    is_sequence = isinstance(raw, dict) and raw.get("type") == "Sequence"
    steps = raw.get(plural) if is_sequence else [raw]
    if not isinstance(steps, list) or not all(
        isinstance(step, dict) and isinstance(step.get("type"), str) for step in steps
    ):
        raise WrongFileError(f"a {key} that is no step and no sequence of steps")
    return tuple(steps)


def names_of(steps: tuple[Mapping[str, Any], ...]) -> str:
    """Return the kinds of steps, for a message."""
    return " + ".join(str(step["type"])[:40] for step in steps[:8]) or "none"
