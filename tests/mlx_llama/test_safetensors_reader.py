"""The safetensors reader: a sound file, and every way in which a header can lie."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_llama.dtypes import DTYPES
from mlx_llama.errors import CheckpointError
from mlx_llama.safetensors_reader import open_safetensors

DATA = bytes(range(16))
SOUND = {
    "a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
    "b": {"dtype": "U8", "shape": [8], "data_offsets": [8, 16]},
}


def write(path: Path, header: object, data: bytes = DATA, *, nbytes: int | None = None) -> Path:
    """Write a file with any header (a text is taken as it is) and any claimed header length."""
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    length = len(text) if nbytes is None else nbytes
    path.write_bytes(length.to_bytes(8, "little") + text + data)
    return path


def entry(**changes: Any) -> dict[str, Any]:
    """Describe all of DATA as one tensor `a`, with changes."""
    return {"a": {"dtype": "U8", "shape": [16], "data_offsets": [0, 16]} | changes}


def test_tensors_saved_by_mlx_come_back_bit_exact(tmp_path: Path) -> None:
    arrays = {
        "bfloat16": mx.random.normal((3, 4)).astype(mx.bfloat16),
        "float16": mx.random.normal((5,)).astype(mx.float16),
        "float32": mx.random.normal((2, 3)),
        "bool": mx.array([True, False, True]),
        "int8": mx.array([-128, 127], dtype=mx.int8),
        "uint8": mx.array([[0, 255]], dtype=mx.uint8),
        "int32": mx.array([-(2**31)], dtype=mx.int32),
        "uint32": mx.array([2**32 - 1], dtype=mx.uint32),
        "int64": mx.array([-(2**63)], dtype=mx.int64),
    }
    path = tmp_path / "a.safetensors"
    mx.save_safetensors(str(path), arrays, metadata={"format": "mlx"})
    refs = open_safetensors(path)
    assert refs.keys() == arrays.keys()
    for name, array in arrays.items():
        ref = refs[name]
        found = ref.read()
        assert (ref.name, ref.dtype, ref.shape) == (name, name, array.shape)
        assert found.dtype == array.dtype
        carrier = DTYPES[name].carrier
        assert np.array_equal(np.array(found.view(carrier)), np.array(array.view(carrier)))


def test_rows_of_a_tensor_are_read_alone(tmp_path: Path) -> None:
    array = mx.arange(40).reshape(10, 4)
    path = tmp_path / "a.safetensors"
    mx.save_safetensors(str(path), {"w": array})
    found = open_safetensors(path)["w"].read(slice(3, 7))
    assert np.array_equal(np.array(found), np.array(array)[3:7])


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (SOUND, DATA),
        ({"__metadata__": {"format": "pt"}} | SOUND, DATA),
        (json.dumps(SOUND) + "   ", DATA),
        ({"b": SOUND["b"], "a": SOUND["a"]}, DATA),
        ({}, b""),
        ({"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, DATA[:4]),
        (SOUND | {"e": {"dtype": "F32", "shape": [0, 4], "data_offsets": [8, 8]}}, DATA),
        ({"a": {"dtype": "F8_E4M3", "shape": [16], "data_offsets": [0, 16]}}, DATA),
        (json.dumps(SOUND)[:-1] + " " * (0x3C - len(json.dumps(SOUND)) % 256 + 256) + "}", DATA),
    ],
    ids=["plain", "metadata", "padded", "order", "none", "scalar", "empty tensor", "fp8", "0x3c"],
)
def test_sound_headers_are_read(tmp_path: Path, header: object, data: bytes) -> None:
    refs = open_safetensors(write(tmp_path / "a.safetensors", header, data))
    for ref in refs.values():
        assert ref.read().shape == ref.shape
    if "b" in refs:
        assert np.array(refs["b"].read()).tobytes() == DATA[8:]


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("", "header has 0 bytes"),
        ("x" * 20, "no JSON object"),
        ("[]", "no JSON object"),
        ("{", "not valid JSON"),
        ('{"a": 1, "a": 2}', "key 'a' stands twice"),
        ('{"a": ' + "[" * 50_000, "nested too deeply"),
        ('{"__metadata__": {"a": 1}}', "__metadata__"),
        ('{"__metadata__": [1]}', "__metadata__"),
        ({"a": 1}, "not described by"),
        ({"a": {}}, "not described by"),
        ({"a": SOUND["a"] | {"more": 1}}, "not described by"),
        ({"a" * 1000: SOUND["a"]}, "name of 1000 letters"),
        (entry(dtype="F64"), "dtype is 'F64'"),
        (entry(dtype="X" * 10_000), "dtype is"),
        (entry(dtype=["U8"]), "dtype is a list"),
        (entry(shape=16), "shape is not"),
        (entry(shape=[-16]), "shape is not"),
        (entry(shape=[16.0]), "shape is not"),
        (entry(shape=[True] * 16), "shape is not"),
        (entry(shape=["16"]), "shape is not"),
        (entry(shape=[1] * 9), "shape is not"),
        (entry(shape=[1 << 31]), "shape is not"),
        (entry(shape=[(1 << 31) - 1] * 8), "expected an absurd number of"),
        (entry(shape=[10**12]), "shape is not"),
        (entry(shape=[10**12, 10**12]), "shape is not"),
        (entry(shape=[1 << 30, 1 << 30]), "expected 1152921504606846976"),
        (entry(shape=[1 << 30, 0]), "has 16 bytes, expected 0"),
        (entry(dtype="F32"), "has 16 bytes, expected 64"),
        (entry(dtype="BF16", shape=[4]), "has 16 bytes, expected 8"),
        (entry(shape=[17]), "has 16 bytes, expected 17"),
        (entry(data_offsets=[0]), "data_offsets"),
        (entry(data_offsets=[0, 8, 16]), "data_offsets"),
        (entry(data_offsets=[-1, 15]), "data_offsets"),
        (entry(data_offsets=[0, "16"]), "data_offsets"),
        (entry(data_offsets=[0.0, 16.0]), "data_offsets"),
        (entry(data_offsets=[16, 0]), "has -16 bytes"),
        (entry(data_offsets=[0, 10**4000]), "an absurd number of"),
        (entry(data_offsets=[10**4000, 10**4000 + 16]), "an absurd number of"),
        (entry(data_offsets=[1, 17]), "leaves a hole"),
        (entry(shape=[15], data_offsets=[0, 15]), "holds 16 bytes of data"),
        (entry(shape=[17], data_offsets=[0, 17]), "holds 16 bytes of data"),
        ({}, "holds 16 bytes of data"),
        (SOUND | {"b": SOUND["b"] | {"shape": [9], "data_offsets": [7, 16]}}, "overlaps"),
        (SOUND | {"b": SOUND["b"] | {"shape": [7], "data_offsets": [9, 16]}}, "leaves a hole"),
        (SOUND | {"c": SOUND["b"]}, "overlaps"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_lying_headers_are_refused_in_one_line(
    tmp_path: Path, header: object, expected: str
) -> None:
    path = write(tmp_path / "a.safetensors", header)
    with pytest.raises(CheckpointError) as caught:
        open_safetensors(path)
    message = str(caught.value)
    assert expected in message
    assert message.startswith(f"{path}: ") and message.isprintable() and len(message) < 500


@pytest.mark.parametrize("nbytes", [1 << 63, 100_000_001, 10_000, (1 << 64) - 1])
def test_header_length_is_bounded(tmp_path: Path, nbytes: int) -> None:
    path = write(tmp_path / "a.safetensors", SOUND, nbytes=nbytes)
    with pytest.raises(CheckpointError, match=f"header has {nbytes} bytes, expected 1 to "):
        open_safetensors(path)


def test_wrong_kinds_of_file_have_a_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match="No such file"):
        open_safetensors(path)
    for data, expected in [
        (b"", "empty"),
        (b"abc", "not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "web page"),
    ]:
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=expected):
            open_safetensors(path)
    with pytest.raises(CheckpointError, match="directory"):
        open_safetensors(tmp_path)


def test_truncation_anywhere_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", SOUND)
    for length in reversed(range(path.stat().st_size)):
        os.truncate(path, length)
        with pytest.raises(CheckpointError):
            open_safetensors(path)


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255)), min_size=1, max_size=5))
def test_flipped_bytes_never_crash(tmp_path: Path, flips: list[tuple[int, int]]) -> None:
    path = write(tmp_path / "a.safetensors", SOUND)
    data = bytearray(path.read_bytes())
    for position, value in flips:
        data[position % len(data)] = value
    path.write_bytes(data)
    try:
        refs = open_safetensors(path)
    except CheckpointError as error:
        assert str(error).isprintable()
        return
    assert sum(ref.nbytes for ref in refs.values()) <= 16
    for ref in refs.values():
        assert ref.read().shape == ref.shape


SIZES = st.one_of(st.integers(-1, 17), st.sampled_from([10**12, 1 << 31, (1 << 31) - 1, 1 << 64]))
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*(dtype.safetensors for dtype in DTYPES.values()), "F64", "U16"]),
        "shape": st.lists(SIZES, max_size=3),
        "data_offsets": st.lists(SIZES, min_size=2, max_size=2),
    }
)


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.dictionaries(st.text(max_size=3), ENTRIES, max_size=4))
def test_headers_that_are_accepted_tile_the_data(
    tmp_path: Path, header: dict[str, dict[str, Any]]
) -> None:
    """Whatever sizes, types and places are claimed: no byte is read twice, none beyond the end."""
    path = write(tmp_path / "a.safetensors", header)
    try:
        refs = open_safetensors(path)
    except CheckpointError as error:
        assert str(error).isprintable() and len(str(error)) < 500
        return
    start = path.stat().st_size - len(DATA)
    taken = [byte for ref in refs.values() for byte in range(ref.offset, ref.offset + ref.nbytes)]
    assert sorted(taken) == list(range(start, start + len(DATA)))
    assert all(ref.read().shape == ref.shape for ref in refs.values())
