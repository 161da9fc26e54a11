"""A model directory becomes a `Llama`: ours, mlx-lm's, or Hugging Face's with safetensors.

Owns reading `config.json`, the index and the shards. Nothing in the directory is trusted: headers
are checked before MLX sees a file, and no template or code in it is run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any

import mlx.core as mx

from mlx_llama import ops
from mlx_llama.config import ModelConfig, QuantFormat, config_from_hf
from mlx_llama.dtypes import DTYPES
from mlx_llama.errors import CheckpointError, TokenizerError
from mlx_llama.folder_kind import decide_folder_kind, own_entry
from mlx_llama.kinds import Decision, kind_named
from mlx_llama.llama import Llama, stop_ids
from mlx_llama.options import LoadOptions
from mlx_llama.rope import with_linear_scaling
from mlx_llama.sampling import SamplingDefaults, sampling_defaults
from mlx_llama.strict_json import MAX_JSON_BYTES, load_json
from mlx_llama.tensor_ref import TensorRef
from mlx_llama.tokenizer import Tokenizer, open_tokenizer
from mlx_llama.weight_files import SAFETENSORS
from mlx_llama.weights import (
    OUTPUT,
    build_model,
    count_formats,
    is_matrix,
    meta_name,
    tensor_shapes,
)

INDEX_NAME = SAFETENSORS.index_name
GENERATION_NAME = "generation_config.json"


@dataclass(frozen=True, slots=True)
class ModelDirectory:
    """What a directory says of itself, read without touching a weight.

    own: what config.json says under `mlx_llama`, empty for other people's directories.
    tensors: by Hugging Face name. sampling: what is recommended for it.
    """

    path: Path
    own: Mapping[str, Any]
    config: ModelConfig
    kind: Decision
    tokenizer: Tokenizer
    tensors: Mapping[str, TensorRef]
    sampling: SamplingDefaults

    @property
    def stored_dtype(self) -> str:
        """Dtype of the tensors that are never packed."""
        return self.tensors["model.norm.weight"].dtype

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(ref.nbytes for ref in self.tensors.values())

    def config_with(self, options: LoadOptions) -> ModelConfig:
        """Return the configuration that the options ask for."""
        if options.rope_linear is None:
            return self.config
        return with_linear_scaling(self.config, options.rope_linear)

    def dtype_with(self, options: LoadOptions) -> mx.Dtype:
        """Return the dtype of activations that the options ask for, or that suits."""
        return ops.compute_dtype(
            self.stored_dtype, is_quantized=self.is_quantized, asked=options.dtype
        )

    def activations_with(self, options: LoadOptions) -> str:
        """Return how packed products take activations; OptionError for what nothing here does."""
        return ops.choose_activations(self.forms, asked=options.activations)

    def loaded_bytes(self, dtype: mx.Dtype) -> int:
        """Bytes of the weights in memory, where dense tensors have the dtype."""
        return sum(
            math.prod(ref.shape) * self._loaded_itemsize(name, ref, dtype)
            for name, ref in self.tensors.items()
            if not (self.config.tied and name.startswith("lm_head."))
        )

    def _loaded_itemsize(self, name: str, ref: TensorRef, dtype: mx.Dtype) -> int:
        stored = DTYPES[ref.dtype]
        if ref.dtype.startswith("uint"):
            return stored.itemsize
        module, _, part = name.rpartition(".")
        if part == "weight" and (meta := meta_name(name)) and is_matrix(meta):
            return ops.dense_dtype(stored.array, dtype).size
        form = self.config.quant_format(module) if part in ("scales", "biases") else None
        return (dtype if form is None else ops.scales_dtype(stored.array, dtype, form)).size

    @property
    def native_formats(self) -> tuple[str, ...]:
        """Formats of packed matrices that the native kernels multiply by, as in format_counts."""
        return self._formats(is_native=True)

    @property
    def other_formats(self) -> tuple[str, ...]:
        """Formats of packed matrices that only MLX's own operations multiply by."""
        return self._formats(is_native=False)

    def _formats(self, *, is_native: bool) -> tuple[str, ...]:
        fitting = (form for form in self.forms if ops.is_native_format(form) == is_native)
        return tuple(sorted(form.describe() for form in fitting))

    @property
    def forms(self) -> frozenset[QuantFormat]:
        """Formats of the packed matrices."""
        modules = {n.removesuffix(".scales") for n in self.tensors if n.endswith(".scales")}
        forms = {self.config.quant_format(module) for module in modules}
        return frozenset(form for form in forms if form is not None)

    def arrays(self) -> dict[str, mx.array]:
        """Return the tensors by Hugging Face name; each is read when it is evaluated.

        Raises CheckpointError for a file that has gone.
        """
        try:
            return self._unread_arrays()
        except RuntimeError as error:
            raise CheckpointError(f"weights cannot be loaded: {error}") from error

    def _unread_arrays(self) -> dict[str, mx.array]:
        if (ours := ops.kernels()) is not None:
            return {
                name: ours.file_array(str(ref.path), ref.offset, ref.shape, DTYPES[ref.dtype].array)
                for name, ref in self.tensors.items()
            }
        arrays: dict[str, mx.array] = {}
        for file in sorted({ref.path for ref in self.tensors.values()}):
            arrays |= mx.load(str(file))  # pyright: ignore[reportArgumentType, reportOperatorIssue]
        return {name: arrays[name] for name in self.tensors}  # without old buffers

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
    path: str | Path | ModelDirectory,
    *,
    dtype: str | None = None,
    rope_linear: float | None = None,
    threads: int | None = None,
    activations: str | None = None,
    on_block: Callable[[int, int], None] | None = None,
) -> Llama:
    """Load a model directory.

    dtype: of activations and dense weights; None takes what suits weights and device. rope_linear:
    stretch the context of a model without RoPE scaling by this factor, at some cost of accuracy.
    threads: of the native CPU kernels or the BLAS, for all models of the process; None leaves them
    as they are. activations: "int8" lets the kernels round them to whole numbers of 8 bits where
    they multiply this model's packed matrices, None and "float32" do not.
    on_block(done, total) is called after each layer. Raises CheckpointError, TokenizerError,
    UnsupportedModelError or OptionError, each with one line that says what to do.
    """
    options = LoadOptions(
        dtype=dtype, rope_linear=rope_linear, threads=threads, activations=activations
    )
    ops.use_threads(options.threads)
    directory = path if isinstance(path, ModelDirectory) else open_model_directory(Path(path))
    config, chosen = directory.config_with(options), directory.dtype_with(options)
    rounded = directory.activations_with(options)
    # Beside the reading of weights, which leaves the interpreter to others. What fails there, or
    # cannot begin, is done again by the first that needs the tokenizer.
    with suppress(RuntimeError):
        Thread(target=_prepared, args=(directory.tokenizer,), name="tokenizer", daemon=True).start()
    model = build_model(config, directory.arrays(), dtype=chosen, on_block=on_block)
    return Llama(
        model.with_activations(rounded),
        directory.tokenizer,
        config,
        path=directory.path,
        dtype=chosen,
        sampling_defaults=directory.sampling,
    )


