"""A size for the whole model: what each matrix may become, and what it becomes once it is measured.

Takes names and shapes, and what `mlx_llama_quantize.sensitivity` measured; reads no weight.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import mlx_llama
from mlx_llama.config import MODES, QuantFormat
from mlx_llama.errors import OptionError
from mlx_llama.options import ConvertOptions
from mlx_llama.safetensors_writer import entry_nbytes
from mlx_llama_convert.plan import ConversionPlan, make_plan
from mlx_llama_convert.source import SourceModel
from mlx_llama_quantize.allocation import Allocation, Choice, allocate
from mlx_llama_quantize.packing import packed_entries
from mlx_llama_quantize.sensitivity import Sensitivity, Survey, SurveyRequest
from mlx_llama_quantize.texts import Text


@dataclass(frozen=True, slots=True)
class Budget:
    """A source and how large it may become. open_plan: has what is fixed right."""

    source: SourceModel
    options: ConvertOptions
    open_plan: ConversionPlan
    candidates: Mapping[str, Sequence[QuantFormat]]

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, at most."""
        assert self.options.target_bpw is not None, "a budget has one"
        return int(self.options.target_bpw * self.open_plan.config.parameter_count / 8)

    @property
    def fixed_nbytes(self) -> int:
        """Bytes of what has no choice: norms, and matrices that an override means."""
        plan = self.open_plan
        return sum(plan.output_bytes_of(name) for name in plan.forms if name not in self.candidates)

    def stored(self, name: str, form: QuantFormat) -> int:
        """Return the bytes of a matrix in a format."""
        weights = self.source.weights
        dtype = self.options.dtype or weights.dtype(name)
        entries = packed_entries(name, weights.shape(name), dtype, form)
        return sum(entry_nbytes(entry) for entry in entries)

    def key(self, text: Text) -> str:
        """Name what is measured: another source, text or packing has another name."""
        stats = [(str(path), path.stat()) for path in self.source.files]
        job = [
            mlx_llama.__version__,
            [[path, found.st_size, found.st_mtime_ns] for path, found in stats],
            repr(self.source.config),
            text.sha256,
            self.packing,
            self.options.dtype,
        ]
        return hashlib.sha256(json.dumps(job).encode()).hexdigest()[:32]

    @property
    def packing(self) -> str:
        """How scales are chosen while it is measured: rtn or mse."""
        return "rtn" if self.options.method == "rtn" else "mse"


def open_budget(source: SourceModel, options: ConvertOptions) -> Budget:
    """Find out what there is to choose. Raises OptionError for a size that cannot be met."""
    plan = make_plan(source, options)
    groups = (options.group_size,) if options.group_size else MODES["affine"][1]
    spec = plan.spec
    candidates: dict[str, list[QuantFormat]] = {}
    for name, form in plan.forms.items():
        if form is None or spec is None or spec.override_of(name) is not None:
            continue
        width = source.weights.shape(name)[-1]
        fitting = [group for group in groups if width % group == 0] or [form.group_size]
        candidates[name] = [QuantFormat(b, g) for b in MODES["affine"][0] for g in fitting]
    if not candidates:
        raise OptionError(
            f"--target-bpw {options.target_bpw:g}: --override leaves no matrix to choose bits for; "
            "leave one of them out"
        )
    budget = Budget(source, options, plan, candidates)
    least, most = (
        budget.fixed_nbytes
        + sum(
            pick(budget.stored(name, form) for form in forms) for name, forms in candidates.items()
        )
        for pick in (min, max)
    )
    per_weight = 8 / plan.config.parameter_count
    if budget.nbytes < least:
        raise OptionError(
            f"--target-bpw {options.target_bpw:g}: {least * per_weight:.2f} bits a weight are the "
            "fewest, with scales and what is not packed; ask for more"
        )
    if budget.nbytes > most:
        raise OptionError(
            f"--target-bpw {options.target_bpw:g}: {most * per_weight:.2f} bits a weight are the "
            "most that there is to choose; take --bits 8 --group-size 32"
        )
    return budget


@dataclass(frozen=True, slots=True)
class Chosen:
    """Bits that were chosen by measuring, for plan, manifest and picture."""

    target_bpw: float
    text: Text
    n_tokens: int
    sensitivities: Sequence[Sensitivity]
    allocation: Allocation

    def to_json(self) -> dict[str, object]:
        """Return the table of sensitivities and what was made of it."""
        return {
            "target_bits_per_weight": self.target_bpw,
            "text": {
                "name": self.text.name,
                "sha256": self.text.sha256,
                "n_tokens": self.n_tokens,
            },
            "expected_kld": self.allocation.cost,
            "bound_kld": self.allocation.bound,
            "tensors": [
                {
                    "tensor": each.tensor,
                    "measured": {f.describe(): each.measured[f] for f in _by_bits(each.measured)},
                    "chosen": self.allocation.forms[each.tensor].describe(),
                    "expected_kld": each.divergence(self.allocation.forms[each.tensor]),
                }
                for each in self.sensitivities
            ],
        }


def _by_bits(forms: Iterable[QuantFormat]) -> list[QuantFormat]:
    return sorted(forms, key=lambda form: form.bits)


def survey(budget: Budget, request: SurveyRequest) -> ConversionPlan:
    """Measure what packing costs, and return the plan of least divergence within the budget.

    What was measured before, for this or another size, is not measured again.
    """
    found = Survey(
        budget.source.weights,
        budget.source.tokenizer,
        budget.candidates,
        request.text,
        request.folder / f"{budget.key(request.text)}.json",
        method=budget.packing,
        dtype=budget.options.dtype,
        on_note=request.on_note,
    )
    sensitivities = found.run(on_progress=request.on_progress, on_look=request.on_look)
    windows = found.windows
    return settle(budget, sensitivities, request.text, len(windows) * windows.n_scored)


def settle(
    budget: Budget, sensitivities: Sequence[Sensitivity], text: Text, n_tokens: int
) -> ConversionPlan:
    """Return the plan of least divergence within the budget."""
    choices = {
        each.tensor: [
            Choice(form, budget.stored(each.tensor, form), each.divergence(form))
            for form in budget.candidates[each.tensor]
        ]
        for each in sensitivities
    }
    allocation = allocate(choices, budget.nbytes - budget.fixed_nbytes)
    assert budget.options.target_bpw is not None, "a budget has one"
    chosen = Chosen(budget.options.target_bpw, text, n_tokens, sensitivities, allocation)
    plan = make_plan(budget.source, budget.options, forms=allocation.forms)
    return replace(plan, chosen=chosen.to_json())
