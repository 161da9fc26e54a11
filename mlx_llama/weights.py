"""Names, shapes and order of a Llama's tensors, and how they become a model in memory.

Inside, names are Meta's (`layers.0.attention.wq.weight`); on disk, in a model directory, they are
Hugging Face's. Rows of wq and wk are in Hugging Face's half-split order in both.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Protocol

import mlx.core as mx

from mlx_llama import ops
from mlx_llama.config import ModelConfig, QuantFormat
from mlx_llama.errors import CheckpointError
from mlx_llama.linear import Dense, Matrix, Packed, Stack, stack_rows
from mlx_llama.model import Block, LlamaModel

EMBEDDING = "tok_embeddings.weight"
OUTPUT = "output.weight"
NORM = "norm.weight"
FLOATS = (mx.float32, mx.bfloat16, mx.float16)

TOP_NAMES = {EMBEDDING: "model.embed_tokens", NORM: "model.norm", OUTPUT: "lm_head"}
LAYER_NAMES = {
    "attention_norm.weight": "input_layernorm",
    "attention.wq.weight": "self_attn.q_proj",
    "attention.wk.weight": "self_attn.k_proj",
    "attention.wv.weight": "self_attn.v_proj",
    "attention.wo.weight": "self_attn.o_proj",
    "ffn_norm.weight": "post_attention_layernorm",
    "feed_forward.w1.weight": "mlp.gate_proj",
    "feed_forward.w3.weight": "mlp.up_proj",
    "feed_forward.w2.weight": "mlp.down_proj",
}
_META_TOP = {f"{module}.weight": name for name, module in TOP_NAMES.items()}
_META_LAYER = {f"{module}.weight": name for name, module in LAYER_NAMES.items()}


class WeightSource(Protocol):
    """Unquantized weights by Meta's names, rows of wq and wk half-split; any order, any rows."""

    @property
    def config(self) -> ModelConfig:
        """The architecture that the weights belong to."""
        ...

    def names(self) -> list[str]:
        """Return the tensors in the order in which they are best read and written."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the full shape of a tensor."""
        ...

    def dtype(self, name: str) -> str:
        """Return the dtype that a tensor is stored in."""
        ...

    def read(self, name: str, rows: slice | None = None) -> mx.array:
        """Return a tensor, or some of its rows, evaluated."""
        ...


class SourceArrays(MutableMapping[str, mx.array]):
    """A source's tensors by Hugging Face names, read when they are taken; what is taken is gone."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._names = {f"{hf_module(name)}.weight": name for name in source.names()}

    def __getitem__(self, hf_name: str) -> mx.array:
        return self._source.read(self._names[hf_name])

    def __setitem__(self, hf_name: str, array: mx.array) -> None:
        raise TypeError(f"{hf_name}: a source's tensors are not replaced")

    def __delitem__(self, hf_name: str) -> None:
        del self._names[hf_name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, hf_name: object) -> bool:  # the mixin's would read the tensor
        return hf_name in self._names


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return every tensor of the architecture in writing order, Meta's name to shape."""
    q_rows, kv_rows = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    dim, hidden = config.dim, config.hidden_dim
    layer = {
        "attention_norm.weight": (dim,),
        "attention.wq.weight": (q_rows, dim),
        "attention.wk.weight": (kv_rows, dim),
        "attention.wv.weight": (kv_rows, dim),
        "attention.wo.weight": (dim, q_rows),
        "ffn_norm.weight": (dim,),
        "feed_forward.w1.weight": (hidden, dim),
        "feed_forward.w3.weight": (hidden, dim),
        "feed_forward.w2.weight": (dim, hidden),
    }
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, dim)}
    for index in range(config.n_layers):
        shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes[NORM] = (dim,)
    if not config.tied:
        shapes[OUTPUT] = (config.vocab_size, dim)
    return shapes


