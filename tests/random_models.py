"""Random small Llamas for tests and for the scripts that make golden files; needs numpy alone.

Weights come from `np.random.RandomState`, whose stream is frozen, so a golden file made years ago
still belongs to them. They are scaled so that attention is sharp and positions matter: a wrong
RoPE changes the logits by hundreds of times the tolerance of the tests.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Weights = dict[str, np.ndarray]
SPM_VOCAB = 320  # tiny_tokenizers.tiny_spm, filled up
TIKTOKEN_VOCAB = 512  # 256 bytes and Meta's 256 special tokens


@dataclass(frozen=True, slots=True)
class Case:
    """One random model and the tokens that it is asked about.

    scaling: as in the `rope_scaling` of a config.json. is_new_dialect: whether config.json has
    `rope_parameters`, else `rope_theta` and `rope_scaling`. n_stored: logits of so many positions
    are compared, the last ones included.
    """

    seed: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope_theta: float
    scaling: Mapping[str, Any] | None = None
    dim: int = 256
    n_layers: int = 3
    vocab_size: int = TIKTOKEN_VOCAB
    norm_eps: float = 1e-5
    is_tied: bool = False
    is_new_dialect: bool = False
    n_tokens: int = 96
    n_stored: int = 12

    @property
    def ids(self) -> list[int]:
        return np.random.RandomState(self.seed + 1000).randint(0, 256, self.n_tokens).tolist()

    @property
    def positions(self) -> list[int]:
        """Positions whose logits are stored: spread over a short text, the end of a long one."""
        if self.n_tokens > 1000:
            return list(range(self.n_tokens - self.n_stored, self.n_tokens))
        return np.linspace(0, self.n_tokens - 1, self.n_stored).astype(int).tolist()


def llama3_scaling(factor: float, original: int = 8192) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }


_LINEAR = {"rope_type": "linear", "factor": 4.0}
CASES: Mapping[str, Case] = {
    "llama1": Case(51, 4, 4, 64, 1e4, vocab_size=SPM_VOCAB, norm_eps=1e-6),
    "llama2": Case(32, 2, 1, 128, 1e4, vocab_size=SPM_VOCAB),
    "linear": Case(13, 2, 2, 64, 1e4, _LINEAR, dim=128, vocab_size=SPM_VOCAB),
    "llama3": Case(24, 4, 2, 64, 5e5),
    "llama3.1": Case(15, 4, 2, 64, 5e5, llama3_scaling(8.0), is_new_dialect=True),
    "llama3.2": Case(36, 4, 1, 64, 5e5, llama3_scaling(32.0), is_tied=True),
    # An original context that short makes the scaling show within a hundred tokens.
    "llama3.1_short": Case(57, 2, 1, 128, 5e5, llama3_scaling(8.0, 64)),
    # Heads that do not add up to the width, as config.json may ask for.
    "wide_heads": Case(58, 4, 2, 64, 5e5, llama3_scaling(32.0, 64), dim=128, is_tied=True),
    # One head in one layer: attention over this many tokens takes seconds on a CPU.
    "llama3.1_long": Case(
        49, 1, 1, 64, 5e5, llama3_scaling(8.0), dim=128, n_layers=1, n_tokens=8300, n_stored=16
    ),
    "llama3.2_long": Case(
        30, 1, 1, 64, 5e5, llama3_scaling(32.0), dim=128, n_layers=1, is_tied=True,
        n_tokens=8300, n_stored=16,
    ),
}  # fmt: skip
LONG_CASES = tuple(name for name, case in CASES.items() if case.n_tokens > 1000)
SHORT_CASES = tuple(name for name in CASES if name not in LONG_CASES)


def random_model(case: Case) -> tuple[Weights, dict[str, Any]]:
    """Return float32 weights under Hugging Face's names and the config.json that fits them."""
    config = _config(case)
    return _weights(case, config["intermediate_size"]), config


