"""Make one small checkpoint for each published Llama, with the tensors that it must become.

Needs torch (made with 2.13), numpy and safetensors, which the tests do not:
`python tests/golden/make_family.py`. Every row has the key names, the number of shards, the dtypes
and the keys of `params.json` of a published checkpoint; only the sizes are small.
`family/<row>.zip` holds its files, `family.json` what a conversion of them must give: the
configuration, and the SHA-256 of each tensor in Hugging Face's names and row order, computed here
from the unsplit weights.

Tokenizers are not in it: the tests write them, with as many tokens as the vocabularies below.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_safetensors

HERE = Path(__file__).parent
SPM, CODELLAMA, TIKTOKEN = 320, 336, 512  # the vocabularies of the tests' tokenizers
HEAD_DIM = 4

Tensors = dict[str, torch.Tensor]
Files = dict[str, bytes]


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


class Weights:
    """Random weights; most rows take them from few values, so that their files pack well."""

    def __init__(self, seed: int, *, coarse: bool) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._coarse = coarse

    def matrix(self, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        if self._coarse:
            # Signed powers of 4 differ in one byte of a bfloat16 alone.
            steps = torch.randint(-4, 4, (rows, width), generator=self._generator)
            return (torch.where(steps < 0, -1, 1) * 4.0 ** (steps % 4 - 4)).to(dtype)
        return torch.randn((rows, width), generator=self._generator).div(math.sqrt(width)).to(dtype)

    def vector(self, width: int, dtype: torch.dtype) -> torch.Tensor:
        return (1 + 0.1 * torch.randn(width, generator=self._generator)).to(dtype)

    def float8(self, rows: int, width: int) -> torch.Tensor:
        """Any codes but the two that are no number."""
        codes = torch.randint(0, 254, (rows, width), generator=self._generator)
        codes = codes + (codes >= 127)
        return codes.to(torch.uint8).view(torch.float8_e4m3fn)

    def scales(self, rows: int) -> torch.Tensor:
        return torch.rand(rows, generator=self._generator) * 1e-3 + 1e-5


def whole(row: Row, weights: Weights) -> Tensors:
    """Return the unsplit weights by Meta's names; float8 matrices are left to `fp8_ranks`."""
    kv_rows = row.kv_heads * HEAD_DIM
    tensors = {"tok_embeddings.weight": weights.matrix(row.vocab, row.dim, row.dtype)}
    for layer in range(row.layers):
        at = f"layers.{layer}"
        shapes = {
            f"{at}.attention.wq": (row.dim, row.dim),
            f"{at}.attention.wk": (kv_rows, row.dim),
            f"{at}.attention.wv": (kv_rows, row.dim),
            f"{at}.attention.wo": (row.dim, row.dim),
        }
        if not is_float8(row, layer):
            shapes |= feed_forward(row, at)
        tensors |= {f"{n}.weight": weights.matrix(*s, row.dtype) for n, s in shapes.items()}
        for norm in ("attention_norm", "ffn_norm"):
            tensors[f"{at}.{norm}.weight"] = weights.vector(row.dim, row.dtype)
    tensors["norm.weight"] = weights.vector(row.dim, row.dtype)
    embedding = tensors["tok_embeddings.weight"]
    tensors["output.weight"] = (
        embedding if row.tied else weights.matrix(row.vocab, row.dim, row.dtype)
    )
    return tensors


def feed_forward(row: Row, at: str) -> dict[str, tuple[int, int]]:
    return {
        f"{at}.feed_forward.w1": (row.hidden, row.dim),
        f"{at}.feed_forward.w2": (row.dim, row.hidden),
        f"{at}.feed_forward.w3": (row.hidden, row.dim),
    }


def is_float8(row: Row, layer: int) -> bool:
    return row.fp8 and 0 < layer < row.layers - 1


