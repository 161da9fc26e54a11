"""The safetensors writer: exact bytes, rows in pieces, and nothing incomplete."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_llama.dtypes import DTYPES
from mlx_llama.safetensors_reader import open_safetensors
from mlx_llama.safetensors_writer import Entry, SafetensorsWriter

ARRAYS = {
    "bf16": mx.random.normal((6, 4)).astype(mx.bfloat16),
    "f16": mx.random.normal((3,)).astype(mx.float16),
    "f32": mx.random.normal((2, 3, 2)),
    "u32": mx.array([[0, 2**32 - 1]], dtype=mx.uint32),
    "u8": mx.array([0, 255, 7], dtype=mx.uint8),
    "i8": mx.array([-128, 127], dtype=mx.int8),
    "i32": mx.array([-(2**31), 5], dtype=mx.int32),
    "i64": mx.array([-(2**63), 5], dtype=mx.int64),
    "bool": mx.array([True, False]),
    "scalar": mx.array(2.5),
    "empty": mx.zeros((0, 4), dtype=mx.float16),
}


def entry(name: str, array: mx.array) -> Entry:
    """Announce an array."""
    return name, str(array.dtype).removeprefix("mlx.core.").rstrip("_"), tuple(array.shape)


def write(path: Path, arrays: dict[str, mx.array], metadata: dict[str, str] | None = None) -> None:
    """Write whole arrays in their order."""
    entries = [entry(name, array) for name, array in arrays.items()]
    with SafetensorsWriter(path, entries, metadata) as writer:
        for name, array in arrays.items():
            writer.write(name, array)


def test_file_is_read_by_mlx_and_by_our_reader_bit_exact(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write(path, ARRAYS, {"format": "mlx"})
    loaded, metadata = mx.load(str(path), return_metadata=True)
    assert metadata == {"format": "mlx"}
    refs = open_safetensors(path)
    assert list(refs) == list(ARRAYS) and loaded.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        carrier = DTYPES[refs[name].dtype].carrier
        expected = np.array(array.reshape(-1).view(carrier))
        for found in (loaded[name], refs[name].read()):
            assert found.shape == array.shape and found.dtype == array.dtype
            assert np.array_equal(np.array(found.reshape(-1).view(carrier)), expected)


def test_bytes_are_exactly_those_of_the_format(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write(path, {"w": mx.array([[1.0, -2.0]], dtype=mx.bfloat16)}, {"format": "pt"})
    header = (
        b'{"__metadata__":{"format":"pt"},"w":{"dtype":"BF16","shape":[1,2],"data_offsets":[0,4]}}'
    )
    padded = header + b" " * (-len(header) % 8)
    assert path.read_bytes() == bytes([len(padded)]) + bytes(7) + padded + b"\x80\x3f\x00\xc0"


def test_golden_file_of_the_safetensors_library_has_the_same_data(tmp_path: Path) -> None:
    golden = Path(__file__).parents[1] / "golden" / "library.safetensors"
    refs = open_safetensors(golden)
    path = tmp_path / "a.safetensors"
    write(path, {name: ref.read() for name, ref in refs.items()}, {"format": "pt"})
    # The library sorts the keys of an entry as we do; only the order of tensors is the caller's.
    assert path.read_bytes() == golden.read_bytes()


@settings(deadline=None)
@given(cuts=st.lists(st.integers(0, 7), max_size=5))
def test_rows_in_pieces_give_the_same_file(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("pieces")
    arrays = {"a": mx.arange(35).reshape(7, 5), "b": mx.arange(3.0)}
    write(folder / "whole", arrays)
    edges = [0, *sorted(cuts), 7]
    with SafetensorsWriter(folder / "pieces", [entry(*item) for item in arrays.items()]) as writer:
        for start, stop in pairwise(edges):
            if start < 7:
                writer.write("a", arrays["a"][start:stop])
        writer.write("b", arrays["b"])
    assert (folder / "pieces").read_bytes() == (folder / "whole").read_bytes()


def test_arrays_without_plain_rows_and_lazy_ones_are_written_right(tmp_path: Path) -> None:
    array = mx.arange(12.0).reshape(3, 4)
    path = tmp_path / "a.safetensors"
    write(path, {"turned": array.T, "strided": array[:, ::2], "one": array[:1] * 2})
    refs = open_safetensors(path)
    assert np.array_equal(np.array(refs["turned"].read()), np.array(array).T)
    assert np.array_equal(np.array(refs["strided"].read()), np.array(array)[:, ::2])
    assert np.array_equal(np.array(refs["one"].read()), np.array(array)[:1] * 2)


W = ("w", "float32", (3, 2))


@pytest.mark.parametrize(
    ("name", "array", "expected"),
    [
        ("v", mx.zeros((3, 2)), "'v' was not announced"),
        ("w", mx.zeros((3, 2), dtype=mx.float16), "announced as float32"),
        ("w", mx.zeros((2, 3)), r"shape \(2, 3\), announced \(3, 2\)"),
        ("w", mx.zeros((4, 2)), "shape"),
        ("w", mx.zeros((6,)), "shape"),
        ("w", mx.array(0.0), "shape"),
        ("w", mx.zeros((3, 2, 1)), "shape"),
    ],
)
def test_what_was_not_announced_is_refused(
    tmp_path: Path, name: str, array: mx.array, expected: str
) -> None:
    with (
        pytest.raises(ValueError, match=expected),
        SafetensorsWriter(tmp_path / "a", [W]) as writer,
    ):
        writer.write(name, array)


def test_more_rows_than_announced_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="2 rows are written"),
        SafetensorsWriter(tmp_path / "a", [W]) as writer,
    ):
        writer.write("w", mx.zeros((2, 2)))
        writer.write("w", mx.zeros((3, 2)))


def test_tensor_of_another_file_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="not announced"),
        SafetensorsWriter(tmp_path / "a", []) as writer,
    ):
        writer.write("w", mx.zeros((3, 2)))


def test_scalar_written_twice_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="shape"),
        SafetensorsWriter(tmp_path / "a", [("s", "float32", ())]) as writer,
    ):
        writer.write("s", mx.array(1.0))
        writer.write("s", mx.array(2.0))


def test_closing_early_is_an_error(tmp_path: Path) -> None:
    for rows in (0, 2):
        with (
            pytest.raises(ValueError, match=f"{rows} of 3 rows of 'w'"),
            SafetensorsWriter(tmp_path / "a", [W]) as writer,
        ):
            writer.write("w", mx.zeros((rows, 2)))


def test_error_inside_the_block_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(KeyError), SafetensorsWriter(tmp_path / "a", [W]):
        raise KeyError("x")


def test_writing_outside_the_block_and_doubled_names_are_refused(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "a", [W])
    with pytest.raises(ValueError, match="outside its `with` block"):
        writer.write("w", mx.zeros((3, 2)))
    with writer:
        writer.write("w", mx.zeros((3, 2)))
    with pytest.raises(ValueError, match="announced twice"):
        SafetensorsWriter(tmp_path / "a", [W, W])


def test_errors_of_the_system_come_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), SafetensorsWriter(tmp_path / "none" / "a", []):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_an_oserror() -> None:
    with pytest.raises(OSError, match="No space left"), SafetensorsWriter(Path("/dev/full"), []):
        pass


def test_file_is_durable_when_the_block_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (synced.append(number), real(number)))
    write(tmp_path / "a", {"w": mx.zeros((3, 2))})
    assert len(synced) == 1


# Shards
