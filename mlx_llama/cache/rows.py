"""Keys and values as they are stored: plain, or packed to 8 or 4 bits. One row a token.

Owns the buffers of one layer: writing rows in place, growing, shrinking. Knows nothing of tokens,
positions or masks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import mlx.core as mx

from mlx_llama.errors import OptionError

PLAIN = 16  # "16 bits": stored as they come, in the dtype of the activations
BITS = (PLAIN, 8, 4)
GROUPS = (128, 64, 32)


@dataclass(frozen=True, slots=True)
class KVBits:
    """Bits per number of stored keys and values; 16 stores them as they are computed."""

    keys: int = PLAIN
    values: int = PLAIN

    def __post_init__(self) -> None:
        for bits in (self.keys, self.values):
            if bits not in BITS:
                raise OptionError(f"--kv-bits: found {bits!r}, expected 16, 8 or 4")

    @property
    def is_plain(self) -> bool:
        """Whether nothing is packed."""
        return self.keys == self.values == PLAIN

    def __str__(self) -> str:
        """Write it as `--kv-bits` takes it."""
        return str(self.keys) if self.keys == self.values else f"{self.keys}:{self.values}"


def group_size(head_dim: int) -> int:
    """Return how many numbers of a row share a scale: the largest of 128, 64, 32 that divides it.

    Raises OptionError for a head that cannot be packed.
    """
    for size in GROUPS:
        if head_dim % size == 0:
            return size
    raise OptionError(
        f"--kv-bits: heads of {head_dim} numbers cannot be packed, 32 does not divide them; "
        "leave it at 16"
    )


def row_bytes(head_dim: int, bits: int, itemsize: int) -> int:
    """Return the bytes of one head's key or value. itemsize: of the activations' dtype."""
    if bits == PLAIN:
        return head_dim * itemsize
    return head_dim * bits // 8 + 2 * (head_dim // group_size(head_dim)) * itemsize


@dataclass(frozen=True, slots=True)
class Stored:
    """Rows of keys or values of one layer.

    arrays: one (B, K, S, D), or packed: numbers (B, K, S, D * bits / 32) uint32, scales and biases
    (B, K, S, D / group). The rows can be written in place.
    """

    arrays: tuple[mx.array, ...]
    bits: int = PLAIN
    group: int = 0

    @classmethod
    def of(cls, x: mx.array, bits: int) -> Self:
        """Store x (B, K, S, D)."""
        if bits == PLAIN:
            return cls((x,))
        group = group_size(x.shape[-1])
        return cls(tuple(mx.quantize(x, group_size=group, bits=bits)), bits, group)

    @property
    def n_rows(self) -> int:
        """Number of rows, S."""
        return self.arrays[0].shape[2]

    @property
    def n_kv_heads(self) -> int:
        """Number of heads, K."""
        return self.arrays[0].shape[1]

    def dense(self, dtype: mx.Dtype) -> mx.array:
        """Return the rows as numbers, (B, K, S, D)."""
        if self.bits == PLAIN:
            return self.arrays[0].astype(dtype)
        return mx.dequantize(*self.arrays, group_size=self.group, bits=self.bits).astype(dtype)

    def rows(self, start: int, stop: int) -> Self:
        """Return the rows from start to stop."""
        if start == 0 and stop == self.n_rows:
            return self
        return self._each(lambda a: a[..., start:stop, :])

    def resized(self, n_rows: int) -> Self:
        """Return a copy with so many rows; new ones are zero."""
        missing = n_rows - self.n_rows
        if missing <= 0:
            return self._each(lambda a: mx.contiguous(a[..., :n_rows, :]))
        return self._each(
            lambda a: mx.concatenate(
                [a, mx.zeros((*a.shape[:2], missing, a.shape[3]), dtype=a.dtype)], axis=2
            )
        )

    def blank(self, n_rows: int) -> Self:
        """Return so many rows of zeros, of the same form."""
        # Zeros, not what happened to be there: a hidden row may be anything but infinite or NaN.
        return self._each(lambda a: mx.zeros((*a.shape[:2], n_rows, a.shape[3]), dtype=a.dtype))

    def owned(self) -> Self:
        """Return a copy that keeps nothing else alive, as a slice keeps its whole array."""
        return self._each(mx.contiguous)

    def shared(self) -> Self:
        """Return the same rows as a value of its own: writing to one copies them first."""
        return self._each(copy.copy)

    def with_rows(self, row: int, other: Self) -> Self:
        """Return the same with other's rows from a row on; in place where nobody else looks."""
        start = mx.array([row])
        pairs = zip(self.arrays, other.arrays, strict=True)
        arrays = tuple(mx.slice_update(mine, new, start, axes=(2,)) for mine, new in pairs)
        return type(self)(arrays, self.bits, self.group)

    def write(self, row: int, other: Self) -> None:
        """Put other's rows here, from a row on, in place."""
        for mine, new in zip(self.arrays, other.arrays, strict=True):
            mine[..., row : row + other.n_rows, :] = new

    def _each(self, function: Callable[[mx.array], mx.array]) -> Self:
        return type(self)(tuple(map(function, self.arrays)), self.bits, self.group)


@dataclass(slots=True)
class Layer:
    """The buffers of one layer; empty until the first write."""

    keys: Stored | None = None
    values: Stored | None = None

    @property
    def arrays(self) -> list[mx.array]:
        """What is held in memory."""
        return [a for part in (self.keys, self.values) if part is not None for a in part.arrays]

    def write(self, row: int, keys: Stored, values: Stored, *, n_rows: int) -> None:
        """Put rows in place, in buffers of n_rows at least."""
        self.resize(n_rows, keys, values)
        assert self.keys is not None and self.values is not None
        self.keys.write(row, keys)
        self.values.write(row, values)

    def resize(self, n_rows: int, keys: Stored, values: Stored) -> None:
        """Make the buffers, shaped like keys and values, n_rows long where they are shorter."""
        if self.keys is None or self.values is None:
            self.keys, self.values = keys.blank(n_rows), values.blank(n_rows)
        elif self.keys.n_rows < n_rows:
            self.keys, self.values = self.keys.resized(n_rows), self.values.resized(n_rows)

    def shrink(self, n_rows: int) -> None:
        """Keep the first n_rows alone."""
        if self.keys is not None and self.values is not None and self.keys.n_rows > n_rows:
            self.keys, self.values = self.keys.resized(n_rows), self.values.resized(n_rows)

    def rows(self, n_rows: int) -> Layer:
        """Return the first n_rows."""
        assert self.keys is not None and self.values is not None
        return Layer(self.keys.rows(0, n_rows), self.values.rows(0, n_rows))

    def packed(self, bits: KVBits) -> Layer:
        """Return what is plain in so many bits."""
        if self.keys is None or self.values is None:
            return Layer()
        keys, values = self.keys.arrays[0], self.values.arrays[0]
        return Layer(Stored.of(keys, bits.keys), Stored.of(values, bits.values))

    def fork(self) -> Layer:
        """Return the same rows; either side copies them when it writes."""
        if self.keys is None or self.values is None:
            return Layer()
        return Layer(self.keys.shared(), self.values.shared())
