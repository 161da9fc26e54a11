from __future__ import annotations

import threading
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_llama.config import QuantFormat
from mlx_llama.options import ConvertOptions
from mlx_llama.weights import is_matrix
from mlx_llama_convert import open_source
from mlx_llama_convert.source import CheckpointWeights
from mlx_llama_quantize import QuantSpec, packed_entries, packing, quantize_weights
from tiny_models import write_meta


@pytest.mark.parametrize(
    ("name", "shape", "wanted", "found"),
    [
        ("layers.0.attention.wq.weight", (64, 64), 64, 64),
        ("layers.0.attention.wq.weight", (64, 128), 128, 128),
        ("layers.0.attention.wq.weight", (64, 192), 128, 64),
        ("layers.0.attention.wq.weight", (64, 96), 64, 32),
        ("layers.0.attention.wq.weight", (64, 172), 64, None),
        ("layers.0.attention.wq.weight", (64, 128), 32, 32),
        ("tok_embeddings.weight", (100, 64), 64, 64),
        ("norm.weight", (64,), 64, None),
        ("layers.0.ffn_norm.weight", (64,), 64, None),
    ],
)
def test_group_is_the_largest_up_to_the_wanted_that_divides(
    name: str, shape: tuple[int, ...], wanted: int, found: int | None
) -> None:
    form = QuantSpec(4, wanted).format_of(name, shape)
    assert (form and form.group_size) == found


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_announced_entries_are_what_mlx_makes(bits: int, group: int) -> None:
    name, form = "layers.0.attention.wq.weight", QuantFormat(bits, group)
    made = mx.quantize(mx.ones((8, 256), dtype=mx.bfloat16), group_size=group, bits=bits)
    entries = packed_entries(name, (8, 256), "bfloat16", form)
    dtypes = {"uint32": mx.uint32, "bfloat16": mx.bfloat16}
    assert [(shape, dtypes[dtype]) for _, dtype, shape in entries] == [
        (array.shape, array.dtype) for array in made
    ]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_unpacked_weights_lie_within_half_a_step(tmp_path: Path, bits: int) -> None:
    source = open_source(write_meta(tmp_path / "m"), ConvertOptions()).weights
    form = QuantFormat(bits, 32)
    forms = {n: form if is_matrix(n) else None for n in source.names()}
    pieces = dict(quantize_weights(source, forms, dtype=None, n_threads=1))
    weight, scales, biases = (
        pieces[f"model.layers.0.mlp.down_proj.{part}"] for part in ("weight", "scales", "biases")
    )
    unpacked = np.array(mx.dequantize(weight, scales, biases, group_size=32, bits=bits))
    values = np.array(source.read("layers.0.feed_forward.w2.weight"))
    step, bias = (np.repeat(np.array(a), 32, axis=1) for a in (scales, biases))
    codes = (values - bias) / step
    # MLX moves a group's scale so that the end of larger magnitude is met exactly: a value beyond
    # the other end is clipped, every other one is rounded to the nearest code.
    is_clipped = (codes < 0) | (codes > 2**bits - 1)
    error = np.abs(unpacked - values) / np.abs(step)
    assert error[~is_clipped].max() <= 0.5 + 1e-3
    assert error.max() <= 1.0 + 1e-3
    assert is_clipped.mean() < 0.2


def test_threads_share_the_work_and_keep_the_order(tmp_path: Path) -> None:
    source = open_source(write_meta(tmp_path / "m"), ConvertOptions()).weights
    seen: set[str] = set()
    read = source.read

    class Watched(CheckpointWeights):
        def __init__(self) -> None: ...

        config = property(lambda _: source.config)

        def names(self) -> list[str]:
            return source.names()

        def shape(self, name: str) -> tuple[int, ...]:
            return source.shape(name)

        def dtype(self, name: str) -> str:
            return source.dtype(name)

        def read(self, name: str, rows: slice | None = None) -> mx.array:
            seen.add(threading.current_thread().name)
            return read(name, rows)

    forms = {n: QuantFormat(4, 64) if is_matrix(n) else None for n in source.names()}
    names = [name for name, _ in quantize_weights(Watched(), forms, dtype=None, n_threads=3)]
    entries = [
        entry[0]
        for n in source.names()
        for entry in packed_entries(n, source.shape(n), "float32", forms[n])
    ]
    assert names == entries
    assert all(name.startswith("quantize") for name in seen)


def test_closing_early_stops_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "BLOCK_BYTES", 100)
    source = open_source(write_meta(tmp_path / "m"), ConvertOptions()).weights
    forms = dict.fromkeys(source.names())
    pieces = quantize_weights(source, forms, dtype=None, n_threads=2)
    next(pieces)
    pieces.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert not [t for t in threading.enumerate() if t.name.startswith("quantize")]
