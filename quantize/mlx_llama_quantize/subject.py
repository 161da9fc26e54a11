"""A model that can be walked block by block, wherever its weights are.

A model directory is one, and so is a checkpoint that has not become a directory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import mlx.core as mx

from mlx_llama import ops
from mlx_llama.config import ModelConfig
from mlx_llama.loading import ModelDirectory
from mlx_llama.ops import DTYPES
from mlx_llama.options import LoadOptions
from mlx_llama.tokenizer import Tokenizer
from mlx_llama.weights import SourceArrays, WeightSource


@dataclass(frozen=True, slots=True)
class Subject:
    """What walking a model takes.

    arrays: gives its tensors by Hugging Face names, each read when it is taken. loaded_bytes: what
    the weights take in memory, dense ones in a dtype. dtype_with: the dtype of activations for a
    user's choice. identity: what tells it from another model, or from itself changed.
    """

    name: str
    config: ModelConfig
    tokenizer: Tokenizer
    arrays: Callable[[], MutableMapping[str, mx.array]]
    loaded_bytes: Callable[[mx.Dtype], int]
    dtype_with: Callable[[str | None], mx.Dtype]
    identity: str

    @classmethod
    def of_directory(cls, directory: ModelDirectory) -> Self:
        """Take a model directory."""
        return cls(
            name=directory.path.name,
            config=directory.config,
            tokenizer=directory.tokenizer,
            arrays=directory.arrays,
            loaded_bytes=directory.loaded_bytes,
            dtype_with=lambda asked: directory.dtype_with(LoadOptions(dtype=asked)),
            identity=_identity({ref.path for ref in directory.tensors.values()}, directory.config),
        )

    @classmethod
    def of_weights(
        cls, name: str, weights: WeightSource, tokenizer: Tokenizer, files: Iterable[Path]
    ) -> Self:
        """Take the weights of a checkpoint, in these files."""
        config = weights.config
        return cls(
            name=name,
            config=config,
            tokenizer=tokenizer,
            arrays=lambda: SourceArrays(weights),
            loaded_bytes=lambda dtype: dense_bytes(weights, dtype),
            dtype_with=lambda asked: ops.compute_dtype(
                config.dtype, is_quantized=False, asked=asked
            ),
            identity=_identity(files, config),
        )


def dense_bytes(weights: WeightSource, dtype: mx.Dtype) -> int:
    """Return what weights take in memory where activations have a dtype."""
    return sum(
        math.prod(weights.shape(name)) * ops.dense_dtype(DTYPES[weights.dtype(name)], dtype).size
        for name in weights.names()
    )


def _identity(files: Iterable[Path], config: ModelConfig) -> str:
    stats = [(str(file.resolve()), *_stat(file)) for file in sorted(files)]
    return json.dumps([stats, repr(config)])


def _stat(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns
