"""Tells the layouts of a folder apart, and says which it took where there are several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_llama.errors import CheckpointError
from mlx_llama.options import ConvertOptions
from mlx_llama_convert.huggingface import holds_huggingface, open_huggingface
from mlx_llama_convert.meta import holds_meta, open_meta
from mlx_llama_convert.refusals import refuse_files
from mlx_llama_convert.source import Origin, SourceModel


@dataclass(frozen=True, slots=True)
class _Layout:
    """A file layout. A format that is read one day is one more of them.

    open: takes the folder, the options, and the model's name where it is not the folder's.
    """

    files: str
    is_in: Callable[[Path], bool]
    open: Callable[[Path, ConvertOptions, str | None], SourceModel]


_HUGGING_FACE = _Layout("Hugging Face's files", holds_huggingface, open_huggingface)
_META = _Layout("Meta's files", holds_meta, open_meta)

# Where Hugging Face's repositories of Meta's models keep Meta's own files.
_ORIGINAL = "original"


def open_source(
    folder: Path, options: ConvertOptions, *, origin: Origin | None = None
) -> SourceModel:
    """Recognise a folder and describe what it holds.

    origin: the hub repository that the folder is a copy of, in the hub's cache. Of the weights it
    reads the norms, the output as far as it equals the embedding, and heads that may be copies.
    Raises CheckpointError or UnsupportedModelError.
    """
    source = _open_source(folder, options, origin.name if origin else None)
    return replace(source, origin=origin)


def _open_source(folder: Path, options: ConvertOptions, name: str | None) -> SourceModel:
    if not folder.exists():
        raise CheckpointError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: a file; give the folder that holds it")
    found = [
        (place, layout)
        # config.json says more than params.json: the RoPE factor, the context, the chat format.
        for place, layout in (
            (folder, _HUGGING_FACE),
            (folder, _META),
            (folder / _ORIGINAL, _META),
        )
        if layout.is_in(place)
    ]
    if not found:
        refuse_files(folder)
        raise CheckpointError(
            f"{folder}: no checkpoint: expected params.json with consolidated.00.pth (Meta) or "
            "config.json with safetensors or pytorch_model.bin (Hugging Face)"
        )
    (place, layout), *others = found
    source = layout.open(place, options, name)
    # The folder that was given has the model's name and its license.
    return replace(
        source, path=folder, notes=(*_choice(folder, place, layout, others), *source.notes)
    )


def _choice(
    folder: Path, place: Path, layout: _Layout, others: list[tuple[Path, _Layout]]
) -> list[str]:
    """Say what was taken and why, where it is not all that there is."""
    if place != folder:
        return [f"{layout.files} in {_ORIGINAL}/ are taken: the folder itself holds no weights"]
    reason = (
        "config.json says more than params.json"
        if layout is _HUGGING_FACE
        else "the folder's own come first"
    )
    return [
        f"{layout.files} are taken, {other.files} "
        f"{'beside them' if where == folder else f'in {_ORIGINAL}/'} are not: {reason}"
        for where, other in others
    ]