def hf_module(name: str) -> str:
    """Return the Hugging Face module of Meta's tensor name: `model.layers.0.self_attn.q_proj`."""
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    _, index, rest = name.split(".", 2)
    return f"model.layers.{index}.{LAYER_NAMES[rest]}"


def meta_name(hf_name: str) -> str | None:
    """Return Meta's name of a Hugging Face tensor; None for one that is not a Llama's."""
    if hf_name in _META_TOP:
        return _META_TOP[hf_name]
    match = re.fullmatch(r"model\.layers\.(\d{1,5})\.(.+)", hf_name)
    if not match or match[2] not in _META_LAYER:
        return None
    return f"layers.{int(match[1])}.{_META_LAYER[match[2]]}"


def is_meta_name(name: str) -> bool:
    """Whether a name is Meta's for a Llama's tensor."""
    match = re.fullmatch(r"layers\.(?:0|[1-9]\d{0,4})\.(.+)", name)
    return name in TOP_NAMES or bool(match and match[1] in LAYER_NAMES)


def is_matrix(name: str) -> bool:
    """Whether a tensor is multiplied (or looked up), not a norm's scale."""
    return not name.endswith("norm.weight")


def count_formats(matrices: Iterable[tuple[QuantFormat | None, str]]) -> dict[str, int]:
    """Count matrices by how they are stored: "4 bits, group 64", or the dtype of dense ones."""
    return dict(Counter(dtype if form is None else form.describe() for form, dtype in matrices))


def build_model(
    config: ModelConfig,
    arrays: MutableMapping[str, mx.array],
    *,
    dtype: mx.Dtype,
    on_block: Callable[[int, int], None] | None = None,
) -> LlamaModel:
    """Make the model of a directory's arrays, one block evaluated at a time.

    arrays: by Hugging Face names, not yet evaluated; emptied as they are used.
    dtype: of dense weights, scales and activations.
    on_block(done, total) is called after each block.
    Raises CheckpointError for a missing tensor or a wrong shape.
    """
    model = build_ends(config, arrays, dtype=dtype)
    blocks: list[Block] = []
    for block in build_blocks(config, arrays, dtype=dtype):
        blocks.append(block)
        if on_block is not None:
            on_block(len(blocks), config.n_layers)
    if unused := sorted(name for name in arrays if not name.startswith("lm_head.")):
        raise CheckpointError(f"tensor {unused[0]} has no place in the model; it would be ignored")
    model.blocks = tuple(blocks)
    return model


def _read(arrays: list[mx.array]) -> None:
    """Evaluate; CheckpointError for what MLX or the kernels say: a file that changed, no memory."""
    try:
        mx.eval(arrays)
    except RuntimeError as error:
        raise CheckpointError(f"weights cannot be loaded: {error}") from error


def build_ends(
    config: ModelConfig, arrays: MutableMapping[str, mx.array], *, dtype: mx.Dtype
) -> LlamaModel:
    """Make the embedding, the last norm and the output, evaluated: a model without its blocks."""
    reader = _ArrayReader(config, arrays, dtype)
    embedding = reader.matrix(EMBEDDING)
    output = embedding if config.tied else reader.matrix(OUTPUT)
    norm = reader.vector(NORM)
    _read([norm, *embedding.arrays(), *output.arrays()])
    return LlamaModel(config, tok_embeddings=embedding, blocks=(), norm=norm, output=output)


def build_blocks(
    config: ModelConfig,
    arrays: MutableMapping[str, mx.array],
    *,
    dtype: mx.Dtype,
    is_joined: bool = True,
) -> Iterator[Block]:
    """Yield the blocks in order, evaluated.

    One at a time: joining rows holds both forms of what is evaluated together. Who keeps none
    needs the memory of one, and with is_joined=False of no second form.
    """
    reader = _ArrayReader(config, arrays, dtype)
    for index in range(config.n_layers):
        block = _build_block(reader, index, join=_joined if is_joined else _beside)
        _read(block.arrays())
        yield block
        del block  # or it would stay while the next one is made


