"""Does the written model compute what its source does? And is a directory still what was written?

Both models run on some tokens in float32, every matrix streamed a few rows at a time, so that
memory is bounded by a block of rows however large the model is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_llama.config import ModelConfig
from mlx_llama.errors import CheckpointError
from mlx_llama.linear import Stack
from mlx_llama.loading import ModelDirectory, open_model_directory
from mlx_llama.model import Block, LlamaModel
from mlx_llama.packed_ref import packed_ref
from mlx_llama.strict_json import MAX_JSON_BYTES, load_json
from mlx_llama.weights import EMBEDDING, NORM, OUTPUT, hf_module, tensor_shapes
from mlx_llama_convert.hashing import file_digests
from mlx_llama_convert.source import SourceModel

BLOCK_BYTES = 32 << 20  # of a matrix in float32
N_TOKENS = 32
# What is compared; any text does, ordinary words make the numbers mean something.
TEXT = (
    "The quick brown fox jumps over the lazy dog while seven wise wizards quietly mix a jug of "
    "blue paint, and every one of them asks why the sky above the sea is never green at noon."
)

ReadRows = Callable[[str, slice | None], mx.array]


@dataclass(frozen=True, slots=True)
class Verification:
    """How the logits of two models differ. same_top: share of equal likeliest tokens.

    mean_kl: KL divergence of the written model from the source, nats a token.
    """

    tokens: int
    same_top: float
    mean_kl: float
    largest_difference: float
    correlation: float


@dataclass(frozen=True, slots=True)
class StreamedMatrix:
    """A matrix (out, in) that is read for each product, a block of rows at a time.

    read: returns rows as float32.
    """

    read: Callable[[slice], mx.array]
    n_rows: int
    width: int

    def __call__(self, x: mx.array) -> mx.array:
        """Return x (..., in) times the transposed matrix; NumPy's BLAS is the faster one here."""
        step = max(1, BLOCK_BYTES // (4 * self.width))
        given = np.array(x)
        parts = [
            given @ np.array(self.read(slice(start, min(start + step, self.n_rows)))).T
            for start in range(0, self.n_rows, step)
        ]
        return mx.array(np.concatenate(parts, axis=-1))

    def rows(self, ids: mx.array) -> mx.array:
        """Return the rows ids (B, L) as (B, L, in)."""
        flat = [self.read(slice(i, i + 1)) for i in np.array(ids).ravel().tolist()]
        return mx.concatenate(flat).reshape(*ids.shape, self.width)

    def arrays(self) -> list[mx.array]:
        """Hold nothing."""
        return []


def compare_weights(source: SourceModel, folder: Path) -> Verification:
    """Run the same tokens through a source and the directory made of it.

    Raises CheckpointError when an unquantized result differs at all, or a quantized one has
    nothing to do with its source.
    """
    directory = open_model_directory(folder)
    tokens = _tokens(source)
    expected = _logits(_streamed(source.config, _source_reader(source)), tokens)
    found = _logits(_streamed(directory.config, _directory_reader(directory)), tokens)
    result = _compare(expected, found)
    is_exact = not directory.is_quantized and directory.config.dtype == source.config.dtype
    if is_exact and result.largest_difference > 0:
        raise CheckpointError(
            f"{folder}: logits differ from the source's by {result.largest_difference:.3g}, "
            "expected none without quantization; the disk or the memory is failing"
        )
    if not result.correlation > 0.5:
        raise CheckpointError(
            f"{folder}: logits have a correlation of {result.correlation:.3f} with the source's, "
            "expected nearly 1; more --bits are needed, or the disk or the memory is failing"
        )
    return result


def check_directory(folder: Path) -> list[str]:
    """Compare a model directory with its manifest; return the names that were checked.

    Raises CheckpointError for a file that is missing, changed, or not in the manifest.
    """
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        raise CheckpointError(f"{folder}: no manifest.json; only mlx-llama convert writes one")
    listed = load_json(manifest, max_bytes=MAX_JSON_BYTES).get("files")
    if not isinstance(listed, dict):
        raise CheckpointError(f"{manifest}: has no table of files; convert the model again")
    for name, entry in listed.items():
        path = folder / name
        if Path(name).name != name or not isinstance(entry, dict):
            raise CheckpointError(f"{manifest}: entry {name!r} is not a file of the folder")
        if not path.is_file():
            raise CheckpointError(f"{path}: is missing; convert the model again")
        found = file_digests(path, ("sha256",))["sha256"]
        if found != entry.get("sha256"):
            raise CheckpointError(
                f"{path}: SHA-256 is {found}, the manifest says {entry.get('sha256')}; the file "
                "has changed since the conversion"
            )
    for path in folder.glob("*.safetensors"):
        if path.name not in listed:
            raise CheckpointError(f"{path}: is not in the manifest; it was added later")
    return sorted(listed)


def _tokens(source: SourceModel) -> mx.array:
    ids = source.tokenizer.encode(TEXT, bos=True)
    return mx.array([(ids * N_TOKENS)[:N_TOKENS]], dtype=mx.uint32)


def _source_reader(source: SourceModel) -> ReadRows:
    def read(name: str, rows: slice | None) -> mx.array:
        return source.weights.read(name, rows).astype(mx.float32)

    return read


def _directory_reader(directory: ModelDirectory) -> ReadRows:
    def read(name: str, rows: slice | None) -> mx.array:
        module, tensors = hf_module(name), directory.tensors
        if f"{module}.scales" not in tensors:
            return tensors[f"{module}.weight"].read(rows).astype(mx.float32)
        form = directory.config.quant_format(module)
        return packed_ref(tensors, module, form, dtype="float32").read(rows)

    return read


def _streamed(config: ModelConfig, read: ReadRows) -> LlamaModel:
    """Build a model whose matrices stay on the disk."""
    shapes = tensor_shapes(config)

    def matrix(name: str) -> StreamedMatrix:
        rows, width = shapes[name]
        return StreamedMatrix(lambda wanted: read(name, wanted), rows, width)

    def block(index: int) -> Block:
        at = f"layers.{index}"
        wq, wk, wv, wo = (matrix(f"{at}.attention.{n}.weight") for n in ("wq", "wk", "wv", "wo"))
        w1, w2, w3 = (matrix(f"{at}.feed_forward.{n}.weight") for n in ("w1", "w2", "w3"))
        return Block(
            attention_norm=read(f"{at}.attention_norm.weight", None),
            wqkv=Stack((wq, wk, wv)),
            wo=wo,
            ffn_norm=read(f"{at}.ffn_norm.weight", None),
            w13=Stack((w1, w3)),
            w2=w2,
        )

    embedding = matrix(EMBEDDING)
    return LlamaModel(
        config,
        tok_embeddings=embedding,
        blocks=[block(index) for index in range(config.n_layers)],
        norm=read(NORM, None),
        output=embedding if config.tied else matrix(OUTPUT),
    )


def _logits(model: LlamaModel, tokens: mx.array) -> np.ndarray:
    return np.array(model(tokens)[0], dtype=np.float64)


def _compare(expected: np.ndarray, found: np.ndarray) -> Verification:
    """Compare logits (L, V) float64."""

    def log_softmax(values: np.ndarray) -> np.ndarray:
        values = values - values.max(axis=-1, keepdims=True)
        return values - np.log(np.exp(values).sum(axis=-1, keepdims=True))

    p, q = log_softmax(expected), log_softmax(found)
    return Verification(
        tokens=len(expected),
        same_top=float((expected.argmax(-1) == found.argmax(-1)).mean()),
        mean_kl=float((np.exp(p) * (p - q)).sum(-1).mean()),
        largest_difference=float(np.abs(expected - found).max()),
        correlation=float(np.corrcoef(expected.ravel(), found.ravel())[0, 1]),
    )
