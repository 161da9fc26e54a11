"""Tensors that lie in files, read by the native kernels."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from kernels_oracle import INSTALLED, needs_kernels
from mlx_llama import ops

FILE_SHAPES = ((3, 5), (2, 5), (0, 5), (1 << 20, 5))  # the last one is read in pieces


def file_of(folder: Path, matrices: list[mx.array]) -> list[mx.array]:
    """Write matrices into a file behind one another, and return them as they lie there."""
    assert INSTALLED is not None
    path, found, offset = folder / "matrices.bin", [], 7
    path.write_bytes(b"header!" + b"".join(np.array(m).tobytes() for m in matrices))
    for matrix in matrices:
        found.append(INSTALLED.file_array(str(path), offset, matrix.shape, matrix.dtype))
        offset += matrix.nbytes
    return found


@needs_kernels
def test_what_lies_in_files_is_read_where_rows_are_joined(tmp_path: Path) -> None:
    dice = np.random.default_rng(3)
    matrices = [mx.array(dice.integers(0, 1 << 32, s, dtype=np.uint32)) for s in FILE_SHAPES]
    for matrix, read in zip(matrices, file_of(tmp_path, matrices), strict=True):
        assert read.dtype == mx.uint32 and np.array_equal(read, matrix)
    expected, found = mx.concatenate(matrices), file_of(tmp_path, matrices)
    assert np.array_equal(ops.join_rows(found), expected)
    mx.eval(found[0])
    assert np.array_equal(ops.join_rows(found), expected)  # one of them was read before
    assert np.array_equal(ops.join_rows([*found[:2], matrices[2], found[3] + 0]), expected)


@needs_kernels
def test_a_file_that_changed_is_not_read(tmp_path: Path) -> None:
    matrices = [mx.ones((4, 5)), mx.ones((1 << 20, 5))]
    path = tmp_path / "matrices.bin"
    for change in (path.read_bytes, lambda: path.read_bytes()[:-1], lambda: b"another"):
        found = file_of(tmp_path, matrices)
        assert np.array_equal(found[0], np.ones((4, 5)))
        other = tmp_path / "other"
        other.write_bytes(change())
        other.replace(path)
        with pytest.raises(RuntimeError, match=r"matrices.bin: cannot be read: it has changed"):
            mx.eval(ops.join_rows(found[1:]))
    found = file_of(tmp_path, matrices)
    path.unlink()
    with pytest.raises(RuntimeError, match=r"matrices.bin: cannot be read: No such file"):
        mx.eval(found[1])


@needs_kernels
def test_what_cannot_lie_in_a_file_is_refused(tmp_path: Path) -> None:
    assert INSTALLED is not None
    (path := tmp_path / "short.bin").write_bytes(bytes(16))
    with pytest.raises(ValueError, match="shape: found -1"):
        INSTALLED.file_array(str(path), 0, [-1, 4], mx.float32)
    with pytest.raises(ValueError, match="arrays: found none"):
        INSTALLED.join_rows([])
    with pytest.raises(RuntimeError, match=r"short.bin: cannot be read: it is cut short"):
        mx.eval(INSTALLED.file_array(str(path), 0, [5], mx.float32))
