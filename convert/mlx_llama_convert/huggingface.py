"""Hugging Face's layout: `config.json`, a tokenizer, and safetensors or `pytorch_model.bin`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_llama.config import ModelConfig, config_from_hf, quantization_from_hf
from mlx_llama.errors import CheckpointError, OptionError, UnsupportedModelError
from mlx_llama.folder_kind import decide_folder_kind
from mlx_llama.kinds import decide_rope_factor
from mlx_llama.loading import (
    GENERATION_NAME,
    open_folder_tokenizer,
    read_generation_config,
    recorded_stop_ids,
)
from mlx_llama.options import ConvertOptions
from mlx_llama.packed_ref import packed_ref
from mlx_llama.sampling import sampling_defaults
from mlx_llama.strict_json import MAX_JSON_BYTES, load_json
from mlx_llama.tensor_ref import TensorRef
from mlx_llama.tokenizer import Tokenizer
from mlx_llama.weight_files import SAFETENSORS, WeightFormat
from mlx_llama.weights import EMBEDDING, OUTPUT, is_meta_name, meta_name
from mlx_llama_convert.pth import open_pth
from mlx_llama_convert.refusals import refuse_packed_folder, refuse_packed_tensors
from mlx_llama_convert.source import CheckpointWeights, SourceModel, check_vocabulary
from mlx_llama_convert.tensors import LogicalTensor, equal_content

# The first that is there is taken.
_FORMATS = (SAFETENSORS, WeightFormat("pytorch_model.bin", "pytorch_model", ".bin", open_pth))

# What else is said of a model, if these are there.
_EVIDENCE = ("chat_template.jinja", "tokenizer_config.json", GENERATION_NAME)


def holds_huggingface(folder: Path) -> bool:
    """Whether a folder has this layout, with weights."""
    return (folder / "config.json").is_file() and any(form.is_in(folder) for form in _FORMATS)


def open_huggingface(folder: Path, options: ConvertOptions, name: str | None = None) -> SourceModel:
    """Describe a folder in Hugging Face's layout; name: of the model, beside the folder's."""
    raw = load_json(folder / "config.json", max_bytes=MAX_JSON_BYTES)
    is_packed = options.allow_requantize and raw.get("quantization") is not None
    if not is_packed:
        refuse_packed_folder(folder, raw)
    form, *others = [form for form in _FORMATS if form.is_in(folder)]
    refs = form.open(folder)
    files = sorted({ref.path for ref in refs.values()})
    unpacked: Mapping[str, LogicalTensor] = refs
    if is_packed:
        unpacked = unpack(refs, raw)
    refuse_packed_tensors(folder, unpacked)
    tensors, is_interleaved = _by_meta_name(folder, unpacked)
    is_tied = _decide_tied(folder, raw, tensors)
    raw, notes = _completed(raw, tensors)
    if is_packed:
        notes.append("the source is quantized already: its errors stay, and new ones are added")
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
        quantization=None,
        overrides={},
        bos_id=None,
        eos_ids=recorded_stop_ids(folder, raw, generation, vocab_size=config.vocab_size),
    )
    if is_interleaved:
        notes.append("tensors have Meta's names: rows of wq and wk are taken in Meta's order")
    notes += [f"{other.name} is there too, not used: safetensors come first" for other in others]
    said = [folder / name for name in (form.index_name, "config.json", *_EVIDENCE)]
    return SourceModel(
        path=folder,
        layout=f"Hugging Face checkpoint, {form.name}",
        files=(
            *files,
            tokenizer.path,
            *(path for path in said if path.is_file()),
        ),
        config=config,
        kind=kind,
        rope=rope,
        tokenizer=tokenizer,
        weights=CheckpointWeights(config, tensors, is_interleaved=is_interleaved),
        generation=generation,
        notes=(*notes, *_notes(config, tokenizer)),
    )


def unpack(refs: Mapping[str, TensorRef], raw: Mapping[str, Any]) -> dict[str, LogicalTensor]:
    """Return tensors packed by MLX as the numbers that they stand for; raw: config.json."""
    default, overrides = quantization_from_hf(raw)
    unpacked: dict[str, LogicalTensor] = {}
    for name, ref in refs.items():
        module, _, part = name.rpartition(".")
        if f"{module}.scales" not in refs:
            unpacked[name] = ref
        elif part == "weight":
            form = overrides.get(module, default)
            unpacked[name] = packed_ref(refs, module, form, dtype=None)
    return unpacked


def _notes(config: ModelConfig, tokenizer: Tokenizer) -> tuple[str, ...]:
    notes = ["the output is the embedding (tied)"] if config.tied else []
    if n_unnamed := config.vocab_size - tokenizer.vocab_size:
        notes.append(
            f"{n_unnamed} rows of the embedding have no token in {tokenizer.path.name}; only those "
            "that end an answer are ever chosen"
        )
    return tuple(notes)


def _by_meta_name(
    folder: Path, refs: Mapping[str, LogicalTensor]
) -> tuple[dict[str, LogicalTensor], bool]:
    """Return the tensors by Meta's names, and whether the file itself used them.

    Hugging Face's names come with the prefix `model.` or, saved from a model without its head,
    without it. Meta's own names come with Meta's row order.
    """
    tensors: dict[str, LogicalTensor] = {}
    styles: dict[bool, str] = {}
    for stored_name, ref in refs.items():
        if stored_name.endswith("rope.freqs"):  # computed, not learned
            continue
        by_hf = meta_name(stored_name) or meta_name(f"model.{stored_name}")
        is_meta = is_meta_name(stored_name)
        name = by_hf or (stored_name if is_meta else None)
        if name is None:
            raise UnsupportedModelError(f"{ref.path}: tensor {stored_name[:80]!r} is not a Llama's")
        if name in tensors:
            raise CheckpointError(
                f"{ref.path}: {stored_name} and {tensors[name].name} are the same tensor"
            )
        tensors[name] = ref
        if is_meta != bool(by_hf):  # "norm.weight" belongs to both
            styles[is_meta] = stored_name
    if len(styles) > 1:
        raise CheckpointError(
            f"{folder}: {styles[True]} is Meta's name, {styles[False]} Hugging Face's; which order "
            "the rows have is not known"
        )
    if EMBEDDING not in tensors:
        raise CheckpointError(f"{folder}: model.embed_tokens.weight is missing; not a whole model")
    return tensors, True in styles


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


def _completed(
    raw: Mapping[str, Any], tensors: Mapping[str, LogicalTensor]
) -> tuple[dict[str, Any], list[str]]:
    """Return config.json with what old releases leave out of it, by the weights' shapes.

    Also the embedding's true number of rows, which some releases pad beyond what they say.
    """
    full, notes = dict(raw), []
    q_rows, k_rows, vocab_size = (
        _n_rows(tensors.get(name))
        for name in ("layers.0.attention.wq.weight", "layers.0.attention.wk.weight", EMBEDDING)
    )
    if full.get("head_dim") is None:
        full["head_dim"] = _quotient(q_rows, full.get("num_attention_heads"))
    if full.get("num_key_value_heads") is None:
        full["num_key_value_heads"] = _quotient(k_rows, full["head_dim"])
    said = full.get("vocab_size")
    if said is None or (type(said) is int and 0 < said < vocab_size):
        full["vocab_size"] = vocab_size
        if said is not None:
            notes.append(
                f"config.json has a vocabulary of {said}, the weights {vocab_size} rows: all kept"
            )
    return full, notes


def _n_rows(tensor: LogicalTensor | None) -> int:
    return tensor.shape[0] if tensor is not None and len(tensor.shape) == 2 else 0


def _quotient(rows: int, count: object) -> int | None:
    """Divide rows by a number of config.json; None where that is none or does not divide them."""
    if type(count) is not int or count < 1 or rows % count:
        return None
    return rows // count or None


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
