"""A folder of weights, recognised and described before any weight is read.

`open_source` tells the layouts apart and returns a `SourceModel`: the configuration, why it is
what it is, the tokenizer, and the weights as a `WeightSource`. Knows nothing of outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_llama.config import ModelConfig
from mlx_llama.errors import CheckpointError
from mlx_llama.kinds import Decision
from mlx_llama.tokenizer import Tokenizer
from mlx_llama.weights import tensor_shapes
from mlx_llama_convert.tensors import WEIGHT_DTYPES, LogicalTensor


@dataclass(frozen=True, slots=True)
class Origin:
    """The hub repository that a folder is a copy of: owner/name, and its commit."""

    repository: str
    commit: str

    @property
    def name(self) -> str:
        """What the model is called."""
        return self.repository.rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class SourceModel:
    """A checkpoint and all that was found out about it.

    layout: how to call its file layout. files: every file that the result depends on.
    rope: why the RoPE factor is what it is, None for a model without one.
    generation: the source's generation_config.json, if it has one.
    origin: where a downloaded folder comes from; its own name says nothing.
    """

    path: Path
    layout: str
    files: tuple[Path, ...]
    config: ModelConfig
    kind: Decision
    rope: str | None
    tokenizer: Tokenizer
    weights: CheckpointWeights
    generation: Mapping[str, Any] | None
    notes: tuple[str, ...]
    origin: Origin | None = None

    @property
    def name(self) -> str:
        """What the model is called."""
        return self.origin.name if self.origin else self.path.resolve().name


class CheckpointWeights:
    """A `WeightSource` over the tensors of a checkpoint.

    is_interleaved: whether wq and wk have Meta's row order, in which a head's features 2i and
    2i + 1 turn together; they are read in Hugging Face's (i and i + D/2), which is the order of
    every model directory.
    """

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, LogicalTensor], *, is_interleaved: bool
    ) -> None:
        self._config = config
        self._tensors = tensors
        self._is_interleaved = is_interleaved
        self._names = list(tensor_shapes(config))
        self._check()

    @property
    def config(self) -> ModelConfig:
        """The architecture that the weights belong to."""
        return self._config

    def names(self) -> list[str]:
        """Return Meta's names in writing order."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the full shape of a tensor."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        """Return the dtype that a tensor is read in."""
        return self._tensors[name].dtype

    def nbytes(self, name: str) -> int:
        """Return the bytes that a tensor takes in the files."""
        return self._tensors[name].nbytes

    def read(self, name: str, rows: slice | None = None) -> mx.array:
        """Return a tensor, or some of its rows, evaluated."""
        tensor = self._tensors[name]
        if not self._is_interleaved or not name.endswith((".wq.weight", ".wk.weight")):
            return tensor.read(rows)
        head_dim = self._config.head_dim
        start, stop, _ = (rows or slice(None)).indices(tensor.shape[0])
        # Rows move within their head only, so whole heads are read.
        first, last = start // head_dim * head_dim, -(-stop // head_dim) * head_dim
        heads = tensor.read(slice(first, last))
        heads = heads.reshape(-1, head_dim // 2, 2, heads.shape[1]).swapaxes(1, 2)
        result = heads.reshape(last - first, -1)[start - first : stop - first]
        mx.eval(result)
        return result

    def _check(self) -> None:
        """Compare every tensor with what the configuration says: none missing, none too many."""
        shapes = tensor_shapes(self._config)
        for name, shape in shapes.items():
            if name not in self._tensors:
                raise CheckpointError(
                    f"tensor {name} is missing, expected for {self._config.n_layers} layers"
                )
            tensor = self._tensors[name]
            path = tensor.path
            if tensor.shape != shape:
                raise CheckpointError(
                    f"{path}: tensor {name} has shape {tensor.shape}, expected {shape} by the "
                    "configuration; a shard is missing or the two belong to different models"
                )
            if tensor.dtype not in WEIGHT_DTYPES:
                raise CheckpointError(
                    f"{path}: tensor {name} is {tensor.dtype}, expected one of "
                    f"{', '.join(WEIGHT_DTYPES)}"
                )
        for name, tensor in self._tensors.items():
            if name not in shapes:
                raise CheckpointError(
                    f"{tensor.path}: tensor {name} is too many: the configuration has "
                    f"{self._config.n_layers} layers"
                )


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, *, is_padded: bool) -> None:
    """Compare the tokenizer with the embedding's rows; some Hugging Face releases pad the rows."""
    size = tokenizer.vocab_size
    if size == vocab_size or (is_padded and size < vocab_size):
        return
    raise CheckpointError(
        f"{tokenizer.path}: {size} tokens, but the weights have {vocab_size} rows; the tokenizer "
        "belongs to another model"
    )
