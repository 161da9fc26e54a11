"""Tensor-parallel ranks as one model: which files, which axis, and rows merged on demand.

Takes the references of every rank, returns one `LogicalTensor` for each of Meta's names. Shapes
must agree between ranks; whether they fit the configuration is the planner's question. Reads no
weights but the norms, which every rank holds and which must be equal.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_llama.dtypes import DTYPES
from mlx_llama.errors import CheckpointError
from mlx_llama.tensor_ref import RowBuffer, TensorRef, row_bounds

_SHARD_NAME = re.compile(r"consolidated\.([0-9]{1,4})\.pth")
_DROPPED = re.compile(r"rope\.freqs|layers\.[0-9]+\.attention\.inner_attention\.rope\.freqs")
_LAYER = re.compile(r"layers\.(?:0|[1-9][0-9]{0,3})\.(.+)")

EMBEDDINGS = "tok_embeddings.weight"
OUTPUT = "output.weight"

# Axis along which ranks are concatenated; None where each rank holds the whole tensor.
# Source: fairscale's model_parallel/layers.py, llama-models' checkpoint.py.
AXES: Mapping[str, int | None] = {
    OUTPUT: 0,
    "norm.weight": None,
    "attention.wq.weight": 0,
    "attention.wk.weight": 0,
    "attention.wv.weight": 0,
    "attention.wo.weight": 1,
    "feed_forward.w1.weight": 0,
    "feed_forward.w2.weight": 1,
    "feed_forward.w3.weight": 0,
    "attention_norm.weight": None,
    "ffn_norm.weight": None,
}
_OUTSIDE_LAYERS = (OUTPUT, "norm.weight")


@dataclass(frozen=True, slots=True)
class LogicalTensor:
    """One tensor of the model, made of one part a rank.

    axis: along which the parts follow each other; None when each part is the whole tensor.
    """

    name: str
    parts: tuple[TensorRef, ...]
    axis: int | None

    @property
    def dtype(self) -> str:
        """Element type, a key of `DTYPES`."""
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the merged tensor."""
        shape = self.parts[0].shape
        if self.axis is None:
            return shape
        merged = sum(part.shape[self.axis] for part in self.parts)
        return (*shape[: self.axis], merged, *shape[self.axis + 1 :])

    @property
    def nbytes(self) -> int:
        """Size of the merged tensor in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def read(self, rows: slice | None = None) -> mx.array:
        """Read and merge the asked rows (all when None) into an evaluated array.

        Only the asked rows are read, from the ranks that hold them.
        """
        if self.axis is None or len(self.parts) == 1:
            return self.parts[0].read(rows)
        if self.axis == 1:
            merged = mx.concatenate([part.read(rows) for part in self.parts], axis=1)
            mx.eval(merged)  # a lazy array would fail on another thread
            return merged
        return self._read_stacked(slice(None) if rows is None else rows)

    def _read_stacked(self, rows: slice) -> mx.array:
        """Read rows that lie rank after rank, each straight into its place."""
        start, stop = row_bounds(rows, self.shape)
        buffer = RowBuffer(self.dtype, (stop - start, *self.shape[1:]))
        filled, first = 0, 0
        for part in self.parts:
            count = part.shape[0]
            begin, end = max(start - first, 0), min(stop - first, count)
            first += count
            if begin < end:
                nbytes = part.nbytes // count * (end - begin)
                part.read_into(buffer.view[filled : filled + nbytes], slice(begin, end))
                filled += nbytes
        return buffer.array()


def find_shards(folder: Path) -> list[Path]:
    """Return the `consolidated.NN.pth` files of a folder in rank order.

    Raises: CheckpointError when there is none, when a number is missing (the file is named), or
    when two files have the same number. Missing last ranks show in the shapes, not here.
    """
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror}") from error
    ranks: dict[int, str] = {}
    for name in names:
        if match := _SHARD_NAME.fullmatch(name):
            rank = int(match[1])
            if rank in ranks:
                raise CheckpointError(f"{folder}: {ranks[rank]} and {name} are the same shard")
            ranks[rank] = name
    if not ranks:
        raise CheckpointError(f"{folder}: holds no consolidated.00.pth: not a Meta checkpoint")
    for rank in range(max(ranks)):
        if rank not in ranks:
            raise CheckpointError(
                f"{folder}: consolidated.{rank:02d}.pth is missing, but {ranks[max(ranks)]} is "
                "there: download the missing shard"
            )
    return [folder / ranks[rank] for rank in sorted(ranks)]


def merge_ranks(
    ranks: Sequence[Mapping[str, TensorRef]], *, dim: int, vocab_size: int | None
) -> dict[str, LogicalTensor]:
    """Merge the tensors of all ranks, in rank order; one rank is the simplest case.

    dim: the model's width, which tells on which axis the embedding is split. vocab_size: rows
    that embedding and output must have; None (or -1 in old `params.json`) leaves it to the planner.
    Raises: CheckpointError that names file and tensor, found against expected.
    """
    kept = [_keep_weights(rank) for rank in ranks]
    _check_names(kept)
    merged: dict[str, LogicalTensor] = {}
    for name in kept[0]:
        parts = tuple(rank[name] for rank in kept)
        _check_parts(parts)
        axis = _embedding_axis(parts, dim) if name == EMBEDDINGS else _axis(parts[0])
        tensor = LogicalTensor(name, parts, axis)
        _check_shape(tensor, dim)
        if axis is None:
            _check_replicated(tensor)
        if name in (EMBEDDINGS, OUTPUT) and vocab_size is not None and vocab_size >= 0:
            _check_rows(tensor, vocab_size)
        merged[name] = tensor
    return merged


def equal_content(a: LogicalTensor, b: LogicalTensor, *, block_rows: int = 8192) -> bool:
    """Whether two tensors hold the same bits, read in blocks of rows; stops where they differ.

    Tensors that share their storage are equal without reading. Recognises a tied output, which
    Meta's files repeat.
    """
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.axis == b.axis and [_place(part) for part in a.parts] == [_place(p) for p in b.parts]:
        return True
    if not a.shape:
        return _same_bits(a.read(), b.read(), a.dtype)
    for start in range(0, a.shape[0], block_rows):
        rows = slice(start, start + block_rows)
        if not _same_bits(a.read(rows), b.read(rows), a.dtype):
            return False
    return True


def _place(ref: TensorRef) -> tuple[Path, int, tuple[int, ...]]:
    return ref.path, ref.offset, ref.shape


def _same_bits(a: mx.array, b: mx.array, dtype: str) -> bool:
    # As numbers NaN would differ from itself, and 0.0 would equal -0.0.
    carrier = DTYPES[dtype].carrier
    return bool(mx.array_equal(a.view(carrier), b.view(carrier)).item())


def _keep_weights(rank: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """Drop RoPE's buffers, which are computed, not learned."""
    return {name: ref for name, ref in rank.items() if not _DROPPED.fullmatch(name)}


