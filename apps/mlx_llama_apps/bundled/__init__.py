"""The checkpoint in the box: Meta's files of a small Llama that was trained for this project.

It is the program's own guide; `training/` makes it. What a command runs is a model directory that
is converted from it on first use.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx_llama
from mlx_llama.errors import CheckpointError, OutputError
from mlx_llama.options import ConvertOptions
from mlx_llama.strict_json import MAX_JSON_BYTES, load_json
from mlx_llama_apps import paths
from mlx_llama_apps.locks import locked
from mlx_llama_apps.progress import remark

BITS = 8  # small models lose much at 4
_FOLDER = Path(__file__).parent / "Llama-3.1-Guide-4M-Instruct"
_WEIGHTS = "consolidated.00.pth"


def checkpoint() -> Path:
    """Return the folder of Meta's files; CheckpointError where an installation lacks it."""
    if not (_FOLDER / _WEIGHTS).is_file():
        raise CheckpointError(
            f"{_FOLDER}: the bundled checkpoint is missing; install mlx-llama again, or give a "
            "model: mlx-llama convert FOLDER makes one"
        )
    return _FOLDER


def target() -> Path:
    """Return where the converted checkpoint goes."""
    return paths.models_folder() / f"{paths.BUNDLED}-{BITS}bit"


def model_directory() -> Path:
    """Return the converted checkpoint; it is made, with plan and progress, where it is not there.

    One that was made of other weights or by another version of the program, or that has lost
    weights, is replaced; whoever asks meanwhile waits for it. Raises OutputError where something
    else has its place.
    """
    source, made = checkpoint(), target()
    if _is_whole(made, source):
        return made
    from mlx_llama_apps.convert import build
    from mlx_llama_apps.flags import MakingFlags
    from mlx_llama_convert import open_source

    made.parent.mkdir(parents=True, exist_ok=True)
    told = "another mlx-llama is making the bundled model: waiting for it"
    with locked(made.parent, on_wait=lambda: remark(told)):
        if not _is_whole(made, source):
            _refuse_another(made)
            options = ConvertOptions(bits=BITS)
            opened, making = open_source(source, options), MakingFlags(force=made.exists())
            build(opened, options, made, making, says_path=False)
    return made


def is_made() -> bool:
    """Whether a model directory of this checkpoint is there, whole or not."""
    source = _manifest(target()).get("source")
    return isinstance(source, dict) and source.get("name") == _FOLDER.name


def _refuse_another(made: Path) -> None:
    """Refuse to replace a directory that is not of this checkpoint, or holds more than it."""
    from mlx_llama_convert.output import check_target

    is_there = made.exists() or made.is_symlink()
    try:
        check_target(made, force=True)
    except OutputError:
        is_ours = False
    else:
        is_ours = is_made()
    if is_there and not is_ours:
        raise OutputError(
            f"{made}: the bundled model belongs there, and this is another, or holds more; rename "
            "the folder and run the command again"
        )


def _manifest(made: Path) -> dict[str, Any]:
    """Return a directory's manifest; nothing where it is damaged or not there."""
    from mlx_llama_convert.output import MANIFEST_NAME

    try:
        return load_json(made / MANIFEST_NAME, max_bytes=MAX_JSON_BYTES)
    except CheckpointError:
        return {}


def _is_whole(made: Path, source: Path) -> bool:
    """Whether a directory was made of these very weights by this version, and has its files."""
    from mlx_llama_convert.checklist import expected_digests

    manifest = _manifest(made)
    if manifest.get("version") != mlx_llama.__version__ or not is_made():
        return False
    files, sources = manifest.get("files"), manifest["source"].get("files")
    if not isinstance(files, dict) or not isinstance(sources, list):
        return False
    found = {str(each.get("name")): each for each in sources if isinstance(each, dict)}
    return all(_has(made / name, entry) for name, entry in files.items()) and all(
        found.get(path.name, {}).get(algorithm) == digest
        for path, (algorithm, digest) in expected_digests([source / _WEIGHTS]).items()
    )


def _has(path: Path, entry: object) -> bool:
    """Whether a file is there and, where it holds weights, is as long as it was written."""
    if not isinstance(entry, dict) or not path.is_file():
        return False
    return path.suffix != ".safetensors" or path.stat().st_size == entry.get("bytes")
