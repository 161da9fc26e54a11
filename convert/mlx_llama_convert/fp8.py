"""Meta's FP8 release of Llama 3.1 405B: float8 weights, their scales in files of their own.

Takes the references of every rank, returns the same with float8 matrices read as bfloat16. Each
rank has scales for its own rows, w2's ranks too, which hold columns: so this happens before ranks
are merged. Knows nothing of merging.

Source: meta-llama/llama-models, `models/llama3/quantization/loader.py` and `quantize_impls.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_llama.errors import CheckpointError
from mlx_llama.tensor_ref import TensorRef
from mlx_llama_convert.pth import open_pth
from mlx_llama_convert.tensors import WEIGHT_DTYPES, LogicalTensor

FLOAT8 = "float8_e4m3fn"
_SCALED = re.compile(r"layers\.([0-9]+)\.(feed_forward\.w[123])\.weight")


@dataclass(frozen=True, slots=True)
class ScaledTensor:
    """A float8 matrix with one scale for each row, read as bfloat16."""

    codes: TensorRef
    scales: TensorRef

    @property
    def name(self) -> str:
        """Name in the files."""
        return self.codes.name

    @property
    def dtype(self) -> str:
        """What the weights were before they were packed."""
        return "bfloat16"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    @property
    def path(self) -> Path:
        """File of the codes."""
        return self.codes.path

    def read(self, rows: slice | None = None) -> mx.array:
        """Return codes times scales, multiplied in float32 and rounded once to bfloat16."""
        scales = self.scales.read(rows).astype(mx.float32).reshape(-1, 1)
        if not bool(mx.all(mx.isfinite(scales)).item()):
            raise CheckpointError(
                f"{self.scales.path}: {self.scales.name!r} holds scales that are no numbers: "
                "damaged, download it again"
            )
        values = mx.from_fp8(self.codes.read(rows), dtype=mx.float32)
        weights = (values * scales).astype(mx.bfloat16)
        mx.eval(weights)
        return weights


@dataclass(frozen=True, slots=True)
class Dequantized:
    """The ranks with their scales applied, the scales' files, and what the user should know."""

    ranks: list[Mapping[str, LogicalTensor]]
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()


def apply_scales(folder: Path, ranks: Sequence[Mapping[str, TensorRef]]) -> Dequantized:
    """Find the scales of every float8 feed-forward matrix; a checkpoint without any is unchanged.

    Raises: CheckpointError when a file or a scale is missing or does not fit its matrix.
    """
    float8 = [[ref for ref in rank.values() if _is_scaled(ref)] for rank in ranks]
    if not any(float8):
        stray = sorted(path.name for path in folder.glob("fp8_scales_*.pt"))
        notes = (f"no weight is float8: {stray[0]} and its like are not used",) if stray else ()
        return Dequantized([*ranks], notes=notes)
    scaled: list[Mapping[str, LogicalTensor]] = []
    files, n_unused = [], 0
    for number, (rank, refs) in enumerate(zip(ranks, float8, strict=True)):
        path = folder / f"fp8_scales_{number}.pt"
        if not path.is_file():
            raise CheckpointError(
                f"{path}: missing; the float8 weights of {refs[0].path.name if refs else folder} "
                "have their scales in it, download it too"
            )
        scales = open_pth(path)
        scaled.append({**rank, **{ref.name: _scaled(ref, scales, path, number) for ref in refs}})
        files.append(path)
        n_unused += len(scales) - len(refs)
    notes = ["float8 weights are read as bfloat16, each rank's rows with its own scales"]
    if n_unused:
        notes.append(f"{n_unused} of the scales belong to weights that are not float8: not used")
    return Dequantized(scaled, tuple(files), tuple(notes))


def _is_scaled(ref: TensorRef) -> bool:
    return ref.dtype == FLOAT8 and bool(_SCALED.fullmatch(ref.name))


def _scaled(
    codes: TensorRef, scales: Mapping[str, TensorRef], path: Path, rank: int
) -> ScaledTensor:
    match = _SCALED.fullmatch(codes.name)
    assert match is not None, "apply_scales passes feed-forward matrices only"
    key = f"{match[1]}_{match[2]}_{rank}"
    if key not in scales:
        raise CheckpointError(
            f"{path}: {key!r} is missing, the scales of {codes.name} in {codes.path.name}; the "
            "file belongs to another rank or checkpoint"
        )
    found, rows = scales[key], codes.shape[0] if codes.shape else 0
    if found.dtype not in WEIGHT_DTYPES or found.shape not in ((rows,), (rows, 1)):
        raise CheckpointError(
            f"{path}: {key!r} is {found.dtype} {found.shape}, expected one number for each of "
            f"the {rows} rows of {codes.name}"
        )
    return ScaledTensor(codes, found)
