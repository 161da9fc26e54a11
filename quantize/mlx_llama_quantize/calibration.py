"""Packing by what layers really read: a calibration text walks through the model block by block.

Each block sees what the blocks before it, already packed, make of the text. Its Hessians are added
up, scales are folded in (`awq`), codes are chosen (`gptq`), the block is written down, and the text
goes on through it as it will be. One block is in memory at a time, with its Hessians and the states
of the text. What is written down is found again by whoever asks for the same.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_llama import ops
from mlx_llama.config import QuantFormat
from mlx_llama.errors import CheckpointError, OptionError
from mlx_llama.linear import Dense, Matrix, Packed, stack_rows
from mlx_llama.model import Block, LlamaModel
from mlx_llama.ops import DTYPES
from mlx_llama.safetensors_reader import open_safetensors
from mlx_llama.tokenizer import Tokenizer
from mlx_llama.weights import EMBEDDING, NORM, OUTPUT, WeightSource, hf_module
from mlx_llama_quantize import awq, gptq
from mlx_llama_quantize.packing import PARTS, pack_matrix, unpacked
from mlx_llama_quantize.products import for_texts, second_moments
from mlx_llama_quantize.texts import Text
from mlx_llama_quantize.walking import embedded, layer_arithmetic

CONTEXT = 512  # tokens of a window
MAX_TOKENS = 32768  # of the text; more say little more
HELD = 4  # windows that `auto` keeps back, an eighth of them at most
FOLDED, CODED = ("awq", "awq+gptq", "auto"), ("gptq", "awq+gptq", "auto")  # methods that do so
METHODS = ("gptq", "awq", "awq+gptq", "auto")

OnProgress = Callable[[int, int], None]  # blocks times windows done, and in all


@dataclass(slots=True)
class _Input:
    """What is known of what matrices read. hessian: sum of the outer products, (in, in) float32.

    held: of windows that are kept back, (1, L, in) each, while `is_holding`.
    """

    hessian: mx.array | None = None
    held: list[mx.array] = field(default_factory=list)
    is_holding: bool = False

    def add(self, x: mx.array) -> None:
        if self.is_holding:
            self.held.append(x.astype(mx.float32))
            mx.eval(self.held)
            return
        product = second_moments(x)
        self.hessian = product if self.hessian is None else self.hessian + product
        mx.eval(self.hessian)

    @property
    def array(self) -> np.ndarray:
        assert self.hessian is not None, "every input is read by a walk"
        return np.array(self.hessian)


@dataclass(frozen=True, slots=True)
class _Watched:
    """A matrix that remembers what it multiplies."""

    matrix: Matrix
    input: _Input

    def __call__(self, x: mx.array) -> mx.array:
        self.input.add(x)
        return self.matrix(x)

    def rows(self, ids: mx.array) -> mx.array:
        return self.matrix.rows(ids)

    def arrays(self) -> list[mx.array]:
        return self.matrix.arrays()


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
    """A walk on its way. folder: where it is written down; it belongs to this walk alone."""

    source: WeightSource
    tokenizer: Tokenizer
    forms: Mapping[str, QuantFormat | None]
    method: str
    text: Text
    folder: Path
    dtype: str | None = None
    _scales: dict[str, np.ndarray] = field(default_factory=dict)

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
        self.folder.mkdir(parents=True, exist_ok=True)
        windows, config = self.windows, self.source.config
        done, states = self._resumed(len(windows))
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
            states = self._block(model, index, states, on_window)
            self._keep(index, states)
        ready = {
            name: self.folder / f"block-{name.split('.')[1]}.safetensors"
            for name, form in self.forms.items()
            if self.method in CODED and form and name.startswith("layers.")
        }
        head = EMBEDDING if config.tied else OUTPUT
        if self.method in CODED and (form := self.forms[head]) and form.mode == "affine":
            ready[head] = self._head(head, form, states)
        return Calibrated(awq.FoldedWeights(self.source, self._scales), ready)

    def forget(self) -> None:
        """Remove what was written down."""
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- one block ---

    def _block(
        self,
        model: LlamaModel,
        index: int,
        states: list[mx.array],
        on_window: Callable[[], None],
    ) -> list[mx.array]:
        inputs = {place: _Input() for place in awq.READERS}
        dense = {
            name: Dense(self.source.read(name).astype(mx.float32)) for name in self._names(index)
        }
        watched = self._assemble(self.source, index, dense, inputs)
        n_learned = len(states) - self._n_held(len(states))
        for number, state in enumerate(states):
            for found in inputs.values():
                found.is_holding = number >= n_learned
            mx.eval(model.through(watched, state))
            on_window()
        del watched, dense
        hessians = {place: found.array for place, found in inputs.items()}
        if self.method in FOLDED:
            self._fold(index, hessians)
        weights = awq.FoldedWeights(self.source, self._scales)
        held = {place: self._held(index, place, found.held) for place, found in inputs.items()}
        del inputs
        packed = self._pack(weights, index, hessians, held)
        if self.method in CODED:
            arrays = {
                f"{hf_module(name)}.{part}": array
                for name, parts in packed.items()
                if self.forms[name]
                for part, array in parts.items()
            }
            self._save(f"block-{index}", arrays)
        matrices = {name: self._matrix(name, parts) for name, parts in packed.items()}
        after = self._assemble(weights, index, matrices, None)
        states = [model.through(after, state) for state in states]
        mx.eval(states)
        return states

    def _n_held(self, n_windows: int) -> int:
        return min(HELD, n_windows // 8) if self.method == "auto" else 0

    def _held(self, index: int, place: str, states: list[mx.array]) -> mx.array | None:
        """Return what was kept back of an input as the scaled matrices read it, (n, in)."""
        if not states:
            return None
        rows = mx.concatenate(states, axis=1)[0]
        scales = self._scales.get(f"{index}.{place}")
        return rows if scales is None else rows / mx.array(scales)

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
        hessians: Mapping[str, np.ndarray],
        held: Mapping[str, mx.array | None],
    ) -> dict[str, dict[str, mx.array]]:
        packed: dict[str, dict[str, mx.array]] = {}
        for place, readers in awq.READERS.items():
            factors: dict[int, gptq.Factor] = {}
            for reader in readers:
                name = f"layers.{index}.{reader}.weight"
                values, form = self._cast(name, weights.read(name)), self.forms[name]
                if form is None:
                    packed[name] = {"weight": values}
                elif self.method in CODED and form.mode == "affine":
                    if form.group_size not in factors:
                        size = form.group_size
                        factors[size] = gptq.factorize(hessians[place], size)
                    packed[name] = _coded(values, form, factors[form.group_size], held[place])
                else:
                    packed[name] = pack_matrix(values, form, "mse")
        return packed

    def _assemble(
        self,
        weights: WeightSource,
        index: int,
        matrices: Mapping[str, Matrix],
        inputs: Mapping[str, _Input] | None,
    ) -> Block:
        def stacked(place: str) -> Matrix:
            parts = [matrices[f"layers.{index}.{r}.weight"] for r in awq.READERS[place]]
            matrix = for_texts(stack_rows(parts))
            return matrix if inputs is None else _Watched(matrix, inputs[place])

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
        path = self.folder / "head.safetensors"
        if path.is_file():
            return path
        read, norm = _Input(), self.source.read(NORM).astype(mx.float32)
        n_learned = len(states) - self._n_held(len(states))
        for number, state in enumerate(states):
            read.is_holding = number >= n_learned
            read.add(ops.rms_norm(state, norm, self.source.config.norm_eps))
        factor = gptq.factorize(read.array, form.group_size)
        held = mx.concatenate(read.held, axis=1)[0] if read.held else None
        n_rows = self.source.shape(name)[0]
        pieces = [
            _coded(self._cast(name, self.source.read(name, rows)), form, factor, held)
            for rows in (
                slice(start, min(start + gptq.ROWS, n_rows))
                for start in range(0, n_rows, gptq.ROWS)
            )
        ]
        module = hf_module(name)
        self._save(
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

    # --- going on where it stopped ---

    def _keep(self, index: int, states: Sequence[mx.array]) -> None:
        """Write down where the walk is: the states behind a block, and all scales so far."""
        arrays = {f"state.{number}": state for number, state in enumerate(states)}
        arrays |= {f"scales.{name}": mx.array(scales) for name, scales in self._scales.items()}
        self._save(f"behind-{index}", arrays)
        (self.folder / f"behind-{index - 1}.safetensors").unlink(missing_ok=True)

    def _save(self, name: str, arrays: dict[str, mx.array]) -> None:
        beside = self.folder / f"{name}.partial.safetensors"
        mx.save_safetensors(str(beside), arrays)
        beside.replace(self.folder / f"{name}.safetensors")

    def _resumed(self, n_windows: int) -> tuple[int, list[mx.array]]:
        """Return how many blocks are done, and the states behind them; a damaged file is none."""
        for index in reversed(range(self.source.config.n_layers)):
            path = self.folder / f"behind-{index}.safetensors"
            if not path.is_file():
                continue
            try:
                arrays = {name: ref.read() for name, ref in open_safetensors(path).items()}
                states = [arrays[f"state.{number}"] for number in range(n_windows)]
            except (CheckpointError, KeyError):
                return 0, []
            self._scales = {
                name.removeprefix("scales."): np.array(array)
                for name, array in arrays.items()
                if name.startswith("scales.")
            }
            return index + 1, states
        return 0, []


def _coded(
    values: mx.array, form: QuantFormat, factor: gptq.Factor, held: mx.array | None
) -> dict[str, mx.array]:
    """Pack values (out, in) by what they read; by `mse` where that errs less on inputs held back.

    held: (n, in) float32; None where nothing was.
    """
    coded: dict[str, mx.array] = dict(zip(PARTS, gptq.quantize(values, form, factor), strict=True))
    if held is None:
        return coded
    searched = pack_matrix(values, form, "mse")
    return min((coded, searched), key=lambda parts: _output_error(values, parts, form, held))


def _output_error(
    values: mx.array, parts: Mapping[str, mx.array], form: QuantFormat, inputs: mx.array
) -> float:
    """Return the squared error of the outputs (n, out) that packing leaves."""
    rest = unpacked(parts, form) - values.astype(mx.float32)
    out = for_texts(Dense(rest))(inputs)
    return float(mx.sum(out * out))


@dataclass(frozen=True, slots=True)
class CalibrationRequest:
    """What to calibrate on. states: a folder in which walks are written down."""

    text: Text
    states: Path
    on_progress: OnProgress | None = None


def calibration_bytes(source: WeightSource) -> int:
    """Return what a walk takes at most, bytes.

    A block in float32 twice (its parts and their join), the Hessians three times (added up, damped,
    factorized), a block's activations, and the states of the text before and behind a block.
    """
    config = source.config
    q_rows, kv_rows = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    dim, hidden = config.dim, config.hidden_dim
    block = dim * (2 * q_rows + 2 * kv_rows + 3 * hidden)
    hessians = 2 * dim**2 + q_rows**2 + hidden**2 + 3 * max(dim, q_rows, hidden) ** 2
    states = 2 * MAX_TOKENS * dim + 8 * CONTEXT * (hidden + q_rows)
    packed_head = config.vocab_size * dim  # at most a byte a weight, twice: parts and their join
    return 4 * (2 * block + hessians + states) + 2 * packed_head


def calibration_key(job: str, text: Text) -> str:
    """Return a name for the folder of one walk: another job or text has another."""
    return hashlib.sha256(json.dumps([job, text.sha256]).encode()).hexdigest()[:32]
