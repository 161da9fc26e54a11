"""A cache and its slow oracle, fed with the same random tokens and compared after each."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import mlx.core as mx
import numpy as np
import pytest

from cache_oracle import CacheOracle
from mlx_llama import ops
from mlx_llama.cache import KVBits, KVCache, load_cache, save_cache
from mlx_llama.cache.rows import AS_COMPUTED, Storage
from mlx_llama.config import ModelConfig, config_from_hf
from mlx_llama.errors import ContextOverflowError
from mlx_llama.rope import rope_periods
from random_models import CASES, random_model

N_LAYERS, N_HEADS, N_KV_HEADS = 2, 4, 2
THETA = 50.0  # every pair of features turns within a few tokens
DENSE_HEAD_DIM, PACKED_HEAD_DIM = 8, 32  # one group of 32 is the least that MLX packs
# Results lie within 4. At positions below 100 an angle is off by 1e-5 in float32 and each turn adds
# as much; a token seen too much or placed one off shows as 1e-2 and more.
DENSE_TOLERANCE = 1e-4
# Half precision keeps 11 bits of a key, whose products with 8 or 32 numbers of q make a score,
# and of a value; each turn back rounds a key again (measured: 1.3e-3 at most).
HALF_TOLERANCE = 4e-3
# The mean of whole numbers, of the largest of them: float32 sums in another order.
MEAN_TOLERANCE = 2e-6
# What packing does to one standard normal number: 32 of them span 4.2 on average, and rounding to
# 2**bits - 1 steps of that leaves an error of a step over sqrt(12). The oracle follows it to each
# result, for which the root mean square of a pass is 1 then. Room for passes with few results, for
# spans above the average and for MLX's steps, which it widens to store 0 exactly (measured over
# 15000 passes for each of PACKINGS: 2.1 at most, and 7.2 for a single result).
SPAN_OF_32 = 4.2
PACKED_ROOM, PACKED_ROOM_FOR_ONE = 2.5, 9.0

DENSE = KVBits(16, 16)
PACKINGS = (KVBits(8, 8), KVBits(4, 4), KVBits(8, 4), KVBits(16, 8))
POLICIES = ("stop", "slide", "slide at the end of the context")
CONTEXTS = (12, 24, 33, 64)


@dataclass(frozen=True, slots=True)
class Shape:
    """What one cache is made with."""

    max_context: int
    capacity: int
    keep: int = 0
    slides: bool = True
    bits: KVBits = DENSE
    packed_from: int = 0
    is_device: bool = False  # kept as this device does, else as computed

    @property
    def storage(self) -> Storage:
        return ops.cache_storage(mx.float32, self.bits) if self.is_device else AS_COMPUTED

    @property
    def tolerance(self) -> float:
        dtype = self.storage.dtype or mx.float32
        return HALF_TOLERANCE if dtype == mx.float16 else DENSE_TOLERANCE

    @property
    def packs(self) -> bool:
        return min(self.bits.keys, self.bits.values) < 16

    @property
    def head_dim(self) -> int:
        return PACKED_HEAD_DIM if self.packs else DENSE_HEAD_DIM

    @property
    def config(self) -> ModelConfig:
        return replace(
            CONFIG, head_dim=self.head_dim, max_context=self.max_context, rope_theta=THETA
        )

    def cache(self) -> KVCache:
        return KVCache(
            self.config,
            capacity=self.capacity,
            keep=self.keep,
            slides=self.slides,
            bits=self.bits,
            packed_from=self.packed_from,
            storage=self.storage,
        )

    def oracle(self) -> CacheOracle:
        return CacheOracle(
            THETA,
            self.max_context,
            self.capacity,
            self.keep,
            self.slides,
            packed_from=self.packed_from if self.packs else 0,
            key_error=packing_error(self.bits.keys),
            value_error=packing_error(self.bits.values),
        )


def packing_error(bits: int) -> float:
    return 0.0 if bits == 16 else SPAN_OF_32 / (2**bits - 1) / math.sqrt(12)


CONFIG = replace(
    config_from_hf(random_model(CASES["llama2"])[1], kind="llama2", is_tied=None),
    n_layers=N_LAYERS,
    n_heads=N_HEADS,
    n_kv_heads=N_KV_HEADS,
)


@dataclass(frozen=True, slots=True)
class Tokens:
    """What the projections of all layers give for some tokens, float32, RoPE not applied.

    q: (layers, H, L, D). k, v: (layers, K, L, D).
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray

    def __len__(self) -> int:
        return self.k.shape[2]

    def __getitem__(self, part: slice) -> Tokens:
        return Tokens(self.q[:, :, part], self.k[:, :, part], self.v[:, :, part])


