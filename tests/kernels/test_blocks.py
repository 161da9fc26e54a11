"""One token's way through a block, several operations at once."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from kernels_oracle import INSTALLED, float64, needs_kernels
from mlx_llama import row_ops
from mlx_llama.cache.rows import Stored
from mlx_llama.cache.view import Sight, View
from mlx_llama.config import QuantFormat
from mlx_llama.linear import Dense, Matrix, Packed, held


def random_matrix(rows: int, columns: int, bits: int) -> tuple[Matrix, mx.array]:
    """Return a matrix as it is held, bits 0 for a dense one, and its numbers."""
    numbers = mx.random.normal((rows, columns)) / math.sqrt(columns)
    if not bits:
        return Dense(numbers.astype(mx.bfloat16)), numbers.astype(mx.bfloat16).astype(mx.float32)
    form = QuantFormat(bits, 32)
    words, scales, biases = mx.quantize(numbers, group_size=32, bits=bits)
    numbers = mx.dequantize(words, scales, biases, group_size=32, bits=bits)
    return Packed(words, scales, biases, form), numbers


@needs_kernels
@pytest.mark.parametrize("bits", [0, 3, 4, 8])
def test_one_tokens_way_through_a_block_is_that_of_single_operations(
    kernels: object, bits: int
) -> None:
    mx.random.seed(bits)
    dim, n_heads, n_kv_heads, head_dim, hidden, n_rows = 96, 6, 2, 16, 160, 37
    matrices = [
        random_matrix(rows, columns, bits)
        for rows, columns in (
            ((n_heads + 2 * n_kv_heads) * head_dim, dim), (dim, n_heads * head_dim),
            (2 * hidden, dim), (dim, hidden),
        )
    ]  # fmt: skip
    (wqkv, wqkv_numbers), (wo, wo_numbers), (w13, w13_numbers), (w2, w2_numbers) = matrices
    h, norm = mx.random.normal((1, 1, dim)), (mx.random.normal((dim,)), 1e-5)
    periods = mx.array([1.0, 3.0, 9.0, 27.0, 81.0, 243.0, 729.0, 2187.0])
    n_turned, normed = n_heads + n_kv_heads, mx.fast.rms_norm(h, *norm)

    heads = row_ops.turned_heads(h, norm, held(wqkv), periods, 5, n_turned)
    assert heads is not None
    apart = (normed @ wqkv_numbers.T).reshape(1, -1, 1, head_dim)
    turned = mx.fast.rope(
        apart[:, :n_turned], head_dim, traditional=False, base=None, scale=1.0, offset=5,
        freqs=periods,
    )  # fmt: skip
    expected = mx.concatenate([turned, apart[:, n_turned:]], axis=1)
    np.testing.assert_allclose(float64(heads), float64(expected), atol=2e-5)

    k, v = (mx.random.normal((1, n_kv_heads, n_rows, head_dim)) for _ in range(2))
    view = View(((Stored((k,)), Stored((v,))),), Sight(n_rows - 1, 1))
    q = heads[:, :n_heads]
    out = row_ops.attended(h, heads, n_heads, view, 0.25, held(wo))
    assert out is not None
    mixed = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.25)
    expected = h + mixed.transpose(0, 2, 1, 3).reshape(1, 1, -1) @ wo_numbers.T
    np.testing.assert_allclose(float64(out), float64(expected), atol=2e-5)

    fed = row_ops.feed_forward(h, norm, held(w13), held(w2))
    assert fed is not None
    gate, up = mx.split(normed @ w13_numbers.T, 2, axis=-1)
    expected = h + (gate * mx.sigmoid(gate) * up) @ w2_numbers.T
    np.testing.assert_allclose(float64(fed), float64(expected), atol=2e-5)


@needs_kernels
def test_what_is_no_single_row_of_float32_goes_by_single_operations() -> None:
    matrix, norm = held(random_matrix(96, 96, 4)[0]), (mx.ones((96,)), 1e-5)
    for h in (
        mx.ones((1, 2, 96)),
        mx.ones((2, 1, 96)),
        mx.ones((1, 1, 96), dtype=mx.bfloat16),
    ):
        assert row_ops.turned_heads(h, norm, matrix, mx.ones((8,)), 0, 4) is None
    h = mx.ones((1, 1, 96))
    wide = held(random_matrix(2 * 1028, 96, 4)[0])  # heads that the kernels would refuse
    assert row_ops.turned_heads(h, norm, wide, mx.ones((514,)), 0, 1) is None
    assert row_ops.feed_forward(h, norm, None, matrix) is None
    assert INSTALLED is not None
    with pytest.raises(ValueError, match="h: expected"):
        INSTALLED.turned_heads(
            mx.ones((1, 2, 96)), norm[0], 1e-5, [mx.ones((32, 96))], 0, 0, mx.ones((8,)), 0, 1
        )
    with pytest.raises(ValueError, match="w2: 32 rows"):
        INSTALLED.feed_forward(h, norm[0], 1e-5, [mx.ones((64, 96))], [mx.ones((32, 32))], 0, 0)
    with pytest.raises(ValueError, match="matrix: found 1 arrays, expected 3"):
        INSTALLED.feed_forward(h, norm[0], 1e-5, [mx.ones((64, 96))], [mx.ones((96, 32))], 32, 4)
