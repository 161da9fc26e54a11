"""Hugging Face's layout: `config.json`, safetensors with or without an index, a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_llama.config import ModelConfig, config_from_hf
from mlx_llama.errors import CheckpointError, OptionError, UnsupportedModelError
from mlx_llama.kinds import decide_rope_factor
from mlx_llama.loading import (
    GENERATION_NAME,
    MAX_JSON_BYTES,
    decide_folder_kind,
    open_folder_tokenizer,
    open_shards,
    read_generation_config,
    recorded_stop_ids,
)
from mlx_llama.options import ConvertOptions
from mlx_llama.sampling import sampling_defaults
from mlx_llama.strict_json import load_json
from mlx_llama.tensor_ref import TensorRef
from mlx_llama.tokenizer import Tokenizer
from mlx_llama.weights import EMBEDDING, OUTPUT, meta_name
from mlx_llama_convert.shards import LogicalTensor, equal_content
from mlx_llama_convert.source import CheckpointWeights, SourceModel, check_vocabulary


def open_huggingface(
    folder: Path, options: ConvertOptions, *, name: str | None = None
) -> SourceModel:
    """Describe a folder in Hugging Face's layout; name: of the model, beside the folder's."""
    raw = load_json(folder / "config.json", max_bytes=MAX_JSON_BYTES)
    if raw.get("quantization") or raw.get("quantization_config"):
        raise UnsupportedModelError(
            f"{folder}: already quantized; packing it again would lose more, take the original"
        )
    refs = open_shards(folder)
    tensors = _logical(folder, refs)
    is_tied = _decide_tied(folder, raw, tensors)
    config = config_from_hf({**raw, "tie_word_embeddings": is_tied}, kind="llama2", is_tied=None)
    tokenizer = open_folder_tokenizer(folder, n_rows=config.vocab_size)
    check_vocabulary(tokenizer, config.vocab_size, is_padded=True)
    kind = decide_folder_kind(folder, raw, config, tokenizer, flag=options.kind, name=name)
    config, rope = _with_rope_factor(config, options)
    generation = read_generation_config(folder)
    # Refused here what would be written into a directory that does not load.
    sampling_defaults(generation or {}, where=str(folder / GENERATION_NAME))
    config = replace(
        config,
        kind=kind.value,
        dtype=tensors[EMBEDDING].dtype,
        bos_id=None,
        eos_ids=recorded_stop_ids(folder, raw, generation, vocab_size=config.vocab_size),
    )
    files = [*sorted({ref.path for ref in refs.values()}), folder / "config.json", tokenizer.path]
    return SourceModel(
        path=folder,
        layout="Hugging Face checkpoint, safetensors",
        files=(*files, *([] if generation is None else [folder / GENERATION_NAME])),
        config=config,
        kind=kind,
        rope=rope,
        tokenizer=tokenizer,
        weights=CheckpointWeights(config, tensors, is_interleaved=False),
        generation=generation,
        notes=_notes(config, tokenizer),
    )


def _notes(config: ModelConfig, tokenizer: Tokenizer) -> tuple[str, ...]:
    notes = ["the output is the embedding (tied)"] if config.tied else []
    if n_unnamed := config.vocab_size - tokenizer.vocab_size:
        notes.append(
            f"{n_unnamed} rows of the embedding have no token in {tokenizer.path.name}; only those "
            "that end an answer are ever chosen"
        )
    return tuple(notes)


def _logical(folder: Path, refs: Mapping[str, TensorRef]) -> dict[str, LogicalTensor]:
    tensors: dict[str, LogicalTensor] = {}
    for hf_name, ref in refs.items():
        name = meta_name(hf_name)
        if name is None:
            raise UnsupportedModelError(f"{folder}: tensor {hf_name} is quantized; not converted")
        tensors[name] = LogicalTensor(name, (ref,), None)
    if EMBEDDING not in tensors:
        raise CheckpointError(f"{folder}: model.embed_tokens.weight is missing; not a whole model")
    return tensors


def _decide_tied(folder: Path, raw: Mapping[str, Any], tensors: dict[str, LogicalTensor]) -> bool:
    """Decide from the weights whether the output is the embedding, and check config.json."""
    said = raw.get("tie_word_embeddings")
    if OUTPUT not in tensors:
        if said is False:
            raise CheckpointError(
                f"{folder}: lm_head.weight is missing, but config.json says it is not tied"
            )
        return True
    if equal_content(tensors[OUTPUT], tensors[EMBEDDING]):
        del tensors[OUTPUT]
        return True
    if said:
        raise CheckpointError(
            f"{folder}: config.json says tie_word_embeddings, but lm_head.weight differs from "
            "model.embed_tokens.weight; set it to false if the output is its own"
        )
    return False


def _with_rope_factor(
    config: ModelConfig, options: ConvertOptions
) -> tuple[ModelConfig, str | None]:
    if config.rope_scaling is None:
        if options.rope_factor is not None:
            raise OptionError("--rope-factor: config.json has no RoPE scaling to give a factor to")
        return config, None
    rope_type = config.rope_scaling.rope_type
    if options.rope_factor is not None and rope_type != "llama3":
        raise OptionError(
            f"--rope-factor: is for Llama 3.1's RoPE scaling, config.json has {rope_type} scaling; "
            "leave it out"
        )
    factor, reason = decide_rope_factor(
        flag=options.rope_factor,
        recorded=config.rope_scaling.factor,
        dim=config.dim,
        n_layers=config.n_layers,
        is_tied=config.tied,
    )
    return replace(config, rope_scaling=replace(config.rope_scaling, factor=factor)), reason
