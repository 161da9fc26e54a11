"""A model directory of random weights in a shape: it computes what a real one computes.

Weights are made and written some rows at a time. Packed ones are random bits under scales that keep
activations in a model's usual range. The vocabulary is made up: the single bytes, then pairs, then
triples, as many as the embedding has rows.
"""

from __future__ import annotations

import json
import math
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, islice, product
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_llama import ops
from mlx_llama.config import ModelConfig, QuantFormat, config_to_hf
from mlx_llama.context import plan_context
from mlx_llama.kinds import kind_named
from mlx_llama.options import ContextOptions, LoadOptions
from mlx_llama.rope import with_linear_scaling
from mlx_llama.safetensors_writer import Entry, SafetensorsWriter, entry_nbytes
from mlx_llama.tokenizer import open_tokenizer
from mlx_llama.tokenizer.bpe import N_SPECIAL
from mlx_llama.weights import hf_module, is_matrix, tensor_shapes
from mlx_llama_apps.bench.scratch import require_room
from mlx_llama_convert.tokenizer_files import write_tokenizer_files

NUMBERS_AT_ONCE = 1 << 22
DENSE, DENSE_BITS = "bfloat16", 16
GROUPS = (64, 32)

OnBytes = Callable[[int, int], None]


def with_bits(shape: ModelConfig, bits: int) -> ModelConfig:
    """Return a shape packed to so many bits, in the largest groups that fit; 16: dense."""
    if bits == DENSE_BITS:
        return shape
    widths = (shape.dim, shape.hidden_dim, shape.n_heads * shape.head_dim)
    group = next(size for size in GROUPS if not any(width % size for width in widths))
    return replace(shape, quantization=QuantFormat(bits, group))


def require(config: ModelConfig, load: LoadOptions, context: ContextOptions) -> None:
    """Raise OptionError for options that a model of random weights has no use for."""
    forms = [] if config.quantization is None else [config.quantization]
    ops.choose_activations(forms, asked=load.activations)
    if load.rope_linear is not None:
        config = with_linear_scaling(config, load.rope_linear)
    dtype = ops.compute_dtype(DENSE, is_quantized=bool(forms), asked=load.dtype)
    plan_context(context, config, dtype=dtype)


def write_random_model(folder: Path, config: ModelConfig, on_bytes: OnBytes | None = None) -> Path:
    """Write a directory that `load` and mlx-lm read; OutputError where the disk has no room.

    on_bytes(done, total) counts what was written. Returns the folder.
    """
    entries = [entry for name in tensor_shapes(config) for entry in _entries(name, config)]
    total = sum(entry_nbytes(entry) for entry in entries)
    folder.mkdir(parents=True)
    require_room(folder, total, "the model", "take a smaller --shape or fewer --bits")
    _write_vocabulary(folder, config)
    done = 0
    with SafetensorsWriter(
        folder / "model.safetensors", entries, {"format": "mlx"}, is_durable=False
    ) as writer:
        for name in tensor_shapes(config):
            for part, rows in _content(name, config):
                writer.write(f"{hf_module(name)}.{part}", rows)
                done += rows.nbytes
                if on_bytes is not None:
                    on_bytes(done, total)
    return folder


def _write_vocabulary(folder: Path, config: ModelConfig) -> None:
    """Write the tokenizer's files and config.json."""
    write_tiktoken(folder / "tokenizer.model", config.vocab_size - N_SPECIAL)
    tokenizer = open_tokenizer(folder)
    write_tokenizer_files(
        tokenizer, kind_named(config.kind), folder, max_context=config.max_context
    )
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    raw = config_to_hf(config) | ids | {"mlx_llama": {"kind": config.kind}}
    (folder / "config.json").write_text(json.dumps(raw, indent=2), encoding="utf-8")


def write_tiktoken(path: Path, n_ranks: int) -> None:
    """Write a Llama 3 tokenizer file of n_ranks tokens."""
    tokens = chain.from_iterable(product(range(256), repeat=size) for size in (1, 2, 3))
    lines = (
        b"%s %d\n" % (b64encode(bytes(token)), rank)
        for rank, token in enumerate(islice(tokens, n_ranks))
    )
    path.write_bytes(b"".join(lines))


def _entries(name: str, config: ModelConfig) -> list[Entry]:
    """Return what the file holds of one of Meta's tensors."""
    module, shape, form = hf_module(name), tensor_shapes(config)[name], config.quantization
    if form is None or not is_matrix(name):
        return [(f"{module}.weight", DENSE, shape)]
    rows, columns = shape
    groups = (rows, columns // form.group_size)
    return [
        (f"{module}.weight", "uint32", (rows, columns * form.bits // 32)),
        (f"{module}.scales", DENSE, groups),
        (f"{module}.biases", DENSE, groups),
    ]


def _content(name: str, config: ModelConfig) -> Iterator[tuple[str, mx.array]]:
    """Yield the parts of one of Meta's tensors, some rows at a time; the same for the same name."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    shape, form = tensor_shapes(config)[name], config.quantization
    if not is_matrix(name):
        yield "weight", _bfloat16(1 + 0.1 * generator.standard_normal(shape, dtype=np.float32))
        return
    rows, columns = shape
    step = max(1, NUMBERS_AT_ONCE // columns)
    for start in range(0, rows, step):
        n_rows = min(step, rows - start)
        if form is None:
            values = generator.standard_normal((n_rows, columns), dtype=np.float32)
            yield "weight", _bfloat16(values / math.sqrt(columns))
            continue
        words = (n_rows, columns * form.bits // 32)
        yield "weight", mx.array(generator.integers(0, 1 << 32, words, dtype=np.uint32))
        # Codes spread evenly over [-reach, reach] have the variance reach² / 3.
        spread = generator.random((n_rows, columns // form.group_size), dtype=np.float32)
        reach = math.sqrt(3 / columns) * (0.75 + 0.5 * spread)
        yield "scales", _bfloat16(2 * reach / ((1 << form.bits) - 1))
        yield "biases", _bfloat16(-reach)


def _bfloat16(values: np.ndarray) -> mx.array:
    return mx.array(values).astype(mx.bfloat16)
