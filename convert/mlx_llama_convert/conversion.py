"""Carries out a `ConversionPlan`: weights, tokenizer, configuration and manifest in one folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx_llama
from mlx_llama.config import config_to_hf
from mlx_llama.kinds import kind_named
from mlx_llama.loading import INDEX_NAME
from mlx_llama.options import DEFAULT_TEMPERATURE, DEFAULT_TOP_P
from mlx_llama_convert.hashing import FileHashes
from mlx_llama_convert.output import new_directory
from mlx_llama_convert.plan import ConversionPlan
from mlx_llama_convert.safetensors_writer import (
    SafetensorsWriter,
    build_index,
    plan_shards,
    shard_names,
)
from mlx_llama_convert.tokenizer_files import write_tokenizer_files
from mlx_llama_quantize import quantize_weights

MAX_SHARD_BYTES = 5_000_000_000
MANIFEST_NAME = "manifest.json"
# Beside the weights: tokenizer files and JSON, 30 MB for Llama 3.
OTHER_BYTES = 40_000_000

OnProgress = Callable[[int, int, str], None]  # bytes written, bytes to write, tensor


def convert_checkpoint(
    plan: ConversionPlan,
    target: Path,
    *,
    n_threads: int,
    force: bool = False,
    command: Sequence[str] = (),
    on_progress: OnProgress | None = None,
) -> None:
    """Write the model directory `target`; it appears whole or not at all.

    force: replace a model directory that is there. command: what the user typed, for the manifest.
    Raises OutputError and CheckpointError; whatever is raised, nothing is left behind.
    """
    needed = plan.output_bytes + OTHER_BYTES
    with (
        new_directory(target, force=force, needed_bytes=needed) as folder,
        FileHashes(plan.source.files) as hashes,
    ):
        _write_weights(plan, folder, n_threads, on_progress)
        kind = kind_named(plan.config.kind)
        write_tokenizer_files(
            plan.source.tokenizer, kind, folder, max_context=plan.config.max_context
        )
        _write_json(folder / "config.json", _config_json(plan))
        _write_json(folder / "generation_config.json", _generation_json(plan))
        _write_json(folder / MANIFEST_NAME, _manifest(plan, hashes.result(), command))


def _write_weights(
    plan: ConversionPlan, folder: Path, n_threads: int, on_progress: OnProgress | None
) -> None:
    shards = plan_shards(plan.entries, max_shard_bytes=MAX_SHARD_BYTES)
    pieces = quantize_weights(
        plan.source.weights, plan.forms, dtype=plan.options.dtype, n_threads=n_threads
    )
    total, done = plan.output_bytes, 0
    with ExitStack() as stack:
        writers = {}
        for name, entries in zip(shard_names(len(shards)), shards, strict=True):
            writer = SafetensorsWriter(folder / name, entries, metadata={"format": "mlx"})
            writers |= dict.fromkeys((entry[0] for entry in entries), stack.enter_context(writer))
        stack.callback(pieces.close)  # pyright: ignore[reportAttributeAccessIssue]
        for name, piece in pieces:
            writers[name].write(name, piece)
            done += piece.nbytes
            if on_progress is not None:
                on_progress(done, total, name)
    if len(shards) > 1:
        _write_json(folder / INDEX_NAME, build_index(shards))


def _config_json(plan: ConversionPlan) -> dict[str, Any]:
    own = {
        "version": mlx_llama.__version__,
        "kind": plan.config.kind,
        "kind_reason": plan.source.kind.reason,
        "rope_factor_reason": plan.source.rope,
    }
    return {**config_to_hf(plan.config), "mlx_llama": own}


def _generation_json(plan: ConversionPlan) -> dict[str, Any]:
    """Return the source's recommendation, or Meta's own, with our stop tokens."""
    eos = [*plan.config.eos_ids]
    ids = {"bos_token_id": plan.config.bos_id, "eos_token_id": eos if len(eos) > 1 else eos[0]}
    if plan.source.generation is not None:
        return {**plan.source.generation, **ids}
    return {
        **ids,
        "do_sample": True,
        "temperature": DEFAULT_TEMPERATURE,
        "top_p": DEFAULT_TOP_P,
    }


def _manifest(
    plan: ConversionPlan, hashes: dict[Path, str], command: Sequence[str]
) -> dict[str, Any]:
    """Return where the directory comes from and what was decided."""
    scaling = plan.config.rope_scaling
    return {
        "tool": "mlx-llama",
        "version": mlx_llama.__version__,
        "mlx_version": version("mlx"),
        "command": [*command],
        "source": {
            "layout": plan.source.layout,
            "files": [
                {"name": path.name, "bytes": path.stat().st_size, "sha256": hashes[path]}
                for path in plan.source.files
            ],
        },
        "kind": {"value": plan.source.kind.value, "reason": plan.source.kind.reason},
        "rope_factor": None
        if scaling is None
        else {"value": scaling.factor, "reason": plan.source.rope},
        "parameters": plan.config.parameter_count,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "matrices": plan.format_counts,
        "notes": [*plan.notes],
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