def _weights(case: Case, hidden_dim: int) -> Weights:
    rng = np.random.RandomState(case.seed)

    def matrix(rows: int, columns: int, gain: float) -> np.ndarray:
        scaled = rng.standard_normal((rows, columns)) * (gain / math.sqrt(columns))
        return scaled.astype(np.float32)

    def norm() -> np.ndarray:
        return (1 + 0.1 * rng.standard_normal(case.dim)).astype(np.float32)

    q_rows, kv_rows = case.n_heads * case.head_dim, case.n_kv_heads * case.head_dim
    weights = {"model.embed_tokens.weight": matrix(case.vocab_size, case.dim, 2.0)}
    for layer in range(case.n_layers):
        at = f"model.layers.{layer}"
        weights |= {
            f"{at}.input_layernorm.weight": norm(),
            # Scores have a deviation of 3: a query sees a few keys, not the mean of all.
            f"{at}.self_attn.q_proj.weight": matrix(q_rows, case.dim, 1.75),
            f"{at}.self_attn.k_proj.weight": matrix(kv_rows, case.dim, 1.75),
            f"{at}.self_attn.v_proj.weight": matrix(kv_rows, case.dim, 1.0),
            f"{at}.self_attn.o_proj.weight": matrix(case.dim, q_rows, 1.0),
            f"{at}.post_attention_layernorm.weight": norm(),
            f"{at}.mlp.gate_proj.weight": matrix(hidden_dim, case.dim, 1.0),
            f"{at}.mlp.up_proj.weight": matrix(hidden_dim, case.dim, 1.0),
            f"{at}.mlp.down_proj.weight": matrix(case.dim, hidden_dim, 1.0),
        }
    weights["model.norm.weight"] = norm()
    if not case.is_tied:
        weights["lm_head.weight"] = matrix(case.vocab_size, case.dim, 2.0)
    return weights


def _config(case: Case) -> dict[str, Any]:
    scaling = None if case.scaling is None else dict(case.scaling)  # transformers writes into it
    rope: dict[str, Any] = {"rope_theta": case.rope_theta, "rope_scaling": scaling}
    if case.is_new_dialect:
        fields = scaling or {"rope_type": "default"}
        rope = {"rope_parameters": {"rope_theta": case.rope_theta, **fields}}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_size": case.dim,
        # What Meta's formula gives for the params.json below.
        "intermediate_size": meta_hidden_dim(meta_params(case)),
        "num_hidden_layers": case.n_layers,
        "num_attention_heads": case.n_heads,
        "num_key_value_heads": case.n_kv_heads,
        "head_dim": case.head_dim,
        "vocab_size": case.vocab_size,
        "rms_norm_eps": case.norm_eps,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": case.is_tied,
        "torch_dtype": "float32",
        **rope,
    }


# Meta's layout of the same model


def meta_params(case: Case) -> dict[str, Any]:
    """Return the params.json; it cannot say head_dim, RoPE factor or linear scaling."""
    return {
        "dim": case.dim,
        "n_layers": case.n_layers,
        "n_heads": case.n_heads,
        "n_kv_heads": case.n_kv_heads,
        "vocab_size": case.vocab_size,
        "multiple_of": 64,
        "ffn_dim_multiplier": 0.6,
        "norm_eps": case.norm_eps,
        "rope_theta": case.rope_theta,
        "use_scaled_rope": case.scaling is not None,
    }


def meta_hidden_dim(params: Mapping[str, Any]) -> int:
    hidden = int(params["ffn_dim_multiplier"] * int(8 * params["dim"] / 3))
    return params["multiple_of"] * math.ceil(hidden / params["multiple_of"])


_META_NAMES = {
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "wq",
    "k_proj": "wk",
    "v_proj": "wv",
    "o_proj": "wo",
    "gate_proj": "w1",
    "up_proj": "w3",
    "down_proj": "w2",
    "self_attn": "attention",
    "mlp": "feed_forward",
}


def meta_weights(weights: Weights, *, head_dim: int) -> Weights:
    """Return the weights under Meta's names, wq and wk in Meta's row order, output repeated."""
    renamed: Weights = {}
    for name, array in weights.items():
        parts = [_META_NAMES.get(part, part) for part in name.removeprefix("model.").split(".")]
        if parts[-2] in ("wq", "wk"):
            array = interleaved(array, head_dim=head_dim)
        renamed[".".join(parts)] = array
    renamed.setdefault("output.weight", renamed["tok_embeddings.weight"])
    return renamed


def interleaved(rows: np.ndarray, *, head_dim: int) -> np.ndarray:
    """Reorder rows from Hugging Face's half-split order to Meta's: i and i + D/2 become 2i, 2i+1.

    Written as a plain loop on purpose, to share nothing with the converter's reshapes.
    """
    result = np.empty_like(rows)
    for row in range(len(rows)):
        head, within = divmod(row, head_dim)
        half, pair = divmod(within, head_dim // 2)
        result[head * head_dim + 2 * pair + half] = rows[row]
    return result


# Files


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write float32, float16 or uint32 arrays; independent of the project's own writer."""
    codes = {"float32": "F32", "float16": "F16", "uint32": "U32"}
    header, offset = {}, 0
    for name, array in tensors.items():
        end = offset + array.nbytes
        shape, dtype = list(array.shape), codes[array.dtype.name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).tobytes())


def write_hf_weights(folder: Path, weights: Weights, config: Mapping[str, Any]) -> None:
    """Write config.json and model.safetensors; the tokenizer is the caller's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_safetensors(folder / "model.safetensors", weights)
