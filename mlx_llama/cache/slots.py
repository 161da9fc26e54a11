"""The buffers of all layers, and how passes of one token write to them at once, in place."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_llama.cache.rows import Layer

Arrays = list[list[mx.array]]  # of each layer, as `Stored` has them


@dataclass(frozen=True, slots=True)
class Slots:
    """Where a pass of one token finds and leaves keys and values, in all layers at once.

    row: the one that the token takes. n_rows: how many it may see, the first ones, or of these what
    `sight` (2, n_rows) says. after: what says that the last such pass is over, where nobody else
    has held the buffers since; they are written as they are then.
    """

    keys: Arrays
    values: Arrays
    row: int
    n_rows: int
    sight: mx.array | None
    after: mx.array | None


class Buffers:
    """The layers of a cache. Who asks for `layers` may hold or change them from then on.

    Passes of one token that follow one another write to the same arrays, though MLX takes arrays
    for unchangeable: each pass comes behind the one before, and `layers` waits for the last.
    """

    def __init__(self, layers: list[Layer]) -> None:
        self._layers = layers
        self._own: tuple[Arrays, Arrays] | None = None  # what passes of one token write to
        self._after: mx.array | None = None

    @property
    def layers(self) -> list[Layer]:
        """The layers, once nothing is written to them any more."""
        after, self._own, self._after = self._after, None, None
        if after is not None:
            mx.eval(after)
        return self._layers

    def for_token(self, n_rows: int) -> tuple[Arrays, Arrays, mx.array | None]:
        """Return keys and values of n_rows at least, and what `take` was told last, if it holds."""
        if self._own is not None and self._own[0][0][0].shape[2] >= n_rows:
            return *self._own, self._after
        stored = []
        for layer in self.layers:
            before = layer.keys
            stored.append(layer.grown(n_rows))
            if layer.keys is not before:
                mx.eval(layer.arrays)  # one by one: old and new stand together for one layer alone
        return [[*k.arrays] for k, _ in stored], [[*v.arrays] for _, v in stored], None

    def take(self, over: mx.array, keys: Arrays, values: Arrays) -> None:
        """Note a pass: what says that it is over, and its buffers where they are other ones."""
        if keys:
            for layer, k, v in zip(self._layers, keys, values, strict=True):
                layer.take(k, v)
            self._own = keys, values
        self._after = over
