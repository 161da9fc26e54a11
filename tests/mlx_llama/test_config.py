"""config.json: both RoPE dialects, quantization entries, and what no Llama can be."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config_samples import EXPECTED, NEW, OLD, read, without
from mlx_llama.cache import KVBits
from mlx_llama.config import (
    LIMITS,
    ModelConfig,
    QuantFormat,
    RopeScaling,
    config_to_hf,
)
from mlx_llama.errors import CheckpointError, MlxLlamaError, UnsupportedModelError
from mlx_llama.memory import cache_bytes_per_token

# As Meta's Llama 3.2 1B has it on Hugging Face, before and since transformers 5.

# --- RoPE's two dialects -----------------------------------------------------------------------


@pytest.mark.parametrize("raw", [OLD, NEW, {**OLD, **NEW}], ids=["old", "new", "both"])
def test_every_dialect_reads_as_the_same_model(raw: dict[str, Any]) -> None:
    assert read(raw) == EXPECTED


SCALINGS = [
    None,
    RopeScaling("llama3", 8.0),
    RopeScaling("llama3", 32.0, 1.5, 5.0, 4096),
    RopeScaling("linear", 4.0),
]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_what_is_written_reads_the_same_in_both_dialects(scaling: RopeScaling | None) -> None:
    config = replace(EXPECTED, rope_scaling=scaling, rope_theta=12345.5)
    raw = json.loads(json.dumps(config_to_hf(config)))
    assert read(raw) == config
    for dialect in (("rope_parameters",), ("rope_theta", "rope_scaling")):
        half = {key: value for key, value in raw.items() if key not in dialect}
        assert len(half) == len(raw) - len(dialect)
        assert read(half) == config


def test_the_old_name_of_the_type_is_read() -> None:
    raw = {**OLD, "rope_scaling": {"type": "linear", "factor": 2}}
    assert read(raw).rope_scaling == RopeScaling("linear", 2.0)
    raw = {**OLD, "rope_scaling": {"type": "default"}}
    assert read(raw).rope_scaling is None


def test_theta_and_scaling_have_metas_defaults() -> None:
    config = read(without("rope_theta", "rope_scaling"))
    assert (config.rope_theta, config.rope_scaling) == (10000.0, None)
    config = read({**OLD, "rope_scaling": {"rope_type": "llama3", "factor": 8}})
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    # Either dialect may hold theta where the other holds the scaling.
    config = read({**without("rope_scaling"), "rope_parameters": OLD["rope_scaling"]})
    assert config == EXPECTED


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_theta": 10000.0}, r"rope_theta is given twice, as \[500000.0, 10000.0\]"),
        ({"rope_scaling": {**OLD["rope_scaling"], "factor": 8.0}}, "keep one"),
        ({"rope_scaling": {"rope_type": "default"}}, "keep one"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 32.0}}, "keep one"),
    ],
)
def test_dialects_that_disagree_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read({**OLD, **NEW, **change})


@pytest.mark.parametrize("name", ["yarn", "dynamic", "longrope", "su", "mrope", "LLAMA3", ["x"]])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_other_rope_types_are_refused_by_name(name: Any, key: str) -> None:
    raw = {**without("rope_scaling"), key: {"rope_type": name, "factor": 2.0}}
    with pytest.raises(UnsupportedModelError, match=r"RoPE type .* is not one of default, llama3"):
        read(raw)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "llama3"},
        {"rope_type": "llama3", "factor": None},
        {"rope_type": "llama3", "factor": "8"},
        {"rope_type": "llama3", "factor": True},
        {"rope_type": "llama3", "factor": 0.5},
        {"rope_type": "llama3", "factor": -8.0},
        {"rope_type": "llama3", "factor": 1e9},
        {"rope_type": "llama3", "factor": math.nan},
        {"rope_type": "llama3", "factor": math.inf},
        {"rope_type": "llama3", "factor": 10**400},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 0.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": math.nan},
        {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": math.inf},
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 0},
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192.5},
        {"rope_type": "linear", "factor": 0.0},
        [1],
        "llama3",
        7,
        True,
    ],
)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_absurd_scalings_are_refused(scaling: Any, key: str) -> None:
    with pytest.raises(CheckpointError):
        read({**without("rope_scaling"), key: scaling})


# --- absurd values -----------------------------------------------------------------------------

SIZES = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "hidden_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_context",
}
OPTIONAL = ("num_key_value_heads", "head_dim", "max_position_embeddings")


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize(
    "value", [0, -1, 10**9, 10**400, True, False, 2.0, 1e300, math.nan, "16", [16], {}]
)
def test_absurd_sizes_are_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        read({**OLD, key: value})
    message = str(caught.value)
    assert key in message or SIZES[key] in message
    assert "\n" not in message


@pytest.mark.parametrize("key", [k for k in SIZES if k not in OPTIONAL])
def test_a_missing_size_is_named(key: str) -> None:
    with pytest.raises(CheckpointError, match=f"{key} is None, expected a whole number"):
        read(without(key))


def test_what_old_files_leave_out() -> None:
    config = read(without(*OPTIONAL, "rms_norm_eps", "torch_dtype", "bos_token_id", "eos_token_id"))
    assert (config.n_kv_heads, config.head_dim, config.max_context) == (32, 64, 2048)
    assert (config.norm_eps, config.dtype) == (1e-6, "bfloat16")
    assert (config.bos_id, config.eos_ids) == (None, ())
    assert read({**OLD, "head_dim": None, "num_key_value_heads": None}).n_kv_heads == 32
    assert read({**OLD, "eos_token_id": 2}).eos_ids == (2,)


@pytest.mark.parametrize("name", LIMITS)
def test_the_bounds_themselves(name: str) -> None:
    fits = {"n_heads": LIMITS["n_heads"], "n_kv_heads": 1} if name == "n_heads" else {}
    fits |= {"n_heads": LIMITS[name], "n_kv_heads": LIMITS[name]} if name == "n_kv_heads" else {}
    assert replace(EXPECTED, **{name: LIMITS[name], **fits})
    with pytest.raises(CheckpointError, match=name):
        replace(EXPECTED, **{**fits, name: LIMITS[name] + 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 5}, "not a multiple of n_kv_heads 5"),
        ({"num_key_value_heads": 64}, "not a multiple of n_kv_heads 64"),
        ({"head_dim": 63}, "head_dim 63 is odd"),
        ({"rms_norm_eps": 0.0}, "norm_eps"),
        ({"rms_norm_eps": -1e-5}, "norm_eps"),
        ({"rms_norm_eps": 1.0}, "norm_eps"),
        ({"rms_norm_eps": math.nan}, "norm_eps"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"rms_norm_eps": True}, "rms_norm_eps"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": 1.0}, "rope_theta"),
        ({"rope_theta": -5e5}, "rope_theta"),
        ({"rope_theta": 1e13}, "rope_theta"),
        ({"rope_theta": math.nan}, "rope_theta"),
        ({"rope_theta": math.inf}, "rope_theta"),
        ({"rope_theta": 10**400}, "rope_theta is too large"),
        ({"rope_theta": "500000"}, "rope_theta"),
    ],
)
def test_values_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read({**OLD, **change})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)


@given(
    key=st.sampled_from([*OLD, "rope_parameters", "quantization", "quantization_config", "dtype"]),
    value=JSON,
)
def test_any_json_is_read_or_refused_in_one_line(key: str, value: Any) -> None:
    try:
        config = read({**OLD, key: value}, is_tied=True)
    except MlxLlamaError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(config, ModelConfig)


@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id"])
@pytest.mark.parametrize("value", ["<s>", True, 1.0, {}, {"a": 1}, [None], [2, "x"], [[2]]])
def test_ids_of_tokens_are_whole_numbers(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=f"{key} is .*, expected token ids"):
        read({**OLD, key: value})


# --- other models ------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "llama4", "mllama", "Llama", None, 3])
def test_other_model_types_are_refused_by_name(model_type: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"model_type is .*, only 'llama'"):
        read({**OLD, "model_type": model_type})
    with pytest.raises(UnsupportedModelError, match="model_type"):
        read(without("model_type"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "'gptq'"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "take the unquantized"),
        ({"quantization_config": "fp8"}, "'fp8'"),
    ],
)
def test_other_arithmetic_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read({**OLD, **change})


# --- tying -------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [True, False, None])
@pytest.mark.parametrize("is_tied", [True, False])
def test_tying_is_what_the_file_says_else_what_the_weights_show(
    said: bool | None, is_tied: bool
) -> None:
    expected = is_tied if said is None else said
    assert read({**OLD, "tie_word_embeddings": said}, is_tied=is_tied).tied == expected
    if said is None:
        assert read(without("tie_word_embeddings"), is_tied=is_tied).tied == expected


def test_tying_is_never_guessed() -> None:
    for said in ("false", 0, [], 1.0):
        with pytest.raises(CheckpointError, match="expected true or false"):
            read({**OLD, "tie_word_embeddings": said}, is_tied=True)
    with pytest.raises(CheckpointError, match="tie_word_embeddings is missing"):
        read(without("tie_word_embeddings"))


# --- quantization ------------------------------------------------------------------------------

PROJECTION = "model.layers.0.self_attn.q_proj"


def test_formats_by_module() -> None:
    entry = {
        "group_size": 64,
        "bits": 4,
        PROJECTION: {"group_size": 32, "bits": 8},
        "lm_head": False,
        "model.embed_tokens": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        "model.norm": True,
    }
    config = read({**OLD, "quantization": entry, "quantization_config": entry})
    assert config.quantization == QuantFormat(4, 64)
    assert config.quant_format("model.layers.1.self_attn.q_proj") == QuantFormat(4, 64)
    assert config.quant_format(PROJECTION) == QuantFormat(8, 32)
    assert config.quant_format("lm_head") is None
    assert config.quant_format("model.embed_tokens") == QuantFormat(4, 32, "mxfp4")
    assert config.quant_format("model.norm") == QuantFormat(4, 64)


def test_quantization_is_written_as_mlx_lm_reads_it() -> None:
    config = replace(
        EXPECTED,
        quantization=QuantFormat(4, 64),
        overrides={"lm_head": None, PROJECTION: QuantFormat(6, 32)},
    )
    raw = json.loads(json.dumps(config_to_hf(config)))
    assert raw["quantization"] == {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
        "lm_head": False,
        PROJECTION: {"group_size": 32, "bits": 6, "mode": "affine"},
    }
    assert raw["quantization_config"] == raw["quantization"]
    assert read(raw) == config


@pytest.mark.parametrize(
    "entry",
    [
        {"bits": 4},
        {"group_size": 64},
        {"bits": 1, "group_size": 64},
        {"bits": 7, "group_size": 64},
        {"bits": 4.0, "group_size": 64},
        {"bits": True, "group_size": 64},
        {"bits": 4, "group_size": 48},
        {"bits": 4, "group_size": 16},
        {"bits": 4, "group_size": 64, "mode": "mxfp4"},
        {"bits": 4, "group_size": 32, "mode": "mxfp8"},
        {"bits": 4, "group_size": 32, "mode": "nvfp4"},
        {"bits": 4, "group_size": 64, "mode": "gguf"},
        {"bits": 4, "group_size": 64, "lm_head": {"bits": 4}},
        {"bits": 4, "group_size": 64, "lm_head": {"bits": 99, "group_size": 64}},
        [4, 64],
        "4bit",
        4,
    ],
)
def test_formats_that_mlx_does_not_have_are_refused(entry: Any) -> None:
    with pytest.raises(MlxLlamaError):
        read({**OLD, "quantization": entry})


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (QuantFormat(4, 64), "4 bits, group 64"),
        (QuantFormat(8, 32, "mxfp8"), "8 bits, group 32, mxfp8"),
    ],
)
def test_a_format_is_described_as_a_person_would(form: QuantFormat, text: str) -> None:
    assert form.describe() == text


# --- what is written ---------------------------------------------------------------------------


def test_what_peers_need_is_always_written() -> None:
    """mlx-lm takes a missing tie_word_embeddings for true and reads the old dialect alone."""
    for tied in (True, False):
        raw = config_to_hf(replace(EXPECTED, tied=tied, bos_id=None, eos_ids=(), rope_scaling=None))
        assert raw["tie_word_embeddings"] is tied
        assert raw["rope_theta"] == 500000.0 and raw["rope_scaling"] is None
        assert raw["rope_parameters"] == {"rope_theta": 500000.0, "rope_type": "default"}
        assert raw["model_type"] == "llama" and raw["architectures"] == ["LlamaForCausalLM"]
        assert raw["head_dim"] == 64 and raw["num_key_value_heads"] == 8
        assert not {"bos_token_id", "eos_token_id", "quantization"} & raw.keys()
    raw = config_to_hf(EXPECTED)
    assert raw["rope_scaling"] == OLD["rope_scaling"]
    assert raw["rope_parameters"] == NEW["rope_parameters"]
    assert raw["eos_token_id"] == [128001, 128008, 128009]
    assert config_to_hf(replace(EXPECTED, eos_ids=(2,)))["eos_token_id"] == 2


def test_sizes_that_follow_from_the_shape() -> None:
    assert EXPECTED.parameter_count == 1_235_814_400
    assert cache_bytes_per_token(EXPECTED, KVBits(), mx.bfloat16) == 32_768
    assert cache_bytes_per_token(EXPECTED, KVBits(8, 4), mx.bfloat16) == 16 * 8 * (64 + 4 + 32 + 4)
