"""The files that hold a folder's weights in Hugging Face's layout: one, or several with an index.

Takes a folder and a format, returns a `TensorRef` for each stored name. Nothing is trusted: the
index must name files of the folder, and say the same as they do. Knows nothing of names' meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlx_llama.errors import CheckpointError
from mlx_llama.safetensors_reader import open_safetensors
from mlx_llama.strict_json import load_json
from mlx_llama.tensor_ref import TensorRef

MAX_INDEX_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """One way to store weights. stem: what the files are called where no index says it."""

    name: str
    stem: str
    suffix: str
    open_file: Callable[[Path], dict[str, TensorRef]]

    @property
    def index_name(self) -> str:
        """Name of the file that says which tensor is in which file."""
        return f"{self.stem}{self.suffix}.index.json"

    def is_in(self, folder: Path) -> bool:
        """Whether a folder has such files; an index alone is none."""
        stem = "" if (folder / self.index_name).is_file() else self.stem
        return next(folder.glob(f"{stem}*{self.suffix}"), None) is not None

    def open(self, folder: Path) -> dict[str, TensorRef]:
        """Open all files and return their tensors, RoPE's buffers left out; reads no weights.

        Raises: CheckpointError when a file is missing or damaged, when a tensor stands in two
        files, or when the index says something else than they do.
        """
        table = _weight_map(folder, self) if (folder / self.index_name).is_file() else None
        if table is None:
            files = sorted(folder.glob(f"{self.stem}*{self.suffix}"))
            if not files:
                raise CheckpointError(
                    f"{folder}: no {self.stem}{self.suffix} and no {self.index_name}"
                )
        else:
            files = [folder / name for name in sorted(set(table.values()))]
        tensors: dict[str, TensorRef] = {}
        for file in files:
            for name, ref in self.open_file(file).items():
                if name in tensors:
                    raise CheckpointError(f"{file}: tensor {name} stands in two files")
                if not _is_buffer(name):
                    tensors[name] = ref
        if table is not None:
            _compare_index(folder / self.index_name, table, tensors)
        return tensors


SAFETENSORS = WeightFormat("safetensors", "model", ".safetensors", open_safetensors)


def _weight_map(folder: Path, form: WeightFormat) -> dict[str, str]:
    """Return the index's table of tensor to file name; every file is one of the folder."""
    index = folder / form.index_name
    table = load_json(index, max_bytes=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(f, str) for f in table.values()):
        raise CheckpointError(f"{index}: weight_map is not a table of tensor to file name")
    here = {file.name for file in folder.iterdir() if file.is_file()}
    for name in sorted(set(table.values())):
        if name not in here:
            raise CheckpointError(f"{index}: names {name!r}, which is no file of {folder}")
        if not name.endswith(form.suffix):
            raise CheckpointError(
                f"{index}: names {name!r}, expected files whose names end in {form.suffix}"
            )
    return table


def _compare_index(index: Path, table: Mapping[str, str], tensors: Mapping[str, TensorRef]) -> None:
    """Refuse an index that says something else than the files: one of the two is damaged."""
    for name, file in table.items():
        if not _is_buffer(name) and (name not in tensors or tensors[name].path.name != file):
            raise CheckpointError(
                f"{index}: says that {file} holds tensor {name}, which it does not; download both "
                "again"
            )
    for name, ref in tensors.items():
        if name not in table:
            # transformers would leave it out, so nobody can say which of the two models is meant.
            raise CheckpointError(
                f"{index}: does not name tensor {name} of {ref.path.name}; download both again"
            )


def _is_buffer(name: str) -> bool:
    """Whether a tensor is one that old releases stored, and everybody computes."""
    return name.endswith("rotary_emb.inv_freq")
