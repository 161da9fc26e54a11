"""Names, shapes, and the model that is made of arrays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_llama.config import ModelConfig, QuantFormat, config_from_hf
from mlx_llama.errors import CheckpointError
from mlx_llama.linear import Dense, Packed
from mlx_llama.weights import (
    build_model,
    count_formats,
    hf_module,
    is_matrix,
    meta_name,
    tensor_shapes,
)
from model_folders import TINY, TINY_SCALED, arrays_of
from random_models import CASES, meta_weights, random_model

Arrays = dict[str, mx.array]

# Meta's name, Hugging Face's name, shape in a model of dim 128, 2 heads of 64, 1 key/value head.
NAMES = [
    ("tok_embeddings.weight", "model.embed_tokens", (320, 128)),
    ("layers.0.attention_norm.weight", "model.layers.0.input_layernorm", (128,)),
    ("layers.0.attention.wq.weight", "model.layers.0.self_attn.q_proj", (128, 128)),
    ("layers.0.attention.wk.weight", "model.layers.0.self_attn.k_proj", (64, 128)),
    ("layers.0.attention.wv.weight", "model.layers.0.self_attn.v_proj", (64, 128)),
    ("layers.0.attention.wo.weight", "model.layers.0.self_attn.o_proj", (128, 128)),
    ("layers.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm", (128,)),
    ("layers.0.feed_forward.w1.weight", "model.layers.0.mlp.gate_proj", (256, 128)),
    ("layers.0.feed_forward.w3.weight", "model.layers.0.mlp.up_proj", (256, 128)),
    ("layers.0.feed_forward.w2.weight", "model.layers.0.mlp.down_proj", (128, 256)),
    ("norm.weight", "model.norm", (128,)),
    ("output.weight", "lm_head", (320, 128)),
]


def tiny() -> tuple[ModelConfig, Arrays]:
    weights, raw = random_model(TINY)
    return config_from_hf(raw, kind="llama2", is_tied=None), arrays_of(weights)


@pytest.mark.parametrize(("meta", "module", "shape"), NAMES)
def test_names_and_shapes(meta: str, module: str, shape: tuple[int, ...]) -> None:
    config, _ = tiny()
    assert hf_module(meta) == module
    assert meta_name(f"{module}.weight") == meta
    assert tensor_shapes(config)[meta] == shape
    assert is_matrix(meta) == (len(shape) == 2)


def test_tensors_are_listed_in_writing_order() -> None:
    config, _ = tiny()
    one_layer = [meta for meta, _, _ in NAMES if meta.startswith("layers.0.")]
    names = list(tensor_shapes(config))
    assert names[0] == "tok_embeddings.weight" and names[-2:] == ["norm.weight", "output.weight"]
    assert names[1:10] == one_layer
    assert names[10:19] == [name.replace(".0.", ".1.") for name in one_layer]
    assert len(names) == 21


@pytest.mark.parametrize("name", ["llama2", "llama3.2", "wide_heads"])
def test_shapes_are_those_of_a_model(name: str) -> None:
    weights, raw = random_model(CASES[name])
    config = config_from_hf(raw, kind="llama2", is_tied=None)
    shapes = tensor_shapes(config)
    expected = {meta_name(name): array.shape for name, array in weights.items()}
    assert shapes == expected
    assert config.parameter_count == sum(array.size for array in weights.values())
    untied = replace(config, tied=False)
    renamed = meta_weights(weights, head_dim=config.head_dim)
    assert set(tensor_shapes(untied)) == set(renamed)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.bias",
        "model.layers.0.self_attn.q_proj.scales",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.-1.mlp.up_proj.weight",
        "model.layers.123456.mlp.up_proj.weight",
        "model.layers.0.mlp.experts.0.up_proj.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.weight",
        "layers.0.attention.wq.weight",
        "lm_head.weight\n",
        "",
    ],
)
def test_foreign_names_have_no_name_here(name: str) -> None:
    assert meta_name(name) is None


def test_matrices_are_counted_by_how_they_are_stored() -> None:
    four, micro = QuantFormat(4, 64), QuantFormat(4, 32, "mxfp4")
    stored = [(four, "uint32"), (None, "bfloat16"), (four, "uint32"), (micro, "uint32")]
    assert count_formats(stored) == {
        "4 bits, group 64": 2,
        "bfloat16": 1,
        "4 bits, group 32, mxfp4": 1,
    }


# --- a model of arrays -------------------------------------------------------------------------


def test_every_tensor_has_its_place() -> None:
    config, arrays = tiny()
    model = build_model(config, dict(arrays), dtype=mx.float32)
    block = model.blocks[1]
    at = "model.layers.1"

    def rows(*names: str) -> mx.array:
        return mx.concatenate([arrays[f"{at}.{name}.weight"] for name in names])

    matrices = [
        (model.tok_embeddings, arrays["model.embed_tokens.weight"]),
        (model.output, arrays["lm_head.weight"]),
        (block.wqkv, rows("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        (block.wo, rows("self_attn.o_proj")),
        (block.w13, rows("mlp.gate_proj", "mlp.up_proj")),
        (block.w2, rows("mlp.down_proj")),
    ]
    for matrix, expected in matrices:
        assert isinstance(matrix, Dense)
        assert mx.array_equal(matrix.weight, expected).item()
    assert mx.array_equal(model.norm, arrays["model.norm.weight"]).item()
    assert mx.array_equal(block.attention_norm, rows("input_layernorm")).item()
    assert mx.array_equal(block.ffn_norm, rows("post_attention_layernorm")).item()


def test_progress_counts_blocks() -> None:
    config, arrays = tiny()
    seen: list[tuple[int, int]] = []
    build_model(config, dict(arrays), dtype=mx.float32, on_block=lambda *done: seen.append(done))
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.parametrize("name", [f"{module}.weight" for _, module, _ in NAMES])
def test_a_missing_tensor_is_named(name: str) -> None:
    config, arrays = tiny()
    del arrays[name]
    with pytest.raises(CheckpointError, match=f"tensor {name} is missing"):
        build_model(config, dict(arrays), dtype=mx.float32)


@pytest.mark.parametrize("name", [f"{module}.weight" for _, module, _ in NAMES])
def test_a_wrong_shape_is_named_with_the_expected_one(name: str) -> None:
    config, arrays = tiny()
    right = arrays[name].shape
    arrays[name] = arrays[name][:-1]
    with pytest.raises(CheckpointError) as caught:
        build_model(config, dict(arrays), dtype=mx.float32)
    assert name in str(caught.value) and f"expected {right}" in str(caught.value)


def packed_tiny(form: QuantFormat) -> tuple[ModelConfig, Arrays]:
    """Pack one projection of TINY."""
    config, arrays = tiny()
    weight = arrays[f"{MODULE}.weight"]
    packed = mx.quantize(weight, group_size=form.group_size, bits=form.bits, mode=form.mode)
    arrays |= {f"{MODULE}.{part}": a for part, a in zip(PARTS, packed, strict=False)}
    return replace(config, quantization=form), arrays


MODULE = "model.layers.0.mlp.down_proj"
PARTS = ("weight", "scales", "biases")


def test_a_tensor_is_packed_exactly_where_it_has_scales() -> None:
    config, arrays = packed_tiny(QuantFormat(4, 64))
    model = build_model(config, dict(arrays), dtype=mx.float16)
    w2 = model.blocks[0].w2
    assert isinstance(w2, Packed) and isinstance(model.blocks[1].w2, Dense)
    assert w2.biases is not None and w2.form == QuantFormat(4, 64)
    assert w2.scales.dtype == w2.biases.dtype == mx.float16
    assert mx.array_equal(w2.weight, arrays[f"{MODULE}.weight"]).item()


@pytest.mark.parametrize(
    ("mode", "group_size", "bits"), [("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)]
)
def test_scales_that_are_bit_patterns_keep_their_dtype(
    mode: str, group_size: int, bits: int
) -> None:
    config, arrays = packed_tiny(QuantFormat(bits, group_size, mode))
    w2 = build_model(config, dict(arrays), dtype=mx.float32).blocks[0].w2
    assert isinstance(w2, Packed) and w2.biases is None
    assert w2.scales.dtype == mx.uint8
    weight = random_model(TINY)[0][f"{MODULE}.weight"]
    rows = w2.rows(mx.arange(4)).astype(mx.float32)
    error = np.abs(np.asarray(rows) - weight[:4])
    assert error.max() < 0.3 * np.abs(weight[:4]).max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization": None}, "does not say how it is quantized"),
        ({"overrides": {MODULE: None}}, "does not say how it is quantized"),
        ({"quantization": QuantFormat(8, 64)}, f"{MODULE}.weight: shape"),
        ({"quantization": QuantFormat(4, 32)}, f"{MODULE}.scales: shape"),
        ({"overrides": {MODULE: QuantFormat(2, 64)}}, f"{MODULE}.weight: shape"),
    ],
)
def test_packed_tensors_must_fit_what_config_says(change: dict[str, Any], message: str) -> None:
    config, arrays = packed_tiny(QuantFormat(4, 64))
    with pytest.raises(CheckpointError, match=message):
        build_model(replace(config, **change), dict(arrays), dtype=mx.float32)


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_or_cut_part_of_a_packed_tensor_is_named(part: str) -> None:
    config, arrays = packed_tiny(QuantFormat(4, 64))
    name = f"{MODULE}.{part}"
    cut = {**arrays, name: arrays[name][:, :-1]}
    with pytest.raises(CheckpointError, match=f"{name}: shape"):
        build_model(config, cut, dtype=mx.float32)
    # Without scales the tensor counts as dense, and its width of packed words is wrong.
    del arrays[name]
    with pytest.raises(CheckpointError, match=MODULE):
        build_model(config, dict(arrays), dtype=mx.float32)


@pytest.mark.parametrize(
    ("part", "dtype"),
    [("weight", mx.float32), ("weight", mx.int32), ("scales", mx.uint8), ("biases", mx.int32)],
)
def test_packed_tensors_of_a_wrong_dtype_are_refused(part: str, dtype: mx.Dtype) -> None:
    config, arrays = packed_tiny(QuantFormat(4, 64))
    arrays[f"{MODULE}.{part}"] = arrays[f"{MODULE}.{part}"].astype(dtype)
    with pytest.raises(CheckpointError, match=f"{MODULE}.{part}: stored as {dtype}, expected"):
        build_model(config, arrays, dtype=mx.float32)


@pytest.mark.parametrize("dtype", [mx.uint8, mx.int8, mx.int32, mx.bool_])
@pytest.mark.parametrize("name", [f"{MODULE}.weight", "model.norm.weight"])
def test_dense_tensors_that_are_no_floats_are_refused(name: str, dtype: mx.Dtype) -> None:
    """A release in 8-bit floats would otherwise be read as whole numbers, scales forgotten."""
    config, arrays = tiny()
    arrays[name] = arrays[name].astype(dtype)
    with pytest.raises(CheckpointError, match=f"{name}: stored as {dtype}, expected"):
        build_model(config, arrays, dtype=mx.float32)


def test_a_width_that_the_group_does_not_divide_is_refused() -> None:
    config, arrays = packed_tiny(QuantFormat(4, 64))
    narrow = {k: v for k, v in arrays.items() if not k.startswith(MODULE)}
    for part, array in zip(PARTS, (4, 1, 1), strict=True):
        narrow[f"{MODULE}.{part}"] = mx.zeros((128, array), dtype=mx.uint32)
    with pytest.raises(CheckpointError, match="width 96 is no multiple of group 64"):
        build_model(replace(config, hidden_dim=96), dense_ffn(narrow, 96), dtype=mx.float32)


def dense_ffn(arrays: Arrays, hidden: int) -> Arrays:
    """Cut gate and up to another hidden width."""
    cut = dict(arrays)
    for name, array in arrays.items():
        if ".gate_proj." in name or ".up_proj." in name:
            cut[name] = array[:hidden]
    return cut


def test_a_tied_output_is_not_read() -> None:
    weights, raw = random_model(TINY_SCALED)
    config = config_from_hf(raw, kind="llama3.2", is_tied=None)
    arrays = arrays_of(weights)
    assert "lm_head.weight" not in arrays
    model = build_model(config, dict(arrays), dtype=mx.float32)
    assert model.output is model.tok_embeddings
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        build_model(replace(config, tied=False), dict(arrays), dtype=mx.float32)


def test_arrays_are_taken_out_as_they_are_used() -> None:
    """Rows that are joined would else stay in memory beside the join."""
    config, arrays = tiny()
    build_model(config, arrays, dtype=mx.float32)
    assert arrays == {}
