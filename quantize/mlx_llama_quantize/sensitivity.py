"""What packing costs, matrix by matrix: the divergence of a model in which it alone is packed.

A probe measures one format (`variants`). What the others cost follows from the error of their
weights: near its minimum the divergence grows as their square, and between two probes as they do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, log
from pathlib import Path

import mlx.core as mx

from mlx_llama.config import ModelConfig, QuantFormat
from mlx_llama.errors import CheckpointError, QuantizationError
from mlx_llama.ops import DTYPES
from mlx_llama.strict_json import MAX_JSON_BYTES, json_text, load_json
from mlx_llama.tokenizer import Tokenizer
from mlx_llama.weights import WeightSource
from mlx_llama_quantize.keeping import Keeper, OnNote, told_when_stopped
from mlx_llama_quantize.packing import pack_matrix, refuse_no_numbers, unpacked
from mlx_llama_quantize.spec import DEFAULT_GROUP_SIZE, fitted
from mlx_llama_quantize.texts import Text
from mlx_llama_quantize.variants import OnProgress, VariantWalk, walk_bytes
from mlx_llama_quantize.windows import Windows, cut_windows

CONTEXT = 512  # tokens of a window
MAX_WINDOWS = 16
WORK = 2_500_000_000  # weights times windows: of a large model fewer windows are read
PROBES = (2, 4)  # bits
SAMPLE_WEIGHTS = 1 << 17  # of a matrix, whose error is looked at in every format
RUNS = 16  # of rows next to each other in a sample


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What packing one matrix costs.

    measured: nats by the format of a probe. errors: squared error of the weights over their
    squares, by format, the probes' among them.
    """

    tensor: str
    measured: Mapping[QuantFormat, float]
    errors: Mapping[QuantFormat, float]

    def divergence(self, form: QuantFormat) -> float:
        """Return what a format costs, nats: as measured, or by its error."""
        if form in self.measured:
            return self.measured[form]
        error = self.errors[form]
        low, *_, high = sorted((self.errors[probe], nats) for probe, nats in self.measured.items())
        if error <= low[0] or low[0] == high[0]:
            return low[1] * error / low[0] if low[0] else low[1]
        if error >= high[0]:
            return high[1] * error / high[0]
        if not (low[0] and low[1] and high[1]):  # no logarithm of nothing
            return low[1] + (high[1] - low[1]) * (error - low[0]) / (high[0] - low[0])
        share = log(error / low[0]) / log(high[0] / low[0])
        return low[1] ** (1 - share) * high[1] ** share


