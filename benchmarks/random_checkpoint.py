"""Writes a checkpoint of random bfloat16 weights in the true shape of a model, to measure with.

    python benchmarks/random_checkpoint.py llama-3.2-1b FOLDER            Hugging Face's layout
    python benchmarks/random_checkpoint.py llama-3.2-1b FOLDER --meta     Meta's layout

Both layouts of one shape hold the same weights, so that conversions of them must agree. Weights are
made and written some rows at a time. To measure speed alone, `mlx-llama bench --shape` makes a
packed model by itself.
"""

from __future__ import annotations

import argparse
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from torch_zip import write_pth

from mlx_llama.config import ModelConfig, RopeScaling, config_to_hf
from mlx_llama.kinds import kind_named
from mlx_llama.safetensors_writer import SafetensorsWriter
from mlx_llama.tensor_ref import byte_view
from mlx_llama.tokenizer import open_tokenizer
from mlx_llama.tokenizer.bpe import N_SPECIAL
from mlx_llama.weights import hf_module, tensor_shapes
from mlx_llama_apps.bench.random_model import write_tiktoken
from mlx_llama_apps.bench.shapes import SHAPES as FAMILY
from mlx_llama_convert.tokenizer_files import write_tokenizer_files

HEADS_AT_ONCE = 64
# What Meta's params.json says instead of the feed-forward width.
FFN_PARAMS: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {"multiple_of": 256, "ffn_dim_multiplier": 1.5, "use_scaled_rope": True},
    "110m": {"multiple_of": 256},
    "15m": {"multiple_of": 32},
}


def long_shape(dim: int, n_layers: int, n_heads: int, n_kv_heads: int) -> ModelConfig:
    """Return a shape that a slow machine can take to 131072 tokens: few layers, few heads of 64."""
    return ModelConfig(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=64,
        hidden_dim=4 * dim,
        vocab_size=4096,
        norm_eps=1e-5,
        rope_theta=500000.0,
        max_context=131072,
        tied=True,
        kind="llama3.1",
        rope_scaling=RopeScaling("llama3", 8.0),
    )


SHAPES = {
    **FAMILY,
    "context": long_shape(512, 2, 8, 2),
    "narrow-2": long_shape(128, 2, 2, 1),
    "narrow-1": long_shape(128, 1, 2, 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--meta", action="store_true", help="write Meta's layout")
    given = parser.parse_args()
    if given.meta and given.shape not in FFN_PARAMS:
        parser.error(f"--meta: known for {', '.join(FFN_PARAMS)}")
    given.folder.mkdir(parents=True)
    write_tiktoken(given.folder / "tokenizer.model", SHAPES[given.shape].vocab_size - N_SPECIAL)
    (write_meta if given.meta else write_huggingface)(given.shape, given.folder)


def write_huggingface(shape: str, folder: Path) -> None:
    """Write safetensors, config.json and the tokenizer as Hugging Face's releases have it."""
    config = SHAPES[shape]
    tokenizer = open_tokenizer(folder)
    write_tokenizer_files(
        tokenizer, kind_named(config.kind), folder, max_context=config.max_context
    )
    (folder / "tokenizer.model").unlink()
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    (folder / "config.json").write_text(json.dumps(config_to_hf(config) | ids, indent=2))
    shapes = tensor_shapes(config)
    names = {name: f"{hf_module(name)}.weight" for name in shapes}
    entries = [(names[name], "bfloat16", size) for name, size in shapes.items()]
    with SafetensorsWriter(folder / "model.safetensors", entries, {"format": "pt"}) as writer:
        for name, size in shapes.items():
            for rows in random_rows(name, size, config.head_dim):
                writer.write(names[name], mx.array(rows).astype(mx.bfloat16))


def write_meta(shape: str, folder: Path) -> None:
    """Write consolidated.00.pth and params.json; the output shares the embedding's storage."""
    config = SHAPES[shape]
    params = {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "vocab_size": config.vocab_size,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        **FFN_PARAMS[shape],
    }
    (folder / "params.json").write_text(json.dumps(params))
    shapes = tensor_shapes(config)

    def content(name: str) -> Iterator[memoryview]:
        for rows in random_rows(name, shapes[name], config.head_dim):
            is_rotated = name.endswith((".wq.weight", ".wk.weight"))
            ordered = interleaved(rows, config.head_dim) if is_rotated else rows
            stored = mx.array(ordered).astype(mx.bfloat16).view(mx.uint16)
            mx.eval(stored)
            yield byte_view(stored)

    aliases = {"output.weight": "tok_embeddings.weight"}
    write_pth(folder / "consolidated.00.pth", shapes, content, aliases=aliases)


def random_rows(name: str, shape: tuple[int, ...], head_dim: int) -> Iterator[np.ndarray]:
    """Yield a tensor's rows, whole heads at a time, float32; the same for the same name."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    if len(shape) == 1:
        yield 1 + 0.1 * generator.standard_normal(shape, dtype=np.float32)
        return
    step = head_dim * HEADS_AT_ONCE
    for start in range(0, shape[0], step):
        size = (min(step, shape[0] - start), shape[1])
        yield generator.standard_normal(size, dtype=np.float32) / math.sqrt(shape[1])


def interleaved(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorder rows of wq or wk from Hugging Face's half-split pairs to Meta's adjacent ones."""
    pairs = rows.reshape(-1, 2, head_dim // 2, rows.shape[1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


if __name__ == "__main__":
    main()
