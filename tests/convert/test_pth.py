"""The `.pth` reader: real files of torch, and hand-made ones."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_llama.dtypes import DTYPES
from mlx_llama.errors import CheckpointError
from mlx_llama.tensor_ref import TensorRef
from mlx_llama_convert.pth import open_pth
from pth_raw import ONE, WEIGHTS, refused, write_raw
from pth_writer import (
    ORDERED_DICT,
    Member,
    bfloat16,
    dict_pickle,
    tensor_pickle,
    text,
    write_pth,
)
from shared_data import shared

GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED = json.loads((GOLDEN / "torch_pth.json").read_text())


def bits(array: mx.array, dtype: str) -> bytes:
    """Return an array's bytes as they lie in memory."""
    return np.array(array.view(DTYPES[dtype].carrier)).tobytes() if array.size else b""


# What torch wrote


@pytest.mark.parametrize("case", ["dtypes", "fp8", "shared", "parameter", "state_dict"])
def test_tensors_of_a_file_written_by_torch_are_bit_exact(case: str) -> None:
    refs = open_pth(GOLDEN / f"torch_{case}.pth")
    assert list(refs) and refs.keys() == EXPECTED[case].keys()
    for name, expected in EXPECTED[case].items():
        ref = refs[name]
        array = ref.read()
        assert (ref.name, ref.dtype, list(ref.shape)) == (
            name,
            expected["dtype"],
            expected["shape"],
        )
        assert array.shape == ref.shape
        assert array.dtype == DTYPES[ref.dtype].array
        assert ref.nbytes == len(expected["hex"]) // 2
        assert bits(array, ref.dtype).hex() == expected["hex"]


def test_tied_tensors_point_to_the_same_bytes() -> None:
    refs = open_pth(GOLDEN / "torch_shared.pth")
    assert refs["embeddings"].offset == refs["output"].offset
    assert refs["second"].offset == refs["first"].offset + refs["first"].nbytes


def test_fp8_codes_decode_to_the_values_of_torch() -> None:
    codes = open_pth(GOLDEN / "torch_fp8.pth")["w"].read()
    assert codes.dtype == mx.uint8
    found = np.array(mx.from_fp8(codes, dtype=mx.float32))
    # e4m3fn: sign, 4 bits of exponent (bias 7), 3 bits of fraction
    raw = np.frombuffer(bytes.fromhex(EXPECTED["fp8"]["w"]["hex"]), np.uint8).astype(int)
    exponent, fraction = raw >> 3 & 15, raw & 7
    size = np.where(exponent == 0, fraction / 512, (1 + fraction / 8) * 2.0 ** (exponent - 7))
    assert np.array_equal(found.ravel(), np.where(raw >> 7, -size, size))


def test_transposed_tensor_is_refused_by_name() -> None:
    message = refused(GOLDEN / "torch_transposed.pth")
    assert "'turned'" in message and "(1, 3)" in message and ".contiguous()" in message


def test_legacy_file_of_torch_is_recognised() -> None:
    assert "legacy format" in refused(GOLDEN / "torch_legacy.pth")


def test_real_checkpoint_holds_the_tensors_of_a_llama() -> None:
    refs = open_pth(shared("checkpoints/stories260k/consolidated.00.pth"))
    assert refs["tok_embeddings.weight"].shape == (512, 64)
    assert {ref.dtype for ref in refs.values()} == {"float32"}
    for ref in refs.values():
        assert mx.isfinite(ref.read()).all().item()


# What may vary


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "uint8", "int32", "int64", "bool"])
@pytest.mark.parametrize("options", [{}, {"shared_storage": True}, {"zip64": True}])
def test_written_arrays_come_back(tmp_path: Path, dtype: str, options: dict[str, bool]) -> None:
    tensors = {
        "a": np.arange(6).reshape(2, 3).astype(dtype),
        "b": (np.arange(20) % 3).reshape(5, 4).astype(dtype),
    }
    path = tmp_path / "a.pth"
    write_pth(path, tensors, **options)
    for name, ref in open_pth(path).items():
        assert ref.dtype == dtype
        assert np.array_equal(np.array(ref.read()), tensors[name])


