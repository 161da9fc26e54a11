"""A model directory becomes a `Llama`: ours, mlx-lm's, or Hugging Face's with safetensors.

Owns reading `config.json`, the index and the shards. Nothing in the directory is trusted: headers
are checked before MLX sees a file, and no template or code in it is run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_llama import ops
from mlx_llama.config import ModelConfig, config_from_hf
from mlx_llama.errors import CheckpointError
from mlx_llama.kinds import Decision, base_kind, decide_kind
from mlx_llama.llama import Llama
from mlx_llama.safetensors_reader import open_safetensors
from mlx_llama.sampling import SamplingDefaults
from mlx_llama.strict_json import load_json
from mlx_llama.tensor_ref import TensorRef
from mlx_llama.tokenizer import Tokenizer, open_tokenizer
from mlx_llama.weights import build_model, count_formats, is_matrix, meta_name

MAX_JSON_BYTES = 64 << 20
INDEX_NAME = "model.safetensors.index.json"
ROPE_BUFFER = "rotary_emb.inv_freq"  # old releases stored it in every layer; it is computed

_NO_MODEL_NAME = re.compile(r"original|mp[0-9]+|fp8|snapshots|[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class ModelDirectory:
    """What a directory says of itself, read without touching a weight.

    own: what config.json says under `mlx_llama`, empty for other people's directories.
    tensors: by Hugging Face name.
    """

    path: Path
    own: Mapping[str, Any]
    config: ModelConfig
    kind: Decision
    tokenizer: Tokenizer
    tensors: Mapping[str, TensorRef]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(ref.nbytes for ref in self.tensors.values())

    @property
    def is_quantized(self) -> bool:
        """Whether any matrix is packed."""
        return any(name.endswith(".scales") for name in self.tensors)

    @property
    def format_counts(self) -> dict[str, int]:
        """Number of matrices by how they are stored."""
        modules = [
            name.removesuffix(".weight")
            for name in self.tensors
            if (meta := meta_name(name)) and is_matrix(meta)
        ]
        return count_formats(
            (
                self.config.quant_format(m) if f"{m}.scales" in self.tensors else None,
                self.tensors[f"{m}.weight"].dtype,
            )
            for m in modules
        )


def load(
    path: str | Path,
    *,
    dtype: str | None = None,
    on_block: Callable[[int, int], None] | None = None,
) -> Llama:
    """Load a model directory.

    dtype: of activations and dense weights; None takes what suits weights and device.
    on_block(done, total) is called after each layer. Raises CheckpointError, TokenizerError or
    UnsupportedModelError, each with one line that says what to do.
    """
    directory = open_model_directory(Path(path))
    config = directory.config
    stored = directory.tensors["model.norm.weight"].dtype
    chosen = ops.compute_dtype(stored, is_quantized=directory.is_quantized, asked=dtype)
    arrays: dict[str, mx.array] = {}
    for file in sorted({ref.path for ref in directory.tensors.values()}):
        arrays |= mx.load(str(file))  # pyright: ignore[reportArgumentType, reportOperatorIssue]
    model = build_model(config, arrays, dtype=chosen, on_block=on_block)
    return Llama(
        model,
        directory.tokenizer,
        config,
        path=directory.path,
        dtype=chosen,
        sampling_defaults=_sampling_defaults(directory.path),
    )


def open_model_directory(path: Path) -> ModelDirectory:
    """Read and check everything but the weights' data."""
    if not (path / "config.json").is_file():
        raise CheckpointError(_no_model(path))
    raw = load_json(path / "config.json", max_bytes=MAX_JSON_BYTES)
    tensors = open_shards(path)
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        if name not in tensors:
            raise CheckpointError(f"{path}: tensor {name} is missing; this is no whole Llama")
    config = config_from_hf(raw, kind="llama2", is_tied="lm_head.weight" not in tensors)
    tokenizer = open_tokenizer(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the weights "
            f"{config.vocab_size}; they belong to different models"
        )
    kind = decide_folder_kind(path, raw, config, tokenizer)
    config = config_from_hf(raw, kind=kind.value, is_tied=config.tied)
    return ModelDirectory(path, own_entry(raw), config, kind, tokenizer, tensors)


