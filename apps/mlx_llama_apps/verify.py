"""`mlx-llama verify`: is a model directory still what was written?"""

from __future__ import annotations

from mlx_llama_apps import paths


def verify(model: str, /) -> None:
    """Compare a model directory's files with the digests in its manifest.

    Parameters
    ----------
    model
        a model directory, the name of one in the models folder, or "bundled", the guide in the box
    """
    from mlx_llama_convert.verification import check_directory

    folder = paths.resolve_model(model)
    names = check_directory(folder)
    print(f"{folder}: {len(names)} files are as they were written")