@dataclass(slots=True)
class Survey:
    """A measuring on its way. path: where it is written down, as JSON; it stays when it is done.

    candidates: of each matrix that is looked at, the formats it may get. method: rtn or mse, by
    which it is packed. dtype: of scales; None for the source's. on_note: told where nothing can be
    written down.
    """

    source: WeightSource
    tokenizer: Tokenizer
    candidates: Mapping[str, Sequence[QuantFormat]]
    text: Text
    path: Path
    method: str = "mse"
    dtype: str | None = None
    on_note: OnNote | None = None
    _measured: dict[str, dict[QuantFormat, float]] = field(default_factory=dict)
    _errors: dict[str, dict[QuantFormat, float]] = field(default_factory=dict)

    @property
    def windows(self) -> Windows:
        """What of the text is read. Raises OptionError."""
        config = self.source.config
        windows = cut_windows(
            self.tokenizer.encode(self.text.content),
            bos_id=self.tokenizer.bos_id,
            context=min(CONTEXT, config.max_context),
            option="--calibration",
        )
        return Windows(windows.ids[: _most_windows(config)], 0)

    def run(
        self, *, on_progress: OnProgress | None = None, on_look: OnProgress | None = None
    ) -> list[Sensitivity]:
        """Measure every matrix, in the order of `candidates`; what was written down is kept.

        on_look: told how many matrices were packed in every format, and of how many.
        """
        with told_when_stopped("what was measured", self.path):
            self._run(on_progress, on_look)
        return [Sensitivity(n, self._measured[n], self._errors[n]) for n in self.candidates]

    def _run(self, on_progress: OnProgress | None, on_look: OnProgress | None) -> None:
        self._resume()
        keeper = Keeper(self.path.parent, self.on_note)
        wanted = [(n, form) for n in self.candidates for form in self._missing(n)]
        if wanted:
            vocab_size = self.tokenizer.vocab_size
            walk = VariantWalk(self.source, vocab_size, self.windows, self._packed, on_progress)
            for measured in walk.run(wanted):
                for name, form, nats in measured:
                    _require_number(name, form, nats)
                    self._measured.setdefault(name, {})[form] = nats
                keeper.keep(self._write)
        untried = [name for name in self.candidates if self._untried(name)]
        for number, name in enumerate(untried, 1):
            self._look_at(name)
            if on_look is not None:
                on_look(number, len(untried))
        keeper.keep(self._write)

    def probes(self, name: str) -> list[QuantFormat]:
        """Return the formats in which a matrix is measured."""
        width = self.source.shape(name)[-1]
        found = (fitted(QuantFormat(bits, DEFAULT_GROUP_SIZE), width) for bits in PROBES)
        return [form for form in found if form is not None]

    def _missing(self, name: str) -> list[QuantFormat]:
        known = self._measured.get(name, {})
        return [form for form in self.probes(name) if form not in known]

    def _packed(self, name: str, values: mx.array, form: QuantFormat) -> mx.array:
        """Return values (out, in) as they are read after packing, float32."""
        refuse_no_numbers(name, values)
        values = values.astype(DTYPES[self.dtype or self.source.dtype(name)])
        return unpacked(pack_matrix(values, form, self.method), form)

    def _look_at(self, name: str) -> None:
        """Find the error of a matrix's weights in every format, on a sample of its rows."""
        known, forms = self._errors.setdefault(name, {}), self._untried(name)
        values = self._sample(name)
        exact = values.astype(mx.float32)
        unit = mx.max(mx.abs(exact)).item() or 1.0  # squares of large weights would be infinite
        total = float(mx.sum(mx.square(exact / unit))) or 1.0
        for form in forms:
            rest = self._packed(name, values, form) - exact
            error = float(mx.sum(mx.square(rest / unit))) / total
            _require_number(name, form, error)
            known[form] = error

    def _untried(self, name: str) -> list[QuantFormat]:
        known = self._errors.get(name, {})
        return [f for f in (*self.candidates[name], *self.probes(name)) if f not in known]

    def _sample(self, name: str) -> mx.array:
        n_rows, width = self.source.shape(name)
        wanted = max(RUNS, SAMPLE_WEIGHTS // width)
        if wanted >= n_rows:
            return self.source.read(name)
        run = wanted // RUNS
        starts = [(n_rows - run) * number // (RUNS - 1) for number in range(RUNS)]
        return mx.concatenate([self.source.read(name, slice(s, s + run)) for s in starts])

    def _write(self) -> None:
        content = {
            kind: {name: {_key(form): x for form, x in found.items()} for name, found in of.items()}
            for kind, of in (("measured", self._measured), ("errors", self._errors))
        }
        beside = self.path.with_name(f"{self.path.stem}.partial.json")
        beside.write_text(json_text(content), encoding="utf-8")
        beside.replace(self.path)

    def _resume(self) -> None:
        """Read what was written down; a damaged file is none."""
        if not self.path.is_file():
            return
        try:
            content = load_json(self.path, max_bytes=MAX_JSON_BYTES)
            self._measured, self._errors = (
                {
                    name: {_form(key): float(x) for key, x in found.items()}
                    for name, found in content[kind].items()
                }
                for kind in ("measured", "errors")
            )
        except (CheckpointError, KeyError, ValueError, TypeError, AttributeError):
            self._measured, self._errors = {}, {}


def survey_bytes(config: ModelConfig) -> int:
    """Return what measuring takes at most, bytes."""
    context = min(CONTEXT, config.max_context)
    return walk_bytes(config, 4 * _most_windows(config) * context * config.dim)


def _most_windows(config: ModelConfig) -> int:
    return max(1, min(MAX_WINDOWS, WORK // config.parameter_count))


def _require_number(name: str, form: QuantFormat, found: float) -> None:
    """Raise QuantizationError for a loss that is none: nothing could be chosen by it."""
    if not isfinite(found):
        raise QuantizationError(
            f"tensor {name}: what {form.bits} bits lose is no number, because weights or what the "
            "model computes are beyond float32; take --bits in place of --target-bpw, or fetch the "
            "weights again if they are damaged"
        )


def _key(form: QuantFormat) -> str:
    return f"{form.bits}:{form.group_size}"


def _form(key: str) -> QuantFormat:
    bits, _, group_size = key.partition(":")
    return QuantFormat(int(bits), int(group_size))


@dataclass(frozen=True, slots=True)
class SurveyRequest:
    """What to measure on. folder: where surveys are written down, by their keys. Rest: of `run`."""

    text: Text
    folder: Path
    on_progress: OnProgress | None = None
    on_note: OnNote | None = None
    on_look: OnProgress | None = None
