"""A model directory's weights as a GGUF file, for llama.cpp to be measured on.

4-bit matrices become Q4_0 and 8-bit ones Q8_0, the formats of the same size that llama.cpp is
fastest with: their values are rounded once more. Dense ones stay what they are. The file has no
vocabulary, so it is good for nothing but measuring.

Source: docs/gguf.md in ggml-org/ggml; `block_q4_0` and `block_q8_0` in its `ggml-common.h`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_llama import ops
from mlx_llama.config import ModelConfig, QuantFormat
from mlx_llama.errors import OptionError
from mlx_llama.loading import ModelDirectory
from mlx_llama.rope import rope_frequencies
from mlx_llama.weights import hf_module, is_matrix, tensor_shapes
from mlx_llama_apps.bench.scratch import require_room

ALIGNMENT = 32
BLOCK = 32  # weights that share a scale
NUMBERS_AT_ONCE = 1 << 22
UINT32, FLOAT32, STRING = 4, 6, 8  # types of metadata
NAMES = {
    "tok_embeddings": "token_embd", "norm": "output_norm", "output": "output",
    "attention_norm": "attn_norm", "attention.wq": "attn_q", "attention.wk": "attn_k",
    "attention.wv": "attn_v", "attention.wo": "attn_output", "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate", "feed_forward.w3": "ffn_up", "feed_forward.w2": "ffn_down",
}  # fmt: skip

OnBytes = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Type:
    """One of ggml's types. number: ggml's own. block_bytes: of BLOCK weights."""

    number: int
    block_bytes: int
    pack: Callable[[np.ndarray], np.ndarray]


def _q4_0(values: np.ndarray) -> np.ndarray:
    """Pack (rows, n) float32 into 4 bits: 16 bytes of codes behind a float16 scale for 32."""
    blocks = values.reshape(-1, BLOCK)
    largest = np.abs(blocks).argmax(axis=1, keepdims=True)
    scale = np.take_along_axis(blocks, largest, axis=1) / np.float32(-8)
    codes = np.clip(blocks * _inverse(scale) + np.float32(8.5), 0, 15).astype(np.uint8)
    halves = codes[:, : BLOCK // 2] | (codes[:, BLOCK // 2 :] << 4)
    return _blocks(scale, halves, len(values))


def _q8_0(values: np.ndarray) -> np.ndarray:
    """Pack (rows, n) float32 into 8 bits: 32 signed codes behind a float16 scale."""
    blocks = values.reshape(-1, BLOCK)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    codes = np.rint(blocks * _inverse(scale)).astype(np.int8).view(np.uint8)
    return _blocks(scale, codes, len(values))


def _inverse(scale: np.ndarray) -> np.ndarray:
    return np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)


def _blocks(scale: np.ndarray, codes: np.ndarray, n_rows: int) -> np.ndarray:
    scales = scale.astype(np.float16).view(np.uint8)
    return np.concatenate([scales, codes], axis=1).reshape(n_rows, -1)


def _float32(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32)


def _float16(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16)


def _bfloat16(values: np.ndarray) -> np.ndarray:
    return np.array(mx.array(values).astype(mx.bfloat16).view(mx.uint16))


F32, Q4_0, Q8_0 = Type(0, 128, _float32), Type(2, 18, _q4_0), Type(8, 34, _q8_0)
PACKED = {4: Q4_0, 8: Q8_0}
DENSE = {"float32": F32, "float16": Type(1, 64, _float16), "bfloat16": Type(30, 64, _bfloat16)}


def write_gguf(directory: ModelDirectory, path: Path, on_bytes: OnBytes | None = None) -> Path:
    """Write the weights; on_bytes(done, total) counts them. Returns the path.

    Raises OptionError for bits that llama.cpp has no counterpart of, OutputError where the disk
    has no room.
    """
    config = directory.config
    tensors = [_Tensor(directory, name) for name in tensor_shapes(config)]
    factors = _rope_factors(config)
    infos, position = [], 0
    if factors is not None:
        infos.append(_info("rope_freqs.weight", factors.shape, F32, position))
        position += _aligned(factors.nbytes)
    for tensor in tensors:
        infos.append(_info(tensor.gguf_name, tensor.shape, tensor.type, position))
        position += _aligned(tensor.nbytes)
    metadata = [_entry(key, value) for key, value in _metadata(config).items()]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(metadata)) + b"".join(metadata + infos)
    require_room(path.parent, len(head) + position, "the GGUF file", "give one by --peer-model")
    done = 0
    with path.open("wb") as file:
        file.write(head.ljust(_aligned(len(head)), b"\0"))
        if factors is not None:
            file.write(factors.tobytes().ljust(_aligned(factors.nbytes), b"\0"))
        for tensor in tensors:
            for rows in tensor.rows():
                file.write(np.ascontiguousarray(rows).data)
                done += rows.nbytes
                if on_bytes is not None:
                    on_bytes(done, position)
            file.write(bytes(_aligned(tensor.nbytes) - tensor.nbytes))
    return path


class _Tensor:
    """One tensor on its way from the directory into the file."""

    def __init__(self, directory: ModelDirectory, name: str) -> None:
        self._directory = directory
        self._module = module = hf_module(name)
        self.shape = tensor_shapes(directory.config)[name]
        self.gguf_name = f"{_gguf_module(name)}.weight"
        self._heads = {"wq": directory.config.n_heads, "wk": directory.config.n_kv_heads}.get(
            name.split(".")[-2]
        )
        self._form: QuantFormat | None = None
        if not is_matrix(name):
            self.type = F32
        elif f"{module}.scales" in directory.tensors:
            self._form = directory.config.quant_format(module)
            self.type = _packed_type(module, self._form)
        else:
            self.type = DENSE[directory.tensors[f"{module}.weight"].dtype]
        if self.shape[-1] % BLOCK and self.type in PACKED.values():
            raise OptionError(
                f"--against llama.cpp: tensor {module} is {self.shape[-1]} wide, llama.cpp packs "
                f"multiples of {BLOCK}; give a file of your own with --peer-model"
            )

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.type.block_bytes // BLOCK

    def rows(self) -> Iterator[np.ndarray]:
        """Yield the packed rows, some at a time."""
        if len(self.shape) == 1:
            yield self.type.pack(self._read(slice(None)))
            return
        n_rows, columns = self.shape
        head_rows = 1 if self._heads is None else n_rows // self._heads
        step = max(1, NUMBERS_AT_ONCE // (columns * head_rows)) * head_rows
        for start in range(0, n_rows, step):
            values = self._read(slice(start, min(n_rows, start + step)))
            if self._heads is not None:
                # From Hugging Face's half-split pairs to the adjacent ones that llama.cpp turns.
                pairs = values.reshape(-1, 2, head_rows // 2, columns)
                values = pairs.swapaxes(1, 2).reshape(values.shape)
            yield self.type.pack(values)

    def _read(self, rows: slice) -> np.ndarray:
        tensors, form = self._directory.tensors, self._form
        weight = tensors[f"{self._module}.weight"].read(rows)
        if form is not None:
            scales, biases = (
                tensors[f"{self._module}.{p}"].read(rows) for p in ("scales", "biases")
            )
            scales, biases = (a.astype(mx.float32) for a in (scales, biases))
            weight = ops.dequantize(weight, scales, biases, form)
        return np.array(weight.astype(mx.float32))


def _packed_type(module: str, form: QuantFormat | None) -> Type:
    if form is None or form.mode != "affine" or form.bits not in PACKED:
        how = "unknown bits" if form is None else form.describe()
        raise OptionError(
            f"--against llama.cpp: tensor {module} has {how}, only 4 and 8 have a counterpart of "
            "the same size there; give a file of your own with --peer-model"
        )
    return PACKED[form.bits]


def _gguf_module(name: str) -> str:
    module = name.removesuffix(".weight")
    if not module.startswith("layers."):
        return NAMES[module]
    _, index, rest = module.split(".", 2)
    return f"blk.{index}.{NAMES[rest]}"


def _metadata(config: ModelConfig) -> Mapping[str, str | int | float]:
    return {
        "general.architecture": "llama",
        "general.alignment": ALIGNMENT,
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.max_context,
        "llama.embedding_length": config.dim,
        "llama.block_count": config.n_layers,
        "llama.feed_forward_length": config.hidden_dim,
        "llama.attention.head_count": config.n_heads,
        "llama.attention.head_count_kv": config.n_kv_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": config.rope_theta,
        "tokenizer.ggml.model": "none",
    }


def _rope_factors(config: ModelConfig) -> np.ndarray | None:
    """Return by how much each pair turns slower than without scaling, (D/2,) float32."""
    if config.rope_scaling is None:
        return None
    plain = rope_frequencies(replace(config, rope_scaling=None))
    return np.asarray(plain) / np.asarray(rope_frequencies(config))


def _entry(key: str, value: str | int | float) -> bytes:
    if isinstance(value, str):
        return _text(key) + struct.pack("<I", STRING) + _text(value)
    kind, form = (UINT32, "<I") if isinstance(value, int) else (FLOAT32, "<f")
    return _text(key) + struct.pack("<I", kind) + struct.pack(form, value)


def _info(name: str, shape: tuple[int, ...], kind: Type, offset: int) -> bytes:
    sizes = shape[::-1]  # ggml counts from the axis whose elements are neighbours
    return (
        _text(name)
        + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        + struct.pack("<IQ", kind.number, offset)
    )


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
