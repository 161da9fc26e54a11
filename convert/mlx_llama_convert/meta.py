"""Meta's layout: `consolidated.NN.pth`, `params.json`, `tokenizer.model`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_llama.config import ModelConfig, RopeScaling, rope_from_hf
from mlx_llama.errors import CheckpointError, OptionError, TokenizerError
from mlx_llama.folder_kind import folder_names
from mlx_llama.kinds import (
    CODELLAMA_THETA,
    Decision,
    base_kind,
    decide_kind,
    decide_rope_factor,
    kind_named,
)
from mlx_llama.loading import GENERATION_NAME, read_generation_config
from mlx_llama.options import ConvertOptions
from mlx_llama.sampling import sampling_defaults
from mlx_llama.strict_json import MAX_JSON_BYTES, load_json
from mlx_llama.tokenizer import Tokenizer, open_tokenizer
from mlx_llama.weights import EMBEDDING, OUTPUT
from mlx_llama_convert.fp8 import apply_scales
from mlx_llama_convert.kv_heads import fold_copies
from mlx_llama_convert.params import MetaParams, parse_params
from mlx_llama_convert.pth import open_pth
from mlx_llama_convert.refusals import refuse_int4_tensors
from mlx_llama_convert.shards import find_shards, merge_ranks
from mlx_llama_convert.source import CheckpointWeights, SourceModel, check_vocabulary
from mlx_llama_convert.tensors import LogicalTensor, equal_content

MAX_PARAMS_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _Weights:
    """The tensors of all ranks as one model, and what was found out on the way.

    files: all that the tensors are read from.
    """

    tensors: dict[str, LogicalTensor]
    n_kv_heads: int
    is_tied: bool
    files: tuple[Path, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Rope:
    """RoPE as it will be. reason: of the factor. files: other than params.json that say so."""

    theta: float
    scaling: RopeScaling | None
    reason: str | None
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()


def holds_meta(folder: Path) -> bool:
    """Whether a folder has this layout, whole or not."""
    return (folder / "params.json").is_file() or any(folder.glob("consolidated.*.pth"))


def open_meta(folder: Path, options: ConvertOptions, name: str | None = None) -> SourceModel:
    """Describe a folder in Meta's layout; name: of the model, beside the folder's."""
    params_path = folder / "params.json"
    if not params_path.is_file():
        raise CheckpointError(f"{folder}: params.json is missing beside consolidated.00.pth")
    raw = load_json(params_path, max_bytes=MAX_PARAMS_BYTES)
    params = parse_params(raw, where=str(params_path))
    shards = find_shards(folder)
    tokenizer = open_tokenizer(_tokenizer_path(folder))
    weights = _open_weights(folder, shards, params)
    rope = _decide_rope(folder, params, tokenizer, weights.is_tied, options)
    kind = _decide_kind(folder, params, tokenizer, rope, weights.is_tied, options, name)
    config = _config(params, weights, rope, kind)
    check_vocabulary(tokenizer, config.vocab_size, is_padded=False)
    generation, said = _generation_beside(folder)
    return SourceModel(
        path=folder,
        layout=f"Meta checkpoint, {len(shards)} file{'s' if len(shards) > 1 else ''}",
        files=(*weights.files, params_path, tokenizer.path, *rope.files, *said),
        config=config,
        kind=kind,
        rope=rope.reason,
        tokenizer=tokenizer,
        weights=CheckpointWeights(config, weights.tensors, is_interleaved=True),
        generation=generation,
        notes=(*weights.notes, *rope.notes, *_doubts(kind, rope)),
    )


def _tokenizer_path(folder: Path) -> Path:
    # LLaMA 1 and Llama 2 downloads keep one tokenizer above the folders of their sizes.
    for place in (folder, folder.resolve().parent):
        if (place / "tokenizer.model").is_file():
            return place / "tokenizer.model"
    raise TokenizerError(
        f"{folder}: tokenizer.model is missing, here and one level up; copy it beside params.json"
    )


def _open_weights(folder: Path, shards: list[Path], params: MetaParams) -> _Weights:
    """Open the ranks, undo what Meta's releases do to weights, and merge them."""
    if params.dim % params.n_heads:
        raise CheckpointError(
            f"{folder}/params.json: dim {params.dim} is no multiple of n_heads {params.n_heads}"
        )
    refs = [open_pth(shard) for shard in shards]
    for rank in refs:
        refuse_int4_tensors(rank)
    dequantized = apply_scales(folder, refs)
    merged = merge_ranks(dequantized.ranks, dim=params.dim, vocab_size=params.vocab_size)
    if EMBEDDING not in merged:
        raise CheckpointError(f"{folder}: tensor {EMBEDDING} is missing; not a whole checkpoint")
    kv_heads = fold_copies(
        merged,
        n_kv_heads=params.n_kv_heads,
        head_dim=params.dim // params.n_heads,
        n_ranks=len(shards),
    )
    tensors, is_tied = _without_tied_output(kv_heads.tensors)
    tied = ("the output is the embedding (tied)",) if is_tied else ()
    return _Weights(
        tensors,
        kv_heads.count,
        is_tied,
        files=(*shards, *dequantized.files),
        notes=(*dequantized.notes, *kv_heads.notes, *tied),
    )


