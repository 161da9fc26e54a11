"""What a conversion will do, complete and checked before a weight is read.

Takes a `SourceModel` and `ConvertOptions`, returns a `ConversionPlan`; pure. `--dry-run` shows
exactly this.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from mlx_llama.config import ModelConfig, QuantFormat
from mlx_llama.errors import OptionError
from mlx_llama.kinds import kind_named
from mlx_llama.llama import stop_ids
from mlx_llama.options import ConvertOptions
from mlx_llama.safetensors_writer import Entry, entry_nbytes
from mlx_llama.weights import count_formats, hf_module, is_matrix
from mlx_llama_convert.source import SourceModel
from mlx_llama_quantize import QuantSpec, packed_entries
from mlx_llama_quantize.spec import CLASSES, DEFAULT_GROUP_SIZE, Override, mode_format, tensor_class

# Parameters: large enough to be used for its answers, small enough to suffer from 4 bits.
SMALL_MODEL = (100_000_000, 2_000_000_000)


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """One conversion.

    config: of the result. forms: by Meta's name, in writing order, None for a tensor that is not
    packed. notes: what the user should know before it starts. spec: what was asked for; None
    without quantization. chosen: how bits were chosen for a size, as the manifest has it.
    """

    source: SourceModel
    options: ConvertOptions
    config: ModelConfig
    forms: Mapping[str, QuantFormat | None]
    notes: tuple[str, ...]
    spec: QuantSpec | None = None
    chosen: Mapping[str, Any] | None = None

    @property
    def is_open(self) -> bool:
        """Whether bits are still to be chosen by measuring; forms are then no more than allowed."""
        return self.options.target_bpw is not None and self.chosen is None

    def entries_of(self, name: str) -> list[Entry]:
        """Return what one tensor becomes: (Hugging Face name, dtype, shape) each."""
        weights = self.source.weights
        dtype = self.options.dtype or weights.dtype(name)
        return packed_entries(name, weights.shape(name), dtype, self.forms[name])

    def output_bytes_of(self, name: str) -> int:
        """Return the bytes that one tensor becomes."""
        return sum(entry_nbytes(entry) for entry in self.entries_of(name))

    @property
    def source_bytes(self) -> int:
        """Bytes of the weights that will be read."""
        return sum(self.source.weights.nbytes(name) for name in self.forms)

    @property
    def output_bytes(self) -> int:
        """Bytes of the weights that will be written."""
        return sum(self.output_bytes_of(name) for name in self.forms)

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for each parameter, scales included."""
        return 8 * self.output_bytes / self.config.parameter_count

    @property
    def format_counts(self) -> dict[str, int]:
        """Number of matrices by how they are stored, such as "4 bits, group 64"."""
        return self._count(name for name in self.forms if is_matrix(name))

    @property
    def policy(self) -> dict[str, dict[str, int]]:
        """The same for each class of tensor: attention, feed-forward, embedding, head."""
        classes = {name: tensor_class(name, is_tied=self.config.tied) for name in self.forms}
        counted = {
            each: self._count(name for name, found in classes.items() if found == each)
            for each in CLASSES
        }
        return {each: counts for each, counts in counted.items() if counts}

    def _count(self, names: Iterable[str]) -> dict[str, int]:
        return count_formats(
            (self.forms[name], self.options.dtype or self.source.weights.dtype(name))
            for name in names
        )


def make_plan(
    source: SourceModel,
    options: ConvertOptions,
    *,
    forms: Mapping[str, QuantFormat] = MappingProxyType({}),
) -> ConversionPlan:
    """Decide every tensor's format and the result's configuration.

    forms: what was chosen by measuring, which goes before what the options say.
    Raises OptionError for a setting that could not take effect.
    """
    weights = source.weights
    spec = _spec(source, options, forms)
    wanted = {n: spec.format_of(n, weights.shape(n)) if spec else None for n in weights.names()}
    found = {name: forms.get(name, form) for name, form in wanted.items()}
    if spec:
        _check(spec, options, found)
    return ConversionPlan(
        source=source,
        options=options,
        config=_config(source, options, spec, found),
        forms=found,
        notes=(*source.notes, *(_notes(source, spec, found) if spec and not forms else [])),
        spec=spec,
    )


