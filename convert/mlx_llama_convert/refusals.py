"""Checkpoints that are recognised and refused by name: weights that someone packed already.

Takes what a folder says of itself and its tensors' names, raises UnsupportedModelError with what to
take instead. A reader for one of them would take its row's place here and wrap its tensors as
`fp8.ScaledTensor` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlx_llama.errors import UnsupportedModelError
from mlx_llama_convert.tensors import LogicalTensor

# By the pattern of a file's name, in folders that hold nothing that is read.
_FILES = {
    "*.gguf": "GGUF is not converted; take the original weights",
    "*.pte": "an ExecuTorch program (.pte) holds no checkpoint; take the bfloat16 release",
    "adapter_model.*": "an adapter (LoRA) is not a model; merge it into its model first",
}
_METHODS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "fbgemm_fp8": "FBGEMM FP8",
    "fp8": "FP8",
    "compressed-tensors": "compressed-tensors",
}
_METHOD_FILES = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ"}
_METHOD_SUFFIXES = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "FP8",
    ".scales": "MLX",
}
_QLORA, _SPINQUANT = "QLoRA", "SpinQuant"


def refuse_files(folder: Path) -> None:
    """Name what a folder without a checkpoint holds instead, if it is known."""
    for pattern, text in _FILES.items():
        if any(folder.glob(pattern)):
            raise UnsupportedModelError(f"{folder}: {text}")


def refuse_packed_folder(folder: Path, raw: Mapping[str, Any]) -> None:
    """Refuse a Hugging Face folder whose config.json (raw) or files say that it is quantized."""
    method = _method(raw)
    if method is None:
        method = next((m for name, m in _METHOD_FILES.items() if (folder / name).is_file()), None)
    if method is not None:
        raise _already_packed(folder, method)


def refuse_packed_tensors(folder: Path, names: Iterable[str]) -> None:
    """Refuse Hugging Face tensors whose names belong to a quantization or an adapter."""
    for name in names:
        if ".lora_" in name:
            raise UnsupportedModelError(
                f"{folder}: tensor {name[:80]}: {_FILES['adapter_model.*']}"
            )
        for suffix, method in _METHOD_SUFFIXES.items():
            if name.endswith(suffix):
                raise _already_packed(folder, f"{method} (tensor {name[:80]})")


def refuse_int4_params(params: Mapping[str, Any], *, where: str) -> None:
    """Refuse the params.json of Meta's int4 releases of Llama 3.2."""
    if "lora_args" in params:
        raise _int4(f"{where}: lora_args", _QLORA)
    arguments = params.get("quantization_args")
    if arguments is not None:
        is_spinquant = isinstance(arguments, Mapping) and arguments.get("spinquant")
        raise _int4(f"{where}: quantization_args", _SPINQUANT if is_spinquant else None)


def refuse_int4_tensors(tensors: Mapping[str, LogicalTensor]) -> None:
    """Refuse the tensors of Meta's int4 releases of Llama 3.2, whatever params.json says."""
    for name, tensor in tensors.items():
        if ".adaptor." in name:
            raise _int4(f"{tensor.path}: tensor {name[:80]!r}", _QLORA)
    for name, tensor in tensors.items():
        if name.endswith((".scales", ".zeros")) or tensor.dtype == "int8":
            raise _int4(f"{tensor.path}: tensor {name[:80]!r}", None)


def _int4(where: str, method: str | None) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{where}: an int4 checkpoint of Meta's ({method or f'{_QLORA} or {_SPINQUANT}'}) is not "
        "converted; take the bfloat16 release of the same model"
    )


def _method(raw: Mapping[str, Any]) -> str | None:
    own, entry = raw.get("quantization"), raw.get("quantization_config")
    if own:
        return "MLX"
    if not entry:
        return None
    method = entry.get("quant_method") if isinstance(entry, Mapping) else None
    if isinstance(method, str):
        return _METHODS.get(method.lower(), repr(method[:40]))
    is_mlx = isinstance(entry, Mapping) and {"bits", "group_size"} <= entry.keys()
    return "MLX" if is_mlx else "an unknown method"


def _already_packed(folder: Path, method: str) -> UnsupportedModelError:
    hint = ", or quantize --allow-requantize" if method.startswith("MLX") else ""
    return UnsupportedModelError(
        f"{folder}: already quantized with {method}; packing it again would lose more, take the "
        f"unquantized release{hint}"
    )
