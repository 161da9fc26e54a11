"""A file that arrives in pieces: locked, continued where it ended, hashed as it grows.

Knows no network. The bytes that an earlier run left are read once, for the hash.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from mlx_llama.errors import DownloadError
from mlx_llama_convert.hub_files import HubFile
from mlx_llama_convert.output import sync

CHUNK_BYTES = 4 << 20


class PartialFile:
    """The unfinished copy of a file; a context manager that keeps what has arrived.

    Raises DownloadError when another process writes here; OSError as the disk gives it.
    """

    def __init__(self, path: Path, file: HubFile) -> None:
        self._path = path
        self._file = file
        self.nbytes = 0
        self._digest = self._new_digest()

    def __enter__(self) -> Self:
        self._stream = os.fdopen(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._stream.close()
            raise DownloadError(
                f"{self._path}: another download is writing here; wait for it"
            ) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stream.close()

    def take_up(self, on_bytes: Callable[[int], None]) -> None:
        """Read what an earlier run left; on_bytes is given the size so far."""
        if os.fstat(self._stream.fileno()).st_size > self._file.nbytes:
            self.restart()
        while chunk := self._stream.read(CHUNK_BYTES):
            self._digest.update(chunk)
            self.nbytes += len(chunk)
            on_bytes(self.nbytes)

    def restart(self) -> None:
        """Throw away what is there."""
        self._stream.seek(0)
        self._stream.truncate()
        self._digest = self._new_digest()
        self.nbytes = 0

    def write(self, data: bytes) -> None:
        """Append bytes."""
        self._stream.write(data)
        self._digest.update(data)
        self.nbytes += len(data)

    def publish(self, target: Path) -> None:
        """Check size and hash and give the file its name; a wrong one is removed."""
        found = self._digest.hexdigest()
        if self.nbytes != self._file.nbytes or found != self._file.digest:
            self._path.unlink()
            raise DownloadError(
                f"{self._file.path}: wrong bytes arrived: {self.nbytes} bytes, "
                f"{self._file.algorithm} {found[:16]}…; expected {self._file.nbytes} bytes, "
                f"{self._file.digest[:16]}…; "
                "removed, run the same command again"
            )
        self._stream.flush()
        sync(self._path)
        self._path.rename(target)

    def _new_digest(self) -> hashlib._Hash:
        if len(self._file.digest) == 64:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self._file.nbytes, usedforsecurity=False)
