"""Ranks merged: split checkpoints equal the whole, inconsistent ones are refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_llama.errors import CheckpointError
from mlx_llama_convert.pth import open_pth
from mlx_llama_convert.shards import EMBEDDINGS, OUTPUT, find_shards, merge_ranks
from mlx_llama_convert.tensors import LogicalTensor, equal_content
from pth_writer import split_ranks, tiny_tensors, write_checkpoint, write_pth
from shared_data import shared

DIM, VOCAB = 16, 64
WHOLE = tiny_tensors(dim=DIM, vocab_size=VOCAB)
Ranks = list[dict[str, np.ndarray]]


def merge(folder: Path, *, dim: int = DIM, vocab: int | None = VOCAB) -> dict[str, LogicalTensor]:
    """Merge all shards of a folder."""
    return merge_ranks([open_pth(path) for path in find_shards(folder)], dim=dim, vocab_size=vocab)


def write_ranks(folder: Path, ranks: Ranks) -> Path:
    """Write ranks as they are, however inconsistent."""
    for number, tensors in enumerate(ranks):
        write_pth(folder / f"consolidated.{number:02d}.pth", tensors)
    return folder


def two_ranks() -> Ranks:
    return split_ranks(WHOLE, 2, embedding_axis=0)


# Files


def test_shards_come_in_order_of_number(tmp_path: Path) -> None:
    names = [f"consolidated.{number:02d}.pth" for number in range(12)]
    for name in [*reversed(names), "params.json", "consolidated.pth", "consolidated.00.pth.tmp"]:
        (tmp_path / name).touch()
    assert [path.name for path in find_shards(tmp_path)] == names


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], "holds no consolidated.00.pth"),
        (["params.json"], "holds no consolidated.00.pth"),
        (["consolidated.00.pth", "consolidated.02.pth"], "consolidated.01.pth is missing"),
        (["consolidated.01.pth"], "consolidated.00.pth is missing"),
        (["consolidated.0.pth", "consolidated.00.pth"], "are the same shard"),
    ],
)
def test_missing_shards_are_named(tmp_path: Path, names: list[str], expected: str) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        find_shards(tmp_path)


def test_folder_that_is_none_has_a_clear_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        find_shards(tmp_path / "none")


# Merging


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("ranks", "axis"), [(1, 0), (2, 0), (2, 1), (4, 0), (4, 1)])
def test_split_checkpoint_equals_the_whole(
    tmp_path: Path, ranks: int, axis: int, dtype: str
) -> None:
    write_checkpoint(tmp_path / "whole", WHOLE, dtype=dtype)
    write_checkpoint(tmp_path / "split", WHOLE, dtype=dtype, ranks=ranks, embedding_axis=axis)
    whole, split = merge(tmp_path / "whole"), merge(tmp_path / "split")
    assert split.keys() == whole.keys() == WHOLE.keys()
    for name, tensor in split.items():
        assert tensor.shape == WHOLE[name].shape
        assert tensor.dtype == dtype
        assert tensor.nbytes == whole[name].nbytes
        assert equal_content(tensor, whole[name], block_rows=5)
        if dtype == "float32":
            assert np.array_equal(np.array(tensor.read()), WHOLE[name])


@pytest.mark.parametrize("options", [{"shared_storage": True}, {"parameters": True}])
def test_containers_do_not_matter(tmp_path: Path, options: dict[str, Any]) -> None:
    write_checkpoint(tmp_path, WHOLE, ranks=2, **options)
    for name, tensor in merge(tmp_path).items():
        assert np.array_equal(np.array(tensor.read()), WHOLE[name])


@pytest.mark.parametrize("axis", [0, 1])
def test_any_rows_equal_those_of_the_whole(tmp_path: Path, axis: int) -> None:
    write_checkpoint(tmp_path, WHOLE, ranks=4, embedding_axis=axis)
    merged = merge(tmp_path)
    for name in (EMBEDDINGS, "layers.0.attention.wk.weight", "layers.1.feed_forward.w2.weight"):
        rows = WHOLE[name].shape[0]
        for start in range(0, rows, 3):
            for stop in (start, start + 1, start + 7, rows):
                found = merged[name].read(slice(start, stop))
                assert np.array_equal(np.array(found), WHOLE[name][start:stop])


def test_only_the_ranks_that_hold_the_rows_are_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, WHOLE, ranks=4)
    merged = merge(tmp_path)
    (tmp_path / "consolidated.03.pth").unlink()
    assert merged[OUTPUT].read(slice(0, VOCAB // 4 * 3)).shape == (48, DIM)
    with pytest.raises(CheckpointError, match=r"consolidated\.03\.pth: tensor 'output\.weight'"):
        merged[OUTPUT].read(slice(40, 49))


def test_buffers_of_rope_are_dropped(tmp_path: Path) -> None:
    frequencies = np.ones(2, np.float32)
    extra = {
        "rope.freqs": frequencies,
        "layers.0.attention.inner_attention.rope.freqs": frequencies,
    }
    ranks = two_ranks()
    write_ranks(tmp_path, [ranks[0] | extra, ranks[1]])
    assert merge(tmp_path).keys() == WHOLE.keys()


@pytest.mark.parametrize("vocab", [None, -1, VOCAB])
def test_unknown_vocabulary_is_left_to_the_caller(tmp_path: Path, vocab: int | None) -> None:
    write_checkpoint(tmp_path, WHOLE, ranks=2)
    assert merge(tmp_path, vocab=vocab)[EMBEDDINGS].shape == (VOCAB, DIM)


def test_real_checkpoint_is_tied() -> None:
    merged = merge(shared("checkpoints/stories260k"), dim=64, vocab=512)
    assert len(merged) == 48
    assert equal_content(merged[EMBEDDINGS], merged[OUTPUT])
    assert not equal_content(merged[EMBEDDINGS], merged["layers.0.attention.wq.weight"])


# Refusals


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    for name in (
        "vision_model.patch.weight",
        "layers.0.attention.wq.bias",
        "layers.0.attention.wq.scales",
        "layers.00.attention.wq.weight",
        "layers.0.norm.weight",
        "attention.wq.weight",
        "norm.weight\n",
    ):
        write_ranks(tmp_path, [WHOLE | {name: np.ones((2, 2), np.float32)}])
        with pytest.raises(CheckpointError, match="no part of a Llama text model") as caught:
            merge(tmp_path)
        assert repr(name) in str(caught.value)


def test_different_names_are_refused_in_both_directions(tmp_path: Path) -> None:
    for holder, other in ((0, 1), (1, 0)):
        ranks = two_ranks()
        del ranks[other]["norm.weight"]
        write_ranks(tmp_path, ranks)
        expected = rf"consolidated\.0{other}\.pth: tensor 'norm\.weight' is missing.*0{holder}\.pth"
        with pytest.raises(CheckpointError, match=expected):
            merge(tmp_path)


def test_different_shapes_and_dtypes_are_refused(tmp_path: Path) -> None:
    name = "layers.1.attention.wq.weight"
    for change in (lambda array: array[:-1], lambda array: array.astype(np.float16)):
        ranks = two_ranks()
        ranks[1][name] = change(ranks[1][name])
        write_ranks(tmp_path, ranks)
        with pytest.raises(
            CheckpointError,
            match=rf"01\.pth: tensor '{re.escape(name)}' is .*expected float32 \(8, 16\)",
        ):
            merge(tmp_path)


def test_norms_that_differ_in_one_bit_are_refused(tmp_path: Path) -> None:
    ranks = two_ranks()
    norm = ranks[1]["layers.0.ffn_norm.weight"].copy()
    norm.view(np.uint32)[3] ^= 1
    ranks[1]["layers.0.ffn_norm.weight"] = norm
    write_ranks(tmp_path, ranks)
    with pytest.raises(CheckpointError, match=r"01\.pth: tensor 'layers\.0\.ffn_norm\.weight' dif"):
        merge(tmp_path)


def test_missing_last_shard_shows_in_the_embedding(tmp_path: Path) -> None:
    for axis, expected in ((1, "4 wide in each of 3 shards"), (0, "48 rows in 3 shards")):
        folder = tmp_path / str(axis)
        write_checkpoint(folder, WHOLE, ranks=4, embedding_axis=axis)
        (folder / "consolidated.03.pth").unlink()
        with pytest.raises(CheckpointError, match=expected):
            merge(folder)


def test_width_of_another_model_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, WHOLE)
    with pytest.raises(CheckpointError, match="16 wide in each of 1 shards, expected 32"):
        merge(tmp_path, dim=32)


def test_wrong_number_of_dimensions_is_refused(tmp_path: Path) -> None:
    for name, shape in ((OUTPUT, (64,)), (EMBEDDINGS, ()), ("norm.weight", (1, 16))):
        write_ranks(tmp_path, [WHOLE | {name: np.ones(shape, np.float32)}])
        with pytest.raises(CheckpointError, match=re.escape(repr(name))):
            merge(tmp_path)


def test_empty_checkpoint_is_refused(tmp_path: Path) -> None:
    write_ranks(tmp_path, [{}])
    with pytest.raises(CheckpointError, match="holds no tensors"):
        merge(tmp_path)


# Tied output


def tensor_of(path: Path, array: np.ndarray) -> LogicalTensor:
    write_pth(path, {"w": array})
    return open_pth(path)["w"]


def test_tied_output_is_recognised_across_shards(tmp_path: Path) -> None:
    for axis in (0, 1):
        write_checkpoint(tmp_path, tiny_tensors(tied=True), ranks=2, embedding_axis=axis)
        merged = merge(tmp_path)
        assert equal_content(merged[EMBEDDINGS], merged[OUTPUT], block_rows=7)
        write_checkpoint(tmp_path, tiny_tensors(tied=False), ranks=2, embedding_axis=axis)
        merged = merge(tmp_path)
        assert not equal_content(merged[EMBEDDINGS], merged[OUTPUT], block_rows=7)


def test_content_is_compared_by_bits(tmp_path: Path) -> None:
    values = np.array([[1.0, np.nan], [0.0, 3.0]], np.float32)
    tensor = tensor_of(tmp_path / "a.pth", values)
    assert equal_content(tensor, tensor_of(tmp_path / "b.pth", values))
    negative_zero = values.copy()
    negative_zero[1, 0] = -0.0
    assert not equal_content(tensor, tensor_of(tmp_path / "c.pth", negative_zero))
    assert not equal_content(tensor, tensor_of(tmp_path / "d.pth", values[:1]))
    assert not equal_content(tensor, tensor_of(tmp_path / "e.pth", values.view(np.int32)))


def test_last_block_is_compared_too(tmp_path: Path) -> None:
    values = np.zeros((10, 2), np.float32)
    other = values.copy()
    other[9, 1] = 1
    first, second = tensor_of(tmp_path / "a.pth", values), tensor_of(tmp_path / "b.pth", other)
    assert not equal_content(first, second, block_rows=3)
    assert not equal_content(first, second, block_rows=9)


def test_shared_storage_is_equal_without_reading(tmp_path: Path) -> None:
    tensor = tensor_of(tmp_path / "a.pth", np.zeros((2, 2), np.float32))
    (tmp_path / "a.pth").unlink()
    assert equal_content(tensor, tensor)


def test_merged_rows_have_the_dtype_of_the_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, WHOLE, dtype="bfloat16", ranks=2)
    assert merge(tmp_path)["norm.weight"].read().dtype == mx.bfloat16
