"""A `tokenizer.json` of others: both of its forms are read, what is no Llama's is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_llama.errors import TokenizerError
from mlx_llama.tokenizer import open_tokenizer
from token_texts import TEXTS
from written_tokenizers import read_json, written


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


Change = Callable[[dict[str, Any]], None]


def set_at(*path: str | int, value: object) -> Change:
    def change(root: Any) -> None:
        for step in path[:-1]:
            root = root[step]
        root[path[-1]] = value

    return change


def drop_merge(root: dict[str, Any]) -> None:
    root["model"]["merges"].pop()


def drop_merge_of(token: str) -> Change:
    """Leave one pair out, as a list of merges that was trained does."""

    def change(root: dict[str, Any]) -> None:
        merges = root["model"]["merges"]
        merges.remove(next(m for m in merges if m.replace(" ", "") == token))

    return change


def swap_merges(root: dict[str, Any]) -> None:
    merges = root["model"]["merges"]
    merges[0], merges[-1] = merges[-1], merges[0]


def drop_token(name: str) -> Change:
    def change(root: dict[str, Any]) -> None:
        del root["model"]["vocab"][name]

    return change


def rename_byte_0(root: dict[str, Any]) -> None:
    vocab = root["model"]["vocab"]
    root["model"]["vocab"] = {"\0" if i == 0 else token: i for token, i in vocab.items()}


SPLIT = ("pre_tokenizer", "pretokenizers", 0)
FOREIGN: dict[str, tuple[str, Change, str]] = {
    "regex": ("tiny llama3", set_at(*SPLIT, "pattern", value={"Regex": "x"}), "not Llama 3's"),
    "behavior": ("tiny llama3", set_at(*SPLIT, "behavior", value="Removed"), "not Llama 3's"),
    "gpt2": ("tiny llama3", set_at("pre_tokenizer", value={"type": "ByteLevel"}), "is ByteLevel"),
    "nfc": ("tiny llama3", set_at("normalizer", value={"type": "NFC"}), "normalizer is NFC"),
    "gap": ("tiny llama3", drop_token("!"), "do not run from 0"),
    "one more": ("tiny llama3", set_at("model", "vocab", " ", value=280), "do not run"),
    "alphabet": ("tiny llama3", rename_byte_0, "not written in the byte alphabet"),
    "trained": ("tiny llama3", drop_merge_of("aaa"), "leave out pairs"),
    "order": ("tiny llama3", swap_merges, "order of its ids"),
    "no bos": ("tiny llama3", set_at("added_tokens", 0, "content", value="<x>"), "begin_of_text"),
    "added gap": ("tiny llama3", set_at("added_tokens", 0, "id", value=999), "do not run"),
    "added twice": (
        "tiny llama3",
        set_at("added_tokens", 0, "content", value="<|eot_id|>"),
        "no name and id of its own",
    ),
    "added list": ("tiny llama3", set_at("added_tokens", 0, value=[]), "no name and id"),
    "dropout": ("tiny llama3", set_at("model", "dropout", value=0.1), "dropout"),
    "steps": ("tiny llama3", set_at("pre_tokenizer", value=["x"]), "no sequence of steps"),
    "nmt": ("tiny llama2", set_at("normalizer", value={"type": "Nmt"}), "normalizer is Nmt"),
    "metaspace": (
        "tiny llama2",
        set_at("pre_tokenizer", value={"type": "Metaspace"}),
        "pre-tokenizer Metaspace",
    ),
    "incomplete": ("tiny llama2", drop_merge, "not all pairs"),
    "no token": ("tiny llama2", set_at("model", "merges", 0, value="x y"), "makes no token"),
    "no byte": ("tiny llama2", drop_token("<0x41>"), "do not run"),
    "moved": ("tiny llama2", set_at("added_tokens", 0, "id", value=5), "another id"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_tokenizer_json_of_another_kind_is_refused(case: str, base: Path, tmp_path: Path) -> None:
    name, change, expected = FOREIGN[case]
    root = read_json(written(name, base).folder / "tokenizer.json")
    change(root)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(root))
    with pytest.raises(TokenizerError, match=re.escape(expected)) as caught:
        open_tokenizer(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_both_forms_of_merges_and_spaces_are_read(base: Path, tmp_path: Path) -> None:
    """As transformers 5 saves it: merges as pairs, spaces by a pre-tokenizer."""
    files = written("tiny llama2", base)
    root = read_json(files.folder / "tokenizer.json")
    root["model"]["merges"] = [merge.split(" ") for merge in root["model"]["merges"]]
    root["normalizer"] = None
    root["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "\u2581",
        "prepend_scheme": "first",
        "split": False,
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(root))
    again = open_tokenizer(path)
    assert [again.encode(t) for t in TEXTS] == [files.source.encode(t) for t in TEXTS]
