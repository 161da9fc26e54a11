"""Whole small checkpoints and model directories, made in code in a fraction of a second."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlx_llama.options import ConvertOptions
from mlx_llama_convert import convert_checkpoint, make_plan, open_source
from pth_writer import tiny_tensors, write_checkpoint
from tiny_tokenizers import BPE_MERGES, tiny_spm, write_spm, write_tiktoken

TIKTOKEN_VOCAB = 256 + len(BPE_MERGES) + 256
_PADDING = -len(tiny_spm().pieces) % 4  # so that four ranks can share the output's rows
SPM = tiny_spm(specials=tuple(f"<pad{number}>" for number in range(_PADDING)))
SPM_VOCAB = len(SPM.pieces)


def meta_params(**changes: Any) -> dict[str, Any]:
    """Return the `params.json` of the weights that `write_meta` writes."""
    params: dict[str, Any] = {
        "dim": 64,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "multiple_of": 32,
        "norm_eps": 1e-5,
        "vocab_size": -1,
    }
    return {**params, **changes}


def write_meta(
    folder: Path,
    *,
    dtype: str = "float32",
    ranks: int = 1,
    is_tiktoken: bool = False,
    tied: bool = False,
    seed: int = 0,
    params: dict[str, Any] | None = None,
    factors: Mapping[str, float] | None = None,
) -> Path:
    """Write a random checkpoint in Meta's layout, dim 64, feed-forward 192; returns the folder.

    factors: of some tensors, by name.
    """
    tensors = tiny_tensors(
        dim=64,
        hidden_dim=192,
        vocab_size=TIKTOKEN_VOCAB if is_tiktoken else SPM_VOCAB,
        tied=tied,
        seed=seed,
    )
    for name, factor in (factors or {}).items():
        tensors[name] *= np.float32(factor)
    theta = {"rope_theta": 500000.0, "use_scaled_rope": True} if is_tiktoken else {}
    write_checkpoint(
        folder,
        tensors,
        dtype=dtype,
        ranks=ranks,
        embedding_axis=0 if is_tiktoken else 1,
        params=meta_params(**theta, **(params or {})),
    )
    if is_tiktoken:
        write_tiktoken(folder / "tokenizer.model")
    else:
        write_spm(folder / "tokenizer.model", SPM)
    return folder


def convert(source: Path, target: Path, *, n_threads: int = 2, **options: Any) -> Path:
    """Convert a checkpoint; options are those of `ConvertOptions`. Returns the target."""
    checked = ConvertOptions(**options)
    convert_checkpoint(
        make_plan(open_source(source, checked), checked), target, n_threads=n_threads
    )
    return target


def write_model(folder: Path, *, kind: str | None = None, **changes: Any) -> Path:
    """Write a model directory; a llama3 kind gets a tiktoken tokenizer. Returns the folder."""
    is_tiktoken = bool(kind and kind.startswith("llama3"))
    options = {name: changes.pop(name) for name in ("bits", "quantize") if name in changes}
    source = write_meta(folder.with_name(folder.name + "-meta"), is_tiktoken=is_tiktoken, **changes)
    return convert(source, folder, kind=kind, **{"quantize": False, **options})
