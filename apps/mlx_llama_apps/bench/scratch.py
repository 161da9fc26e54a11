"""A folder for files of gigabytes: gone afterwards, or when the next one is made."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from mlx_llama.errors import OutputError
from mlx_llama_apps import paths
from mlx_llama_apps.locks import is_locked, locked

SPARE_BYTES = 256 << 20  # of the disk


@contextmanager
def work_folder() -> Iterator[Path]:
    """Yield a folder, which is gone afterwards; what a run that was killed left goes first."""
    home = paths.cache_folder() / "bench"
    home.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with locked(home):  # a folder has its lock before anyone can take it for left behind
            for path in home.iterdir():
                with suppress(OSError):
                    if not is_locked(path):
                        shutil.rmtree(path)
            work = Path(tempfile.mkdtemp(dir=home))
            stack.callback(shutil.rmtree, work, ignore_errors=True)
            stack.enter_context(locked(work))
        yield work


def require_room(folder: Path, nbytes: int, what: str, otherwise: str) -> None:
    """Raise OutputError, with both numbers, where the disk has less than a file takes."""
    free = shutil.disk_usage(folder).free
    if free < nbytes + SPARE_BYTES:
        raise OutputError(
            f"{folder}: {what} takes {nbytes / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free; "
            f"{otherwise}, or move MLX_LLAMA_HOME"
        )
