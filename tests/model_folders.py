"""Puts the models of `random_models` on the disk: model directories and Meta checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_llama.config import QuantFormat
from mlx_llama.loading import INDEX_NAME
from mlx_llama.options import ConvertOptions
from mlx_llama_convert import convert_checkpoint, make_plan, open_source
from pth_writer import write_checkpoint
from random_models import (
    SPM_VOCAB,
    Case,
    Weights,
    meta_params,
    meta_weights,
    random_model,
    write_hf_weights,
    write_safetensors,
)
from tiny_tokenizers import tiny_spm, write_spm, write_tiktoken

TINY = Case(100, 2, 1, 64, 1e4, dim=128, n_layers=2, vocab_size=SPM_VOCAB, n_tokens=48)
TINY_SCALED = Case(
    101, 2, 1, 64, 5e5, {"rope_type": "llama3", "factor": 32.0}, dim=128, n_layers=2, is_tied=True,
    n_tokens=48,
)  # fmt: skip


def write_tokenizer(folder: Path, *, is_tiktoken: bool) -> None:
    """Write a tokenizer.model of exactly SPM_VOCAB or TIKTOKEN_VOCAB tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    if is_tiktoken:
        write_tiktoken(folder / "tokenizer.model", merges=())
        return
    missing = SPM_VOCAB - len(tiny_spm().pieces)
    specials = tuple(f"<unused{index}>" for index in range(missing))
    write_spm(folder / "tokenizer.model", tiny_spm(specials=specials))


def write_hf(
    folder: Path,
    case: Case = TINY,
    *,
    change: Callable[[Weights, dict[str, Any]], object] | None = None,
) -> Path:
    """Write a case as a Hugging Face folder; `change` edits weights and config.json before."""
    weights, config = random_model(case)
    if change is not None:
        change(weights, config)
    write_hf_weights(folder, weights, config)
    write_tokenizer(folder, is_tiktoken=case.vocab_size != SPM_VOCAB)
    return folder


def write_meta(folder: Path, case: Case = TINY, *, ranks: int = 1, dtype: str = "float32") -> Path:
    """Write a case as Meta does, split over ranks."""
    is_tiktoken = case.vocab_size != SPM_VOCAB
    weights, _ = random_model(case)
    write_checkpoint(
        folder,
        meta_weights(weights, head_dim=case.head_dim),
        dtype=dtype,
        ranks=ranks,
        embedding_axis=0 if is_tiktoken else 1,
        params=meta_params(case),
    )
    write_tokenizer(folder, is_tiktoken=is_tiktoken)
    return folder


def convert(source: Path, target: Path, **options: Any) -> Path:
    """Convert as the command line does; the options are those of `ConvertOptions`."""
    chosen = ConvertOptions(**options)
    convert_checkpoint(make_plan(open_source(source, chosen), chosen), target, n_threads=2)
    return target


def arrays_of(weights: Mapping[str, Any]) -> dict[str, mx.array]:
    """Return numpy weights as MLX arrays."""
    return {name: mx.array(array) for name, array in weights.items()}


def shard_name(index: int) -> str:
    return f"model-{index + 1:05d}-of-00003.safetensors"


def split(folder: Path, *, with_index: bool = True) -> dict[str, str]:
    """Cut model.safetensors into three files; return the index's weight_map."""
    weights, _ = random_model(TINY)
    names = list(weights)
    weight_map: dict[str, str] = {}
    for index in range(3):
        part = {name: weights[name] for name in names[index::3]}
        write_safetensors(folder / shard_name(index), part)
        weight_map |= dict.fromkeys(part, shard_name(index))
    (folder / "model.safetensors").unlink()
    if with_index:
        write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    content = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(content))


_PARTS = ("weight", "scales", "biases")
_FOUR, _EIGHT = QuantFormat(4, 64), QuantFormat(8, 32)


def _form_of(module: str) -> QuantFormat | None:
    if module in ("lm_head", "model.layers.1.self_attn.k_proj"):
        return None
    return _EIGHT if module.endswith(("embed_tokens", "down_proj", "v_proj")) else _FOUR


def write_as_mlx_lm_does(folder: Path) -> Weights:
    """Write TINY packed, settings by module in config.json; return the unpacked weights."""
    write_hf(folder)
    weights, raw = random_model(TINY)
    entry: dict[str, Any] = {"group_size": _FOUR.group_size, "bits": _FOUR.bits}
    arrays: dict[str, mx.array] = {}
    unpacked: Weights = {}
    for name, array in arrays_of(weights).items():
        module = name.removesuffix(".weight")
        form = _form_of(module) if array.ndim == 2 else None
        if form is None:
            arrays[name], unpacked[name] = array, weights[name]
            entry |= {module: False} if array.ndim == 2 else {}
            continue
        settings: Any = {"group_size": form.group_size, "bits": form.bits}
        packed = mx.quantize(array, **settings)
        arrays |= {f"{module}.{part}": a for part, a in zip(_PARTS, packed, strict=True)}
        unpacked[name] = np.asarray(mx.dequantize(*packed, **settings))
        entry |= {module: settings} if form != _FOUR else {}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "mlx"})
    raw |= {"quantization": entry, "quantization_config": entry}
    (folder / "config.json").write_text(json.dumps(raw))
    return unpacked