def _joined(parts: Iterable[Matrix]) -> Matrix:
    return stack_rows([*parts])


def _beside(parts: Iterable[Matrix]) -> Matrix:
    """Put matrices of one input side by side, each evaluated before the next is read."""
    found: list[Matrix] = []
    for part in parts:
        _read(part.arrays())
        found.append(part)
    return found[0] if len(found) == 1 else Stack(tuple(found))


def _build_block(
    reader: _ArrayReader, index: int, join: Callable[[Iterable[Matrix]], Matrix]
) -> Block:
    def matrices(*names: str) -> Matrix:
        return join(reader.matrix(f"layers.{index}.{name}.weight") for name in names)

    return Block(
        attention_norm=reader.vector(f"layers.{index}.attention_norm.weight"),
        wqkv=matrices("attention.wq", "attention.wk", "attention.wv"),
        wo=matrices("attention.wo"),
        ffn_norm=reader.vector(f"layers.{index}.ffn_norm.weight"),
        w13=matrices("feed_forward.w1", "feed_forward.w3"),
        w2=matrices("feed_forward.w2"),
    )


class _ArrayReader:
    """Takes tensors by Meta's names out of arrays by Hugging Face names, checking shapes."""

    def __init__(
        self, config: ModelConfig, arrays: MutableMapping[str, mx.array], dtype: mx.Dtype
    ) -> None:
        self._config = config
        self._arrays = arrays
        self._dtype = dtype
        self._shapes = tensor_shapes(config)

    def vector(self, name: str) -> mx.array:
        """Return a norm's scale, (dim,)."""
        return self._take(hf_module(name) + ".weight", self._shapes[name]).astype(self._dtype)

    def matrix(self, name: str) -> Matrix:
        """Return a matrix, packed where the directory holds scales for it."""
        module, (rows, columns) = hf_module(name), self._shapes[name]
        if f"{module}.scales" not in self._arrays:
            weight = self._take(f"{module}.weight", (rows, columns))
            return Dense(weight.astype(ops.dense_dtype(weight.dtype, self._dtype)), self._dtype)
        form = self._config.quant_format(module)
        if form is None:
            raise CheckpointError(
                f"tensor {module}.scales: config.json does not say how it is quantized"
            )
        if columns % form.group_size:
            raise CheckpointError(
                f"tensor {module}.weight: width {columns} is no multiple of group {form.group_size}"
            )
        weight = self._take(f"{module}.weight", (rows, columns * form.bits // 32), (mx.uint32,))
        groups = (rows, columns // form.group_size)
        if form.mode != "affine":  # the scales are bit patterns there, not numbers
            scales = self._take(f"{module}.scales", groups, (mx.uint8,))
            return Packed(weight, scales, None, form, self._dtype)
        scales = self._take(f"{module}.scales", groups)
        biases = self._take(f"{module}.biases", groups)
        dtype = ops.scales_dtype(scales.dtype, self._dtype, form)
        scales, biases = scales.astype(dtype), biases.astype(dtype)
        return Packed(weight, scales, biases, form, self._dtype)

    def _take(
        self, name: str, shape: tuple[int, ...], dtypes: tuple[mx.Dtype, ...] = FLOATS
    ) -> mx.array:
        if name not in self._arrays:
            raise CheckpointError(f"tensor {name} is missing from the model directory")
        # Taken out: rows that are joined shall not stay in memory beside the join.
        array = self._arrays.pop(name)
        if array.shape != shape:
            raise CheckpointError(
                f"tensor {name}: shape {array.shape}, expected {shape} by config.json"
            )
        if (dtype := array.dtype) not in dtypes:
            raise CheckpointError(
                f"tensor {name}: stored as {dtype}, expected {' or '.join(map(str, dtypes))}"
            )
        return array