def _check_names(ranks: Sequence[Mapping[str, TensorRef]]) -> None:
    if not ranks or not ranks[0]:
        raise CheckpointError("the checkpoint holds no tensors")
    first = ranks[0]
    first_path = next(iter(first.values())).path
    for rank in ranks[1:]:
        for name in sorted(first.keys() - rank.keys()):
            path = next((ref.path for ref in rank.values()), "another shard")
            raise CheckpointError(f"{path}: tensor {name!r} is missing, {first_path} holds it")
        for name in sorted(rank.keys() - first.keys()):
            raise CheckpointError(
                f"{first_path}: tensor {name!r} is missing, {rank[name].path} holds it"
            )


def _check_parts(parts: tuple[TensorRef, ...]) -> None:
    first = parts[0]
    for part in parts[1:]:
        if part.shape != first.shape or part.dtype != first.dtype:
            raise CheckpointError(
                f"{part.path}: tensor {part.name!r} is {part.dtype} {part.shape}, expected "
                f"{first.dtype} {first.shape} as in {first.path.name}: the shards are not of "
                "one checkpoint"
            )


def _axis(ref: TensorRef) -> int | None:
    if ref.name in _OUTSIDE_LAYERS:
        return AXES[ref.name]
    match = _LAYER.fullmatch(ref.name)
    if match is None or match[1] not in AXES or match[1] in _OUTSIDE_LAYERS:
        raise CheckpointError(
            f"{ref.path}: tensor {ref.name!r} is no part of a Llama text model in Meta's layout"
        )
    return AXES[match[1]]


def _embedding_axis(parts: tuple[TensorRef, ...], dim: int) -> int:
    """Decide from the shape how the embedding is split.

    Llama 3 splits the vocabulary (axis 0, full width on each rank), its predecessors the width.
    """
    width = parts[0].shape[-1] if parts[0].shape else 0
    if width == dim:
        return 0
    if width * len(parts) == dim:
        return 1
    raise CheckpointError(
        f"{parts[0].path}: tensor {EMBEDDINGS!r} is {width} wide in each of {len(parts)} shards, "
        f"expected {dim} (vocabulary split) or {dim}/{len(parts)} (width split): a shard is "
        "missing, or params.json belongs to another model"
    )


def _check_shape(tensor: LogicalTensor, dim: int) -> None:
    """Refuse what cannot be merged: a matrix has 2 dimensions, a norm is as wide as the model."""
    shape = tensor.parts[0].shape
    expected = f"({dim},)" if tensor.axis is None else "2 dimensions"
    if (shape != (dim,)) if tensor.axis is None else (len(shape) != 2):
        raise CheckpointError(
            f"{tensor.parts[0].path}: tensor {tensor.name!r} has shape {shape}, expected {expected}"
        )


def _check_replicated(tensor: LogicalTensor) -> None:
    first = tensor.parts[0]
    for part in tensor.parts[1:]:
        if not _same_bits(first.read(), part.read(), tensor.dtype):
            raise CheckpointError(
                f"{part.path}: tensor {tensor.name!r} differs from that in {first.path.name}, "
                "expected the same in every shard: the shards are not of one checkpoint"
            )


def _check_rows(tensor: LogicalTensor, vocab_size: int) -> None:
    if tensor.shape[0] != vocab_size:
        raise CheckpointError(
            f"{tensor.parts[0].path}: tensor {tensor.name!r} has {tensor.shape[0]} rows in "
            f"{len(tensor.parts)} shards, expected the vocabulary of {vocab_size}: a shard is "
            "missing, or params.json belongs to another model"
        )
