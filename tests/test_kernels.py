"""The native kernels against float64: shapes, strides, types, instruction sets, threads."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_llama import native, ops
from mlx_llama.cache.rows import Stored
from mlx_llama.cache.view import Sight, View
from mlx_llama.config import QuantFormat
from mlx_llama.errors import OptionError
from mlx_llama.linear import Dense, Matrix, Packed, held

INSTALLED = native.kernels()
needs_kernels = pytest.mark.skipif(
    INSTALLED is None, reason=f"no native kernels: {native.missing_reason()}"
)
INSTRUCTIONS = ("baseline", "neon", "avx2", "avxvnni", "avx512", "vnni", "vbmi", "amx")
FEW = 5  # rows of activations that are multiplied without panels
HALF_STEP = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}
LEAST = {mx.float32: 1e-37, mx.float16: 6e-8, mx.bfloat16: 1e-37}
types = st.sampled_from([mx.float32, mx.bfloat16, mx.float16])
seeds = st.integers(0, 2**31)
many = settings(max_examples=60, deadline=None)


@pytest.fixture(
    params=[(name, n) for name in INSTRUCTIONS for n in (1, 3)], ids=str, scope="module"
)
def kernels(request: pytest.FixtureRequest) -> Iterator[object]:
    assert INSTALLED is not None
    name, threads = request.param
    before = INSTALLED.instructions(), INSTALLED.threads()
    if not INSTALLED.use_instructions(name):
        pytest.skip(f"this processor has no {name}")
    INSTALLED.use_threads(threads)
    yield INSTALLED
    INSTALLED.use_instructions(before[0])
    INSTALLED.use_threads(before[1])


def float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32), dtype=np.float64)


def laid_out(values: np.ndarray, layout: str, dtype: mx.Dtype) -> mx.array:
    """Return values (m, n) as an array that stands in memory in another way."""
    x = mx.array(values.astype(np.float32)).astype(dtype)
    if layout == "columns":
        return mx.contiguous(x.T).T
    if layout == "every other":
        return mx.repeat(x, 2, axis=-1)[:, ::2]
    if layout == "broadcast":
        return mx.broadcast_to(x[:1], x.shape)
    return x


layouts = st.sampled_from(["whole", "columns", "every other", "broadcast"])


def assert_close(found: mx.array, expected: np.ndarray, size: np.ndarray, bound: float) -> None:
    """Compare within bound of size, what was added, and the rounding of the result."""
    allowed = bound * size + HALF_STEP[found.dtype] * np.abs(expected) + LEAST[found.dtype]
    assert found.shape == expected.shape
    assert (np.abs(float64(found) - expected) <= allowed).all()


def step_of(n_rows: int) -> float:
    """Return by how much of its group's largest an activation of n_rows may be off.

    Few are counted in steps of 2^-23, of which half is lost and half a margin; many in 32767ths.
    """
    return 1.01 * 2.0**-23 if n_rows <= FEW else 0.505 / 32767


@needs_kernels
@many
@given(
    seeds, st.sampled_from([2, 3, 4, 5, 6, 8]), st.sampled_from([32, 64, 128]), st.integers(0, 70),
    st.integers(1, 70), st.integers(1, 9), types, types, layouts,
)  # fmt: skip
def test_products_are_those_of_float64(
    kernels: object, seed: int, bits: int, group: int, m: int, rows: int, groups: int,
    dtype: mx.Dtype, scale_dtype: mx.Dtype, layout: str,
) -> None:  # fmt: skip
    random, columns = np.random.default_rng(seed), group * groups
    x = laid_out(random.normal(size=(m, columns)), layout, dtype)
    weight = mx.array(random.integers(0, 2**32, (rows, columns * bits // 32), dtype=np.uint32))
    scales, biases = (
        mx.array(random.normal(size=(rows, groups)).astype(np.float32)).astype(scale_dtype)
        for _ in range(2)
    )
    found = kernels.quantized_matmul(x, weight, scales, biases, group_size=group, bits=bits)
    stream = np.unpackbits(np.array(weight).view(np.uint8), axis=-1, bitorder="little")
    numbers = stream.reshape(rows, columns, bits) @ (2.0 ** np.arange(bits))
    scale, bias = (np.repeat(float64(a), group, axis=1) for a in (scales, biases))
    wide = float64(x)
    sizes = np.abs(scale) * numbers + np.abs(bias)
    matrix = scale * numbers + bias
    largest = np.abs(wide).reshape(m, groups, group).max(axis=2)
    steps = np.repeat(largest, group, axis=1) * step_of(m)
    moved = steps @ (sizes if m <= FEW else np.abs(matrix)).T
    size = (math.sqrt(columns) * np.abs(wide)) @ sizes.T
    assert found.dtype == dtype
    assert_close(found, wide @ matrix.T, size + moved * 2**24, 2**-24)


@needs_kernels
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("n_rows", [1, 20])
def test_small_activations_beside_a_large_one_keep_their_steps(
    kernels: object, bits: int, spread: float, n_rows: int
) -> None:
    """Each activation is off by a step of its group's largest at most, and by none of another's."""
    random, columns = np.random.default_rng(bits), 256
    x = random.normal(size=(n_rows, columns)).astype(np.float32) * np.float32(spread)
    x[0, 70] = -1000.0  # in the second group of four
    # The matrix takes out single activations: one number of a row is 1, the others 0.
    numbers = np.zeros((columns, columns), dtype=np.uint8)
    np.fill_diagonal(numbers, 1)
    stream = ((numbers[..., None] >> np.arange(bits)) & 1).astype(np.uint8)
    packed = np.packbits(stream.reshape(columns, -1), axis=-1, bitorder="little")
    weight = mx.array(packed.view(np.uint32))
    ones, none = mx.ones((columns, 4)), mx.zeros((columns, 4))
    found = kernels.quantized_matmul(  # pyright: ignore
        mx.array(x), weight, ones, none, group_size=64, bits=bits
    )
    largest = np.repeat(np.abs(x).reshape(n_rows, 4, 64).max(axis=2), 64, axis=1)
    error = np.abs(float64(found) - x.astype(np.float64))
    assert (error <= largest * (step_of(n_rows) + 2.0**-24)).all()
    assert error[0, 70] <= 1000 * 3 * 2.0**-24  # the largest: what floats round alone


@needs_kernels
@many
@given(
    seeds, st.integers(0, 70), st.integers(0, 70), st.integers(0, 1100), types, types, layouts,
    layouts,
)  # fmt: skip
def test_dense_products_are_those_of_float64(
    kernels: object, seed: int, m: int, rows: int, columns: int, dtype: mx.Dtype,
    weight_dtype: mx.Dtype, layout: str, weight_layout: str,
) -> None:  # fmt: skip
    random = np.random.default_rng(seed)
    x = laid_out(random.normal(size=(m, columns)), layout, dtype)
    weight = laid_out(random.normal(size=(rows, columns)), weight_layout, weight_dtype)
    found = kernels.matmul(x, weight)  # pyright: ignore
    wide, matrix = float64(x), float64(weight)
    assert found.dtype == dtype
    bound = (math.sqrt(columns) + 4) * 2**-24
    assert_close(found, wide @ matrix.T, np.abs(wide) @ np.abs(matrix).T, bound)


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

    heads = ops.turned_heads(h, norm, held(wqkv), periods, 5, n_turned)
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
    out = ops.attended(h, q, view, 0.25, held(wo))
    assert out is not None
    mixed = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.25)
    expected = h + mixed.transpose(0, 2, 1, 3).reshape(1, 1, -1) @ wo_numbers.T
    np.testing.assert_allclose(float64(out), float64(expected), atol=2e-5)

    fed = ops.feed_forward(h, norm, held(w13), held(w2))
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
        assert ops.turned_heads(h, norm, matrix, mx.ones((8,)), 0, 4) is None
    h = mx.ones((1, 1, 96))
    wide = held(random_matrix(2 * 1028, 96, 4)[0])  # heads that the kernels would refuse
    assert ops.turned_heads(h, norm, wide, mx.ones((514,)), 0, 1) is None
    assert ops.feed_forward(h, norm, None, matrix) is None
    assert INSTALLED is not None
    with pytest.raises(ValueError, match="h: expected"):
        INSTALLED.turned_heads(
            mx.ones((1, 2, 96)), norm[0], 1e-5, [mx.ones((32, 96))], 0, 0, mx.ones((8,)), 0, 1
        )
    with pytest.raises(ValueError, match="w2: 32 rows"):
        INSTALLED.feed_forward(h, norm[0], 1e-5, [mx.ones((64, 96))], [mx.ones((32, 32))], 0, 0)
    with pytest.raises(ValueError, match="matrix: found 1 arrays, expected 3"):
        INSTALLED.feed_forward(h, norm[0], 1e-5, [mx.ones((64, 96))], [mx.ones((96, 32))], 32, 4)


@needs_kernels
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize(("n_rows", "bound"), [(1, 8192 / 16 + 32), (20, 8192 / 512 + 512)])
def test_long_dense_sums_of_one_sign_stay_within_their_bound(
    kernels: object, n_rows: int, bound: float, dtype: mx.Dtype
) -> None:
    weight = mx.full((32, 8192), 0.1).astype(dtype)
    found = kernels.matmul(mx.full((n_rows, 8192), 0.1), weight)  # pyright: ignore
    expected = 8192 * float(np.float32(0.1)) * float(weight[0, 0].astype(mx.float32).item())
    assert np.abs(float64(found) / expected - 1).max() <= bound * 2.0**-24


@needs_kernels
@many
@given(seeds, st.integers(0, 9), st.integers(1, 1100), types, types, layouts)
def test_norms_and_gates_are_those_of_float64(
    kernels: object, seed: int, m: int, n: int, dtype: mx.Dtype, other: mx.Dtype, layout: str
) -> None:
    random = np.random.default_rng(seed)
    x = laid_out(random.normal(size=(m, n)), layout, dtype)
    weight = mx.array(random.normal(size=n).astype(np.float32)).astype(other)
    wide = float64(x)
    expected = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + 1e-5) * float64(weight)
    assert_close(kernels.rms_norm(x, weight, 1e-5), expected, np.abs(expected), 1e-6)
    pairs = laid_out(random.normal(size=(m, 2 * n)) * 8, layout, dtype)
    gate, up = np.split(float64(pairs), 2, axis=-1)
    expected = gate / (1 + np.exp(-gate)) * up
    assert_close(kernels.swiglu(pairs), expected, np.abs(expected), 1e-6)


def heads_of(
    random: np.random.Generator, shape: tuple[int, ...], dtype: mx.Dtype, *, is_strided: bool
) -> mx.array:
    """Return normal numbers (B, heads, L, D), if wanted as a projection leaves them."""
    batch, n_heads, n_rows, dim = shape
    x = mx.array(random.normal(size=(batch, n_rows + 3, n_heads, dim)).astype(np.float32))
    x = x.astype(dtype)[:, :n_rows].swapaxes(1, 2)
    return x if is_strided else mx.contiguous(x)


@needs_kernels
@many
@given(
    seeds, st.integers(1, 2), st.integers(1, 9), st.integers(0, 40), st.integers(0, 200),
    st.integers(1, 40), types, st.booleans(),
)  # fmt: skip
def test_heads_turn_as_in_float64(
    kernels: object, seed: int, batch: int, n_heads: int, m: int, offset: int, half: int,
    dtype: mx.Dtype, is_strided: bool,
) -> None:  # fmt: skip
    random = np.random.default_rng(seed)
    q = heads_of(random, (batch, n_heads, m, 2 * half), dtype, is_strided=is_strided)
    periods = np.exp(random.uniform(0, 9, half)).astype(np.float32)
    positions = np.arange(offset, offset + m, dtype=np.float32)
    angles = (positions[:, None] * (1 / periods)).astype(np.float64)
    a, b = np.split(float64(q), 2, axis=-1)
    turned = np.concatenate(
        [a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)], axis=-1
    )
    size = np.tile(np.abs(a) + np.abs(b), 2)
    assert_close(kernels.rotate(q, mx.array(periods), offset), turned, size, 2.0**-22)


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
    st.booleans(),
)  # fmt: skip
def test_rows_are_attended_as_in_float64(
    kernels: object, seed: int, batch: int, shared: int, group: int, m: int, before: int,
    second: int, dim: int, key_bits: int, value_bits: int, dtype: mx.Dtype, cached: mx.Dtype,
    is_strided: bool, is_causal: bool,
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
    found = kernels.attention(
        q, [k.arrays for k in keys], [v.arrays for v in values], dim**-0.5, sight
    )
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
        found = kernels.attention(q, [keys.arrays], [values.arrays], 0.125)  # pyright: ignore
        assert_close(found, expected, (n_rows / 64 + 64 + 8 * largest) * 2.0**-24 * size, 1.0)


@needs_kernels
@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        ([[(1, 2, 9, 64)]], [[(1, 2, 8, 64)]], "as many rows and heads"),
        ([[(1, 2, 9, 32)]], [[(1, 2, 9, 64)]], "keys: rows of 32, q's of 64"),
        ([[(1, 3, 9, 64)]], [[(1, 3, 9, 64)]], "heads that divide q's"),
        ([[(1, 2, 2, 64)]], [[(1, 2, 2, 64)]], "no more rows than keys"),
        ([[(1, 2, 0, 64)]], [[(1, 2, 0, 64)]], "no more rows than keys|found none"),
        ([], [], "found 0 and 0 parts"),
    ],
)
def test_wrong_caches_are_refused(
    keys: list[list[tuple[int, ...]]], values: list[list[tuple[int, ...]]], message: str
) -> None:
    assert INSTALLED is not None
    parts = [[[mx.zeros(shape) for shape in part] for part in which] for which in (keys, values)]
    with pytest.raises(ValueError, match=message):
        INSTALLED.attention(mx.zeros((1, 4, 3, 64)), *parts, 1.0)


@needs_kernels
@pytest.mark.parametrize(("n_rows", "bound"), [(1, 8192 / 16 + 32), (20, 8192 / 512 + 512)])
def test_long_sums_of_one_sign_stay_within_their_bound(
    kernels: object, n_rows: int, bound: float
) -> None:
    x = mx.full((n_rows, 8192), 0.1)
    packed = mx.full((32, 1024), 0x77777777, dtype=mx.uint32)
    scales, biases = mx.full((32, 128), 0.1), mx.zeros((32, 128))
    found = kernels.quantized_matmul(x, packed, scales, biases, group_size=64, bits=4)  # pyright: ignore
    expected = 8192 * float(np.float32(0.1)) ** 2 * 7
    assert np.abs(float64(found) / expected - 1).max() <= bound * 2.0**-24


@needs_kernels
@pytest.mark.parametrize("width", [1500, 4096, 16384])
def test_norms_of_one_sign_stay_within_their_bound(kernels: object, width: int) -> None:
    value = float(np.float32(0.1))
    found = kernels.rms_norm(mx.full((1, width), value), mx.ones(width), 0.0)  # pyright: ignore
    assert np.abs(float64(found) - 1).max() <= 1e-6


@needs_kernels
@pytest.mark.parametrize("n_queries", [1, 32])
@pytest.mark.parametrize("n_rows", [1024, 32768])
def test_long_attention_stays_within_its_bound(
    kernels: object, n_rows: int, n_queries: int
) -> None:
    q, k = mx.zeros((1, 2, n_queries, 32)), mx.zeros((1, 1, n_rows, 32))
    v = mx.full((1, 1, n_rows, 32), 0.1)
    found = kernels.attention(q, [[k]], [[v]], scale=1.0)  # pyright: ignore
    expected = float(np.float32(0.1))
    assert np.abs(float64(found) / expected - 1).max() <= (n_rows / 64 + 128) * 2.0**-24


@needs_kernels
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_row(kernels: object, bad: float) -> None:
    for m in (3, 20):
        x = np.ones((m, 64), dtype=np.float32)
        x[1, 7] = bad
        packed = mx.quantize(mx.random.normal((40, 64)), group_size=32, bits=4)
        for found in (
            kernels.quantized_matmul(mx.array(x), *packed, group_size=32, bits=4),
            kernels.matmul(mx.array(x), mx.random.normal((40, 64))),
            kernels.rms_norm(mx.array(x), mx.ones(64), 1e-5),
            kernels.swiglu(mx.array(x)),
        ):
            rows = np.isfinite(np.array(found)).all(axis=1)
            assert not rows[1] and rows[[i for i in range(m) if i != 1]].all()


@needs_kernels
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 7}, "bits: found 7, expected 2, 3, 4, 5, 6 or 8"),
        ({"group_size": 48}, "group_size: found 48"),
        ({"group_size": 32}, "scales and biases: expected 8 rows of 4"),
        ({"bits": 8}, "weight: rows of 16 words, expected 32"),
    ],
)
def test_wrong_shapes_are_refused(changes: dict[str, int], message: str) -> None:
    assert INSTALLED is not None
    packed = mx.quantize(mx.zeros((8, 128)), group_size=64, bits=4)
    with pytest.raises(ValueError, match=message):
        INSTALLED.quantized_matmul(
            mx.zeros((1, 128)), *packed, **{"group_size": 64, "bits": 4, **changes}
        )


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
        outs.append(INSTALLED.attention(q, [[keys]], [[values]], 1.0))
    mx.eval(outs)
    found = [float(out[0, 0, 0, 0].item()) for out in outs]
    assert found == pytest.approx([(row + 2) / 2 for row in range(64)], rel=1e-6)


@needs_kernels
def test_another_mlx_is_refused_by_name() -> None:
    code = (
        "import mlx.core as mx; mx.__version__ = '9.9.9'\n"
        "from mlx_llama import native\n"
        "assert native.kernels() is None\n"
        "print(native.missing_reason())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "found mlx 9.9.9: build it again (make kernels)" in done.stdout


@needs_kernels
def test_threads_are_those_of_the_environment() -> None:
    code = "import mlx_llama_kernels; print(mlx_llama_kernels.threads())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={"OMP_NUM_THREADS": "1", "PATH": ""},
    )  # fmt: skip
    assert done.stdout.strip() == "1"


@needs_kernels
def test_threads_can_be_chosen() -> None:
    assert INSTALLED is not None
    before = INSTALLED.threads()
    ops.use_threads(2)
    assert INSTALLED.threads() == 2
    ops.use_threads(before)


def test_threads_without_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "kernels", lambda: None)
    monkeypatch.setattr(native, "missing_reason", lambda: "mlx_llama_kernels is not installed")
    with pytest.raises(OptionError, match=r"--threads 2: .* mlx_llama_kernels is not installed"):
        ops.use_threads(2)
