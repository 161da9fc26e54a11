"""SHA-256 of files, taken on a thread of its own beside the conversion."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from mlx_llama.errors import CheckpointError

CHUNK_BYTES = 4 << 20


class FileHashes:
    """Hashes files in the background; a context manager that gives up when it is left early."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = tuple(files)
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sha256")

    def __enter__(self) -> Self:
        self._future = self._pool.submit(lambda: {f: self._sha256(f) for f in self._files})
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._pool.shutdown(wait=True)

    def result(self) -> dict[Path, str]:
        """Wait for all hashes, lower-case hexadecimal."""
        return self._future.result()

    def _sha256(self, path: Path) -> str:
        digest = hashlib.sha256()
        buffer = bytearray(CHUNK_BYTES)
        try:
            with path.open("rb", buffering=0) as file:
                while (count := file.readinto(buffer)) and not self._stop.is_set():
                    digest.update(memoryview(buffer)[:count])
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        return digest.hexdigest()
