"""A directory that appears whole or not at all, and a conversion that can go on where it stopped.

Files are written into `OUT.partial/` beside the target, which takes the target's name when
everything is on the disk. What was finished there is written down in a journal with its digest; the
next run of the same job keeps it, any other run starts over. Knows nothing of models.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mlx_llama.errors import GOES_ON, CheckpointError, OutputError, is_ctrl_c
from mlx_llama.strict_json import MAX_JSON_BYTES, load_json
from mlx_llama_convert.hashing import file_digests

JOURNAL = ".mlx-llama-partial"  # marks the folder as ours; holds the lock and the finished files
MANIFEST_NAME = "manifest.json"
REPLACED = ".replaced"  # the old output, inside the partial folder while names are swapped


@dataclass(slots=True)
class Partial:
    """The folder in the making. finished: SHA-256 of files that are whole, by name."""

    folder: Path
    finished: dict[str, str] = field(default_factory=dict)

    def finish(self, name: str, sha256: str) -> None:
        """Write down that a file is whole, so that a later run need not make it again."""
        sync(self.folder / name)
        self.finished[name] = sha256
        with (self.folder / JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(json.dumps({"file": name, "sha256": sha256}) + "\n")
            journal.flush()
            os.fsync(journal.fileno())


@contextmanager
def new_directory(
    target: Path,
    *,
    force: bool,
    needed_bytes: int,
    job: str = "",
    on_note: Callable[[str], None] | None = None,
) -> Iterator[Partial]:
    """Yield a folder that becomes `target` when the block ends well.

    force: an existing directory of ours is replaced, at the very end. needed_bytes: refused at once
    when the disk has less. job: what is being made; files that an interrupted run of the same job
    finished are kept, if their digests are right. on_note: told what is kept or thrown away.
    Raises OutputError. After Ctrl-C or a failing disk finished files stay; after any other
    exception, and when nothing was finished, the folder is removed. What stays is said in the
    error, or in a note of the exception.
    """
    target = Path(os.path.abspath(target))  # noqa: PTH100 - a last symlink stays one
    partial = Partial(target.with_name(target.name + ".partial"))
    check_target(target, force=force)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = _claim(partial, target, job, on_note or (lambda _: None))
    except OSError as error:
        raise OutputError(f"{partial.folder}: cannot be written: {error.strerror}") from error
    is_resumable = False
    try:
        kept_bytes = sum((partial.folder / name).stat().st_size for name in partial.finished)
        _check_space(target, needed_bytes - kept_bytes)
        yield partial
        check_target(target, force=force)  # it may have appeared in the meantime
        _publish(partial.folder, target)
    except OSError as error:
        is_resumable = bool(partial.finished)
        raise OutputError(
            f"{error.filename or partial.folder}: {error.strerror or error}; "
            + (f"{_kept(partial)}: {GOES_ON}" if partial.finished else "nothing was left behind")
        ) from error
    except BaseException as error:
        is_resumable = is_ctrl_c(error) and bool(partial.finished)
        if is_resumable:
            error.add_note(_kept(partial))
        raise
    finally:
        if _holds(partial.folder, lock):
            _restore(partial.folder, target)
            if not is_resumable:
                _discard(partial.folder)
        os.close(lock)


def check_target(target: Path, *, force: bool) -> None:
    """Refuse a target that exists, and with force one that holds more than we wrote."""
    if not target.exists() and not target.is_symlink():
        return
    if not force:
        raise OutputError(f"{target}: exists; choose another --output, or --force to replace it")
    foreign = _foreign_files(target)
    if foreign:
        raise OutputError(
            f"{target}: --force replaces only what mlx-llama wrote, and {foreign[0]} is not of it; "
            "choose another --output"
        )


def _foreign_files(target: Path) -> list[str]:
    """Return what stands at a target and is not in the manifest of one of our directories."""
    if target.is_symlink() or not target.is_dir():
        return [target.name]
    ours = {MANIFEST_NAME, JOURNAL, REPLACED}  # a kill right after the renames leaves the last two
    try:
        manifest = load_json(target / MANIFEST_NAME, max_bytes=MAX_JSON_BYTES)
    except CheckpointError:
        manifest = {}
    files = manifest.get("files")
    if manifest.get("tool") == "mlx-llama" and isinstance(files, dict):
        ours |= set(files)
    else:
        ours = set()
    return sorted(path.name for path in target.iterdir() if path.name not in ours)


def _kept(partial: Partial) -> str:
    n_files = len(partial.finished)
    files = "1 finished file is" if n_files == 1 else f"{n_files} finished files are"
    return f"{files} kept in {partial.folder}"


def _claim(partial: Partial, target: Path, job: str, on_note: Callable[[str], None]) -> int:
    """Take the partial folder, old or new, and lock it; return the lock's file descriptor."""
    folder, journal = partial.folder, partial.folder / JOURNAL
    folder.mkdir(exist_ok=True)
    if not journal.is_file():
        if any(folder.iterdir()):
            raise OutputError(f"{folder}: exists and is not ours; move it away")
        return _begin(folder, job)
    lock = _lock(journal, folder)
    _restore(folder, target)
    partial.finished = _finished_files(folder, job, on_note)
    if partial.finished:
        for path in folder.iterdir():
            if path.name not in (*partial.finished, JOURNAL):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return lock
    _discard(folder)
    os.close(lock)
    folder.mkdir()
    return _begin(folder, job)


