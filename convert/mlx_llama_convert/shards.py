"""Tensor-parallel ranks as one model: which files, which axis, and rows merged on demand.

Takes the tensors of every rank, returns one `LogicalTensor` for each of Meta's names. Shapes must
agree between ranks; whether they fit the configuration is the planner's question. Reads no weights
but the norms, which every rank holds and which must be equal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlx_llama.errors import CheckpointError
from mlx_llama_convert.tensors import LogicalTensor, MergedTensor, same_bits

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
    ranks: Sequence[Mapping[str, LogicalTensor]], *, dim: int, vocab_size: int | None
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
        _check_shape(parts[0], dim, is_vector=axis is None)
        if axis is None:
            _check_replicated(parts)
        tensor = parts[0]
        if axis is not None and len(parts) > 1:
            tensor = MergedTensor(parts, axis)
        if name in (EMBEDDINGS, OUTPUT) and vocab_size is not None and vocab_size >= 0:
            _check_rows(tensor, vocab_size, n_ranks=len(parts))
        merged[name] = tensor
    return merged


def _keep_weights(rank: Mapping[str, LogicalTensor]) -> dict[str, LogicalTensor]:
    """Drop RoPE's buffers, which are computed, not learned."""
    return {name: ref for name, ref in rank.items() if not _DROPPED.fullmatch(name)}


def _check_names(ranks: Sequence[Mapping[str, LogicalTensor]]) -> None:
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


def _check_parts(parts: tuple[LogicalTensor, ...]) -> None:
    first = parts[0]
    for part in parts[1:]:
        if part.shape != first.shape or part.dtype != first.dtype:
            raise CheckpointError(
                f"{part.path}: tensor {part.name!r} is {part.dtype} {part.shape}, expected "
                f"{first.dtype} {first.shape} as in {first.path.name}: the shards are not of "
                "one checkpoint"
            )


def _axis(part: LogicalTensor) -> int | None:
    if part.name in _OUTSIDE_LAYERS:
        return AXES[part.name]
    match = _LAYER.fullmatch(part.name)
    if match is None or match[1] not in AXES or match[1] in _OUTSIDE_LAYERS:
        raise CheckpointError(
            f"{part.path}: tensor {part.name!r} is no part of a Llama text model in Meta's layout"
        )
    return AXES[match[1]]


def _embedding_axis(parts: tuple[LogicalTensor, ...], dim: int) -> int:
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


def _check_shape(part: LogicalTensor, dim: int, *, is_vector: bool) -> None:
    """Refuse what cannot be merged: a matrix has 2 dimensions, a norm is as wide as the model."""
    expected = f"({dim},)" if is_vector else "2 dimensions"
    if (part.shape != (dim,)) if is_vector else (len(part.shape) != 2):
        raise CheckpointError(
            f"{part.path}: tensor {part.name!r} has shape {part.shape}, expected {expected}"
        )


def _check_replicated(parts: tuple[LogicalTensor, ...]) -> None:
    first = parts[0]
    for part in parts[1:]:
        if not same_bits(first.read(), part.read(), first.dtype):
            raise CheckpointError(
                f"{part.path}: tensor {part.name!r} differs from that in {first.path.name}, "
                "expected the same in every shard: the shards are not of one checkpoint"
            )


def _check_rows(tensor: LogicalTensor, vocab_size: int, *, n_ranks: int) -> None:
    if tensor.shape[0] != vocab_size:
        raise CheckpointError(
            f"{tensor.path}: tensor {tensor.name!r} has {tensor.shape[0]} rows in "
            f"{n_ranks} shards, expected the vocabulary of {vocab_size}: a shard is "
            "missing, or params.json belongs to another model"
        )
