"""`mlx-llama show`: what a model directory is, without loading its weights."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from mlx_llama.options import PLAIN_BITS, ContextOptions, LoadOptions
from mlx_llama.strict_json import MAX_JSON_BYTES, json_text, load_json
from mlx_llama_apps import paths
from mlx_llama_apps.flags import LoadFlags, PlanFlags, given
from mlx_llama_apps.inference import slower
from mlx_llama_apps.terminal import size, visible, write_line

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_llama.config import ModelConfig
    from mlx_llama.loading import ModelDirectory


LINE_ENDS = {ord(char): " " for char in "\n\u2028\u2029"}
MAX_FILE_BYTES = 1 << 63


def show(
    model: str,
    /,
    *,
    as_json: Annotated[bool, Parameter(name="--json")] = False,
    plan_flags: PlanFlags | None = None,
    load_flags: LoadFlags | None = None,
) -> None:
    """Say what a model directory holds and how it will run.

    Parameters
    ----------
    model
        a model directory, the name of one in the models folder, or "bundled", the guide in the box
    as_json
        print one JSON object
    """
    from mlx_llama.loading import open_model_directory

    options = ContextOptions(**given(plan_flags)), LoadOptions(**given(load_flags))
    facts = model_facts(open_model_directory(paths.resolve_model(model)), *options)
    if as_json:
        print(visible(json_text(facts, indent=2)))
        return
    for name, value in _rows(facts):
        # The files' own texts stand in a value: they end no line and reach no terminal's controls.
        write_line(f"{name:<14}{visible(value.translate(LINE_ENDS))}", sys.stdout)


def model_facts(
    directory: ModelDirectory, context_options: ContextOptions, load_options: LoadOptions
) -> dict[str, Any]:
    """Collect what `show` prints, as JSON holds it; sizes in bytes."""
    from mlx_llama import ops
    from mlx_llama.cache import KVBits
    from mlx_llama.dtypes import name_of
    from mlx_llama.kinds import kind_named
    from mlx_llama.memory import cache_bytes_per_token

    config = directory.config_with(load_options)
    scaling, formats = config.rope_scaling, directory.format_counts
    dtype, bits = directory.dtype_with(load_options), context_options.key_value_bits
    activations = directory.activations_with(load_options)
    return {
        "path": str(directory.path),
        "kind": {
            "value": directory.kind.value,
            "reason": directory.own.get("kind_reason") or directory.kind.reason,
        },
        "prompt_format": kind_named(config.kind).prompt,
        "parameters": config.parameter_count,
        "layers": config.n_layers,
        "dim": config.dim,
        "hidden_dim": config.hidden_dim,
        "heads": config.n_heads,
        "kv_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "vocabulary": config.vocab_size,
        "tied": config.tied,
        "context": config.max_context,
        "rope": {
            "theta": config.rope_theta,
            "type": "default" if scaling is None else scaling.rope_type,
            "factor": None if scaling is None else scaling.factor,
            "reason": _rope_reason(directory, load_options),
        },
        "matrices": formats,
        "bits_per_weight": round(8 * directory.weight_bytes / config.parameter_count, 4),
        "weight_bytes": directory.weight_bytes,
        "kv_bytes_per_token": cache_bytes_per_token(config, KVBits(*bits), dtype),
        "memory": _memory_facts(directory, context_options, config, dtype),
        "tokenizer": directory.tokenizer.family,
        "source_files": _source_files(directory.path),
        "backend": ops.backend(),
        "kernels": {
            "summary": ops.native_summary(activations),
            "missing": ops.slow_reason(),
            "blas": ops.blas_name(),
            "formats": directory.native_formats,
            "other_formats": directory.other_formats,
        },
        "dtype": name_of(dtype),
        "activations": activations,
    }


def model_rows(
    directory: ModelDirectory, context: ContextOptions, options: LoadOptions
) -> list[tuple[str, str]]:
    """Return what `show` says of the model itself, as name and value; fit for a terminal."""
    rows = _rows(model_facts(directory, context, options))
    return [
        (name, visible(value.translate(LINE_ENDS)))
        for name, value in rows
        if name not in ("memory", "fits")
    ]


def _rope_reason(directory: ModelDirectory, options: LoadOptions) -> Any:
    """Say why the RoPE factor is what it is; None where there is none, or no reason is known."""
    if options.rope_linear is not None:
        return "--rope-linear"
    if directory.config.rope_scaling is None:
        return None
    return directory.own.get("rope_factor_reason")


def _memory_facts(
    directory: ModelDirectory, options: ContextOptions, config: ModelConfig, dtype: mx.Dtype
) -> dict[str, Any]:
    """Say what running the model takes, and which contexts would fit."""
    from mlx_llama.context import plan_context
    from mlx_llama.dtypes import name_of
    from mlx_llama.ops import cache_dtype

    context = plan_context(options, config, dtype=dtype, weights=directory.loaded_bytes(dtype))
    return {
        **asdict(context.plan),
        "total": context.plan.total,
        "fits": context.plan.fits,
        "context_reason": context.reason,
        "kv_bits": str(context.bits),
        "kv_dtype": name_of(cache_dtype(dtype, context.bits)),
        "largest_contexts": context.demand.largest_contexts(context.plan.found),
    }


def _source_files(path: Path) -> list[dict[str, Any]]:
    """Return the files that the directory was made of, by its manifest."""
    if not (path / "manifest.json").is_file():
        return []
    source = load_json(path / "manifest.json", max_bytes=MAX_JSON_BYTES).get("source")
    files = source.get("files") if isinstance(source, dict) else None
    return [f for f in files if isinstance(f, dict)] if isinstance(files, list) else []


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    rope = facts["rope"]
    scaling = ""
    if rope["factor"] is not None:
        reason = f" ({rope['reason']})" if rope["reason"] else ""
        scaling = f", {rope['type']} scaling, factor {rope['factor']:g}{reason}"
    matrices = ", ".join(f"{count} × {how}" for how, count in facts["matrices"].items())
    rows = [
        ("model", facts["path"]),
        ("kind", f"{facts['kind']['value']} ({facts['kind']['reason']})"),
        ("prompt", facts["prompt_format"]),
        (
            "shape",
            f"{facts['parameters'] / 1e6:,.2f} M parameters, {facts['layers']} layers, dim "
            f"{facts['dim']}, feed-forward {facts['hidden_dim']}, {facts['heads']} heads, "
            f"{facts['kv_heads']} key/value heads of {facts['head_dim']}",
        ),
        ("vocabulary", f"{facts['vocabulary']} ({facts['tokenizer']})"),
        ("output", "the embedding (tied)" if facts["tied"] else "its own matrix"),
        ("context", f"{facts['context']} tokens, {facts['kv_bytes_per_token']:,} bytes each"),
        ("RoPE", f"theta {rope['theta']:g}{scaling}"),
        ("matrices", matrices),
        (
            "weights",
            f"{size(facts['weight_bytes'])}, {facts['bits_per_weight']:.2f} bits per weight",
        ),
        ("runs on", f"{facts['backend']}, {facts['dtype']}"),
        ("kernels", _kernels(facts)),
        *_memory_rows(facts["memory"], facts["context"]),
    ]
    for file in facts["source_files"]:
        digest = f"sha256 {str(file.get('sha256', ''))[:16]}…"
        rows.append(("made of", f"{file.get('name')}, {_file_size(file)}, {digest}"))
    return rows


def _kernels(facts: dict[str, Any]) -> str:
    kernels = facts["kernels"]
    if kernels["missing"] is not None:
        return f"{kernels['summary']}; {slower(kernels['blas'])}"
    others = ", ".join(kernels["other_formats"])
    if facts["backend"] == "cpu" and others:
        return f"{kernels['summary']}; MLX's own operations, slower, for {others}"
    return kernels["summary"]


def _memory_rows(memory: dict[str, Any], most: int) -> list[tuple[str, str]]:
    found = memory["found"]
    free = "" if found is None else f" of {size(found)} free"
    doubt = "" if memory["is_proven"] else " (unproven on this device)"
    misfit = "" if memory["fits"] else ": does not fit"
    kept = memory["kv_dtype"]
    if memory["kv_bits"] not in PLAIN_BITS:
        kept = f"{memory['kv_bits']} bits"
    return [
        (
            "memory",
            f"{size(memory['total'])}{free} at context {memory['context']} "
            f"({memory['context_reason']}){doubt}{misfit}: weights {size(memory['weights'])}, "
            f"cache {size(memory['cache'])} ({kept}), workspace "
            f"{size(memory['workspace'] + memory['scratch'])}",
        ),
        ("fits", f"contexts up to {_longest(memory['largest_contexts'], most)}"),
    ]


def _longest(contexts: Mapping[str, int], most: int) -> str:
    """Say which contexts fit by the bits of the cache; at once where all reach the model's most."""
    if len(contexts) > 1 and set(contexts.values()) == {most}:
        *bits, last = contexts
        return f"{most}, the model's longest, with --kv-bits {', '.join(bits)} or {last}"
    return ", ".join(f"{n} with --kv-bits {bits}" for bits, n in contexts.items())


def _file_size(file: dict[str, Any]) -> str:
    """Say how large a manifest's file is; a manifest may hold anything."""
    nbytes = file.get("bytes")
    if type(nbytes) is int and 0 <= nbytes < MAX_FILE_BYTES:
        return size(nbytes)
    return "size unknown"
