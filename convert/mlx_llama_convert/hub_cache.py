"""Where a repository's files lie in the hub's cache, which all its tools share.

blobs/DIGEST is a content, blobs/DIGEST.incomplete one that is on its way, snapshots/COMMIT/PATH a
link to a content, refs/REVISION the commit that a branch or tag was. Knows no network.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mlx_llama.errors import DownloadError, OutputError
from mlx_llama_convert.hub_files import Choice, HubFile, choose_files


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A repository's files of one commit, in the cache."""

    name: str
    commit: str
    choice: Choice
    folder: Path

    @property
    def source(self) -> Path:
        """The folder to convert."""
        return self.folder / self.choice.folder


@dataclass(frozen=True, slots=True)
class Listing:
    """What a repository holds of a model, and where it goes.

    root: the repository's folder in the cache.
    """

    name: str
    revision: str
    commit: str
    choice: Choice
    files: tuple[HubFile, ...]
    root: Path

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files)

    @property
    def missing_nbytes(self) -> int:
        """Bytes that are still to be downloaded."""
        return sum(file.nbytes - self._nbytes_here(file) for file in self.files)

    @property
    def snapshot(self) -> Snapshot:
        """What is there after the download."""
        return Snapshot(self.name, self.commit, self.choice, self.root / "snapshots" / self.commit)

    def blob(self, file: HubFile) -> Path:
        """Return where a file's content lies."""
        return self.root / "blobs" / file.digest

    def partial(self, file: HubFile) -> Path:
        """Return where a file's content grows."""
        return self.root / "blobs" / f"{file.digest}.incomplete"

    def is_here(self, file: HubFile) -> bool:
        """Tell whether the snapshot has the file, in its whole length."""
        return nbytes_of(self.snapshot.folder / file.path) == file.nbytes

    def _nbytes_here(self, file: HubFile) -> int:
        if self.is_here(file) or nbytes_of(self.blob(file)) == file.nbytes:
            return file.nbytes
        partial = nbytes_of(self.partial(file)) or 0
        return partial if partial <= file.nbytes else 0


def repository_folder(cache: Path, name: str) -> Path:
    """Return a model repository's folder in the cache."""
    return cache / "--".join(["models", *name.split("/")])


def read_snapshot(name: str, folder: Path) -> Snapshot:
    """Describe the files of a snapshot; DownloadError when they are no whole model."""
    here = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    choice = choose_files(here, where=str(folder))
    # Meta's list of files arrives before the weights, so it shows what an interrupted run left out.
    checklist = folder / choice.folder / "checklist.chk"
    if choice.is_meta and checklist.is_file():
        text = checklist.read_text(encoding="utf-8", errors="replace")
        listed = set(re.findall(r"consolidated\.[0-9]{2}\.pth", text))
        if lacking := sorted(listed - {Path(path).name for path in choice.weights}):
            raise DownloadError(f"{folder}: {lacking[0]} is missing")
    return Snapshot(name, folder.name, choice, folder)


def prepare(listing: Listing) -> None:
    """Make the folders, and refuse what the disk has no room for."""
    with disk_told(listing.root):
        (listing.root / "blobs").mkdir(parents=True, exist_ok=True)
        free, needed = shutil.disk_usage(listing.root).free, listing.missing_nbytes
    if free < needed:
        raise OutputError(
            f"{listing.root}: {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB to download; make "
            "room, or move the cache to another disk with HF_HOME"
        )


def link(blob: Path, pointer: Path) -> None:
    """Show a content in the snapshot by a relative link."""
    pointer.parent.mkdir(parents=True, exist_ok=True)
    pointer.unlink(missing_ok=True)
    depth = len(pointer.relative_to(blob.parents[1]).parts) - 1
    try:
        pointer.symlink_to(f"{'../' * depth}blobs/{blob.name}")
    except OSError:  # a disk without links
        blob.rename(pointer)


def write_reference(listing: Listing) -> None:
    """Note which commit the revision is, for those who look offline."""
    if listing.revision == listing.commit:
        return
    reference = listing.root / "refs" / listing.revision
    reference.parent.mkdir(parents=True, exist_ok=True)
    written = reference.with_name(reference.name + ".new")
    written.write_text(listing.commit, encoding="ascii")
    written.rename(reference)


@contextmanager
def disk_told(path: Path, *, passed: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn what the disk refuses into one line; passed: errors that only look like the disk's."""
    try:
        yield
    except passed:
        raise
    except OSError as error:
        kept = "; make room, what has arrived is kept" if error.errno == errno.ENOSPC else ""
        raise OutputError(
            f"{error.filename or path}: cannot be written: {error.strerror or error}{kept}; "
            "HF_HOME moves the cache to another disk"
        ) from error


def nbytes_of(path: Path) -> int | None:
    """Return a file's size, None where there is no file."""
    with suppress(OSError):
        return path.stat().st_size if path.is_file() else None
    return None


def is_model_folder(path: Path) -> bool:
    """Whether a folder holds a Llama's config.json and safetensors."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    is_llama = isinstance(config, dict) and config.get("model_type") == "llama"
    return is_llama and any(path.glob("*.safetensors"))