def _prepared(tokenizer: Tokenizer) -> None:
    with suppress(Exception):
        tokenizer.prepare()


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
    _refuse_too_many(path, config, tensors)
    tokenizer = open_folder_tokenizer(path, n_rows=config.vocab_size)
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the weights "
            f"{config.vocab_size}; they belong to different models"
        )
    kind = decide_folder_kind(path, raw, config, tokenizer)
    generation = read_generation_config(path)
    config = replace(
        config,
        kind=kind.value,
        eos_ids=recorded_stop_ids(path, raw, generation, vocab_size=config.vocab_size),
    )
    stops = stop_ids(kind_named(kind.value), tokenizer, config.eos_ids)
    padding = frozenset(range(tokenizer.vocab_size, config.vocab_size))
    sampling = replace(
        sampling_defaults(generation or {}, where=str(path / GENERATION_NAME)),
        padding=padding - stops,
        unnamed_stops=padding & stops,
    )
    return ModelDirectory(path, own_entry(raw), config, kind, tokenizer, tensors, sampling)


def open_folder_tokenizer(path: Path, *, n_rows: int) -> Tokenizer:
    """Open a folder's tokenizer; its tokenizer.json when that alone has the tokens added to it.

    n_rows: of the embedding. A `tokenizer.json` that does not open, does not fit or differs in the
    tokens that both have is passed over: rows without a token are never drawn.
    """
    tokenizer, other = open_tokenizer(path), path / "tokenizer.json"
    if tokenizer.vocab_size >= n_rows or tokenizer.path == other or not other.is_file():
        return tokenizer
    try:
        fuller = open_tokenizer(other)
    except TokenizerError:
        return tokenizer
    return fuller if _extends(fuller, tokenizer) and fuller.vocab_size <= n_rows else tokenizer


