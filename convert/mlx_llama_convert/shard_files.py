"""How the tensors of a model directory are spread over files, and the index that says so.

Knows sizes and names alone; the files are written by `mlx_llama.safetensors_writer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_llama.safetensors_writer import Entry, entry_nbytes


def plan_shards(sizes: Mapping[str, int], *, max_shard_bytes: int) -> list[list[str]]:
    """Split tensors, in order, into files of at most `max_shard_bytes` of data.

    sizes: bytes by name. One that is larger has a file of its own. None give one empty file.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, nbytes in sizes.items():
        if shards[-1] and filled + nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
    return shards


def shard_names(count: int) -> list[str]:
    """Name the files of a model as Hugging Face does."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def build_index(shards: Sequence[Sequence[Entry]]) -> dict[str, Any]:
    """Return the content of `model.safetensors.index.json`: total bytes, and the file of each name.

    Names are sorted, so that equal models have equal files.
    """
    places = {
        entry[0]: name
        for name, shard in zip(shard_names(len(shards)), shards, strict=True)
        for entry in shard
    }
    total_nbytes = sum(entry_nbytes(entry) for shard in shards for entry in shard)
    return {
        "metadata": {"total_size": total_nbytes},
        "weight_map": {name: places[name] for name in sorted(places)},
    }
