"""Attention over plain and packed caches against float64."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_oracle import INSTALLED, assert_close, float64, heads_of, needs_kernels, seeds, types


class Cached:
    """Rows (B, K, S, D) as a cache stores them, and what they are in float64."""

    def __init__(self, rows: mx.array, bits: int, group: int) -> None:
        self.arrays = [rows]
        self.exact = float64(rows)
        self.size = np.abs(self.exact)  # the magnitudes that unpacking adds
        if bits == 16:
            return
        self.arrays = list(mx.quantize(rows, group_size=group, bits=bits))
        words, scales, biases = self.arrays
        numbers = np.array(words)[..., None] >> np.arange(0, 32, bits, dtype=np.uint32)
        numbers = (numbers & (2**bits - 1)).reshape(rows.shape).astype(np.float64)
        scale, bias = (np.repeat(float64(a), group, axis=-1) for a in (scales, biases))
        self.exact = scale * numbers + bias
        self.size = np.abs(scale) * numbers + np.abs(bias)

    def followed_by(self, spare: int) -> list[mx.array]:
        """Return the arrays with so many rows behind them that hold nothing."""
        if not spare:
            return self.arrays
        return [
            mx.concatenate([a, mx.full((*a.shape[:2], spare, a.shape[3]), 1e9).astype(a.dtype)], 2)
            for a in self.arrays
        ]


def attended(
    q: mx.array, keys: list[Cached], values: list[Cached], seen: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return attention in float64, what its sums added, and that of the largest score's."""
    wide, scale = float64(q), q.shape[-1] ** -0.5

    def whole(parts: list[Cached], name: str) -> np.ndarray:
        joined = np.concatenate([getattr(part, name) for part in parts], axis=2)
        return np.repeat(joined, wide.shape[1] // joined.shape[1], axis=1)

    scores = wide @ whole(keys, "exact").swapaxes(-1, -2) * scale
    sizes = np.abs(wide) @ whole(keys, "size").swapaxes(-1, -2) * scale
    largest = np.where(seen, sizes, 0).max(axis=-1, keepdims=True, initial=0)
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True, initial=-1e300))
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights @ whole(values, "exact"), weights @ whole(values, "size"), largest


@needs_kernels
@settings(max_examples=150, deadline=None)
@given(
    seeds, st.integers(1, 2), st.integers(1, 3), st.integers(1, 5), st.integers(0, 40),
    st.integers(0, 200), st.sampled_from([0, 0, 1, 70]), st.sampled_from([7, 64, 96, 128, 256]),
    st.sampled_from([16, 16, 8, 4]), st.sampled_from([16, 16, 8, 4]), types, types, st.booleans(),
    st.booleans(), st.sampled_from([0, 0, 1, 40]),
)  # fmt: skip
def test_rows_are_attended_as_in_float64(
    kernels: object, seed: int, batch: int, shared: int, group: int, m: int, before: int,
    second: int, dim: int, key_bits: int, value_bits: int, dtype: mx.Dtype, cached: mx.Dtype,
    is_strided: bool, is_causal: bool, spare: int,
) -> None:  # fmt: skip
    random = np.random.default_rng(seed)
    if dim == 7:
        key_bits = value_bits = 16
    rows = m + before
    lengths = [rows, second] if second else [rows]
    q = heads_of(random, (batch, shared * group, m, dim), dtype, is_strided=is_strided)
    packed_by = [next(size for size in (128, 64, 32) if dim % size == 0 or dim == 7)] * 2
    if dim % 64 == 0:
        packed_by[0] = 32
    keys, values = (
        [
            Cached(
                heads_of(random, (batch, shared, n, dim), cached, is_strided=is_strided),
                bits,
                size,
            )
            for n in lengths
        ]
        for bits, size in zip((key_bits, value_bits), packed_by, strict=True)
    )
    total = sum(lengths)
    first = np.arange(total) - (total - m)
    last = np.full(total, m)
    if not is_causal:
        first = random.integers(-2, m + 2, total)
        last = first + random.integers(-2, m + 2, total)
        first[:1], last[:1] = 0, m  # every query sees something
    queries = np.arange(m)[:, None]
    seen = (first <= queries) & (last >= queries)
    sight = None if is_causal else mx.array(np.stack([first, last]).astype(np.int32))
    expected, size, largest = attended(q, keys, values, seen)
    parts = [[part.followed_by(spare) for part in which] for which in (keys, values)]
    found = kernels.attention(q, *parts, lengths, dim**-0.5, sight)
    assert found.dtype == dtype
    bound = (total / 64 + 64 + 8 * largest) * 2.0**-24
    assert_close(found, expected, bound * size, 1.0)


