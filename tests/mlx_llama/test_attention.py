"""Attention over stored rows against NumPy in float64, and what it takes of memory."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_llama import ops
from mlx_llama.attention import Manner, attend
from mlx_llama.cache import View
from mlx_llama.cache.rows import Stored
from mlx_llama.cache.view import Sight

N_HEADS, N_KV_HEADS, HEAD_DIM = 4, 2, 64
SCALE = HEAD_DIM**-0.5
TOLERANCE = {mx.float32: 2e-5, mx.bfloat16: 2e-2}  # of the largest number of the result

# Tiles of 32 rows, the least; or all rows at once.
TILES, AT_ONCE = 1, 1 << 30


def random(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    numbers = np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)
    return mx.array(numbers).astype(dtype)


def part_of_buffers(n_rows: int, bits: int, *, sign: int, dtype: mx.Dtype = mx.float32) -> Stored:
    """Return rows as a cache shows them: the first of longer buffers."""
    x = sign * random(1, N_KV_HEADS, n_rows + 56, HEAD_DIM, dtype=dtype)
    return Stored.of(x, bits).rows(0, n_rows)


def expected(q: mx.array, view: View) -> np.ndarray:
    """Compute the causal attention of q (1, H, m, D) over what the rows hold."""
    (keys, values), n_queries = view.parts[0], q.shape[2]
    k, v = (np.asarray(rows.dense(mx.float32), np.float64)[0] for rows in (keys, values))
    k, v = (np.repeat(x, N_HEADS // N_KV_HEADS, axis=0) for x in (k, v))
    scores = np.asarray(q.astype(mx.float32), np.float64)[0] @ k.transpose(0, 2, 1) * SCALE
    ask = np.arange(keys.n_rows - n_queries, keys.n_rows)[:, None]
    scores = np.where(np.arange(keys.n_rows) <= ask, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return (weights / weights.sum(axis=-1, keepdims=True)) @ v


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("n_queries", [1, 7, 48])
@pytest.mark.parametrize(("k_bits", "v_bits"), [(16, 16), (8, 8), (4, 4), (16, 4), (8, 16)])
@pytest.mark.parametrize("tile_scores", [TILES, AT_ONCE])
@pytest.mark.parametrize("by_heads", [True, False])
def test_attention_is_that_over_the_rows_as_stored(
    dtype: mx.Dtype, n_queries: int, k_bits: int, v_bits: int, tile_scores: int, by_heads: bool
) -> None:
    n_rows = 200
    q = random(1, N_HEADS, n_queries, HEAD_DIM, dtype=dtype)
    keys = part_of_buffers(n_rows, k_bits, sign=1, dtype=dtype)
    values = part_of_buffers(n_rows, v_bits, sign=-1, dtype=dtype)
    view = View(((keys, values),), Sight(n_rows - n_queries, n_queries))
    out = attend(q, view, scale=SCALE, manner=Manner(mx.float32, tile_scores, by_heads))
    assert out.dtype == dtype
    found, wanted = np.asarray(out.astype(mx.float32), np.float64)[0], expected(q, view)
    assert np.abs(found - wanted).max() <= TOLERANCE[dtype] * np.abs(wanted).max()


@pytest.mark.skipif(ops.backend() != "cpu", reason="it is the CPU's products that copy")
@pytest.mark.parametrize("bits", [8, 4])
def test_decode_copies_no_packed_rows(bits: int) -> None:
    """Each step copied the packed rows of a layer, because they are a part of longer buffers."""
    n_rows = 20_000
    keys, values = (part_of_buffers(n_rows, bits, sign=sign) for sign in (1, -1))
    view = View(((keys, values),), Sight(n_rows - 1, 1))
    q = random(1, N_HEADS, 1, HEAD_DIM)
    mx.eval(q, keys.arrays, values.arrays)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(ops.attention(q, view, scale=SCALE))
    scores = N_HEADS * n_rows * 4
    assert mx.get_peak_memory() - before < 3 * scores < keys.arrays[0].nbytes