def own_entry(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a config.json says under `mlx_llama`, which only this project writes."""
    own = raw.get("mlx_llama")
    return own if isinstance(own, Mapping) else {}


def _no_model(path: Path) -> str:
    if not path.exists():
        return f"{path}: no such folder; give a model directory, or make one with mlx-llama convert"
    if path.is_file():
        return f"{path}: a file, expected a model directory (config.json and safetensors)"
    if (path / "params.json").is_file():
        return f"{path}: a Meta checkpoint; make a model of it: mlx-llama convert {path}"
    return f"{path}: no config.json, so no model directory; make one with mlx-llama convert"


def open_shards(path: Path) -> dict[str, TensorRef]:
    """Open a folder's safetensors and return its tensors by name, RoPE's buffers left out."""
    files = weight_files(path, index_name=INDEX_NAME, pattern="model*.safetensors")
    tensors = collect_tensors(files, open_safetensors)
    return {name: ref for name, ref in tensors.items() if _is_ours(path, name)}


def weight_files(path: Path, *, index_name: str, pattern: str) -> list[Path]:
    """Return the files that the index names or, without an index, those of the pattern."""
    index = path / index_name
    if not index.is_file():
        if files := sorted(path.glob(pattern)):
            return files
        raise CheckpointError(f"{path}: no {pattern.replace('*', '')} and no {index_name}")
    table = load_json(index, max_bytes=MAX_JSON_BYTES).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(f, str) for f in table.values()):
        raise CheckpointError(f"{index}: weight_map is not a table of tensor to file name")
    files = sorted(set(table.values()))
    here = {file.name for file in path.iterdir() if file.is_file()}
    for name in files:
        if name not in here:
            raise CheckpointError(f"{index}: names {name!r}, which is no file of {path}")
    return [path / name for name in files]


def collect_tensors(
    files: Iterable[Path], open_file: Callable[[Path], dict[str, TensorRef]]
) -> dict[str, TensorRef]:
    """Open files and return their tensors; every name must stand in one file alone."""
    tensors: dict[str, TensorRef] = {}
    for file in files:
        for name, ref in open_file(file).items():
            if name in tensors:
                raise CheckpointError(f"{file}: tensor {name} stands in two files")
            tensors[name] = ref
    return tensors


def _is_ours(path: Path, name: str) -> bool:
    if name.endswith(ROPE_BUFFER):
        return False
    module, _, part = name.rpartition(".")
    if part in ("weight", "scales", "biases") and meta_name(f"{module}.weight"):
        return True
    raise CheckpointError(f"{path}: tensor {name} is not a Llama's; adapters are not loaded here")


def decide_folder_kind(
    path: Path,
    raw: Mapping[str, Any],
    config: ModelConfig,
    tokenizer: Tokenizer,
    *,
    flag: str | None = None,
) -> Decision:
    """Choose the kind of a folder in Hugging Face's layout; raw is its config.json."""
    recorded = own_entry(raw).get("kind")
    return decide_kind(
        flag=flag,
        recorded=recorded if isinstance(recorded, str) else None,
        chat_template=_chat_template_text(path),
        names=[*folder_names(path), str(raw.get("_name_or_path", ""))],
        base=base_kind(
            is_tiktoken=tokenizer.family == "tiktoken",
            is_rope_scaled=config.rope_scaling is not None,
            is_tied=config.tied,
            norm_eps=config.norm_eps,
            rope_theta=config.rope_theta,
        ),
        is_tiktoken=tokenizer.family == "tiktoken",
    )


def folder_names(path: Path) -> list[str]:
    """Return what a folder goes by, nearest first, up to a name that is the model's own.

    `models--A--B/snapshots/COMMIT/original` in Hugging Face's cache has it three levels up.
    """
    place = path.resolve()
    names = [place.name]
    while _NO_MODEL_NAME.fullmatch(place.name):
        place = place.parent
        names.append(place.name)
    return names


def _chat_template_text(path: Path) -> str | None:
    """Return a folder's chat template, to be recognised and never executed."""
    file = path / "chat_template.jinja"
    if file.is_file() and file.stat().st_size < MAX_JSON_BYTES:
        return file.read_text(encoding="utf-8", errors="replace")
    if not (path / "tokenizer_config.json").is_file():
        return None
    template = load_json(path / "tokenizer_config.json", max_bytes=MAX_JSON_BYTES).get(
        "chat_template"
    )
    return template if isinstance(template, str) else None


def _sampling_defaults(path: Path) -> SamplingDefaults:
    """Read generation_config.json; values that cannot be are as good as absent."""
    if not (path / "generation_config.json").is_file():
        return SamplingDefaults()
    raw = load_json(path / "generation_config.json", max_bytes=MAX_JSON_BYTES)
    if raw.get("do_sample") is False:
        return SamplingDefaults(temperature=0.0)

    def number(name: str, low: float, high: float) -> float | None:
        value = raw.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        return value if low <= value <= high else None

    top_k = number("top_k", 0, 1 << 21)
    return SamplingDefaults(
        temperature=number("temperature", 0.0, 100.0),
        top_p=number("top_p", 0.0, 1.0),
        top_k=None if top_k is None else int(top_k),
        repetition_penalty=number("repetition_penalty", 0.01, 100.0),
    )