def _extends(fuller: Tokenizer, tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer has another one's tokens and some more; special ones may be renamed."""
    if fuller.family != tokenizer.family or fuller.vocab_size <= tokenizer.vocab_size:
        return False
    specials = set(tokenizer.special_tokens.values())
    return all(
        fuller.token_bytes(token) == tokenizer.token_bytes(token)
        for token in range(tokenizer.vocab_size)
        if token not in specials
    )


def _refuse_too_many(path: Path, config: ModelConfig, tensors: Mapping[str, TensorRef]) -> None:
    """Refuse tensors that config.json leaves no place for; a tied output may repeat itself."""
    known = {*tensor_shapes(config), OUTPUT}
    for name in tensors:
        if meta_name(f"{name.rpartition('.')[0]}.weight") not in known:
            raise CheckpointError(
                f"{path}: tensor {name} is too many: config.json has {config.n_layers} layers"
            )


def _no_model(path: Path) -> str:
    if not path.exists():
        return (
            f"{path}: no such folder; give the path of a model directory: mlx-llama convert makes "
            "one and prints its path, mlx-llama show NAME that of a name such as bundled"
        )
    if path.is_file():
        return f"{path}: a file, expected a model directory (config.json and safetensors)"
    if (path / "params.json").is_file():
        return f"{path}: a Meta checkpoint; make a model of it: mlx-llama convert {path}"
    return f"{path}: no config.json, so no model directory; make one with mlx-llama convert"


def open_shards(path: Path) -> dict[str, TensorRef]:
    """Open a folder's safetensors; every tensor must be a Llama's."""
    tensors = SAFETENSORS.open(path)
    for name in tensors:
        module, _, part = name.rpartition(".")
        if part not in ("weight", "scales", "biases") or not meta_name(f"{module}.weight"):
            raise CheckpointError(
                f"{path}: tensor {name} is not a Llama's; adapters are not loaded here"
            )
    return tensors


def read_generation_config(path: Path) -> dict[str, Any] | None:
    """Read a folder's generation_config.json; None where there is none."""
    file = path / GENERATION_NAME
    return load_json(file, max_bytes=MAX_JSON_BYTES) if file.is_file() else None


def recorded_stop_ids(
    path: Path, raw: Mapping[str, Any], generation: Mapping[str, Any] | None, *, vocab_size: int
) -> tuple[int, ...]:
    """Return the ids that config.json (raw) and generation_config.json name as ends, sorted."""
    ids: set[int] = set()
    for name, content in (("config.json", raw), (GENERATION_NAME, generation or {})):
        value = content.get("eos_token_id")
        for token in value if isinstance(value, list) else [] if value is None else [value]:
            if type(token) is not int or not 0 <= token < vocab_size:
                raise CheckpointError(
                    f"{path / name}: eos_token_id is {repr(value)[:60]}, expected token ids from 0 "
                    f"to {vocab_size - 1}"
                )
            ids.add(token)
    return tuple(sorted(ids))