def _without_tied_output(
    tensors: dict[str, LogicalTensor],
) -> tuple[dict[str, LogicalTensor], bool]:
    """Leave out an output that repeats the embedding, as Meta's files of tied models hold it."""
    if OUTPUT in tensors and not equal_content(tensors[OUTPUT], tensors[EMBEDDING]):
        return tensors, False
    return {name: tensor for name, tensor in tensors.items() if name != OUTPUT}, True


def _decide_rope(
    folder: Path,
    params: MetaParams,
    tokenizer: Tokenizer,
    is_tied: bool,
    options: ConvertOptions,
) -> _Rope:
    # Meta's code has another default theta for Llama 3 than for its predecessors.
    default_theta = 500000.0 if tokenizer.family == "tiktoken" else 10000.0
    theta = default_theta if params.rope_theta is None else params.rope_theta
    beside, files = _scaling_beside(folder)
    if not params.is_rope_scaled and beside is None:
        if options.rope_factor is not None:
            raise OptionError(
                "--rope-factor: params.json has no use_scaled_rope, the factor would do nothing"
            )
        return _Rope(theta, None, None)
    factor, reason = decide_rope_factor(
        flag=options.rope_factor,
        recorded=None if beside is None else beside.factor,
        dim=params.dim,
        n_layers=params.n_layers,
        is_tied=is_tied,
    )
    notes = ("params.json has no use_scaled_rope, config.json scales RoPE: it is scaled",)
    return _Rope(
        theta,
        replace(beside or RopeScaling("llama3", factor), factor=factor),
        reason,
        files=files,
        notes=() if params.is_rope_scaled else notes,
    )


def _scaling_beside(folder: Path) -> tuple[RopeScaling | None, tuple[Path, ...]]:
    """Return the RoPE scaling of a config.json that came with Meta's files, and its path."""
    for path in (place / "config.json" for place in _places(folder)):
        if path.is_file():
            raw = load_json(path, max_bytes=MAX_JSON_BYTES)
            scaling = rope_from_hf(raw)[1] if raw.get("model_type") == "llama" else None
            return scaling, () if scaling is None else (path,)
    return None, ()


def _generation_beside(folder: Path) -> tuple[dict[str, Any] | None, tuple[Path, ...]]:
    """Return the generation_config.json that came with Meta's files, and its path."""
    for place in _places(folder):
        if (generation := read_generation_config(place)) is not None:
            path = place / GENERATION_NAME
            # Refused here what would be written into a directory that does not load.
            sampling_defaults(generation, where=str(path))
            return generation, (path,)
    return None, ()


def _places(folder: Path) -> tuple[Path, ...]:
    """Return where Hugging Face's repositories keep what they add to Meta's files."""
    resolved = folder.resolve()
    return (folder, resolved.parent) if resolved.name == "original" else (folder,)


def _decide_kind(
    folder: Path,
    params: MetaParams,
    tokenizer: Tokenizer,
    rope: _Rope,
    is_tied: bool,
    options: ConvertOptions,
    name: str | None,
) -> Decision:
    is_tiktoken = tokenizer.family == "tiktoken"
    return decide_kind(
        flag=options.kind,
        recorded=None,
        chat_template=None,
        names=[*([name] if name else []), *folder_names(folder)],
        base=base_kind(
            is_tiktoken=is_tiktoken,
            is_rope_scaled=rope.scaling is not None,
            is_tied=is_tied,
            norm_eps=params.norm_eps,
            rope_theta=rope.theta,
        ),
        is_tiktoken=is_tiktoken,
    )


def _doubts(kind: Decision, rope: _Rope) -> tuple[str, ...]:
    """Say where Meta's sources contradict each other."""
    if kind.value == "llama-guard-3" and rope.scaling is None:
        return (
            "Llama Guard 3 is made from Llama 3.1 and 3.2, whose RoPE is scaled, but params.json "
            "has no use_scaled_rope: not scaled; put its config.json beside it if that says more",
        )
    return ()


def _context(kind: Decision, rope: _Rope) -> int:
    # Code Llama 70B Python was trained like Llama 2, and has its theta.
    is_short = kind.value == "codellama" and rope.theta < CODELLAMA_THETA
    return kind_named("llama2" if is_short else kind.value).context


def _config(params: MetaParams, weights: _Weights, rope: _Rope, kind: Decision) -> ModelConfig:
    embedding = weights.tensors[EMBEDDING]
    return ModelConfig(
        dim=params.dim,
        n_layers=params.n_layers,
        n_heads=params.n_heads,
        n_kv_heads=weights.n_kv_heads,
        head_dim=params.dim // params.n_heads,
        hidden_dim=params.hidden_dim,
        vocab_size=embedding.shape[0],
        norm_eps=params.norm_eps,
        rope_theta=rope.theta,
        max_context=_context(kind, rope),
        tied=weights.is_tied,
        kind=kind.value,
        rope_scaling=rope.scaling,
        dtype=embedding.dtype,
    )
