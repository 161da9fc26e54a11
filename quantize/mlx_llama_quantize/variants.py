"""A model in which one matrix is packed, beside the model as it is: many of them, layer by layer.

A text goes through the model as it is. Then what stands before a layer goes through it once for
each of its variants, and on through the layers behind; the predictions are compared. All of it in
float32, so that nothing but the packing differs. In memory are one layer, the states of one layer's
variants, and logits of a slice of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_llama import ops
from mlx_llama.config import ModelConfig, QuantFormat
from mlx_llama.linear import Dense, Matrix, Stack
from mlx_llama.model import Block
from mlx_llama.weights import EMBEDDING, NORM, OUTPUT, WeightSource
from mlx_llama_quantize.divergence import divergences, log_softmax
from mlx_llama_quantize.packing import refuse_no_numbers
from mlx_llama_quantize.products import for_texts
from mlx_llama_quantize.walking import embedded, layer_arithmetic
from mlx_llama_quantize.windows import Windows

LOGITS_BYTES = 320 << 20  # of the tokens that are compared together: two models' and a part
SLICE_BYTES = 64 << 20  # of the output matrix, and of what comparing has alive
COPIES = 8  # arrays as large as its logits that comparing has alive

# The matrices of a layer by the block's field; those of one field read the same input.
FIELDS = {
    "wqkv": ("attention.wq", "attention.wk", "attention.wv"),
    "wo": ("attention.wo",),
    "w13": ("feed_forward.w1", "feed_forward.w3"),
    "w2": ("feed_forward.w2",),
}

OnProgress = Callable[[int, int], None]  # windows through layers: done, and in all
Wanted = tuple[str, QuantFormat]  # a tensor by Meta's name, and how it is packed
Packed = Callable[[str, mx.array, QuantFormat], mx.array]  # what is read after packing, float32


def walk_bytes(config: ModelConfig, windows_bytes: int) -> int:
    """Return what a walk takes at most, bytes; windows_bytes: of the states of all windows.

    A layer in float32, one more being packed, four copies of a matrix meanwhile, the states of a
    layer's variants (two formats of seven matrices), logits to compare and rows of the output.
    """
    q_rows, kv_rows = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    layer = config.dim * (2 * q_rows + 2 * kv_rows + 3 * config.hidden_dim)
    matrix = config.dim * max(q_rows, config.hidden_dim)
    states = 2 * (2 * sum(map(len, FIELDS.values())) + 3) * windows_bytes
    return 4 * (layer + 5 * matrix) + states + LOGITS_BYTES + LOGITS_BYTES // 3 + 6 * SLICE_BYTES


@dataclass(slots=True)
class _Variant:
    """One of the models. states: of the windows before a layer, (1, L, dim) each."""

    tensor: str
    form: QuantFormat
    states: list[mx.array]


class VariantWalk:
    """One walk. vocab_size: of the tokenizer; an embedding may have rows beyond it."""

    def __init__(
        self,
        source: WeightSource,
        vocab_size: int,
        windows: Windows,
        packed: Packed,
        on_progress: OnProgress | None,
    ) -> None:
        self.source, self.config = source, source.config
        self.vocab_size = vocab_size
        self.windows = windows
        self._packed = packed
        self._on_progress = on_progress
        self._arithmetic = layer_arithmetic(source)
        self._norm = source.read(NORM).astype(mx.float32)
        self._head = EMBEDDING if self.config.tied else OUTPUT
        self._done = self._total = 0

    def run(self, wanted: Sequence[Wanted]) -> Iterator[list[tuple[str, QuantFormat, float]]]:
        """Yield what variants cost, nats a token, those of one layer together."""
        n_layers = self.config.n_layers
        by_layer = {
            index: [each for each in wanted if each[0].startswith(f"layers.{index}.")]
            for index in range(n_layers)
        }
        starts = [index for index, found in by_layer.items() for _ in found]
        starts += [0 for name, _ in wanted if name == EMBEDDING]
        n_passes = n_layers + sum(n_layers - start for start in starts)
        n_passes += max((index for index, found in by_layer.items() if found), default=0)
        self._total = n_passes * len(self.windows)
        first = embedded(self.source, self.windows.ids, lambda rows: rows)
        base = self._hidden(self._to_the_end(first, 0))
        for name, form in wanted:
            if name == EMBEDDING:
                yield self._measured(base, [self._embedding(form)], 0)
            elif name == OUTPUT:
                yield self._measured(base, [_Variant(name, form, [])], n_layers)
        yield from self._layers(base, first, by_layer)

    def _layers(
        self, base: mx.array, states: list[mx.array], by_layer: Mapping[int, Sequence[Wanted]]
    ) -> Iterator[list[tuple[str, QuantFormat, float]]]:
        last = max((index for index, found in by_layer.items() if found), default=-1)
        for index in range(last + 1):
            parts = self._parts(index)
            variants = [
                _Variant(name, form, self._through(self._changed(index, parts, name, form), states))
                for name, form in by_layer[index]
            ]
            if index < last:
                states = self._through(self._block(parts), states)
            del parts  # before others are read
            if variants:
                yield self._measured(base, variants, index + 1)

    def _measured(
        self, base: mx.array, variants: Sequence[_Variant], index: int
    ) -> list[tuple[str, QuantFormat, float]]:
        """Take variants from before a layer to the end, and compare what they predict."""
        for layer in range(index, self.config.n_layers):
            block = self._block(self._parts(layer))
            for variant in variants:
                variant.states = self._through(block, variant.states)
            del block
        hidden = [self._hidden(variant.states) if variant.states else base for variant in variants]
        forms = [v.form if v.tensor == self._head else None for v in variants]
        totals = [0.0] * len(variants)
        step = max(1, LOGITS_BYTES // (3 * 4 * self.vocab_size))
        for start in range(0, len(base), step):
            rows = slice(start, start + step)
            log_a = log_softmax(self._logits(base[rows], None))
            for number, (states, form) in enumerate(zip(hidden, forms, strict=True)):
                totals[number] += self._divergence(log_a, self._logits(states[rows], form))
        return [
            (variant.tensor, variant.form, total / len(base))
            for variant, total in zip(variants, totals, strict=True)
        ]

    def _divergence(self, log_a: mx.array, logits: mx.array) -> float:
        """Return the tokens' divergences added up."""
        step = max(1, SLICE_BYTES // (COPIES * 4 * self.vocab_size))
        slices = (slice(start, start + step) for start in range(0, len(logits), step))
        return sum(
            float(mx.sum(divergences(log_a[rows], log_softmax(logits[rows])))) for rows in slices
        )

    def _logits(self, hidden: mx.array, form: QuantFormat | None) -> mx.array:
        """Return scores (N, V) for normed states (N, dim); the output is read in slices."""
        step = max(1, SLICE_BYTES // (4 * self.config.dim))
        found: list[mx.array] = []
        for start in range(0, self.vocab_size, step):
            rows = slice(start, min(start + step, self.vocab_size))
            values = self.source.read(self._head, rows)
            values = values if form is None else self._packed(self._head, values, form)
            found.append(for_texts(Dense(values.astype(mx.float32)))(hidden))
            mx.eval(found[-1])
        logits = found[0] if len(found) == 1 else mx.concatenate(found, axis=-1)
        mx.eval(logits)
        return logits

    # --- layers ---

    def _to_the_end(self, states: list[mx.array], index: int) -> list[mx.array]:
        for layer in range(index, self.config.n_layers):
            states = self._through(self._block(self._parts(layer)), states)
        return states

    def _through(self, block: Block, states: Sequence[mx.array]) -> list[mx.array]:
        found: list[mx.array] = []
        for state in states:
            found.append(self._arithmetic.through(block, state))
            mx.eval(found[-1])
            self._done += 1
            if self._on_progress is not None:
                self._on_progress(self._done, self._total)
        return found

    def _hidden(self, states: Sequence[mx.array]) -> mx.array:
        """Return the normed states at the scored positions of all windows, (N, dim)."""
        rows = mx.concatenate([state[0, self.windows.scored] for state in states])
        hidden = ops.rms_norm(rows, self._norm, self.config.norm_eps)
        mx.eval(hidden)
        return hidden

    def _embedding(self, form: QuantFormat) -> _Variant:
        states = embedded(
            self.source, self.windows.ids, lambda rows: self._packed(EMBEDDING, rows, form)
        )
        return _Variant(EMBEDDING, form, states)

    def _parts(self, index: int) -> dict[str, mx.array]:
        """Return a layer's tensors by their names in it, float32, evaluated."""
        names = [*(n for names in FIELDS.values() for n in names), "attention_norm", "ffn_norm"]
        parts: dict[str, mx.array] = {}
        for name in names:
            parts[name] = self.source.read(f"layers.{index}.{name}.weight").astype(mx.float32)
            mx.eval(parts[name])
            refuse_no_numbers(f"layers.{index}.{name}.weight", parts[name])
        return parts

    def _changed(
        self, index: int, parts: Mapping[str, mx.array], name: str, form: QuantFormat
    ) -> Block:
        """Return a layer with one of its matrices packed."""
        values = self._packed(name, self.source.read(name), form)
        mx.eval(values)
        part = name.removeprefix(f"layers.{index}.").removesuffix(".weight")
        return self._block({**parts, part: values})

    def _block(self, parts: Mapping[str, mx.array]) -> Block:
        """Put a layer together; its matrices are not joined, so that there is one copy of each."""
        fields: dict[str, Matrix] = {}
        for each, names in FIELDS.items():
            matrices = tuple(for_texts(Dense(parts[name])) for name in names)
            fields[each] = matrices[0] if len(matrices) == 1 else Stack(matrices)
        return Block(attention_norm=parts["attention_norm"], ffn_norm=parts["ffn_norm"], **fields)