@needs_kernels
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("n_kv_heads", [1, 2])
def test_long_caches_are_split_and_joined(kernels: object, bits: int, n_kv_heads: int) -> None:
    """Few queries over thousands of rows: threads share them out, each with its own softmax."""
    random = np.random.default_rng(bits)
    for m, n_rows in ((1, 5000), (2, 1025)):
        q = heads_of(random, (1, 4, m, 64), mx.float32, is_strided=False)
        keys, values = (
            Cached(
                heads_of(random, (1, n_kv_heads, n_rows, 64), mx.float32, is_strided=False),
                bits,
                64,
            )
            for _ in range(2)
        )
        seen = np.arange(n_rows)[None] <= np.arange(n_rows - m, n_rows)[:, None]
        expected, size, largest = attended(q, [keys], [values], seen)
        found = kernels.attention(q, [keys.arrays], [values.arrays], [n_rows], 0.125)  # pyright: ignore
        assert_close(found, expected, (n_rows / 64 + 64 + 8 * largest) * 2.0**-24 * size, 1.0)


@needs_kernels
@pytest.mark.parametrize("n_queries", [1, 32])
@pytest.mark.parametrize("n_rows", [1024, 32768])
def test_long_attention_stays_within_its_bound(
    kernels: object, n_rows: int, n_queries: int
) -> None:
    q, k = mx.zeros((1, 2, n_queries, 32)), mx.zeros((1, 1, n_rows, 32))
    v = mx.full((1, 1, n_rows, 32), 0.1)
    found = kernels.attention(q, [[k]], [[v]], [n_rows], scale=1.0)  # pyright: ignore
    expected = float(np.float32(0.1))
    assert np.abs(float64(found) / expected - 1).max() <= (n_rows / 64 + 128) * 2.0**-24


@needs_kernels
@pytest.mark.parametrize(
    ("keys", "values", "rows", "message"),
    [
        ([[(1, 2, 9, 64)]], [[(1, 1, 9, 64)]], [9], "as many heads"),
        ([[(1, 2, 9, 64)]], [[(1, 2, 8, 64)]], [9], "values: .* of 9 rows at least"),
        ([[(1, 2, 9, 64)]], [[(1, 2, 9, 64)]], [10], "keys: .* of 10 rows at least"),
        ([[(1, 2, 9, 64)]], [[(1, 2, 9, 64)]], [-1], "rows: found -1"),
        ([[(1, 2, 9, 32)]], [[(1, 2, 9, 64)]], [9], "keys: rows of 32, q's of 64"),
        ([[(1, 3, 9, 64)]], [[(1, 3, 9, 64)]], [9], "heads that divide q's"),
        ([[(1, 2, 9, 64)]], [[(1, 2, 9, 64)]], [2], "no more rows than keys"),
        ([[(1, 2, 9, 64)]], [[(1, 2, 9, 64)]], [0], "found none"),
        ([[(1, 2, 9, 64)]], [[(1, 2, 9, 64)]], [4, 5], "found 1, 1 and 2 parts"),
        ([], [], [], "found 0, 0 and 0 parts"),
    ],
)
def test_wrong_caches_are_refused(
    keys: list[list[tuple[int, ...]]],
    values: list[list[tuple[int, ...]]],
    rows: list[int],
    message: str,
) -> None:
    assert INSTALLED is not None
    parts = [[[mx.zeros(shape) for shape in part] for part in which] for which in (keys, values)]
    with pytest.raises(ValueError, match=message):
        INSTALLED.attention(mx.zeros((1, 4, 3, 64)), *parts, rows, 1.0)


@needs_kernels
def test_a_cache_that_was_forked_is_not_written_through(tmp_path: Path) -> None:
    """The kernels read buffers that MLX writes in place: what still is to be read is kept."""
    assert INSTALLED is not None
    buffer = mx.zeros((1, 1, 64, 32))
    mx.eval(buffer)
    q = mx.ones((1, 1, 1, 32))
    outs = []
    for row in range(64):
        buffer[..., row : row + 1, :] = mx.full((1, 1, 1, 32), row + 1.0)
        keys, values = buffer[..., : row + 1, :] * 0, buffer[..., : row + 1, :]
        outs.append(INSTALLED.attention(q, [[keys]], [[values]], [row + 1], 1.0))
    mx.eval(outs)
    found = [float(out[0, 0, 0, 0].item()) for out in outs]
    assert found == pytest.approx([(row + 2) / 2 for row in range(64)], rel=1e-6)
