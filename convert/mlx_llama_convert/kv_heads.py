"""Key and value heads that a checkpoint stores more than once.

Meta splits Llama 3.1 405B over 16 ranks too, more than its 8 key/value heads: each rank holds a
whole head, so each head is there twice, and params.json counts 16. Takes merged tensors, returns
them with the copies left out, when they are copies.

Source: meta-llama/llama-models, `models/checkpoint.py`, `reshard_mp`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_llama.tensor_ref import row_bounds
from mlx_llama_convert.tensors import LogicalTensor, joined, same_bits

N_KV_HEADS = 8  # of every Llama whose query heads share key/value heads
_STORED_TWICE = (".attention.wk.weight", ".attention.wv.weight")


@dataclass(frozen=True, slots=True)
class FoldedHeads:
    """A matrix whose heads are each stored `copies` times in a row; the first one is read."""

    stored: LogicalTensor
    head_dim: int
    copies: int

    @property
    def name(self) -> str:
        """Name in the files."""
        return self.stored.name

    @property
    def dtype(self) -> str:
        """Element type."""
        return self.stored.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape without the copies."""
        rows, *width = self.stored.shape
        return (rows // self.copies, *width)

    @property
    def nbytes(self) -> int:
        """Bytes that are read of the files."""
        return self.stored.nbytes // self.copies

    @property
    def path(self) -> Path:
        """File of the first head."""
        return self.stored.path

    def read(self, rows: slice | None = None) -> mx.array:
        """Read the asked rows, head by head."""
        start, stop = row_bounds(rows or slice(None), self.shape)
        pieces: list[mx.array] = []
        while start < stop:
            head, row = divmod(start, self.head_dim)
            count = min(self.head_dim - row, stop - start)
            first = head * self.copies * self.head_dim + row
            pieces.append(self.stored.read(slice(first, first + count)))
            start += count
        return joined(pieces or [self.stored.read(slice(0, 0))], axis=0)


@dataclass(frozen=True, slots=True)
class KvHeads:
    """The tensors, how many key/value heads they have now, and what the user should know."""

    tensors: dict[str, LogicalTensor]
    count: int
    notes: tuple[str, ...] = ()


def fold_copies(
    tensors: dict[str, LogicalTensor], *, n_kv_heads: int, head_dim: int, n_ranks: int
) -> KvHeads:
    """Leave out copies of key/value heads where every one of them is equal bit for bit.

    Reads wk and wv of all layers, two heads at a time, for a checkpoint of more ranks than heads;
    nothing for any other.
    """
    copies, rest = divmod(n_kv_heads, N_KV_HEADS)
    stored = {name: t for name, t in tensors.items() if name.endswith(_STORED_TWICE)}
    rows = n_kv_heads * head_dim
    is_resharded = n_kv_heads == n_ranks and copies > 1 and not rest
    if not is_resharded or any(tensor.shape[0] != rows for tensor in stored.values()):
        return KvHeads(tensors, n_kv_heads)
    for name, tensor in stored.items():
        if (head := _first_difference(tensor, head_dim, copies)) is not None:
            note = f"{n_kv_heads} key/value heads kept: {name} has no copies at head {head}"
            return KvHeads(tensors, n_kv_heads, (note,))
    folded = {name: FoldedHeads(tensor, head_dim, copies) for name, tensor in stored.items()}
    note = (
        f"{n_kv_heads} key/value heads become {N_KV_HEADS}: each is stored {copies} times, "
        "compared bit for bit in every layer"
    )
    return KvHeads({**tensors, **folded}, N_KV_HEADS, (note,))


def _first_difference(tensor: LogicalTensor, head_dim: int, copies: int) -> int | None:
    """Return the first head that is no copy of the one that it should repeat, None for none."""
    for first in range(0, tensor.shape[0] // head_dim, copies):
        original = tensor.read(slice(first * head_dim, (first + 1) * head_dim))
        for head in range(first + 1, first + copies):
            copy = tensor.read(slice(head * head_dim, (head + 1) * head_dim))
            if not same_bits(original, copy, tensor.dtype):
                return head
    return None
