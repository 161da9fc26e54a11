"""Digests of files, taken on a thread of its own beside the conversion."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from mlx_llama.errors import CheckpointError

CHUNK_BYTES = 4 << 20


class Hasher:
    """Hashes files in the background, one after another; a context manager.

    Leaving it early gives up what is not done.
    """

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hash")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, path: Path, *, names: tuple[str, ...] = ("sha256",)) -> Future[dict[str, str]]:
        """Hash a file by each of hashlib's names; the future gives lower-case hexadecimal."""
        return self._pool.submit(self._digests, path, names)

    def _digests(self, path: Path, names: tuple[str, ...]) -> dict[str, str]:
        return file_digests(path, names, stop=self._stop)


def file_digests(
    path: Path, names: tuple[str, ...], *, stop: threading.Event | None = None
) -> dict[str, str]:
    """Read a file once and return its digests by hashlib's names, lower-case hexadecimal."""
    digests = {name: hashlib.new(name, usedforsecurity=False) for name in names}
    buffer = bytearray(CHUNK_BYTES)
    try:
        with path.open("rb", buffering=0) as file:
            while (count := file.readinto(buffer)) and not (stop and stop.is_set()):
                for digest in digests.values():
                    digest.update(memoryview(buffer)[:count])
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return {name: digest.hexdigest() for name, digest in digests.items()}
