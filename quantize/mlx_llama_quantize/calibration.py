"""Packing by what layers really read: a calibration text walks through the model block by block.

Each block sees what the blocks before it, already packed, make of the text. Its Hessians are added
up, scales are folded in (`awq`), codes are chosen (`gptq`), the block is written down, and the text
goes on through it as it will be. One block is in memory at a time, with its Hessians and the states
of the text. What is written down is found again by whoever asks for the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_llama import ops
from mlx_llama.config import QuantFormat
from mlx_llama.errors import OptionError
from mlx_llama.linear import Dense, Matrix, Packed, Stack
from mlx_llama.model import Block, LlamaModel
from mlx_llama.ops import DTYPES
from mlx_llama.safetensors_reader import open_safetensors
from mlx_llama.tokenizer import Tokenizer
from mlx_llama.weights import EMBEDDING, NORM, OUTPUT, WeightSource, hf_module
from mlx_llama_quantize import awq, gptq
from mlx_llama_quantize.auto import coded
from mlx_llama_quantize.inputs import Input, Watched
from mlx_llama_quantize.keeping import Keeper, OnNote
from mlx_llama_quantize.packing import PARTS, pack_matrix, refuse_no_numbers
from mlx_llama_quantize.products import SLAB, for_texts
from mlx_llama_quantize.texts import Text
from mlx_llama_quantize.walk_record import WalkRecord
from mlx_llama_quantize.walking import embedded, layer_arithmetic

CONTEXT = 512  # tokens of a window
MAX_TOKENS = 32768  # of the text; more say little more
HELD = 4  # windows that `auto` keeps back, an eighth of them at most
FOLDED, CODED = ("awq", "awq+gptq", "auto"), ("gptq", "awq+gptq", "auto")  # methods that do so
METHODS = ("gptq", "awq", "awq+gptq", "auto")

OnProgress = Callable[[int, int], None]  # blocks times windows done, and in all


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What a walk leaves: weights to read in place of the source's, and what is packed already.

    ready: files of packed tensors by Meta's name.
    """

    weights: WeightSource
    ready: Mapping[str, Path]

    def read(self, name: str) -> dict[str, mx.array]:
        """Return the arrays of a ready tensor by part, evaluated."""
        module, tensors = hf_module(name), open_safetensors(self.ready[name])
        return {
            part: tensors[f"{module}.{part}"].read()
            for part in PARTS
            if f"{module}.{part}" in tensors
        }


