"""What a conversion needs of the machine, and what the machine has."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import mlx.core as mx

from mlx_llama import ops
from mlx_llama.config import QuantFormat
from mlx_llama.dtypes import name_of
from mlx_llama.errors import OutputError
from mlx_llama.memory import available_memory
from mlx_llama.safetensors_writer import entry_nbytes
from mlx_llama_convert.plan import ConversionPlan
from mlx_llama_quantize import packed_entries
from mlx_llama_quantize.calibration import calibration_bytes, record_bytes
from mlx_llama_quantize.certificate import certificate_bytes
from mlx_llama_quantize.packing import BLOCK_BYTES, pack_matrix
from mlx_llama_quantize.sensitivity import survey_bytes
from mlx_llama_quantize.subject import dense_bytes

PROGRAM_BYTES = 200_000_000  # Python, MLX and a tokenizer
# A block as read, as float32 inside MLX, and packed; as many blocks wait as there are threads.
BYTES_PER_BLOCK = 5 * BLOCK_BYTES
# Beside the weights: tokenizer files and JSON, 30 MB for Llama 3.
OTHER_BYTES = 40_000_000
_SAMPLE_SHAPE = (1024, 2048)


@dataclass(frozen=True, slots=True)
class Needs:
    """What a conversion takes and finds; bytes, and seconds. memory_found: None if unknown.

    kept: what is written down meanwhile on another disk than the target's: where, and how much.
    """

    memory: int
    memory_found: int | None
    disk: int
    disk_found: int
    seconds: float
    kept: tuple[Path, int] | None = None

    def check(self, target: Path) -> None:
        """Raise OutputError, with both numbers, for a machine on which it cannot work."""
        if self.memory_found is not None and self.memory_found < self.memory:
            raise OutputError(
                f"{self.memory_found / 1e9:.2f} GB of memory are free, {self.memory / 1e9:.2f} GB "
                "needed; end another program"
            )
        _check_room(target.parent, self.disk, self.disk_found, "choose another --output")
        if self.kept is not None:
            folder, nbytes = self.kept
            free = shutil.disk_usage(_existing(folder)).free
            _check_room(folder, nbytes, free, "name another folder in MLX_LLAMA_HOME")


def _check_room(folder: Path, needed: int, found: int, otherwise: str) -> None:
    if found < needed:
        raise OutputError(
            f"{folder}: {found / 1e9:.2f} GB free, {needed / 1e9:.2f} GB needed; make room or "
            f"{otherwise}"
        )


def needs_of(
    *,
    weights: int,
    output_bytes: int,
    form: QuantFormat | None,
    target: Path,
    n_threads: int,
    method: str = "rtn",
    stage_bytes: int = 0,
    kept: tuple[Path, int] | None = None,
) -> Needs:
    """Work out what writing `output_bytes` of so many weights takes; packs a sample to time it.

    stage_bytes: memory of the largest stage beside packing; those are not timed. kept: the folder
    of what is written down meanwhile, and how much that is.
    """
    is_one_disk = kept and _existing(kept[0]).stat().st_dev == _existing(target).stat().st_dev
    return Needs(
        memory=PROGRAM_BYTES + max(stage_bytes, (2 * n_threads + 2) * BYTES_PER_BLOCK),
        memory_found=available_memory(),
        disk=disk_bytes(output_bytes) + (kept[1] if kept and is_one_disk else 0),
        disk_found=shutil.disk_usage(_existing(target)).free,
        seconds=weights * _seconds_per_weight(form, method, n_threads),
        kept=None if is_one_disk else kept,
    )


def stage_bytes(
    plan: ConversionPlan, *, is_surveyed: bool, is_calibrated: bool, is_compared: bool
) -> int:
    """Return what the largest of a plan's stages takes at most beside packing, bytes."""
    found = [0]
    if is_surveyed:
        found.append(survey_bytes(plan.config))
    if is_calibrated:
        found.append(calibration_bytes(plan.source.weights, plan.options.method))
    if is_compared:
        dtype = ops.compute_dtype(plan.config.dtype, is_quantized=True, asked=None)
        loaded = dense_bytes(plan.source.weights, dtype)
        found.append(certificate_bytes(plan.config, loaded, _loaded_bytes(plan, dtype)))
    return max(found)


def walk_bytes(plan: ConversionPlan) -> int:
    """Return what a plan's calibration writes down at most, bytes."""
    return record_bytes(plan.source.weights, plan.options.method, plan.output_bytes)


def _loaded_bytes(plan: ConversionPlan, dtype: mx.Dtype) -> int:
    """Return what the result takes in memory, scales and dense tensors in a dtype."""
    if plan.is_open:  # scale and bias take a bit more of each weight, in groups of 32
        return int(((plan.options.target_bpw or 0) + 1) * plan.config.parameter_count / 8)
    name, weights = name_of(dtype), plan.source.weights
    entries = (
        entry
        for tensor, form in plan.forms.items()
        for entry in packed_entries(tensor, weights.shape(tensor), name, form)
    )
    return sum(entry_nbytes(entry) for entry in entries)


def disk_bytes(output_bytes: int) -> int:
    """Return the disk space to ask for: a tenth more than the weights, and the other files."""
    return output_bytes + output_bytes // 10 + OTHER_BYTES


def _existing(path: Path) -> Path:
    """Return the nearest folder above that exists."""
    path = path.absolute()
    return path if path.is_dir() else _existing(path.parent)


def _seconds_per_weight(form: QuantFormat | None, method: str, n_threads: int) -> float:
    """Time packing a sample, or copying where nothing is packed, with so many threads."""
    sample = mx.ones(_SAMPLE_SHAPE, dtype=mx.bfloat16, stream=mx.cpu)
    mx.eval(sample)
    started = perf_counter()
    if form is None:
        mx.eval(mx.array(sample, dtype=mx.float32))
    else:
        with mx.stream(mx.cpu):
            pack_matrix(sample, form, "rtn" if method == "rtn" else "mse")
    is_shared = form is not None and method == "rtn" and ops.packs_by_threads(form)
    return (perf_counter() - started) / sample.size / (1 if is_shared else n_threads)
