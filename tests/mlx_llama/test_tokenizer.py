"""Tokenizers: ids as Meta's own code gives them, text in whole characters, bad files refused."""

from __future__ import annotations

import hashlib
import json
import struct
import time
from itertools import pairwise
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_llama.errors import TokenizerError
from mlx_llama.tokenizer import Tokenizer, open_tokenizer
from mlx_llama.tokenizer.bpe import PATTERN, cut, special_names
from mlx_llama.tokenizer.spm_proto import (
    SPACE,
    PieceType,
    SpmModel,
)
from shared_data import shared
from tiny_tokenizers import BPE_MERGES, tiny_spm, write_spm, write_tiktoken
from token_texts import BROKEN_TEXTS, LARGE_TEXTS, TEXTS

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/tokens.json").read_text())
FILES = {
    "llama2": "tokenizers/llama2.model",
    "llama3": "tokenizers/llama3.model",
    "small": "checkpoints/stories260k/tokenizer.model",
}
# Of the processor: far above what a text of a million characters takes (0.5 s), far below what
# quadratic time would.
LARGE_LIMIT_S = 20.0

_opened: dict[str, Tokenizer] = {}


def real(name: str) -> Tokenizer:
    """Open one of the real files, or skip."""
    if name not in _opened:
        _opened[name] = open_tokenizer(shared(FILES[name]))
    return _opened[name]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tiny")
    return {
        "tiktoken": open_tokenizer(write_tiktoken(folder / "a.model")),
        "sentencepiece": open_tokenizer(write_spm(folder / "b.model")),
        "extra": open_tokenizer(
            write_spm(folder / "c.model", tiny_spm(remove_extra_whitespaces=True))
        ),
        "bare": open_tokenizer(write_spm(folder / "d.model", tiny_spm(add_dummy_prefix=False))),
    }


def stream(tokenizer: Tokenizer, ids: list[int], *, at_start: bool = True) -> str:
    detokenizer = tokenizer.detokenizer(at_start=at_start)
    return "".join([detokenizer.add(i) for i in ids]) + detokenizer.finish()


# --- against Meta's code -----------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_texts_give_the_ids_of_metas_code(name: str) -> None:
    tokenizer = real(name)
    for text, ids in zip(TEXTS, GOLDEN["texts"][name], strict=True):
        assert tokenizer.encode(text) == ids, text


def test_lone_surrogates_become_replacement_characters() -> None:
    for text, ids in zip(BROKEN_TEXTS, GOLDEN["broken"], strict=True):
        assert real("llama3").encode(text) == ids
        sound = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        assert real("llama2").encode(text) == real("llama2").encode(sound)
        assert "\ufffd" in sound or "😀" in sound


@pytest.mark.parametrize("key", LARGE_TEXTS)
@pytest.mark.parametrize("name", FILES)
def test_large_texts_give_the_ids_of_metas_code_in_linear_time(name: str, key: str) -> None:
    tokenizer = real(name)
    start = time.process_time()
    ids = tokenizer.encode(LARGE_TEXTS[key])
    assert time.process_time() - start < LARGE_LIMIT_S
    digest = hashlib.sha256(struct.pack(f"<{len(ids)}I", *ids)).hexdigest()
    assert [len(ids), digest] == GOLDEN["large"][name][key]


def test_known_ids_of_the_published_files() -> None:
    assert real("llama2").encode("Hello world") == [15043, 3186]
    assert real("llama2").encode("Hi", bos=True, eos=True) == [1, 6324, 2]
    expected = [128000, 2028, 374, 264, 1296, 11914, 13, 128001]
    assert real("llama3").encode("This is a test sentence.", bos=True, eos=True) == expected
    assert [real(name).vocab_size for name in FILES] == [32000, 128256, 512]
    assert real("llama3").encode("<|eot_id|>") == [27, 91, 68, 354, 851, 91, 29]


def test_special_tokens_of_llama3_are_known_by_the_names_of_every_release() -> None:
    ids = real("llama3").special_tokens
    expected = {
        "<|begin_of_text|>": 0,
        "<|end_of_text|>": 1,
        "<|reserved_special_token_0|>": 2,
        "<|finetune_right_pad_id|>": 4,
        "<|step_id|>": 5,
        "<|start_header_id|>": 6,
        "<|end_header_id|>": 7,
        "<|eom_id|>": 8,
        "<|eot_id|>": 9,
        "<|python_tag|>": 10,
        "<|image|>": 11,
        "<|reserved_special_token_2|>": 12,  # Meta's code decides where releases differ
        "<|reserved_special_token_245|>": 255,
        "<|reserved_special_token_247|>": 255,
        "<|reserved_special_token_250|>": 255,
    }
    assert {name: ids[name] - 128000 for name in expected} == expected
    assert real("llama3").token_bytes(128009) == b"<|eot_id|>"
    assert real("llama3").decode([128000, 9906, 128009]) == "<|begin_of_text|>Hello<|eot_id|>"


