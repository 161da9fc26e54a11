"""A directory that appears whole or not at all.

Files are written into `OUT.partial/` beside the target, which takes the target's name when
everything is on the disk. A crash leaves at most that one folder; the next run recognises it by
its mark and replaces it. Knows nothing of models.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_llama.errors import OutputError

MARK = ".mlx-llama-partial"
REPLACED = ".replaced"  # the old output, inside the partial folder while names are swapped


@contextmanager
def new_directory(target: Path, *, force: bool, needed_bytes: int) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` when the block ends well.

    force: an existing model directory is replaced, at the very end. needed_bytes: refused at once
    when the disk has less. Raises OutputError; any exception in the block removes the folder.
    """
    partial = target.with_name(target.name + ".partial")
    check_target(target, force=force)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = _claim(partial, target)
    except OSError as error:
        raise OutputError(f"{partial}: cannot be written: {error.strerror}") from error
    try:
        _check_space(target, needed_bytes)
        yield partial
        _publish(partial, target)
    except OSError as error:
        raise OutputError(
            f"{error.filename or partial}: {error.strerror or error}; nothing was left behind"
        ) from error
    finally:
        if partial.exists():
            shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def check_target(target: Path, *, force: bool) -> None:
    """Refuse a target that exists, and with force one that is no model directory."""
    if not target.exists() and not target.is_symlink():
        return
    if not force:
        raise OutputError(f"{target}: exists; choose another --output, or --force to replace it")
    is_model = target.is_dir() and not target.is_symlink() and (target / "config.json").is_file()
    is_empty = target.is_dir() and not target.is_symlink() and not any(target.iterdir())
    if not (is_model or is_empty):
        raise OutputError(f"{target}: is no model directory, --force does not replace it")


def _claim(partial: Path, target: Path) -> int:
    """Make the partial folder anew and lock it; return the lock's file descriptor."""
    if partial.exists():
        if not (partial / MARK).is_file():
            raise OutputError(f"{partial}: exists and is not ours; move it away")
        _lock(partial / MARK, partial)
        if (partial / REPLACED).exists() and not target.exists():
            # Killed between the two renames: the old output is still whole in here.
            (partial / REPLACED).rename(target)
        shutil.rmtree(partial)
    partial.mkdir()
    return _lock(partial / MARK, partial)


def _lock(mark: Path, partial: Path) -> int:
    descriptor = os.open(mark, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise OutputError(f"{partial}: another conversion is writing here; wait for it") from error
    return descriptor


def _check_space(target: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < needed_bytes:
        raise OutputError(
            f"{target.parent}: {free / 1e9:.2f} GB free, {needed_bytes / 1e9:.2f} GB needed; make "
            "room or choose another --output"
        )


def _publish(partial: Path, target: Path) -> None:
    for file in partial.iterdir():
        sync(file)
    sync(partial)
    if target.exists():
        target.rename(partial / REPLACED)
    # The mark goes with it: until the rename the folder is recognised as unfinished.
    partial.rename(target)
    sync(target.parent)
    (target / MARK).unlink()
    shutil.rmtree(target / REPLACED, ignore_errors=True)


def sync(path: Path) -> None:
    """Force a file's or folder's bytes to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
