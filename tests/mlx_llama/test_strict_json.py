"""JSON from strangers is refused wherever it is ambiguous or unbounded."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_llama.errors import CheckpointError
from mlx_llama.strict_json import load_json, parse_json

TEXTS = st.text('ab"\\/\n\0\xe9\u2028\U0001f600', max_size=6)
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=10,
)


@settings(deadline=None)
@given(st.dictionaries(TEXTS, JSON_VALUES, max_size=4))
def test_sound_objects_come_back_as_json_gives_them(value: dict[str, Any]) -> None:
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        assert parse_json(text, where="a.json") == json.loads(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ('{"a": 1} x', "not valid JSON"),
        ("{'a': 1}", "not valid JSON"),
        ('{"a": 1, "a": 2}', "key 'a' stands twice"),
        ('{"b": {"a": 1, "c": 2, "a": 1}}', "key 'a' stands twice"),
        ('{"\\u0061": 1, "a": 2}', "key 'a' stands twice"),
        ('{"a": NaN}', "NaN is not a number"),
        ('{"a": -Infinity}', "-Infinity is not a number"),
        ('{"a": 1e999}', "1e999 is too large"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"a": ' + "[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"a": "\\ud800"}', "surrogate"),
        ('{"\\udc00": 1}', "surrogate"),
        ("[1]", "holds list, expected an object"),
        ('"a"', "holds str, expected an object"),
        ("null", "holds NoneType, expected an object"),
        ("\ufeff{}", "BOM"),
        ('{"a": "line\nbreak"}', "not valid JSON"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_json_is_refused_in_one_line(text: str, expected: str) -> None:
    with pytest.raises(CheckpointError, match=r"\Asome/params\.json: ") as caught:
        parse_json(text, where="some/params.json")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_surrogate_pairs_are_sound() -> None:
    assert parse_json('{"a": "\\ud83d\\ude00"}', where="a") == {"a": "\U0001f600"}


def test_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "params.json"
    path.write_text('{"dim": 64}', encoding="utf-8")
    assert load_json(path, max_bytes=11) == {"dim": 64}
    with pytest.raises(CheckpointError, match=r"params\.json: larger than 10 bytes"):
        load_json(path, max_bytes=10)


def test_unreadable_files_have_a_clear_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.json: cannot be read: No such file"):
        load_json(tmp_path / "none.json", max_bytes=100)
    with pytest.raises(CheckpointError, match="directory"):
        load_json(tmp_path, max_bytes=100)
    path = tmp_path / "params.json"
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(CheckpointError, match=r"params\.json: not UTF-8 text at byte 7"):
        load_json(path, max_bytes=100)


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_random_bytes_never_crash(data: bytes) -> None:
    try:
        assert isinstance(parse_json(data.decode("utf-8", "replace"), where="a"), dict)
    except CheckpointError as error:
        assert "\n" not in str(error)


def test_recursion_limit_is_not_changed() -> None:
    limit = sys.getrecursionlimit()
    parse_json('{"a": [[[]]]}', where="a")
    assert sys.getrecursionlimit() == limit
