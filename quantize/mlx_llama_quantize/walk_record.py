"""Where a walk is, written down, so that it goes on after it was stopped."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_llama.dtypes import name_of
from mlx_llama.errors import CheckpointError, OutputError
from mlx_llama.safetensors_reader import open_safetensors
from mlx_llama.safetensors_writer import SafetensorsWriter
from mlx_llama_quantize.keeping import Keeper

STALE_S = 30 * 86400


@dataclass(frozen=True, slots=True)
class WalkRecord:
    """The files of one walk. folder: theirs alone. keeper: of what is for a later run only."""

    folder: Path
    keeper: Keeper

    def path(self, name: str) -> Path:
        """Return where arrays of a name stand."""
        return self.folder / f"{name}.safetensors"

    def open(self) -> None:
        """Raise OutputError, before any work, where what is to be read again cannot be written."""
        with self._room():
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / "probe.partial"
            probe.touch()
            probe.unlink()

    def save(self, name: str, arrays: dict[str, mx.array]) -> None:
        """Write arrays down that are read again; whole or not at all. Raises OutputError."""
        with self._room():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(name, arrays)

    @contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"{self.folder}: {error.strerror or error}; what is packed waits there: make room, "
                "or name another folder in MLX_LLAMA_HOME"
            ) from error

    def _write(self, name: str, arrays: dict[str, mx.array]) -> None:
        beside = self.folder / f"{name}.partial.safetensors"
        entries = [(n, name_of(a.dtype), a.shape) for n, a in arrays.items()]
        try:
            with SafetensorsWriter(beside, entries, is_durable=False) as writer:
                for each, array in arrays.items():
                    writer.write(each, array)
            beside.replace(self.path(name))
        finally:
            beside.unlink(missing_ok=True)

    def keep(
        self, index: int, states: Sequence[mx.array], scales: Mapping[str, np.ndarray]
    ) -> None:
        """Write down the states behind a block, and all scales so far, in place of those before."""
        arrays = {f"state.{number}": state for number, state in enumerate(states)}
        arrays |= {f"scales.{name}": mx.array(found) for name, found in scales.items()}

        def write() -> None:
            self._write(f"behind-{index}", arrays)
            self.path(f"behind-{index - 1}").unlink(missing_ok=True)

        self.keeper.keep(write)

    def resumed(
        self, n_layers: int, n_windows: int
    ) -> tuple[int, list[mx.array], dict[str, np.ndarray]]:
        """Return how many blocks are done, the states behind them, and scales.

        A damaged file is none.
        """
        for index in reversed(range(n_layers)):
            path = self.path(f"behind-{index}")
            if not path.is_file():
                continue
            try:
                arrays = {name: ref.read() for name, ref in open_safetensors(path).items()}
                states = [arrays[f"state.{number}"] for number in range(n_windows)]
            except (CheckpointError, KeyError):
                break
            scales = {
                name.removeprefix("scales."): np.array(array)
                for name, array in arrays.items()
                if name.startswith("scales.")
            }
            return index + 1, states, scales
        return 0, [], {}

    def forget(self) -> None:
        """Remove what was written down."""
        shutil.rmtree(self.folder, ignore_errors=True)


def forget_stale(states: Path) -> None:
    """Remove, of a folder of walks, those that nobody has taken up for a month."""
    with suppress(OSError):
        for path in states.iterdir():
            files = [*path.iterdir()]
            newest = max(each.stat().st_mtime for each in (path, *files))
            is_walk = all(each.suffix == ".safetensors" for each in files)
            if is_walk and time.time() - newest > STALE_S:
                shutil.rmtree(path, ignore_errors=True)