def test_special_names_differ_between_releases_as_published() -> None:
    assert special_names("llama3")[4:12] == [
        "<|reserved_special_token_2|>",
        "<|reserved_special_token_3|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|reserved_special_token_4|>",
        "<|eot_id|>",
        "<|reserved_special_token_5|>",
        "<|reserved_special_token_6|>",
    ]
    assert special_names("llama3.1")[11] == "<|reserved_special_token_3|>"
    assert [special_names(s)[255] for s in ("llama3", "llama3.1", "meta")] == [
        f"<|reserved_special_token_{n}|>" for n in (250, 247, 245)
    ]


# --- against slow code of our own ---------------------------------------------------------------


def slow_tiktoken(text: str) -> list[int]:
    """Llama 3's rule on the tiny file: split, then merge the lowest rank, leftmost first."""
    ranks = {bytes((value,)): value for value in range(256)}
    ranks |= {token: 256 + index for index, token in enumerate(BPE_MERGES)}
    ids = []
    for piece in regex.findall(PATTERN, text):
        parts = [bytes((value,)) for value in piece.encode()]
        if piece.encode() in ranks:
            parts = [piece.encode()]
        while pairs := [
            (ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks
        ]:
            _, at = min(pairs)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def slow_sentencepiece(text: str, model: SpmModel) -> list[int]:
    """Llama 2's rule: merge what scores highest, leftmost first, then bytes for the unknown."""
    normal = [p for p in model.pieces if p.type is PieceType.NORMAL]
    scores = {piece.text: piece.score for piece in normal}
    ids = {piece.text: token_id for token_id, piece in enumerate(model.pieces)}
    parts = list((SPACE + text).replace(" ", SPACE)) if text else []
    while pairs := [
        (-scores[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in scores
    ]:
        _, at = min(pairs)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    found = []
    for part in parts:
        found += [ids[part]] if part in scores else [3 + value for value in part.encode()]
    return found


HARD = st.lists(
    st.sampled_from(
        [" ", "  ", "\n", "\r", "\t", "a", "aa", "hello", " world", "ing", "the", "12", "345", "é",
         "日", "😀", "\u200d", "\u3000", "\x85", "'S", "'ll", "[INST]", "\0", SPACE, "==", ".", "İ"]
    )
).map("".join)  # fmt: skip


@given(text=st.one_of(HARD, st.text()))
@settings(max_examples=300, deadline=None)
def test_tiny_files_encode_as_slow_code_does(tiny: dict[str, Tokenizer], text: str) -> None:
    assert tiny["tiktoken"].encode(text) == slow_tiktoken(text)
    assert tiny["sentencepiece"].encode(text) == slow_sentencepiece(text, tiny_spm())


@given(text=st.one_of(HARD, st.text()))
@settings(max_examples=200, deadline=None)
def test_decoding_returns_the_text(tiny: dict[str, Tokenizer], text: str) -> None:
    assert tiny["tiktoken"].decode(tiny["tiktoken"].encode(text)) == text
    spaced = text.replace(SPACE, " ")  # SentencePiece writes a space with that character
    assert tiny["sentencepiece"].decode(tiny["sentencepiece"].encode(text)) == spaced


@given(ids=st.lists(st.integers(0, 300), max_size=40))
@settings(max_examples=300, deadline=None)
def test_streamed_text_equals_decode_for_any_ids(
    tiny: dict[str, Tokenizer], ids: list[int]
) -> None:
    for name, tokenizer in tiny.items():
        assert stream(tokenizer, ids) == tokenizer.decode(ids), name


@pytest.mark.parametrize("name", FILES)
def test_streamed_text_equals_decode_on_real_files(name: str) -> None:
    tokenizer = real(name)
    for text in TEXTS:
        ids = tokenizer.encode(text, bos=True, eos=True)
        assert stream(tokenizer, ids) == tokenizer.decode(ids)


def slow_cut(text: str) -> list[str]:
    """Meta's cuts, character by character."""
    parts = []
    for first in range(0, len(text), 400_000):
        slice_, start, count = text[first : first + 400_000], 0, 0
        for at, char in enumerate(slice_):
            same = at > 0 and char.isspace() == slice_[at - 1].isspace()
            count = count + 1 if same else 1
            if count > 25_000:
                parts.append(slice_[start:at])
                start, count = at, 1
        parts.append(slice_[start:])
    return parts


LENGTHS = st.sampled_from([1, 7, 12_499, 12_500, 24_999, 25_000, 25_001, 37_501, 75_000, 150_000])


@given(runs=st.lists(st.tuples(st.sampled_from("ab \u3000\x1cé"), LENGTHS), max_size=8))
@settings(max_examples=40, deadline=None)
def test_long_text_is_cut_where_meta_cuts_it(runs: list[tuple[str, int]]) -> None:
    text = "".join(char * length for char, length in runs)
    assert list(cut(text)) == slow_cut(text)


# --- streaming ----------------------------------------------------------------------------------


def test_characters_split_over_tokens_are_held_back(tiny: dict[str, Tokenizer]) -> None:
    for name, first in (("tiktoken", 0), ("sentencepiece", 3)):
        detokenizer = tiny[name].detokenizer(at_start=True)
        pieces = [detokenizer.add(first + value) for value in "a😀".encode()]
        assert pieces == ["a", "", "", "", "😀"], name
        assert detokenizer.finish() == ""


def test_finish_shows_a_broken_character(tiny: dict[str, Tokenizer]) -> None:
    for name, first, shown in (("tiktoken", 0, "\ufffd"), ("sentencepiece", 3, "\ufffd\ufffd")):
        detokenizer = tiny[name].detokenizer(at_start=True)
        assert detokenizer.add(first + 0xF0) + detokenizer.add(first + 0x9F) == ""
        assert detokenizer.finish() == shown, name


def test_only_one_leading_space_is_dropped_and_only_at_the_start(
    tiny: dict[str, Tokenizer],
) -> None:
    tokenizer = tiny["sentencepiece"]
    ids = tokenizer.encode("  hello")  # the added space and two of the text
    assert stream(tokenizer, ids) == "  hello"
    assert stream(tokenizer, [1, *ids]) == "  hello"
    assert stream(tokenizer, ids, at_start=False) == "   hello"
    assert stream(tiny["tiktoken"], tiny["tiktoken"].encode(" a"), at_start=True) == " a"


def test_a_control_token_ends_a_broken_character(tiny: dict[str, Tokenizer]) -> None:
    """Bytes before and after `</s>` once joined to a character that `decode` did not give."""
    ids = [3 + 0xC3, 2, 3 + 0xA9]
    assert stream(tiny["sentencepiece"], ids) == tiny["sentencepiece"].decode(ids) == "\ufffd\ufffd"


def test_token_bytes_are_what_a_token_stands_for(tiny: dict[str, Tokenizer]) -> None:
    tokenizer = tiny["sentencepiece"]
    assert tokenizer.token_bytes(3 + 0x0A) == b"\n"
    assert tokenizer.token_bytes(1) == b""
    (token_id,) = tokenizer.encode("hello")
    assert tokenizer.token_bytes(token_id) == b" hello"
    assert tiny["tiktoken"].token_bytes(255) == b"\xff"
    assert tiny["tiktoken"].token_bytes(tiny["tiktoken"].eos_id) == b"<|end_of_text|>"


@pytest.mark.parametrize("name", ["tiktoken", "sentencepiece"])
def test_ids_outside_the_vocabulary_are_refused(tiny: dict[str, Tokenizer], name: str) -> None:
    tokenizer = tiny[name]
    for wrong in (-1, tokenizer.vocab_size, 1 << 40):
        for call in (
            lambda i: tokenizer.decode([5, i]),
            tokenizer.token_bytes,
            tokenizer.detokenizer(at_start=True).add,
        ):
            with pytest.raises(TokenizerError, match=f"{wrong} is not between 0 and"):
                call(wrong)


def test_a_small_tiktoken_file_has_256_specials_behind_its_ranks(
    tiny: dict[str, Tokenizer],
) -> None:
    tokenizer = tiny["tiktoken"]
    n_ranks = 256 + len(BPE_MERGES)
    assert tokenizer.vocab_size == n_ranks + 256
    assert (tokenizer.bos_id, tokenizer.eos_id) == (n_ranks, n_ranks + 1)
    assert tokenizer.special_tokens["<|eot_id|>"] == n_ranks + 9
    assert tokenizer.encode("<|eot_id|>", bos=True, eos=True)[1] != n_ranks + 9
