"""Keys and values as they are stored: plain, or packed to 8 or 4 bits. One row a token.

Owns the buffers of one layer: writing rows in place, growing, shrinking. Knows nothing of tokens,
positions or masks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import mlx.core as mx

from mlx_llama.errors import OptionError

WIDE = 32  # "32 bits": stored as they come, in float32
PLAIN = 16  # "16 bits": of a float dtype, which the device decides
BITS = (WIDE, PLAIN, 8, 4)
GROUPS = (128, 64, 32)


@dataclass(frozen=True, slots=True)
class KVBits:
    """Bits per number of stored keys and values; 16 and 32 pack nothing."""

    keys: int = PLAIN
    values: int = PLAIN

    def __post_init__(self) -> None:
        for bits in (self.keys, self.values):
            if bits not in BITS:
                raise OptionError(
                    f"--kv-bits: found {bits!r}, expected 32, 16, 8 or 4", option="kv_bits"
                )

    @property
    def is_plain(self) -> bool:
        """Whether nothing is packed."""
        return min(self.keys, self.values) >= PLAIN

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
        "leave it at 16",
        option="kv_bits",
    )


def row_bytes(head_dim: int, bits: int, itemsize: int) -> int:
    """Return the bytes of one head's key or value. itemsize: of plain numbers, and of scales."""
    if bits >= PLAIN:
        return head_dim * itemsize
    return head_dim * bits // 8 + 2 * (head_dim // group_size(head_dim)) * itemsize


def _finite_half(x: mx.array) -> mx.array:
    """Return x with what float16 would make infinite as its largest numbers."""
    most = mx.array(65504.0, dtype=x.dtype)
    return mx.where(mx.isfinite(x), mx.clip(x, -most, most), x)


def put_rows(buffer: mx.array, new: mx.array, row: int) -> mx.array:
    """Return the buffer (B, K, S, D) with new (B, K, L, D) in its rows from `row` on.

    In place where nobody else looks, when it is evaluated.
    """
    if buffer.dtype == mx.float16 and new.dtype != mx.float16:
        new = _finite_half(new)
    result = copy.copy(buffer)
    result[..., row : row + new.shape[2], :] = new
    return result


def pack_rows(
    buffers: Sequence[mx.array], new: mx.array, row: int, *, group_size: int, bits: int
) -> Sequence[mx.array]:
    """Return words, scales and biases with new (B, K, L, D) packed in their rows from `row` on."""
    packed = mx.quantize(new, group_size=group_size, bits=bits)
    return [put_rows(*each, row) for each in zip(buffers, packed, strict=True)]


@dataclass(frozen=True, slots=True)
class Storage:
    """How numbers are kept: `ops.cache_storage` chooses what suits the device.

    dtype: of plain numbers and of packed ones' scales; None leaves them as they come. put: as
    `put_rows`; into float16 it must leave finite what is finite. pack: as `pack_rows`, to its bits.
    """

    dtype: mx.Dtype | None = None
    put: Callable[[mx.array, mx.array, int], mx.array] = put_rows
    pack: Callable[..., Sequence[mx.array]] = pack_rows

    def blank(self, like: mx.array, n_rows: int) -> mx.array:
        """Return a buffer of zeros for n_rows like those of an array (B, K, L, D)."""
        # Zeros, not what happened to be there: a hidden row may be anything but infinite or NaN.
        dtype = like.dtype if self.dtype is None or like.dtype == mx.uint32 else self.dtype
        return mx.zeros((*like.shape[:2], n_rows, like.shape[3]), dtype=dtype)

    def owned(self, x: mx.array) -> mx.array:
        """Return a copy as it is kept, which holds nothing else in memory, as a slice does."""
        if self.dtype is None:
            return mx.contiguous(x)
        return self.put(self.blank(x, x.shape[2]), x, 0)