def random_tokens(shape: Shape, n_tokens: int, *seed: int) -> Tokens:
    """Draw normal numbers; where the cache packs, the first head says exactly what is seen.

    Its queries are 0, so that it returns the mean of what is seen, and its values are whole
    numbers from 0 to the last step, both among them: packing keeps these as they are.
    """
    rng = np.random.RandomState(seed)

    def normal(heads: int) -> np.ndarray:
        drawn = rng.standard_normal((N_LAYERS, heads, n_tokens, shape.head_dim))
        return drawn.astype(np.float32)

    q, k, v = normal(N_HEADS), normal(N_KV_HEADS), normal(N_KV_HEADS)
    if shape.packs:
        q[:, : N_HEADS // N_KV_HEADS] = 0
        v[:, 0] = rng.randint(0, last_step(shape) + 1, v[:, 0].shape)
        v[:, 0, :, :2] = 0, last_step(shape)
    return Tokens(q, k, v)


def last_step(shape: Shape) -> int:
    return 2 ** min(shape.bits.values, 8) - 1


def feed(cache: KVCache, tokens: Tokens, n_queries: int | None = None) -> np.ndarray:
    """Do what a model does in one pass; return (layers, H, m, D) for the last m queries."""
    cache.begin(len(tokens))
    seen = [attend(cache, layer, tokens, n_queries) for layer in range(N_LAYERS)]
    cache.advance(len(tokens))
    mx.eval(seen)
    return np.stack([np.asarray(out)[0] for out in seen])


def attend(cache: KVCache, layer: int, tokens: Tokens, n_queries: int | None = None) -> mx.array:
    periods = rope_periods(cache_config(tokens))
    q, k, v = (mx.array(x[layer])[None] for x in (tokens.q, tokens.k, tokens.v))
    q, k = (ops.rotate(x, periods, cache.position) for x in (q, k))
    view = cache.append(layer, k, v)
    n_queries = len(tokens) if n_queries is None else n_queries
    return ops.attention(q[:, :, len(tokens) - n_queries :], view, scale=scale_of(tokens))


def cache_config(tokens: Tokens) -> ModelConfig:
    return replace(CONFIG, head_dim=tokens.k.shape[-1], rope_theta=THETA)


def scale_of(tokens: Tokens) -> float:
    return 1 / math.sqrt(tokens.k.shape[-1])


def counts_of(cache: KVCache | CacheOracle) -> dict[str, int]:
    names = ("offset", "position", "held", "forgotten")
    return {name: getattr(cache, name) for name in names}


class Twins:
    """A cache and its oracle, which get the same tokens and are compared after every step."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.cache = shape.cache()
        self.oracle = shape.oracle()
        self.most = 0  # tokens counted at once so far: what was packed stays so
        self.check()

    def check(self) -> None:
        assert counts_of(self.cache) == counts_of(self.oracle)
        # Trimmed below `packed_from`, what was packed may stay so: no pass need end there again.
        may_be_packed = self.most >= self.shape.packed_from
        limits = {self.oracle.pass_limit, *([self.oracle.room] if may_be_packed else [])}
        assert self.cache.pass_limit in limits
        if self.shape.slides:
            assert self.cache.rows <= self.shape.capacity

    def chunks(self, n_tokens: int) -> Iterator[int]:
        """Split as a caller does: no pass over the limit, none beyond a cache that stops."""
        while n_tokens > 0 and self.cache.pass_limit > 0:
            size = min(n_tokens, self.cache.pass_limit)
            yield size
            n_tokens -= size

    def run(self, n_tokens: int, seed: int, n_queries: int | None = None) -> None:
        for size in self.chunks(n_tokens):
            last = size if n_queries is None else min(n_queries, size)
            self.run_pass(random_tokens(self.shape, size, seed, self.oracle.offset), last)

    def run_pass(self, tokens: Tokens, n_queries: int) -> None:
        is_packed = self.shape.packs and self.most >= self.shape.packed_from
        found = feed(self.cache, tokens, n_queries)
        results = self.oracle.run(tokens.q, tokens.k, tokens.v, scale=scale_of(tokens))
        expected, deviation = (x[:, :, len(tokens) - n_queries :] for x in results)
        self.most = max(self.most, self.oracle.offset)
        self.check()
        assert found.shape == expected.shape
        if not self.shape.packs:
            np.testing.assert_allclose(found, expected, rtol=0, atol=self.shape.tolerance)
            return
        exact = N_HEADS // N_KV_HEADS
        most = MEAN_TOLERANCE * last_step(self.shape)
        np.testing.assert_allclose(found[:, :exact], expected[:, :exact], rtol=0, atol=most)
        found, expected, deviation = (x[:, exact:] for x in (found, expected, deviation))
        if not is_packed:
            np.testing.assert_allclose(found, expected, rtol=0, atol=self.shape.tolerance)
            return
        errors = np.maximum(np.abs(found - expected) - self.shape.tolerance, 0) / (
            deviation + 1e-12
        )
        assert math.sqrt((errors**2).mean()) <= PACKED_ROOM
        assert errors.max() <= PACKED_ROOM_FOR_ONE

    def abandon(self, n_tokens: int, seed: int, n_layers: int, *, evaluates: bool) -> None:
        """Begin a pass of tokens that never come again, and leave it."""
        n_tokens = min(n_tokens, self.cache.pass_limit)
        if n_tokens == 0:
            return
        tokens = random_tokens(self.shape, n_tokens, seed)
        self.cache.begin(n_tokens)
        seen = [attend(self.cache, layer, tokens) for layer in range(n_layers)]
        if evaluates:
            mx.eval(seen)
        # A turn comes before the pass, so it may stand without it.
        if self.cache.position != self.oracle.position:
            self.oracle.turn_if_due()
        if n_tokens == 1 and self.shape.slides:
            # One token takes the row of the one that it no longer sees, whatever becomes of it.
            self.oracle.first = max(self.oracle.first, self.oracle.offset + 1 - self.oracle.window)
        self.check()

    def overflow(self, n_tokens: int) -> None:
        """Ask for more than fits: refused, and nothing else happens."""
        if self.shape.slides:
            return
        with pytest.raises(ContextOverflowError):
            self.cache.begin(self.shape.capacity - self.oracle.offset + n_tokens)
        self.check()

    def trim(self, n_tokens: int) -> None:
        self.cache.trim(n_tokens)
        self.oracle.trim(n_tokens)
        self.check()

    def reserve(self, n_tokens: int) -> None:
        if not self.shape.slides:
            n_tokens = min(n_tokens, self.shape.capacity - self.oracle.offset)
        self.cache.reserve(n_tokens)
        self.check()

    def clear(self) -> None:
        self.cache.clear()
        self.oracle, self.most = self.shape.oracle(), 0
        self.check()

    def fork(self) -> Self:
        made = type(self)(self.shape)
        made.cache, made.oracle, made.most = self.cache.fork(), self.oracle.fork(), self.most
        made.check()
        return made

    def reload(self) -> None:
        """Go through a file."""
        config = self.shape.config
        ids = [n % config.vocab_size for n in range(self.oracle.offset)]
        loaded = self.shape.cache()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cache"
            save_cache(path, self.cache, tokens=ids, fingerprint={})
            self.check()
            assert load_cache(path, loaded, dtype=mx.float32, fingerprint={}) == ids
        loaded.keep_first(self.shape.keep)  # a text that was not cut does not say
        self.cache = loaded
        self.check()
