"""The cache of a text: keys and values of all layers.

A pass that is given up before `advance` never was, but that a single token in a full ring has taken
the row of the oldest one, which is then forgotten. What a cache must do between passes (`upkeep`)
comes in pieces, each of which is done or not, so that it can be left at any of them and gone on
with.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx

from mlx_llama.cache.rows import AS_COMPUTED, KVBits, Layer, Storage, Stored, group_size
from mlx_llama.cache.slots import Arrays, Buffers, Slots
from mlx_llama.cache.view import Sight, View
from mlx_llama.cache.window import Window
from mlx_llama.config import ModelConfig
from mlx_llama.rope import angles_back, rope_periods, turn_back

UNPACKED = KVBits()
STEP = 256  # tokens; buffers grow and shrink by multiples of it
TURN_ROWS = 1024  # keys that are turned back at once, in float32
SLACK = 4  # a buffer that is this many times too long is given back


class KVCache:
    """Keys and values of a text: how it grows, how it forgets and how it is stored are choices.

    capacity: positions that attention may see, the newest included. slides: a full cache forgets
    the oldest tokens behind the first `keep`, and turns positions back before they leave the range
    that the model was trained for; otherwise it takes no more. bits: of stored keys and values;
    from packed_from tokens on, plain before. storage: the dtype of what is stored, and how it gets
    into the buffers.

    `reserve` makes room for what is to come, so that nothing is copied; beyond it the buffers
    double. Raises OptionError for choices that cannot work.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        capacity: int,
        keep: int = 0,
        slides: bool = False,
        bits: KVBits = UNPACKED,
        packed_from: int = 0,
        storage: Storage = AS_COMPUTED,
    ) -> None:
        self.window = Window(capacity, keep, config.max_context, slides)
        self.bits = bits
        self.packed_from = packed_from
        self.storage = storage
        if not bits.is_plain:
            group_size(config.head_dim)
        self.config = config
        self._buffers = Buffers([Layer() for _ in range(config.n_layers)])
        self._is_packed = packed_from == 0 or bits.is_plain
        self._rows = 0  # length of the buffers, for those that exist and those to come
        self._reserved = 0  # what they shall become, when it is too early
        self._done = 0  # pieces of the upkeep that is under way
        self._pending: dict[int, tuple[Stored, Stored]] = {}  # a pass's rows, kept until it is over
        self._sight = Sight(0, 0)
        self._is_straight = True  # whether the pass's rows simply follow those before it

    @property
    def _layers(self) -> list[Layer]:
        return self._buffers.layers

    # --- what it holds ---------------------------------------------------------------------------

    @property
    def offset(self) -> int:
        """Tokens counted, forgotten ones included."""
        return self.window.offset

    @property
    def position(self) -> int:
        """RoPE position of the next token."""
        return self.window.position

    @property
    def forgotten(self) -> int:
        """Tokens counted that are held no more."""
        return self.window.forgotten

    @property
    def held(self) -> int:
        """Tokens held."""
        return self.offset - self.forgotten

    @property
    def capacity(self) -> int:
        """Positions that attention may see, the newest included."""
        return self.window.capacity

    @property
    def keep(self) -> int:
        """First tokens, which are never forgotten."""
        return self.window.keep

    @property
    def slides(self) -> bool:
        """Whether a full cache forgets the oldest tokens; otherwise it takes no more."""
        return self.window.slides

    @property
    def rows(self) -> int:
        """Tokens that fit into each layer's buffers as they are."""
        return self._rows

    @property
    def nbytes(self) -> int:
        """Bytes allocated, in use or not."""
        return sum(array.nbytes for array in self.arrays)

    @property
    def arrays(self) -> list[mx.array]:
        """The buffers, for `mx.eval`."""
        pending = [a for pair in self._pending.values() for part in pair for a in part.arrays]
        return [array for layer in self._layers for array in layer.arrays] + pending

    @property
    def is_packed(self) -> bool:
        """Whether what is stored is packed, as it is from `packed_from` on."""
        return self._is_packed and not self.bits.is_plain

    # --- a pass ----------------------------------------------------------------------------------

    @property
    def pass_limit(self) -> int:
        """Tokens that the next pass may have at most.

        The caller splits a text there, so that what depends on the count of tokens (turning back,
        packing) happens at the same token whatever the slices. 0: full.
        """
        until_packed = self.packed_from - self.offset
        room = self.window.room
        return room if self._is_packed or until_packed <= 0 else min(room, until_packed)

    def reserve(self, n_tokens: int) -> None:
        """Make room for so many more tokens, as far as the capacity goes."""
        self._reserved = self._rounded(self.offset + n_tokens)
        self._rows = max(self._rows, self._allowed(self._reserved))

    def begin(self, n_tokens: int) -> None:
        """Prepare for a pass: do what upkeep is left, and grow.

        Raises ContextOverflowError for a full cache, ValueError for a pass beyond `pass_limit`.
        """
        self._pending.clear()
        self.window.check(n_tokens)
        if n_tokens > self.pass_limit:
            raise ValueError(f"a pass of {n_tokens} tokens, at most {self.pass_limit} may come")
        for _ in self.upkeep():
            pass
        needed = min(self.offset + n_tokens, self.capacity)
        if needed > self._rows:
            self._rows = self._allowed(self._rounded(max(needed, 2 * self._rows)))
        self._is_straight = self.window.is_straight and self.offset + n_tokens <= self.capacity
        self._sight = self._sight_of(n_tokens)
        if n_tokens == 1 and not self._is_straight:
            self.window.overwrite()

    def append(self, layer: int, k: mx.array, v: mx.array) -> View:
        """Store k, v (B, K, L, D) of one layer; return what their queries may see."""
        window, rows, n_tokens = self.window, self._layers[layer], k.shape[2]
        bits, storage = self.bits if self._is_packed else UNPACKED, self.storage
        if self._is_straight or n_tokens == 1:
            # One token takes the row of the one that it no longer sees.
            row = window.row(window.offset)
            held = rows.append(row, k, v, bits, n_rows=self._rows, storage=storage)
            stop = window.offset + n_tokens if self._is_straight else self.capacity
            return View((held,), self._sight, (stop,))
        # What the first queries of the pass still see must not be overwritten by its last tokens.
        new = Stored.kept(k, bits.keys, storage), Stored.kept(v, bits.values, storage)
        self._pending[layer] = new
        n_held = window.n_rows
        if rows.keys is None or rows.values is None or n_held == 0:
            return View((new,), self._sight)
        return View(((rows.keys, rows.values), new), self._sight, (n_held, n_tokens))

    @property
    def has_slots(self) -> bool:
        """Whether each layer has buffers: none before the first pass."""
        return self.offset > 0

    def slots(self) -> Slots:
        """Return what a pass of one token finds, instead of `append` for each layer."""
        window = self.window
        keys, values, after = self._buffers.for_token(self._rows)
        n_rows = window.offset + 1 if self._is_straight else self.capacity
        row = window.row(window.offset)
        return Slots(keys, values, row, n_rows, self._sight.bounds(1), after)

    def fill_slots(self, over: mx.array, keys: Arrays, values: Arrays) -> None:
        """Note what such a pass returns: what says that it is over, and buffers that are new."""
        self._buffers.take(over, keys, values)

    def advance(self, n_tokens: int) -> None:
        """Count the tokens that every layer has stored."""
        start = self.offset
        for layer, (keys, values) in self._pending.items():
            for token, row, count in self.window.runs(start, start + n_tokens):
                first, last = token - start, token - start + count
                part = keys.rows(first, last), values.rows(first, last)
                self._layers[layer].write(row, *part, n_rows=self._rows, storage=self.storage)
        self._pending.clear()
        self.window.advance(n_tokens)

    def _sight_of(self, n_tokens: int) -> Sight:
        """Say what the queries of a pass of n_tokens see of the rows that `append` shows."""
        window, start = self.window, self.offset
        if self._is_straight:
            return Sight(start, n_tokens)
        if n_tokens == 1 and start + 1 - window.first >= window.span:
            return Sight(start, 1)  # a full ring: everything is seen
        import numpy as np

        held = np.arange(start) if window.is_straight else window.tokens_of_rows()
        if n_tokens > 1:
            own = np.arange(start, start + n_tokens)
            return Sight(start, n_tokens, np.concatenate([held, own]), window)
        held[window.row(start)] = start
        return Sight(start, 1, held, window)

    # --- forgetting ------------------------------------------------------------------------------

    def trim(self, n_tokens: int, *, gives_back: bool = True) -> None:
        """Forget the newest tokens; `forgotten` tells what else is missing. ValueError beyond.

        gives_back: shorten buffers that are much too long, which copies what they hold.
        """
        self._finish_upkeep()
        self.window.trim(n_tokens)
        if n_tokens and not self.offset:
            self.clear()
            return
        self._pending.clear()
        if gives_back and self.window.is_straight and self._rows > SLACK * max(self.offset, STEP):
            self._rows = self._rounded(self.offset)
            for layer in self._layers:
                layer.shrink(self._rows)
            mx.eval(self.arrays)
            mx.clear_cache()

    def recount(self, n_tokens: int) -> None:
        """Count tokens again that `trim` forgot without giving their rows back.

        That nothing else was written to those rows meanwhile is the caller's word. ValueError where
        tokens were forgotten behind them, or the rows are no more.
        """
        if not self.window.is_straight or self.offset + n_tokens > self._rows:
            raise ValueError(f"cannot count {n_tokens} tokens again behind {self.offset}")
        self._finish_upkeep()
        self.window.advance(n_tokens)

    def keep_first(self, n_tokens: int) -> None:
        """Choose anew how many first tokens are kept; what has been forgotten leaves no choice.

        Raises ValueError when tokens have been forgotten.
        """
        if n_tokens != self.keep:
            if not self.window.is_straight:
                raise ValueError("what is kept cannot be chosen after tokens were forgotten")
            self.window = replace(self.window, keep=n_tokens)

    def begin_sliding(self) -> None:
        """Forget the oldest tokens from now on when it is full."""
        self.window.slides = True

    def clear(self) -> None:
        """Forget everything and give the memory back."""
        self.window.trim(self.offset)
        self._pending.clear()
        self._buffers = Buffers([Layer() for _ in self._layers])
        self._is_packed = self.packed_from == 0 or self.bits.is_plain
        self._rows = self._reserved = self._done = 0
        mx.clear_cache()

    def fork(self) -> KVCache:
        """Return a cache with the same contents; what either side writes to is copied then."""
        other = copy.copy(self)
        other.window = copy.copy(self.window)
        other._buffers = Buffers([layer.fork() for layer in self._layers])
        other._pending = {}
        return other

    def layers(self) -> list[Layer]:
        """Return the rows that hold tokens, of every layer; none of an empty cache."""
        self._finish_upkeep()
        return [layer.rows(self.window.n_rows) for layer in self._layers] if self.offset else []

    def take_up(self, window: Window, layers: list[Layer], *, is_packed: bool) -> None:
        """Hold what another cache held: its counts, and what its `layers` returned."""
        self.clear()
        self.window = window
        self._is_packed = is_packed or self.bits.is_plain
        if layers:
            self._buffers = Buffers(layers)
            self._rows = window.n_rows

    # --- upkeep ----------------------------------------------------------------------------------

    def upkeep(self) -> Iterator[None]:
        """Turn positions back and pack where the next pass needs it; yield after each piece.

        Who leaves early goes on there the next time, and the cache is as good as untouched till
        the end.
        """
        if self.window.must_turn:
            yield from self._turn_back()
        if not self._is_packed and self.offset >= self.packed_from:
            yield from self._pack()

    def _finish_upkeep(self) -> None:
        """End what is under way: what follows wants all rows alike."""
        if self._done:
            for _ in self.upkeep():
                pass

    def _turn_back(self) -> Iterator[None]:
        """Turn the keys behind the kept ones back, a few rows of a layer at a time."""
        import numpy as np

        positions = np.maximum(self.window.tokens_of_rows() - self.window.shift, 0)
        turned_window = copy.copy(self.window)
        delta = turned_window.turn()
        periods = rope_periods(self.config)
        n_layers = len(self._layers)
        starts = range(self.keep, self.capacity, TURN_ROWS)
        while self._done < n_layers * len(starts):
            start, layer = starts[self._done // n_layers], self._layers[self._done % n_layers]
            stop = min(start + TURN_ROWS, self.capacity)
            assert layer.keys is not None  # a cache that must turn is full
            some = layer.keys.rows(start, stop)
            angles = angles_back(periods, positions[start:stop], delta)
            turned = turn_back(some.dense(mx.float32), *angles)
            keys = layer.keys.with_numbers(start, turned, self.storage)
            # No call stands between these two, so that no signal can come between them.
            layer.keys, self._done = keys, self._done + 1
            del some, turned, keys
            mx.eval(layer.arrays)
            yield
        self.window, self._done = turned_window, 0

    def _pack(self) -> Iterator[None]:
        """Pack what was stored plain, one layer at a time."""
        while self._done < len(self._layers):
            packed = self._layers[self._done].packed(self.bits, self.storage)
            mx.eval(packed.arrays)
            self._layers[self._done] = packed
            self._done += 1
            yield
        self._is_packed, self._done = True, 0
        self._rows = max(self._rows, self._reserved)

    def _allowed(self, n_rows: int) -> int:
        """Return what of a buffer may be made now: nothing plain that will be packed later."""
        return n_rows if self._is_packed else min(n_rows, self._rounded(self.packed_from))

    def _rounded(self, n_tokens: int) -> int:
        return min(-(-max(n_tokens, 1) // STEP) * STEP, self.capacity)