def split(row: Row, name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
    """Cut one tensor for the ranks, as the release of the row did."""
    if tensor.ndim == 1:
        return [tensor] * row.ranks
    if name.endswith((".wk.weight", ".wv.weight")):
        heads = tensor.view(row.kv_heads, HEAD_DIM, row.dim).repeat_interleave(row.copies, dim=0)
        return [part.reshape(-1, row.dim).clone() for part in heads.chunk(row.ranks)]
    is_row_parallel = name.endswith((".wo.weight", ".w2.weight"))
    if name == "tok_embeddings.weight":
        is_row_parallel = row.vocab != TIKTOKEN  # Llama 3 splits the vocabulary, not the width
    # Cloned, because torch saves the whole storage of a view.
    return [part.clone(memory_format=torch.contiguous_format)
            for part in tensor.chunk(row.ranks, dim=1 if is_row_parallel else 0)]  # fmt: skip


def fp8_ranks(row: Row, weights: Weights) -> tuple[list[Tensors], list[Tensors], Tensors]:
    """Return float8 matrices and scales by rank, and what they are worth, merged."""
    codes: list[Tensors] = [{} for _ in range(row.ranks)]
    scales: list[Tensors] = [{} for _ in range(row.ranks)]
    worth: Tensors = {}
    for layer in (n for n in range(row.layers) if is_float8(row, n)):
        for name, (rows, width) in feed_forward(row, f"layers.{layer}").items():
            axis = 1 if name.endswith("w2") else 0
            shape = (rows, width // row.ranks) if axis else (rows // row.ranks, width)
            parts = []
            for rank in range(row.ranks):
                part, scale = weights.float8(*shape), weights.scales(shape[0])
                codes[rank][f"{name}.weight"] = part
                key = f"{layer}_feed_forward.{name[-2:]}_{rank}"
                scales[rank][key] = scale
                parts.append((part.to(torch.float32) * scale[:, None]).to(torch.bfloat16))
            worth[f"{name}.weight"] = torch.cat(parts, dim=axis)
    return codes, scales, worth


def saved(tensors: Any) -> bytes:
    out = io.BytesIO()
    torch.save(tensors, out)
    return out.getvalue()


def in_one_storage(tensors: Tensors) -> Tensors:
    """Lay all tensors into one storage, as the early sharded releases have them."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
    views, start = {}, 0
    for name, tensor in tensors.items():
        views[name] = flat[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()
    return views


def meta_files(row: Row, tensors: Tensors, weights: Weights) -> tuple[Files, Tensors]:
    """Return the files of a row, and its merged weights."""
    ranks: list[Tensors] = [{} for _ in range(row.ranks)]
    for name, tensor in tensors.items():
        for rank, part in zip(ranks, split(row, name, tensor), strict=True):
            rank[name] = part
    if row.tied and not row.shares_storage:
        ranks[0]["output.weight"] = ranks[0]["output.weight"].clone()
    files: Files = {"params.json": json.dumps(row.filled_params()).encode()}
    if row.fp8:
        codes, scales, worth = fp8_ranks(row, weights)
        for number in range(row.ranks):
            ranks[number] |= codes[number]
            files[f"fp8_scales_{number}.pt"] = saved(scales[number])
        tensors = {**tensors, **worth}
    for number, rank in enumerate(ranks):
        if row.shares_storage and not row.tied:
            rank = in_one_storage(rank)
        if row.buffers:
            frequencies = torch.linspace(1, 0.1, HEAD_DIM // 2)
            buffers = {row.buffers.format(n): frequencies for n in range(row.layers)}
            rank = {**rank, **buffers}
        files[f"consolidated.{number:02d}.pth"] = saved(rank)
    return files, tensors


def half_split(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder rows as the converter of transformers does (`permute`)."""
    rows, width = weight.shape
    paired = weight.view(heads, rows // heads // 2, 2, width)
    return paired.transpose(1, 2).reshape(rows, width)


HF_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}
HF_TOP = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}


def as_hf(row: Row, tensors: Tensors) -> Tensors:
    """Return the weights in Hugging Face's names and row order, a tied output left out."""
    result: Tensors = {}
    for full_name, tensor in tensors.items():
        name = full_name.removesuffix(".weight")
        if name == "output" and row.tied:
            continue
        if name.endswith(".wq"):
            tensor = half_split(tensor, row.heads)
        if name.endswith(".wk"):
            tensor = half_split(tensor, row.kv_heads)
        if name in HF_TOP:
            result[f"{HF_TOP[name]}.weight"] = tensor
        else:
            _, layer, part = name.split(".", 2)
            result[f"model.layers.{layer}.{HF_NAMES[part]}.weight"] = tensor
    return result


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def expected(row: Row, hf: Tensors) -> dict[str, Any]:
    return {
        "folders": dict(row.folders),
        "vocab": row.vocab,
        "ranks": row.ranks,
        "notes": list(row.notes),
        "config": {
            "torch_dtype": str(row.dtype).removeprefix("torch."),
            "hidden_size": row.dim,
            "intermediate_size": row.hidden,
            "num_attention_heads": row.heads,
            "num_key_value_heads": row.kv_heads,
            "head_dim": HEAD_DIM,
            "vocab_size": row.vocab,
            "rms_norm_eps": row.params["norm_eps"],
            "rope_theta": row.theta,
            "max_position_embeddings": row.context,
            "tie_word_embeddings": row.tied,
        },
        "factor": row.factor,
        "tensors": {name: sha256(tensor) for name, tensor in sorted(hf.items())},
    }


# --- Meta's int4 releases, which are refused -----------------------------------------------------


def int4_files(row: Row, tensors: Tensors, *, lora: bool) -> Files:
    """Return a folder as the QLoRA or SpinQuant release of a row has it."""
    stored: Tensors = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            stored[name] = tensor
            continue
        module, (rows, width) = name.removesuffix(".weight"), tensor.shape
        group = width if module in HF_TOP else 32
        stored[name] = torch.randint(-8, 8, tensor.shape, dtype=torch.int8)
        stored[f"{module}.scales"] = torch.ones(rows, width // group)
        if lora and module not in HF_TOP:
            stored[f"{module}.adaptor.A.weight"] = torch.ones(16, width, dtype=torch.bfloat16)
            stored[f"{module}.adaptor.B.weight"] = torch.ones(rows, 16, dtype=torch.bfloat16)
    arguments: dict[str, Any] = {"quantization_args": {"group_size": 32}}
    if lora:
        arguments["lora_args"] = {"rank": 16, "scale": 2.0}
    else:
        arguments["quantization_args"]["spinquant"] = True
    params = {**row.filled_params(), **arguments}
    return {"params.json": json.dumps(params).encode(), "consolidated.00.pth": saved(stored)}


# --- Hugging Face's folders ----------------------------------------------------------------------


@dataclass(frozen=True)
class HfFolder:
    """A folder in Hugging Face's layout with the weights of a row.

    config: keys beyond the sizes, None takes one away. parts: files that the weights are cut into.
    prefix: whether names begin with `model.`. inv_freq: whether RoPE's buffers are stored.
    """

    row: str
    config: Mapping[str, Any]
    is_safetensors: bool
    parts: int = 1
    prefix: bool = True
    inv_freq: bool = False
    extra_rows: int = 0
    names: str = "huggingface"
    wants: Mapping[str, Any] = field(default_factory=dict)


OLD_CONFIG = {"head_dim": None, "num_key_value_heads": None, "tie_word_embeddings": None,
              "rope_theta": None, "torch_dtype": "float16"}  # fmt: skip
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip

HF_FOLDERS: dict[str, HfFolder] = {
    "hf-bin": HfFolder(
        "llama1-7b", OLD_CONFIG, False, inv_freq=True, wants={"rms_norm_eps": 1e-6}),
    "hf-bin-sharded": HfFolder("llama2-13b", {"head_dim": None}, False, parts=3, inv_freq=True),
    "hf-bin-no-prefix": HfFolder("llama3.2-1b", {
        "rope_scaling": {**SCALED, "factor": 32.0}, "tie_word_embeddings": None}, False,
        prefix=False),
    "hf-bin-meta-names": HfFolder("llama2-7b", {}, False, names="meta"),
    "hf-safetensors": HfFolder("llama2-7b", {"num_key_value_heads": None}, True, extra_rows=16),
    "hf-safetensors-sharded": HfFolder("llama3.1-8b", {
        "rope_theta": None, "rope_parameters": {"rope_theta": 500000.0, **SCALED}}, True, parts=3),
}  # fmt: skip


def hf_files(folder: HfFolder, row: Row, meta: Tensors) -> tuple[Files, dict[str, Any]]:
    tensors = as_hf(row, meta)
    if folder.extra_rows:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            padding = torch.zeros(folder.extra_rows, row.dim, dtype=row.dtype)
            tensors[name] = torch.cat([tensors[name], padding])
    answer = expected(row, tensors)
    vocab = row.vocab + folder.extra_rows
    answer["config"] |= {"vocab_size": vocab, **folder.wants}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": row.layers,
        **answer["config"],
        "vocab_size": row.vocab,
        **folder.config,
    }
    config = {key: value for key, value in config.items() if value is not None}
    stored = dict(meta) if folder.names == "meta" else tensors
    if not folder.prefix:
        stored = {name.removeprefix("model."): tensor for name, tensor in stored.items()}
    if folder.inv_freq:
        for layer in range(row.layers):
            name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
            stored[name] = torch.ones(HEAD_DIM // 2)
    files: Files = {"config.json": json.dumps(config).encode()}
    stem, suffix = ("model", "safetensors") if folder.is_safetensors else ("pytorch_model", "bin")
    save = save_safetensors if folder.is_safetensors else saved
    names = list(stored)
    if folder.parts == 1:
        files[f"{stem}.{suffix}"] = save({n: stored[n].contiguous() for n in names})
        return files, answer
    weight_map = {}
    for part in range(folder.parts):
        file = f"{stem}-{part + 1:05d}-of-{folder.parts:05d}.{suffix}"
        chosen = names[part :: folder.parts]
        files[file] = save({n: stored[n].contiguous() for n in chosen})
        weight_map |= dict.fromkeys(chosen, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    files[f"{stem}.{suffix}.index.json"] = json.dumps(index).encode()
    return files, answer


def write_zip(path: Path, files: Files) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, data in sorted(files.items()):
            member = zipfile.ZipInfo(name)  # dated 1980, so that the bytes repeat
            member.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(member, data)


def main() -> None:
    target = HERE / "family"
    target.mkdir(exist_ok=True)
    for old in target.glob("*.zip"):
        old.unlink()
    golden: dict[str, Any] = {}
    merged: dict[str, Tensors] = {}
    for seed, (name, row) in enumerate(ROWS.items()):
        weights = Weights(seed, coarse=not row.is_dense)
        files, merged[name] = meta_files(row, whole(row, weights), weights)
        golden[name] = expected(row, as_hf(row, merged[name]))
        write_zip(target / f"{name}.zip", files)
    for name, folder in HF_FOLDERS.items():
        files, golden[name] = hf_files(folder, ROWS[folder.row], merged[folder.row])
        write_zip(target / f"{name}.zip", files)
    small = Row({}, LLAMA32_1B, heads=8, kv=8, ranks=1, multiple=32, **SMALL)
    for name, lora in (("int4-qlora", True), ("int4-spinquant", False)):
        torch.manual_seed(0)
        tensors = whole(small, Weights(0, coarse=True))
        write_zip(target / f"{name}.zip", int4_files(small, tensors, lora=lora))
    text = json.dumps(golden, separators=(",", ":")).replace('"folders"', '\n"folders"')
    (HERE / "family.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
