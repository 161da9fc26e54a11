"""The checkpoint in the box: Meta's files of a small Llama that was trained for this project.

It is the program's own guide; `training/` makes it. What a command runs is a model directory that
is converted from it on first use.
"""

from __future__ import annotations

import json
from pathlib import Path

from mlx_llama.errors import CheckpointError
from mlx_llama.options import ConvertOptions
from mlx_llama_apps import paths

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
    return paths.default_output(Path(paths.BUNDLED), size=f"{BITS}bit")


def model_directory() -> Path:
    """Return the converted checkpoint; it is made, with plan and progress, where it is not there.

    One that was made of other weights, by another version of the program, is replaced.
    """
    source, made = checkpoint(), target()
    if _is_made_of(made, source):
        return made
    from mlx_llama_apps.convert import build
    from mlx_llama_apps.flags import MakingFlags
    from mlx_llama_convert import open_source

    options = ConvertOptions(bits=BITS)
    opened, making = open_source(source, options), MakingFlags(force=made.exists())
    build(opened, options, made, making, says_path=False)
    return made


def _is_made_of(target: Path, source: Path) -> bool:
    """Whether a directory's manifest names these very weights."""
    from mlx_llama_convert.checklist import expected_digests
    from mlx_llama_convert.output import MANIFEST_NAME

    if not (target / MANIFEST_NAME).is_file():
        return False
    expected = expected_digests([source / _WEIGHTS])
    manifest = json.loads((target / MANIFEST_NAME).read_text(encoding="utf-8"))
    found = {file["name"]: file for file in manifest["source"]["files"]}
    return all(
        found.get(path.name, {}).get(algorithm) == digest
        for path, (algorithm, digest) in expected.items()
    )