def _check(
    spec: QuantSpec, options: ConvertOptions, forms: Mapping[str, QuantFormat | None]
) -> None:
    """Refuse what could not take effect."""
    if unused := spec.unused(forms):
        raise OptionError(
            f"--override {unused[0]}: means no matrix; take a class ({', '.join(CLASSES)}) or a "
            "name such as layers.0.attention.wq or model.layers.0.*, with * and ?"
        )
    if all(spec.wanted(name) is None for name in forms):
        raise OptionError(
            "--override: leaves every matrix as it is, so that nothing is packed; leave it out, or "
            "take convert with --no-quantize"
        )
    if not any(forms.values()):
        raise OptionError(
            "--bits: no matrix has a width that a group of 32 divides, none can be packed; "
            "convert it with --no-quantize"
        )
    if options.method != "rtn" and not any(f and f.mode == "affine" for f in forms.values()):
        raise OptionError(
            f"--method {options.method}: mode {options.mode} has one way to choose its scales; "
            "take --method rtn"
        )


def _spec(
    source: SourceModel, options: ConvertOptions, chosen: Mapping[str, QuantFormat]
) -> QuantSpec | None:
    if not options.quantize:
        if options.group_size is not None:
            raise OptionError(
                "--group-size: does nothing with --no-quantize; leave one of them out"
            )
        return None
    if options.target_bpw is not None:
        for option, is_given in (
            ("--bits", options.bits is not None),
            ("--mode", options.mode != "affine"),
        ):
            if is_given:
                raise OptionError(f"{option}: --target-bpw chooses it; leave one of them out")
    form = mode_format(options.mode, options.bits, options.group_size)
    if chosen:  # what most have is the default, and the others are the exceptions
        form = Counter(chosen.values()).most_common(1)[0][0]
    group_size = options.group_size or DEFAULT_GROUP_SIZE
    overrides = tuple(Override.parse(o, group_size=group_size) for o in options.override)
    return QuantSpec(form.bits, form.group_size, form.mode, overrides, is_tied=source.config.tied)


def _config(
    source: SourceModel,
    options: ConvertOptions,
    spec: QuantSpec | None,
    forms: Mapping[str, QuantFormat | None],
) -> ModelConfig:
    overrides: dict[str, QuantFormat | None] = {}
    if spec:
        overrides = {
            hf_module(name): form
            for name, form in forms.items()
            if is_matrix(name) and form != spec.default
        }
    stops = stop_ids(kind_named(source.config.kind), source.tokenizer, source.config.eos_ids)
    return replace(
        source.config,
        dtype=options.dtype or source.config.dtype,
        quantization=spec.default if spec else None,
        overrides=overrides,
        bos_id=source.tokenizer.bos_id,
        eos_ids=tuple(sorted(stops)),
    )


def _notes(
    source: SourceModel, spec: QuantSpec, forms: Mapping[str, QuantFormat | None]
) -> list[str]:
    notes: list[str] = []
    if spec.bits <= 4 and SMALL_MODEL[0] <= source.config.parameter_count <= SMALL_MODEL[1]:
        notes.append(
            f"{spec.bits} bits cost a small model much (Meta measured 49.3 to 43.3 on MMLU for "
            "Llama 3.2 1B, activations in 8 bits too): --bits 8 loses little, --group-size 32 less"
        )
    odd = Counter(
        (source.weights.shape(name)[-1], wanted.group_size, form)
        for name, form in forms.items()
        if (wanted := spec.wanted(name)) and form != wanted
    )
    for (width, group_size, form), count in odd.items():
        number = f"{count} matrices" if count > 1 else "1 matrix"
        how = "not packed" if form is None else f"packed in groups of {form.group_size}"
        notes.append(f"{number} of width {width} {how}: {group_size} does not divide it")
    return notes
