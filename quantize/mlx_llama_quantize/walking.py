"""What a walk through a model's layers starts from: a layer's arithmetic, and what it reads."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from mlx_llama.linear import Dense
from mlx_llama.model import LlamaModel
from mlx_llama.weights import EMBEDDING, NORM, WeightSource


def layer_arithmetic(source: WeightSource) -> LlamaModel:
    """Return what takes a text through a layer; its ends are not to be used."""
    nothing = Dense(mx.zeros((1, 1)))
    norm = source.read(NORM).astype(mx.float32)
    return LlamaModel(source.config, tok_embeddings=nothing, blocks=(), norm=norm, output=nothing)


def embedded(
    source: WeightSource, windows: np.ndarray, change: Callable[[mx.array], mx.array]
) -> list[mx.array]:
    """Return the embedding's rows for windows (n, L), (1, L, dim) float32 each.

    change: what becomes of rows (m, dim) as stored, such as packing. Only the rows of tokens that
    the windows have are read.
    """
    tokens, places = np.unique(windows, return_inverse=True)
    rows = [source.read(EMBEDDING, slice(int(token), int(token) + 1)) for token in tokens]
    table = change(mx.concatenate(rows)).astype(mx.float32)
    states = [table[mx.array(row)][None] for row in places.reshape(windows.shape)]
    mx.eval(states)
    return states
