"""Tokenizer files: how they are told apart, and what is refused in one line."""

from __future__ import annotations

import base64
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_llama.errors import TokenizerError
from mlx_llama.tokenizer import open_tokenizer
from mlx_llama.tokenizer.spm_proto import (
    SpmModel,
    parse_model,
    serialize_model,
)
from shared_data import shared
from tiny_tokenizers import tiny_spm, write_spm, write_tiktoken


def test_a_folder_gives_tokenizer_model_before_tokenizer_json(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.model or tokenizer\.json"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        open_tokenizer(tmp_path)
    path = write_tiktoken(tmp_path / "tokenizer.model")
    assert open_tokenizer(str(tmp_path)).path == path


def test_the_content_tells_the_format_not_the_name(tmp_path: Path) -> None:
    assert open_tokenizer(write_spm(tmp_path / "tokenizer.json")).family == "sentencepiece"
    assert open_tokenizer(write_tiktoken(tmp_path / "x.bin")).family == "tiktoken"


def lines_of(*changes: tuple[int, bytes]) -> bytes:
    """A tiktoken file of 256 lines with some of them changed."""
    lines = [b"%s %d" % (base64.b64encode(bytes((v,))), v) for v in range(256)]
    for at, line in changes:
        lines[at] = line
    return b"\n".join(lines) + b"\n"


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "zeros": (bytes(4096), "begins with the bytes 00 00 00 00"),
    "text": (b"hello there\n", "begins with the bytes"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "page": (b"<!DOCTYPE html><html></html>", "web page"),
    "field garbage": (b"\n\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", "too long"),
    "field early end": (b"\n\x7f<unk>", "ends early"),
    "rank gap": (lines_of((7, b"Bw== 8")), "line 8 has rank '8', expected 7"),
    "rank word": (lines_of((7, b"Bw== seven")), "line 8 has rank 'seven'"),
    "no rank": (lines_of((7, b"Bw==")), "line 8 has rank ''"),
    "two spaces": (lines_of((7, b"Bw==  7")), "line 8 has rank ' 7'"),
    "moved space": (lines_of((7, b"Bw==7"), (8, b"7 CA== 8")), "line 8 has rank ''"),
    "no base64": (lines_of((7, b"B*w= 7")), "line 8 has no base64"),
    "bad padding": (lines_of((7, b"Bw= 7")), "line 8 has no base64"),
    "empty token": (lines_of((7, b" 7")), "line 8 has an empty token"),
    "twice": (lines_of((7, b"AA== 7")), "line 8 has the same token twice"),
    "missing byte": (lines_of((7, b"YWFh 7")), "only 255 of the 256 single bytes"),
    "cut off": (lines_of()[:700], "line"),
    "json array": (b"[1, 2]", "begins with the bytes"),
    "json broken": (b'{"model": {', "not valid JSON"),
    "json empty": (b"{}", 'without a "model"'),
    "json deep": (b'{"a":' * 100_000, "nested too deeply"),
    "json wordpiece": (b'{"model": {"type": "WordPiece", "vocab": {}}}', "'WordPiece'"),
    "json unigram": (b'{"model": {"type": "Unigram", "vocab": []}}', "'Unigram'"),
    "json list vocab": (b'{"model": {"type": "BPE", "vocab": [], "merges": []}}', "no table"),
    "json bool id": (b'{"model": {"vocab": {"a": true}, "merges": []}}', "no whole number"),
    "json no merges": (b'{"model": {"vocab": {"a": 0}}}', "no list of merges"),
    "json triple": (b'{"model": {"vocab": {"a": 0}, "merges": ["a b c"]}}', "not a pair"),
    "json no pair": (b'{"model": {"vocab": {"a": 0}, "merges": ["a a", 57]}}', "merge 57 is"),
    "json mixed": (b'{"model": {"vocab": {"a": 0}, "merges": [["a b", ""]]}}', "not a pair"),
    "json one": (b'{"model": {"vocab": {"a": 0}, "merges": [["a b"]]}}', "not a pair"),
    "json number": (b'{"model": {"vocab": {"a": 0}, "merges": [["a", 5]]}}', "not a pair"),
    "json other": (b'{"model": {"vocab": {"a": 0}, "merges": []}}', "neither byte-level"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused_in_one_line(
    case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data, expected = BAD_FILES[case]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(TokenizerError) as caught:
        open_tokenizer(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and expected in message and "\n" not in message
    assert capfd.readouterr() == ("", "")


def test_files_of_absurd_size_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokenizer.model"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse: takes no space
    with pytest.raises(TokenizerError, match="1099511627776 bytes are too many"):
        open_tokenizer(path)
    path.write_bytes(b"AA== 0\n" * (1 << 21))
    with pytest.raises(TokenizerError, match="2097152 lines, at most"):
        open_tokenizer(path)
    monkeypatch.setattr("mlx_llama.tokenizer.spm_proto.MAX_PIECES", 100)
    with pytest.raises(TokenizerError, match="more than 100 pieces"):
        open_tokenizer(write_spm(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no such tokenizer file or folder"):
        open_tokenizer(tmp_path / "nothing.model")


@pytest.mark.parametrize("kind", ["tiktoken", "sentencepiece"])
def test_a_file_cut_off_anywhere_never_fails_in_another_way(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tokenizer.model"
    data = (write_tiktoken if kind == "tiktoken" else write_spm)(path).read_bytes()
    for size in range(0, len(data) - 1, 13):
        path.write_bytes(data[:size])
        try:
            tokenizer = open_tokenizer(path)
        except TokenizerError as error:
            assert "\n" not in str(error)
        else:  # whole lines were lost behind the bytes, or settings that have defaults
            assert tokenizer.encode("hello")
    assert capfd.readouterr() == ("", "")


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_damaged_sentencepiece_files_never_crash(
    tmp_path_factory: Any, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "tokenizer.model"
    content = bytearray(write_spm(path).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        tokenizer = open_tokenizer(path)
    except TokenizerError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(tokenizer.decode(tokenizer.encode("hello 日 😀")), str)


def test_a_sentencepiece_model_of_another_type_is_refused(tmp_path: Path) -> None:
    path = write_spm(tmp_path / "u.model", SpmModel(tiny_spm().pieces, model_type=1))
    with pytest.raises(TokenizerError, match="SentencePiece Unigram model"):
        open_tokenizer(path)


def test_a_written_sentencepiece_model_reads_back() -> None:
    model = tiny_spm(specials=("<step>",), remove_extra_whitespaces=True)
    assert parse_model(serialize_model(model, unk="<unk>", bos="<s>", eos="</s>")) == model


def test_the_real_sentencepiece_file_reads_as_described() -> None:
    model = parse_model(shared("tokenizers/llama2.model").read_bytes())
    assert (model.add_dummy_prefix, model.remove_extra_whitespaces) == (True, False)
    assert (len(model.pieces), model.byte_fallback, model.has_charsmap) == (32000, True, False)
    small = parse_model(shared("checkpoints/stories260k/tokenizer.model").read_bytes())
    assert (small.add_dummy_prefix, small.remove_extra_whitespaces) == (True, True)


def test_importing_the_package_imports_no_tokenizer_library() -> None:
    code = (
        "import sys, mlx_llama.tokenizer; "
        "sys.exit(bool({'tiktoken', 'sentencepiece', 'mlx.core'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
