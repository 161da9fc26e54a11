"""What the kernels cannot do for MLX's transformations: each is refused in a line that names it."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import pytest

from kernels_oracle import needs_kernels
from mlx_llama import native, ops
from mlx_llama.config import QuantFormat, config_from_hf
from mlx_llama.model import LlamaModel
from mlx_llama.weights import build_model
from model_folders import TINY, arrays_of
from random_models import random_model


def tiny() -> LlamaModel:
    weights, raw = random_model(TINY)
    config = config_from_hf(raw, kind="llama2", is_tied=None)
    return build_model(config, arrays_of(weights), dtype=mx.float32)


def of_hidden(model: LlamaModel, n_tokens: int) -> Callable[[mx.array], mx.array]:
    return lambda h: model.through(model.blocks[0], h.reshape(1, n_tokens, -1)).sum()


@needs_kernels
@pytest.mark.parametrize("n_tokens", [5, 1])
def test_a_gradient_is_refused_by_name(n_tokens: int) -> None:
    model = tiny()
    h = mx.ones((1, n_tokens, model.config.dim))
    with pytest.raises(ValueError, match=r"^MlxLlama\w+: .* no gradient; uninstall mlx_llama_kern"):
        mx.grad(of_hidden(model, n_tokens))(h)
    with pytest.raises(ValueError, match=r"^MlxLlama\w+: .* no derivative; uninstall"):
        mx.jvp(of_hidden(model, n_tokens), [h], [h])
    assert mx.isfinite(of_hidden(model, n_tokens)(h)).item()  # it computes as before


@needs_kernels
@pytest.mark.parametrize("n_tokens", [5, 1])
def test_vectorizing_is_refused_by_name(n_tokens: int) -> None:
    model = tiny()
    h = mx.ones((3, n_tokens, model.config.dim))
    with pytest.raises(ValueError, match=r"^MlxLlama\w+: .* no vectorized form \(vmap\); uninst"):
        mx.vmap(of_hidden(model, n_tokens))(h)


@needs_kernels
def test_packing_refuses_too() -> None:
    x, form = mx.ones((2, 64)), QuantFormat(8, 64)
    with pytest.raises(ValueError, match=r"^MlxLlamaQuantize: .* no vectorized form"):
        mx.vmap(lambda row: ops.quantize(row, form)[1])(x)


def test_mlxs_own_operations_have_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the message says of a model without the extension."""
    monkeypatch.setattr(native, "kernels", lambda: None)
    model = tiny()
    gradient = mx.grad(of_hidden(model, 5))(mx.random.normal((1, 5, model.config.dim)))
    assert float(mx.abs(gradient).max().item()) > 0