def _holds(folder: Path, lock: int) -> bool:
    """Whether the folder is the one that was locked, not another run's of the same name."""
    try:
        return os.path.samestat(os.fstat(lock), os.stat(folder / JOURNAL))  # noqa: PTH116
    except FileNotFoundError:
        return False


def _restore(folder: Path, target: Path) -> None:
    """Put the old output back where a run ended between the two renames."""
    if (folder / REPLACED).exists() and not target.exists():
        (folder / REPLACED).rename(target)


def _discard(folder: Path) -> None:
    """Remove the folder, its journal last: what is left by a second Ctrl-C is still ours."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != JOURNAL:
            path.unlink()
    (folder / JOURNAL).unlink()
    folder.rmdir()


def _begin(folder: Path, job: str) -> int:
    lock = _lock(folder / JOURNAL, folder)
    os.write(lock, (json.dumps({"job": job}) + "\n").encode())
    return lock


def _finished_files(folder: Path, job: str, on_note: Callable[[str], None]) -> dict[str, str]:
    """Read the journal of an interrupted run; keep what is whole and belongs to this job."""
    entries: list[dict[str, str]] = []
    for line in (folder / JOURNAL).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            break  # the last line of a run that was cut off
        if not isinstance(entry, dict):
            break
        entries.append(entry)
    if not entries or len(entries) == 1:
        return {}
    if entries[0].get("job") != job:
        on_note("the source or the options have changed since the last run: starting over")
        return {}
    finished: dict[str, str] = {}
    for entry in entries[1:]:
        name, sha256 = str(entry.get("file")), entry.get("sha256")
        path = folder / name
        if Path(name).name != name or not path.is_file():
            continue
        on_note(f"checking {name}, which the last run finished")
        if file_digests(path, ("sha256",))["sha256"] == sha256:
            finished[name] = str(sha256)
        else:
            on_note(f"{name} is damaged and is made again")
    return finished


def _lock(journal: Path, folder: Path) -> int:
    descriptor = os.open(journal, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise OutputError(f"{folder}: another conversion is writing here; wait for it") from error
    return descriptor


def _check_space(target: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < needed_bytes:
        raise OutputError(
            f"{target.parent}: {free / 1e9:.2f} GB free, {needed_bytes / 1e9:.2f} GB needed; make "
            "room or choose another --output"
        )


def _publish(folder: Path, target: Path) -> None:
    for file in folder.iterdir():
        sync(file)
    sync(folder)
    if target.exists():
        target.rename(folder / REPLACED)
    # The journal goes with it: until the rename the folder is recognised as unfinished.
    folder.rename(target)
    sync(target.parent)
    (target / JOURNAL).unlink()
    shutil.rmtree(target / REPLACED, ignore_errors=True)


def sync(path: Path) -> None:
    """Force a file's or folder's bytes to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
