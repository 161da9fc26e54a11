from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_llama.errors import CheckpointError, MlxLlamaError, UnsupportedModelError
from mlx_llama_convert.params import parse_params
from tiny_models import meta_params

# params.json fields and feed-forward width of the family, as published.
WIDTHS = [
    ({"dim": 4096, "n_heads": 32, "multiple_of": 256}, 11008),  # LLaMA 1 and Llama 2 7B
    ({"dim": 5120, "n_heads": 40, "multiple_of": 256}, 13824),
    ({"dim": 6656, "n_heads": 52, "multiple_of": 256}, 17920),
    ({"dim": 8192, "n_heads": 64, "multiple_of": 256}, 22016),  # LLaMA 1 65B
    ({"dim": 8192, "n_heads": 64, "multiple_of": 4096, "ffn_dim_multiplier": 1.3}, 28672),
    ({"dim": 4096, "n_heads": 32, "multiple_of": 1024, "ffn_dim_multiplier": 1.3}, 14336),
    ({"dim": 16384, "n_heads": 128, "multiple_of": 4096, "ffn_dim_multiplier": 1.2}, 53248),
    ({"dim": 2048, "n_heads": 32, "multiple_of": 256, "ffn_dim_multiplier": 1.5}, 8192),
    ({"dim": 3072, "n_heads": 24, "multiple_of": 256, "ffn_dim_multiplier": 1.0}, 8192),
]


@pytest.mark.parametrize(("fields", "width"), WIDTHS)
def test_feed_forward_width_is_that_of_the_published_models(
    fields: dict[str, Any], width: int
) -> None:
    assert parse_params({**meta_params(), **fields}, where="params.json").hidden_dim == width


def test_missing_keys_take_metas_defaults() -> None:
    params = parse_params({"dim": 64, "n_layers": 2, "n_heads": 4}, where="params.json")
    assert params.n_kv_heads == 4
    assert params.vocab_size is None
    assert params.multiple_of == 256
    assert params.norm_eps == 1e-5
    assert not params.is_rope_scaled


def test_params_nested_under_model_are_found() -> None:
    assert parse_params({"model": meta_params()}, where="params.json").dim == 64


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"n_layers": 0}, "n_layers is 0, expected a whole number from 1"),
        ({"n_layers": 10**9}, "n_layers is 1000000000"),
        ({"n_layers": -1}, "n_layers is -1"),
        ({"n_layers": 2.0}, "n_layers is 2.0"),
        ({"n_layers": True}, "n_layers is True"),
        ({"dim": "64"}, "dim is '64'"),
        ({"dim": 10**30}, "dim is 1000000000000000000000000000000"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"vocab_size": -2}, "vocab_size is -2"),
        ({"norm_eps": 0}, "norm_eps is 0"),
        ({"norm_eps": 7.0}, "norm_eps is 7.0"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"use_scaled_rope": "yes"}, "use_scaled_rope is 'yes'"),
        ({"ffn_dim_multiplier": 1e9}, "ffn_dim_multiplier is 1000000000.0"),
        ({"dim": [1] * 1000}, "dim is [1, 1"),
    ],
)
def test_absurd_values_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_params(meta_params(**changes), where="params.json")
    assert text in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("quantization_args", "int4"),
        ("lora_args", "QLoRA"),
        ("vision_chunk_size", "vision"),
        ("moe_args", "mixture"),
        ("n_expertss", "unknown"),
    ],
)
def test_other_keys_are_refused_by_name(key: str, text: str) -> None:
    with pytest.raises(UnsupportedModelError, match=key) as caught:
        parse_params(meta_params(**{key: {}}), where="params.json")
    assert text in str(caught.value)


@pytest.mark.parametrize("key", ["dim", "n_layers", "n_heads"])
def test_needed_keys_are_missed_by_name(key: str) -> None:
    params = meta_params()
    del params[key]
    with pytest.raises(MlxLlamaError, match=f"'{key}' is missing"):
        parse_params(params, where="params.json")


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@settings(deadline=None)
@given(
    st.dictionaries(
        st.one_of(
            st.sampled_from([*meta_params(), "rope_theta", "ffn_dim_multiplier", "model"]),
            st.sampled_from(["use_scaled_rope", "quantization_args", "lora_args", "max_seq_len"]),
            st.text(max_size=5),
        ),
        VALUES,
        max_size=8,
    )
)
def test_any_json_is_bounded_parameters_or_one_clear_line(changes: dict[str, Any]) -> None:
    try:
        params = parse_params({**meta_params(), **changes}, where="params.json")
    except MlxLlamaError as error:
        assert str(error).startswith("params.json: ") and len(str(error)) < 400
        return
    assert 1 <= params.n_layers <= 1024
    assert 1 <= params.hidden_dim < 1 << 50
