"""Tells the layouts of a folder apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mlx_llama.errors import CheckpointError, UnsupportedModelError
from mlx_llama.options import ConvertOptions
from mlx_llama_convert.huggingface import open_huggingface
from mlx_llama_convert.meta import open_meta
from mlx_llama_convert.source import Origin, SourceModel


def open_source(
    folder: Path, options: ConvertOptions, *, origin: Origin | None = None
) -> SourceModel:
    """Recognise a folder and describe what it holds; no weight but the norms is read.

    origin: the hub repository that the folder is a copy of, in the hub's cache.
    Where both layouts stand side by side, safetensors are taken: they say more of themselves.
    Raises CheckpointError or UnsupportedModelError.
    """
    source = _open_source(folder, options, origin.name if origin else None)
    return replace(source, origin=origin)


def _open_source(folder: Path, options: ConvertOptions, name: str | None) -> SourceModel:
    if not folder.exists():
        raise CheckpointError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: a file; give the folder that holds it")
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return open_huggingface(folder, options, name=name)
    if (folder / "params.json").is_file() or any(folder.glob("consolidated.*.pth")):
        return open_meta(folder, options, name=name)
    if any(folder.glob("pytorch_model*.bin")):
        raise UnsupportedModelError(
            f"{folder}: weights in pytorch_model.bin; take the safetensors of the same release"
        )
    if any(folder.glob("*.gguf")):
        raise UnsupportedModelError(f"{folder}: GGUF is not converted; take the original weights")
    raise CheckpointError(
        f"{folder}: no checkpoint: expected params.json with consolidated.00.pth (Meta) or "
        "config.json with safetensors (Hugging Face)"
    )
