"""The config.json of Llama 3.2 1B in RoPE's two dialects, and what it reads as."""

from __future__ import annotations

from typing import Any

from mlx_llama.config import (
    ModelConfig,
    RopeScaling,
    config_from_hf,
)

OLD = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
NEW = {
    **{k: v for k, v in OLD.items() if k not in ("rope_scaling", "rope_theta", "torch_dtype")},
    "dtype": "bfloat16",
    "rope_parameters": {**OLD["rope_scaling"], "rope_theta": 500000.0},
}
EXPECTED = ModelConfig(
    dim=2048,
    n_layers=16,
    n_heads=32,
    n_kv_heads=8,
    head_dim=64,
    hidden_dim=8192,
    vocab_size=128256,
    norm_eps=1e-5,
    rope_theta=500000.0,
    max_context=131072,
    tied=True,
    kind="llama3.2",
    rope_scaling=RopeScaling("llama3", 32.0),
    dtype="bfloat16",
    bos_id=128000,
    eos_ids=(128001, 128008, 128009),
)


def read(raw: dict[str, Any], *, is_tied: bool | None = None) -> ModelConfig:
    return config_from_hf(raw, kind="llama3.2", is_tied=is_tied)


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in OLD.items() if key not in keys}
