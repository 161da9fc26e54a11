"""Key and value heads that are stored twice: left out when they are copies, kept when not."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from family import FAMILY, digests, unpack
from mlx_llama.options import ConvertOptions
from mlx_llama.tensor_ref import TensorRef
from mlx_llama_convert import make_plan, open_source
from mlx_llama_convert.kv_heads import FoldedHeads, fold_copies
from mlx_llama_convert.pth import open_pth
from mlx_llama_convert.tensors import LogicalTensor
from pth_writer import write_pth
from tiny_models import convert

ROW = "llama3.1-405b-mp16"
HEAD_DIM = 4


def stored(path: Path, heads: np.ndarray) -> TensorRef:
    """Write heads (n, head_dim, width) as one matrix."""
    write_pth(path, {"w": heads.reshape(-1, heads.shape[-1])})
    return open_pth(path)["w"]


@pytest.mark.parametrize("copies", [2, 3])
def test_any_rows_are_those_of_the_first_copies(tmp_path: Path, copies: int) -> None:
    heads = np.arange(5 * HEAD_DIM * 3, dtype=np.float32).reshape(5, HEAD_DIM, 3)
    every = np.repeat(heads, copies, axis=0)
    every[1::copies] += 1000  # a copy that is no copy: never read here
    folded = FoldedHeads(stored(tmp_path / "w.pth", every), HEAD_DIM, copies)
    expected = heads.reshape(-1, 3)
    assert (folded.shape, folded.nbytes) == ((20, 3), 240)
    assert np.array_equal(np.array(folded.read()), expected)
    for start in range(21):
        for stop in range(start, 21):
            rows = slice(start, stop)
            assert np.array_equal(np.array(folded.read(rows)), expected[rows])


def change_one_bit(folder: Path, rank: int, layer: int, matrix: str) -> None:
    path = folder / f"consolidated.{rank:02d}.pth"
    arrays = {
        name: (np.array(ref.read().view(mx.uint16)), "bfloat16")
        for name, ref in open_pth(path).items()
    }
    arrays[f"layers.{layer}.attention.{matrix}.weight"][0][-1, -1] ^= 1
    write_pth(path, arrays)


@pytest.mark.parametrize(("rank", "matrix"), [(0, "wk"), (7, "wk"), (15, "wv")])
def test_heads_that_differ_in_one_bit_are_all_kept(tmp_path: Path, rank: int, matrix: str) -> None:
    folder = unpack(ROW, tmp_path / "m")
    change_one_bit(folder, rank, 0, matrix)
    source = open_source(folder, ConvertOptions(kind="llama3.1"))
    assert source.config.n_kv_heads == 16
    head = rank | 1
    text = (
        f"16 key/value heads kept: layers.0.attention.{matrix}.weight has no copies at head {head}"
    )
    assert text in source.notes
    out = convert(folder, tmp_path / "out", quantize=False, kind="llama3.1")
    found, expected = digests(out / "model.safetensors"), FAMILY[ROW]["tensors"]
    other = {name for name in found if not name.endswith(("k_proj.weight", "v_proj.weight"))}
    assert {name: found[name] for name in other} == {name: expected[name] for name in other}


def test_a_plan_counts_each_head_once(tmp_path: Path) -> None:
    options = ConvertOptions(quantize=False, kind="llama3.1")
    plan = make_plan(open_source(unpack(ROW, tmp_path / "m"), options), options)
    assert plan.source_bytes == plan.output_bytes
    assert any("each is stored 2 times, compared bit for bit" in note for note in plan.notes)


@pytest.mark.parametrize(("n_kv_heads", "n_ranks"), [(8, 8), (16, 8), (16, 1), (12, 12), (2, 2)])
def test_equal_heads_of_other_checkpoints_are_left_alone(
    tmp_path: Path, n_kv_heads: int, n_ranks: int
) -> None:
    """Only more ranks than heads make copies; equal heads of another origin are weights."""
    ref = stored(tmp_path / "w.pth", np.zeros((n_kv_heads, HEAD_DIM, 3), np.float32))
    tensors: dict[str, LogicalTensor] = {
        f"layers.0.attention.{name}.weight": ref for name in ("wk", "wv")
    }
    (tmp_path / "w.pth").unlink()  # nothing is read
    found = fold_copies(tensors, n_kv_heads=n_kv_heads, head_dim=HEAD_DIM, n_ranks=n_ranks)
    assert (found.tensors, found.count, found.notes) == (tensors, n_kv_heads, ())