@dataclass(slots=True)
class Calibration:
    """A walk on its way. folder: where it is written down; it belongs to this walk alone.

    on_note: told where that fails and nothing but a later run needs it.
    """

    source: WeightSource
    tokenizer: Tokenizer
    forms: Mapping[str, QuantFormat | None]
    method: str
    text: Text
    folder: Path
    dtype: str | None = None
    on_note: OnNote | None = None
    _scales: dict[str, np.ndarray] = field(default_factory=dict)
    _record: WalkRecord = field(init=False)

    def __post_init__(self) -> None:
        self._record = WalkRecord(self.folder, Keeper(self.folder, self.on_note))

    @property
    def windows(self) -> np.ndarray:
        """The text's tokens, (n, context) uint32, BOS first in each. Raises OptionError."""
        ids = self.tokenizer.encode(self.text.content)[:MAX_TOKENS]
        context = min(CONTEXT, self.source.config.max_context, len(ids))
        if context < 2:
            raise OptionError("--calibration: the text has no words; give a longer one")
        n_windows = len(ids) // context
        windows = np.array(ids[: n_windows * context], np.uint32).reshape(n_windows, context)
        windows[:, 0] = self.tokenizer.bos_id
        return windows

    def run(self, *, on_progress: OnProgress | None = None) -> Calibrated:
        """Walk through all blocks; what was written down before is kept."""
        windows, config = self.windows, self.source.config
        if self.method in CODED:
            self._record.open()
        done, states, self._scales = self._record.resumed(config.n_layers, len(windows))
        total, passed = config.n_layers * len(windows), done * len(windows)
        model = layer_arithmetic(self.source)
        if done == 0:
            states = self._embedded(windows)

        def on_window() -> None:
            nonlocal passed
            passed += 1
            if on_progress is not None:
                on_progress(passed, total)

        for index in range(done, config.n_layers):
            self._block(model, index, states, on_window)
            self._record.keep(index, states, self._scales)
        ready = {
            name: self._record.path(f"block-{name.split('.')[1]}")
            for name, form in self.forms.items()
            if self.method in CODED and form and name.startswith("layers.")
        }
        head = EMBEDDING if config.tied else OUTPUT
        if self.method in CODED and (form := self.forms[head]) and form.mode == "affine":
            ready[head] = self._head(head, form, states)
        return Calibrated(awq.FoldedWeights(self.source, self._scales), ready)

    def forget(self) -> None:
        """Remove what was written down."""
        self._record.forget()

    # --- one block ---

    def _block(
        self,
        model: LlamaModel,
        index: int,
        states: list[mx.array],
        on_window: Callable[[], None],
    ) -> None:
        """Pack a block by what it reads; states become those behind it."""
        inputs = self._read_by(model, index, states, on_window)
        hessians = {place: found.moments.taken() for place, found in inputs.items()}
        if self.method in FOLDED:
            self._fold(index, hessians)
        weights = awq.FoldedWeights(self.source, self._scales)
        held = {p: found.rows(self._scales.get(f"{index}.{p}")) for p, found in inputs.items()}
        packed = self._pack(weights, index, hessians, held)
        del hessians, held
        if self.method in CODED:
            arrays = {
                f"{hf_module(name)}.{part}": array
                for name, parts in packed.items()
                if self.forms[name]
                for part, array in parts.items()
            }
            self._record.save(f"block-{index}", arrays)
        matrices = {name: self._matrix(name, parts) for name, parts in packed.items()}
        after = self._assemble(weights, index, matrices, None)
        for number, state in enumerate(states):
            states[number] = model.through(after, state)
            mx.eval(states[number])

    def _read_by(
        self,
        model: LlamaModel,
        index: int,
        states: Sequence[mx.array],
        on_window: Callable[[], None],
    ) -> dict[str, Input]:
        """Take the states through a block as it is, and return what its matrices read."""
        inputs = {place: Input() for place in awq.READERS}
        dense: dict[str, Matrix] = {}
        for name in self._names(index):
            values = self.source.read(name).astype(mx.float32)
            mx.eval(values)
            refuse_no_numbers(name, values)
            dense[name] = Dense(values)
        watched = self._assemble(self.source, index, dense, inputs)
        n_learned = len(states) - self._n_held(len(states))
        for number, state in enumerate(states):
            for found in inputs.values():
                found.is_holding = number >= n_learned
            mx.eval(model.through(watched, state))
            on_window()
        return inputs

    def _n_held(self, n_windows: int) -> int:
        return min(HELD, n_windows // 8) if self.method == "auto" else 0

    def _fold(self, index: int, hessians: dict[str, np.ndarray]) -> None:
        """Find the block's scales; the Hessians become those of the scaled inputs."""
        config = self.source.config
        for place, readers in awq.READERS.items():
            names = [f"layers.{index}.{reader}.weight" for reader in readers]
            shared = config.n_heads // config.n_kv_heads if place == "mixed" else 1
            # w3's rows were not scaled yet when w1 and w3 were looked at, nor v's for q, k, v: a
            # row's scale changes its own grid alone.
            scales = awq.find_scales(
                [(self._array(name), self.forms[name]) for name in names],
                hessians[place],
                self._dtype_of(names[0]),
                shared=shared,
                width=config.head_dim,
            )
            feeder = f"layers.{index}.{awq.FEEDERS[place]}.weight"
            if feeder.endswith("norm.weight"):
                scales = awq.foldable(self.source.read(feeder), scales)
            self._scales[f"{index}.{place}"] = scales
            hessians[place] /= scales[:, None] * scales

    def _pack(
        self,
        weights: WeightSource,
        index: int,
        hessians: dict[str, np.ndarray],
        held: Mapping[str, mx.array | None],
    ) -> dict[str, dict[str, mx.array]]:
        packed: dict[str, dict[str, mx.array]] = {}
        for place, readers in awq.READERS.items():
            factors: dict[int, gptq.Factor] = {}
            hessian = hessians.pop(place)
            for reader in readers:
                name = f"layers.{index}.{reader}.weight"
                values, form = self._cast(name, weights.read(name)), self.forms[name]
                if form is None:
                    packed[name] = {"weight": values}
                elif self.method in CODED and form.mode == "affine":
                    if form.group_size not in factors:
                        size = form.group_size
                        factors[size] = gptq.factorize(hessian, size)
                    packed[name] = coded(values, form, factors[form.group_size], held[place])
                else:
                    packed[name] = pack_matrix(values, form, "mse")
        return packed

    def _assemble(
        self,
        weights: WeightSource,
        index: int,
        matrices: Mapping[str, Matrix],
        inputs: Mapping[str, Input] | None,
    ) -> Block:
        def stacked(place: str) -> Matrix:
            # Not joined, so that there is one copy of each.
            parts = [matrices[f"layers.{index}.{r}.weight"] for r in awq.READERS[place]]
            matrix = for_texts(parts[0] if len(parts) == 1 else Stack(tuple(parts)))
            return matrix if inputs is None else Watched(matrix, inputs[place])

        def norm(name: str) -> mx.array:
            return weights.read(f"layers.{index}.{name}.weight").astype(mx.float32)

        return Block(
            attention_norm=norm("attention_norm"),
            wqkv=stacked("attention"),
            wo=stacked("mixed"),
            ffn_norm=norm("ffn_norm"),
            w13=stacked("feed_forward"),
            w2=stacked("gated"),
        )

    def _matrix(self, name: str, parts: Mapping[str, mx.array]) -> Matrix:
        form = self.forms[name]
        if form is None:
            return Dense(parts["weight"].astype(mx.float32))
        scales, biases = parts["scales"], parts.get("biases")
        if biases is not None:
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        return Packed(parts["weight"], scales, biases, form, mx.float32)

    def _names(self, index: int) -> list[str]:
        return [f"layers.{index}.{r}.weight" for rs in awq.READERS.values() for r in rs]

    def _array(self, name: str) -> np.ndarray:
        return np.array(self.source.read(name).astype(mx.float32))

    def _dtype_of(self, name: str) -> mx.Dtype:
        return DTYPES[self.dtype or self.source.dtype(name)]

    def _cast(self, name: str, values: mx.array) -> mx.array:
        return values.astype(self._dtype_of(name))

    # --- the ends ---

    def _head(self, name: str, form: QuantFormat, states: Sequence[mx.array]) -> Path:
        """Pack the output by what it reads, some rows at a time; a tied embedding is one."""
        path = self._record.path("head")
        if path.is_file():
            return path
        read, norm = Input(), self.source.read(NORM).astype(mx.float32)
        n_learned = len(states) - self._n_held(len(states))
        for number, state in enumerate(states):
            read.is_holding = number >= n_learned
            read.add(ops.rms_norm(state, norm, self.source.config.norm_eps))
        factor, held = gptq.factorize(read.moments.taken(), form.group_size), read.rows()
        n_rows = self.source.shape(name)[0]
        pieces = [
            coded(self._cast(name, self.source.read(name, rows)), form, factor, held)
            for rows in (
                slice(start, min(start + gptq.ROWS, n_rows))
                for start in range(0, n_rows, gptq.ROWS)
            )
        ]
        module = hf_module(name)
        self._record.save(
            "head", {f"{module}.{p}": mx.concatenate([piece[p] for piece in pieces]) for p in PARTS}
        )
        return path

    def _embedded(self, windows: np.ndarray) -> list[mx.array]:
        """Return the rows of the embedding, packed and unpacked as they will be."""
        form = self.forms[EMBEDDING]

        def change(rows: mx.array) -> mx.array:
            values = self._cast(EMBEDDING, rows)
            if form is None:
                return values
            packed = self._matrix(EMBEDDING, pack_matrix(values, form, "mse"))
            return packed.rows(mx.arange(len(values)))

        return embedded(self.source, windows, change)


@dataclass(frozen=True, slots=True)
class CalibrationRequest:
    """What to calibrate on. states: a folder in which walks are written down."""

    text: Text
    states: Path
    on_progress: OnProgress | None = None
    on_note: OnNote | None = None


def calibration_bytes(source: WeightSource, method: str) -> int:
    """Return what a walk takes at most, bytes.

    Beside the states of the text it is the largest of three: a block in float32 with the moments of
    its inputs and a window's activations; the moments, the largest of them once more and a quarter
    while it is factorized, what `auto` keeps back, and the work on one matrix; the packed output
    twice.
    """
    config = source.config
    q_rows, kv_rows = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    dim, hidden = config.dim, config.hidden_dim
    widest, matrix = max(dim, q_rows, hidden), dim * max(q_rows, hidden)
    block = dim * (2 * q_rows + 2 * kv_rows + 3 * hidden)
    moments = 2 * dim**2 + q_rows**2 + hidden**2
    held = 2 * HELD * CONTEXT * (2 * dim + q_rows + hidden) if method == "auto" else 0
    read = block + matrix // 2 + moments + SLAB * widest + held + 8 * CONTEXT * (hidden + q_rows)
    pack = moments + 5 * widest**2 // 4 + held + 4 * matrix + block // 3
    # At most 8 bits and two scales in float32 to 32 weights, as pieces and joined.
    head = 4 * dim**2 + 2 * config.vocab_size * dim // 3 + 6 * gptq.ROWS * dim
    return 4 * (MAX_TOKENS * dim + max(read, pack, head))


def record_bytes(source: WeightSource, method: str, packed_bytes: int) -> int:
    """Return what a walk writes down at most: the states twice, and what it packs."""
    states = 2 * 4 * MAX_TOKENS * source.config.dim
    return states + (packed_bytes if method in CODED else 0)


def calibration_key(job: str, text: Text) -> str:
    """Return a name for the folder of one walk: another job or text has another."""
    return hashlib.sha256(json.dumps([job, text.sha256]).encode()).hexdigest()[:32]
