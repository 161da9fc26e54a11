"""The published Llamas, a row each: what a checkpoint in the layout of each one is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

SPM, CODELLAMA, TIKTOKEN = 320, 336, 512  # the vocabularies of the tests' tokenizers
HEAD_DIM = 4


@dataclass(frozen=True)
class Row:
    """One row of the family's table.

    params: of params.json as published, its sizes left to `heads`, `kv`, `layers` and `multiple`;
    a None stands for a size to fill in at that place. folders: names that the files go by, and the
    kind that follows. buffers: "" or the pattern of RoPE's buffers. copies: of each key/value head.
    is_dense: whether all bits of the weights are random.
    """

    folders: Mapping[str, str]
    params: Mapping[str, Any]
    vocab: int
    heads: int
    ranks: int
    context: int
    kv: int | None = None
    layers: int = 1
    dtype: torch.dtype = torch.bfloat16
    multiple: int = 16
    theta: float = 500000.0
    factor: float | None = None
    buffers: str = ""
    tied: bool = False
    shares_storage: bool = False
    copies: int = 1
    fp8: bool = False
    is_dense: bool = False
    notes: tuple[str, ...] = ()

    @property
    def dim(self) -> int:
        return self.heads * HEAD_DIM

    @property
    def kv_heads(self) -> int:
        return self.kv or self.heads

    @property
    def hidden(self) -> int:
        """As the published code computes it."""
        hidden = int(2 * (4 * self.dim) / 3)
        if (multiplier := self.params.get("ffn_dim_multiplier")) is not None:
            hidden = int(multiplier * hidden)
        return self.multiple * ((hidden + self.multiple - 1) // self.multiple)

    def filled_params(self) -> dict[str, Any]:
        sizes = {
            "dim": self.dim,
            "multiple_of": self.multiple,
            "n_heads": self.heads,
            "n_kv_heads": self.kv_heads * self.copies,
            "n_layers": self.layers,
            "vocab_size": self.vocab,
        }
        return {key: sizes[key] if value is None else value for key, value in self.params.items()}


# params.json as published, None where the size follows from the row.
LLAMA1 = {
    "dim": None,
    "multiple_of": None,
    "n_heads": None,
    "n_layers": None,
    "norm_eps": 1e-6,
    "vocab_size": -1,
}
LLAMA1_65B = {**LLAMA1, "norm_eps": 1e-5}
LLAMA2 = {**LLAMA1, "norm_eps": 1e-5}
LLAMA2_70B = {
    "dim": None,
    "multiple_of": None,
    "ffn_dim_multiplier": 1.3,
    "n_heads": None,
    "n_kv_heads": None,
    "n_layers": None,
    "norm_eps": 1e-5,
    "vocab_size": -1,
}
LLAMA2_34B = {**LLAMA2_70B, "ffn_dim_multiplier": 1.0}
CODE = {
    "dim": None,
    "n_layers": None,
    "n_heads": None,
    "multiple_of": None,
    "ffn_dim_multiplier": 1.0,
    "norm_eps": 1e-5,
    "rope_theta": 1000000,
}
CODE_34B = {
    "dim": None,
    "n_layers": None,
    "n_heads": None,
    "n_kv_heads": None,
    "multiple_of": None,
    "ffn_dim_multiplier": 1.0,
    "norm_eps": 1e-5,
    "rope_theta": 1000000,
}
CODE_70B = {**CODE_34B, "ffn_dim_multiplier": 1.3, "vocab_size": None}
CODE_70B_INSTRUCT = {**CODE_70B, "rope_theta": 10000}
LLAMA3 = {
    "dim": None,
    "n_layers": None,
    "n_heads": None,
    "n_kv_heads": None,
    "vocab_size": None,
    "multiple_of": None,
    "ffn_dim_multiplier": 1.3,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
LLAMA31 = {**LLAMA3, "use_scaled_rope": True}
LLAMA31_405B = {**LLAMA31, "ffn_dim_multiplier": 1.2}
LLAMA32_1B = {**LLAMA31, "ffn_dim_multiplier": 1.5}
LLAMA32_3B = {**LLAMA31, "ffn_dim_multiplier": 1.0}

OLD = {"theta": 10000.0, "context": 4096, "vocab": SPM}
FIRST = {"theta": 10000.0, "context": 2048, "vocab": SPM, "dtype": torch.float16,
         "buffers": "layers.{}.attention.inner_attention.rope.freqs"}  # fmt: skip
SECOND = {**OLD, "buffers": "rope.freqs"}
CODER = {"theta": 1e6, "context": 16384, "vocab": CODELLAMA, "buffers": "rope.freqs"}
THIRD = {"context": 8192, "vocab": TIKTOKEN}
LONG = {"context": 131072, "vocab": TIKTOKEN, "factor": 8.0}
SMALL = {**LONG, "factor": 32.0, "tied": True}
FLAT = {"heads": 8, "kv": 8, "ranks": 8}  # where the grouping of heads is not the point
BIG = {"heads": 16, "kv": 8, "ranks": 8, "multiple": 32}

ROWS: dict[str, Row] = {
    "llama1-7b": Row({"7B": "llama1"}, LLAMA1, heads=4, ranks=1, is_dense=True,
        **FIRST),
    "llama1-13b": Row({"13B": "llama1"}, LLAMA1, heads=6, ranks=2, shares_storage=True, **FIRST),
    "llama1-30b": Row({"30B": "llama1"}, LLAMA1, heads=12, ranks=4, shares_storage=True, **FIRST),
    "llama1-65b": Row({"65B": "llama1"}, LLAMA1_65B, heads=8, ranks=8, **FIRST),
    "llama2-7b": Row(
        {"llama-2-7b": "llama2", "llama-2-7b-chat": "llama2-chat"}, LLAMA2, heads=4, ranks=1,
        is_dense=True, **SECOND),
    "llama2-13b": Row(
        {"llama-2-13b": "llama2", "llama-2-13b-chat": "llama2-chat"}, LLAMA2, heads=6, ranks=2,
        **SECOND),
    "llama2-34b": Row(
        {"llama-2-34b": "llama2"}, LLAMA2_34B, heads=16, kv=8, ranks=4, **SECOND),
    "llama2-70b": Row(
        {"llama-2-70b": "llama2", "llama-2-70b-chat": "llama2-chat"}, LLAMA2_70B, **BIG, **SECOND),
    "codellama-7b": Row(
        {"CodeLlama-7b": "codellama", "CodeLlama-7b-Instruct": "codellama-instruct",
         "unnamed": "codellama"}, CODE, heads=4, ranks=1, **CODER),
    "codellama-7b-python": Row(
        {"CodeLlama-7b-Python": "codellama"}, CODE, heads=4, ranks=1, **{**CODER, "vocab": SPM}),
    "codellama-13b": Row(
        {"CodeLlama-13b": "codellama"}, {**CODE, "vocab_size": None}, heads=6, ranks=2, **CODER),
    "codellama-34b": Row(
        {"CodeLlama-34b": "codellama", "CodeLlama-34b-Instruct": "codellama-instruct"}, CODE_34B,
        heads=16, kv=8, ranks=4, **{**CODER, "vocab": SPM}),
    "codellama-70b": Row({"CodeLlama-70b": "codellama"}, CODE_70B, **BIG, **CODER),
    "codellama-70b-instruct": Row(
        {"CodeLlama-70b-Instruct": "codellama-70b-instruct", "CodeLlama-70b-Python": "codellama"},
        CODE_70B_INSTRUCT, **FLAT, **{**CODER, "theta": 10000.0, "context": 4096}),
    "llama3-8b": Row(
        {"Meta-Llama-3-8B": "llama3", "Meta-Llama-3-8B-Instruct": "llama3-instruct",
         "unnamed": "llama3"}, LLAMA3, heads=8, kv=2, ranks=1, **THIRD),
    "llama3-70b": Row(
        {"Meta-Llama-3-70B": "llama3", "Meta-Llama-3-70B-Instruct": "llama3-instruct"}, LLAMA3,
        **BIG, **THIRD),
    "llama3.1-8b": Row(
        {"Llama-3.1-8B": "llama3.1", "Meta-Llama-3.1-8B-Instruct": "llama3.1-instruct",
         "unnamed": "llama3.1"}, LLAMA31, heads=8, kv=2, ranks=1, **LONG),
    "llama3.1-70b": Row(
        {"Llama-3.1-70B": "llama3.1", "Llama-3.1-70B-Instruct": "llama3.1-instruct"}, LLAMA31,
        **BIG, **LONG),
    "llama3.1-405b-mp8": Row({"Llama-3.1-405B-MP8": "llama3.1"}, LLAMA31_405B, **BIG, **LONG),
    "llama3.1-405b-mp16": Row(
        {"Llama-3.1-405B-MP16": "llama3.1", "Llama-3.1-405B-Instruct-MP16": "llama3.1-instruct"},
        LLAMA31_405B, copies=2, notes=("16 key/value heads become 8",), **{**BIG, "ranks": 16},
        **LONG),
    "llama3.1-405b-fp8": Row(
        {"Llama-3.1-405B": "llama3.1", "Llama-3.1-405B-Instruct": "llama3.1-instruct"},
        LLAMA31_405B, fp8=True, layers=4, notes=("float8",), **FLAT, **LONG),
    "llama3.2-1b": Row(
        {"Llama-3.2-1B": "llama3.2", "Llama-3.2-1B-Instruct": "llama3.2-instruct",
         "unnamed": "llama3.2"}, LLAMA32_1B, heads=8, kv=2, ranks=1, notes=("tied",), **SMALL),
    "llama3.2-3b": Row(
        {"Llama-3.2-3B": "llama3.2", "Llama-3.2-3B-Instruct": "llama3.2-instruct"}, LLAMA32_3B,
        heads=6, kv=2, ranks=1, shares_storage=True, notes=("tied",), **SMALL),
    "llama3.3-70b": Row(
        {"Llama-3.3-70B-Instruct": "llama3.3-instruct"}, LLAMA31, **FLAT, **LONG),
    "llama-guard-1": Row({"LlamaGuard-7b": "llama-guard-1"}, LLAMA2, heads=4, ranks=1, **SECOND),
    "llama-guard-2": Row(
        {"Meta-Llama-Guard-2-8B": "llama-guard-2"}, LLAMA3, heads=8, kv=2, ranks=1, **THIRD),
    "llama-guard-3-8b": Row(
        {"Llama-Guard-3-8B": "llama-guard-3"}, LLAMA31, heads=8, kv=2, ranks=1, **LONG),
    "llama-guard-3-8b-unscaled": Row(
        {"Llama-Guard-3-8B": "llama-guard-3"}, LLAMA3, heads=8, kv=2, ranks=1,
        notes=("no use_scaled_rope",), **{**LONG, "factor": None}),
    "llama-guard-3-1b": Row(
        {"Llama-Guard-3-1B": "llama-guard-3"}, LLAMA32_1B, heads=8, kv=2, ranks=1,
        notes=("tied",), **SMALL),
}  # fmt: skip
