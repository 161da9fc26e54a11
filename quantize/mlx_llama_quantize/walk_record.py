"""Where a walk is, written down, so that it goes on after it was stopped."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_llama.errors import CheckpointError
from mlx_llama.safetensors_reader import open_safetensors


@dataclass(frozen=True, slots=True)
class WalkRecord:
    """The files of one walk. folder: theirs alone."""

    folder: Path

    def path(self, name: str) -> Path:
        """Return where arrays of a name stand."""
        return self.folder / f"{name}.safetensors"

    def save(self, name: str, arrays: dict[str, mx.array]) -> None:
        """Write arrays down; they appear whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = self.folder / f"{name}.partial.safetensors"
        mx.save_safetensors(str(beside), arrays)
        beside.replace(self.path(name))

    def keep(
        self, index: int, states: Sequence[mx.array], scales: Mapping[str, np.ndarray]
    ) -> None:
        """Write down the states behind a block, and all scales so far, in place of those before."""
        arrays = {f"state.{number}": state for number, state in enumerate(states)}
        arrays |= {f"scales.{name}": mx.array(found) for name, found in scales.items()}
        self.save(f"behind-{index}", arrays)
        self.path(f"behind-{index - 1}").unlink(missing_ok=True)

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