AS_COMPUTED = Storage()


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
        if bits >= PLAIN:
            return cls((x,))
        group = group_size(x.shape[-1])
        return cls(tuple(mx.quantize(x, group_size=group, bits=bits)), bits, group)

    @classmethod
    def kept(cls, x: mx.array, bits: int, storage: Storage) -> Self:
        """Store x as it is kept, which holds nothing else in memory."""
        if storage.dtype is None:
            return cls.of(x, bits).owned(storage)
        return cls.of(x, bits).blank(x.shape[2], storage).with_numbers(0, x, storage)

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

    def blank(self, n_rows: int, storage: Storage) -> Self:
        """Return so many rows of zeros for rows like these."""
        return self._each(lambda a: storage.blank(a, n_rows))

    def owned(self, storage: Storage) -> Self:
        """Return a copy as it is kept."""
        return self._each(storage.owned)

    def shared(self) -> Self:
        """Return the same rows as a value of its own: writing to one copies them first."""
        return self._each(copy.copy)

    def with_rows(self, row: int, other: Self, storage: Storage) -> Self:
        """Return the same with other's rows from a row on; in place where nobody else looks."""
        pairs = zip(self.arrays, other.arrays, strict=True)
        arrays = tuple(storage.put(mine, new, row) for mine, new in pairs)
        return type(self)(arrays, self.bits, self.group)

    def with_numbers(self, row: int, x: mx.array, storage: Storage) -> Self:
        """Return the same with x (B, K, L, D) in its rows from a row on, as `with_rows`."""
        if self.bits == PLAIN:
            arrays = [storage.put(self.arrays[0], x, row)]
        else:
            arrays = storage.pack(self.arrays, x, row, group_size=self.group, bits=self.bits)
        return type(self)(tuple(arrays), self.bits, self.group)

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

    def append(
        self, row: int, k: mx.array, v: mx.array, bits: KVBits, *, n_rows: int, storage: Storage
    ) -> tuple[Stored, Stored]:
        """Put k, v (B, K, L, D) in place, in buffers of n_rows at least, which are returned."""
        if self.keys is None or self.values is None:
            keys, values = Stored.of(k, bits.keys), Stored.of(v, bits.values)
            self.keys, self.values = keys.blank(n_rows, storage), values.blank(n_rows, storage)
        self.grown(n_rows)
        self.keys = self.keys.with_numbers(row, k, storage)
        self.values = self.values.with_numbers(row, v, storage)
        return self.keys, self.values

    def write(
        self, row: int, keys: Stored, values: Stored, *, n_rows: int, storage: Storage
    ) -> None:
        """Put rows that are stored already in place, in buffers of n_rows at least."""
        if self.keys is None or self.values is None:
            self.keys, self.values = keys.blank(n_rows, storage), values.blank(n_rows, storage)
        self.grown(n_rows)
        self.keys = self.keys.with_rows(row, keys, storage)
        self.values = self.values.with_rows(row, values, storage)

    def grown(self, n_rows: int) -> tuple[Stored, Stored]:
        """Return the buffers, of n_rows at least; there must be some."""
        assert self.keys is not None and self.values is not None
        if self.keys.n_rows < n_rows:
            self.keys, self.values = self.keys.resized(n_rows), self.values.resized(n_rows)
        return self.keys, self.values

    def take(self, keys: list[mx.array], values: list[mx.array]) -> None:
        """Hold these arrays, stored as those before."""
        assert self.keys is not None and self.values is not None
        self.keys = replace(self.keys, arrays=tuple(keys))
        self.values = replace(self.values, arrays=tuple(values))

    def shrink(self, n_rows: int) -> None:
        """Keep the first n_rows alone."""
        if self.keys is not None and self.values is not None and self.keys.n_rows > n_rows:
            self.keys, self.values = self.keys.resized(n_rows), self.values.resized(n_rows)

    def rows(self, n_rows: int) -> Layer:
        """Return the first n_rows."""
        assert self.keys is not None and self.values is not None
        return Layer(self.keys.rows(0, n_rows), self.values.rows(0, n_rows))

    def packed(self, bits: KVBits, storage: Storage) -> Layer:
        """Return what is plain in so many bits."""
        if self.keys is None or self.values is None:
            return Layer()
        pairs = (self.keys, bits.keys), (self.values, bits.values)
        return Layer(*(Stored.kept(rows.arrays[0], each, storage) for rows, each in pairs))

    def fork(self) -> Layer:
        """Return the same rows; either side copies them when it writes."""
        if self.keys is None or self.values is None:
            return Layer()
        return Layer(self.keys.shared(), self.values.shared())