@pytest.mark.parametrize(
    "options",
    [
        {"prefix": "archive"},
        {"prefix": "a/b"},
        {"byteorder": None},
        {"ordered": False},
        {"parameters": True},
        {"extra_members": (Member("consolidated.00/.data/serialization_id", b"1"),)},
    ],
)
def test_variants_of_the_container_are_read(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "a.pth"
    write_pth(path, {"w": bfloat16(WEIGHTS)}, **options)
    (ref,) = open_pth(path).values()
    assert ref.dtype == "bfloat16"
    assert np.array_equal(np.array(ref.read().astype(mx.float32)), WEIGHTS)


def test_strides_of_dimensions_of_size_one_do_not_matter(tmp_path: Path) -> None:
    pickled = dict_pickle({"w": tensor_pickle(ONE, 4, (1, 8, 1), (999, 1, 7))})
    ref = open_pth(write_raw(tmp_path / "a.pth", pickled))["w"]
    assert np.array_equal(np.array(ref.read()), WEIGHTS.ravel()[4:].reshape(1, 8, 1))


def test_metadata_of_a_state_dict_is_ignored(tmp_path: Path) -> None:
    attributes = b"}" + text("_metadata") + ORDERED_DICT + b"s"
    data = dict_pickle({"w": tensor_pickle(ONE, 0, (3, 4))}, start=ORDERED_DICT)
    assert open_pth(write_raw(tmp_path / "a.pth", data[:-1] + attributes + b"b."))


# Rows


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (slice(0, 1), WEIGHTS[:1]),
        (slice(1, 3), WEIGHTS[1:3]),
        (slice(2, 9), WEIGHTS[2:]),
        (slice(3, 3), WEIGHTS[3:3]),
        (slice(2, 1), WEIGHTS[2:1]),
        (slice(None), WEIGHTS),
    ],
)
def test_rows_are_those_of_a_slice(tmp_path: Path, rows: slice, expected: np.ndarray) -> None:
    path = tmp_path / "a.pth"
    write_pth(path, {"other": WEIGHTS + 50, "w": WEIGHTS}, shared_storage=True)
    assert np.array_equal(np.array(open_pth(path)["w"].read(rows)), expected)


def test_rows_with_a_step_and_rows_of_a_scalar_are_errors_of_the_caller(tmp_path: Path) -> None:
    ref = TensorRef("w", "float32", (3, 4), tmp_path / "a", 0)
    with pytest.raises(ValueError, match="step 1"):
        ref.read(slice(0, 3, 2))
    with pytest.raises(ValueError, match="no rows"):
        TensorRef("w", "float32", (), tmp_path / "a", 0).read(slice(0, 1))


def test_file_cut_after_opening_is_reported_with_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    write_pth(path, {"w": WEIGHTS})
    ref = open_pth(path)["w"]
    os.truncate(path, ref.offset + 10)
    with pytest.raises(CheckpointError, match=r"a\.pth: tensor 'w' is cut short: 10 bytes .* 48"):
        ref.read()
    path.unlink()
    with pytest.raises(CheckpointError, match=r"a\.pth: tensor 'w' cannot be read: No such file"):
        ref.read()


def test_arrays_read_on_many_threads_are_whole_and_usable_here(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    tensors = {str(index): np.full((64, 32), index, np.float32) for index in range(16)}
    write_pth(path, tensors)
    refs = open_pth(path)
    read: dict[str, mx.array] = {}

    def work(names: list[str]) -> None:
        for name in names:
            read[name] = refs[name].read()

    threads = [threading.Thread(target=work, args=(list(refs)[part::4],)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, array in tensors.items():
        assert np.array_equal(np.array(read[name] + 0), array)


# Damaged containers


def test_wrong_kinds_of_file_have_a_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    assert "No such file" in refused(path)
    for data, expected in [
        (b"", "empty"),
        (b"hello, this is a text", "not a PyTorch checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"PK\x03\x04" + b"\0" * 100, "download it again"),
    ]:
        path.write_bytes(data)
        assert expected in refused(path)
    folder = tmp_path / "folder.pth"
    folder.mkdir()
    assert "directory" in refused(folder)


def test_truncation_anywhere_is_refused(tmp_path: Path) -> None:
    whole = (GOLDEN / "torch_shared.pth").read_bytes()
    path = tmp_path / "a.pth"
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert refused(path)
