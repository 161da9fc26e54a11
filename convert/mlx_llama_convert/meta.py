"""Meta's layout: `consolidated.NN.pth`, `params.json`, `tokenizer.model`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mlx_llama.config import ModelConfig, RopeScaling
from mlx_llama.errors import CheckpointError, OptionError, TokenizerError
from mlx_llama.kinds import Decision, base_kind, decide_kind, decide_rope_factor, kind_named
from mlx_llama.options import ConvertOptions
from mlx_llama.strict_json import load_json
from mlx_llama.tokenizer import Tokenizer, open_tokenizer
from mlx_llama.weights import EMBEDDING, OUTPUT
from mlx_llama_convert.params import MetaParams, parse_params
from mlx_llama_convert.pth import open_pth
from mlx_llama_convert.shards import LogicalTensor, equal_content, find_shards, merge_ranks
from mlx_llama_convert.source import CheckpointWeights, SourceModel, check_vocabulary

MAX_PARAMS_BYTES = 1 << 20


def open_meta(folder: Path, options: ConvertOptions, *, name: str | None = None) -> SourceModel:
    """Describe a folder in Meta's layout; name: of the model, beside the folder's."""
    params_path = folder / "params.json"
    if not params_path.is_file():
        raise CheckpointError(f"{folder}: params.json is missing beside consolidated.00.pth")
    raw = load_json(params_path, max_bytes=MAX_PARAMS_BYTES)
    params = parse_params(raw, where=str(params_path))
    shards = find_shards(folder)
    tokenizer = open_tokenizer(_tokenizer_path(folder))
    tensors = merge_ranks(
        [open_pth(shard) for shard in shards], dim=params.dim, vocab_size=params.vocab_size
    )
    is_tied = _drop_tied_output(tensors)
    kind = _decide_kind(folder, params, tokenizer, is_tied, options, name)
    scaling, rope = _scaling(params, options, is_tied)
    config = _config(params, tensors, tokenizer, kind, scaling, is_tied)
    check_vocabulary(tokenizer, config.vocab_size, is_padded=False)
    return SourceModel(
        path=folder,
        layout=f"Meta checkpoint, {len(shards)} file{'s' if len(shards) > 1 else ''}",
        files=(*shards, params_path, tokenizer.path),
        config=config,
        kind=kind,
        rope=rope,
        tokenizer=tokenizer,
        weights=CheckpointWeights(config, tensors, is_interleaved=True),
        generation=None,
        notes=("the output is the embedding (tied)",) if is_tied else (),
    )


def _tokenizer_path(folder: Path) -> Path:
    # LLaMA 1 and Llama 2 downloads keep one tokenizer above the folders of their sizes.
    for place in (folder, folder.resolve().parent):
        if (place / "tokenizer.model").is_file():
            return place / "tokenizer.model"
    raise TokenizerError(
        f"{folder}: tokenizer.model is missing, here and one level up; copy it beside params.json"
    )


def _drop_tied_output(tensors: dict[str, LogicalTensor]) -> bool:
    """Drop an output that repeats the embedding, as Meta's files of tied models hold it."""
    if OUTPUT not in tensors:
        return True
    if EMBEDDING in tensors and equal_content(tensors[OUTPUT], tensors[EMBEDDING]):
        del tensors[OUTPUT]
        return True
    return False


def _decide_kind(
    folder: Path,
    params: MetaParams,
    tokenizer: Tokenizer,
    is_tied: bool,
    options: ConvertOptions,
    name: str | None,
) -> Decision:
    is_tiktoken = tokenizer.family == "tiktoken"
    resolved = folder.resolve()
    return decide_kind(
        flag=options.kind,
        recorded=None,
        chat_template=None,
        names=[*([name] if name else []), resolved.name, resolved.parent.name],
        base=base_kind(
            is_tiktoken=is_tiktoken,
            is_rope_scaled=params.is_rope_scaled,
            is_tied=is_tied,
            norm_eps=params.norm_eps,
            rope_theta=params.rope_theta,
        ),
        is_tiktoken=is_tiktoken,
    )


def _scaling(
    params: MetaParams, options: ConvertOptions, is_tied: bool
) -> tuple[RopeScaling | None, str | None]:
    if not params.is_rope_scaled:
        if options.rope_factor is not None:
            raise OptionError(
                "--rope-factor: params.json has no use_scaled_rope, the factor would do nothing"
            )
        return None, None
    factor, reason = decide_rope_factor(
        flag=options.rope_factor,
        recorded=None,
        dim=params.dim,
        n_layers=params.n_layers,
        is_tied=is_tied,
    )
    return RopeScaling("llama3", factor), reason


def _config(
    params: MetaParams,
    tensors: Mapping[str, LogicalTensor],
    tokenizer: Tokenizer,
    kind: Decision,
    scaling: RopeScaling | None,
    is_tied: bool,
) -> ModelConfig:
    if EMBEDDING not in tensors:
        raise CheckpointError(f"tensor {EMBEDDING} is missing; the checkpoint is not whole")
    if params.dim % params.n_heads:
        raise CheckpointError(
            f"params.json: dim {params.dim} is no multiple of n_heads {params.n_heads}"
        )
    # Meta's code has another default theta for Llama 3 than for its predecessors.
    default_theta = 500000.0 if tokenizer.family == "tiktoken" else 10000.0
    return ModelConfig(
        dim=params.dim,
        n_layers=params.n_layers,
        n_heads=params.n_heads,
        n_kv_heads=params.n_kv_heads,
        head_dim=params.dim // params.n_heads,
        hidden_dim=params.hidden_dim,
        vocab_size=tensors[EMBEDDING].shape[0],
        norm_eps=params.norm_eps,
        rope_theta=default_theta if params.rope_theta is None else params.rope_theta,
        max_context=kind_named(kind.value).context,
        tied=is_tied,
        kind=kind.value,
        rope_scaling=scaling,
        dtype=tensors[EMBEDDING].dtype,
    )
