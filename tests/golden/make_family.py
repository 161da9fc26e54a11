"""Make one small checkpoint for each published Llama, with the tensors that it must become.

Needs torch (made with 2.13), numpy and safetensors, which the tests do not:
`python tests/golden/make_family.py`. Every row has the key names, the number of shards, the dtypes
and the keys of `params.json` of a published checkpoint; only the sizes are small.
`family/<row>.zip` holds its files, `family.json` what a conversion of them must give: the
configuration, and the SHA-256 of each tensor in Hugging Face's names and row order, computed here
from the unsplit weights.

The rows stand in `family_rows.py`. Tokenizers are not in it: the tests write them, with as many
tokens as the vocabularies there.
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
from family_rows import HEAD_DIM, LLAMA32_1B, ROWS, SMALL, TIKTOKEN, Row
from safetensors.torch import save as save_safetensors

HERE = Path(__file__).parent

Tensors = dict[str, torch.Tensor]
Files = dict[str, bytes]


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
