"""Named shapes, models of random weights, and the GGUF file for llama.cpp."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlx_llama
from mlx_llama.errors import OptionError, OutputError
from mlx_llama.loading import open_model_directory
from mlx_llama_apps.bench import scratch
from mlx_llama_apps.bench.gguf import write_gguf
from mlx_llama_apps.bench.random_model import with_bits, write_random_model
from mlx_llama_apps.bench.shapes import SHAPES, shape_named

# As Meta's model cards count them.
PARAMETERS = {
    "llama-1-7b": 6_738_415_616, "llama-1-65b": 65_285_660_672, "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192, "codellama-34b": 33_743_970_304, "llama-3-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496, "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824,
}  # fmt: skip


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_shapes_have_the_sizes_of_the_models(name: str, parameters: int) -> None:
    assert shape_named(name.upper()).parameter_count == parameters


def test_unknown_shape_lists_the_known_ones() -> None:
    with pytest.raises(OptionError, match=r"llama-3\.2-1b"):
        shape_named("gpt-2")


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_every_shape_can_be_packed(name: str, bits: int) -> None:
    config = with_bits(SHAPES[name], bits)
    form = config.quantization
    assert form is not None and form.bits == bits
    assert config.dim % form.group_size == config.hidden_dim % form.group_size == 0


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Mapping[int, Path]:
    """Two layers of a small shape, by bits."""
    shape = small_shape()
    folder = tmp_path_factory.mktemp("random")
    return {
        bits: write_random_model(folder / f"{bits}", with_bits(shape, bits)) for bits in (4, 8, 16)
    }


def small_shape() -> Any:
    from dataclasses import replace

    return replace(
        shape_named("llama-3.2-1b"),
        dim=128, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=32, hidden_dim=256, vocab_size=700,
    )  # fmt: skip


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_random_model_runs_with_activations_of_a_usual_size(
    small: Mapping[int, Path], bits: int
) -> None:
    llama = mlx_llama.load(small[bits], dtype="float32")
    logits = np.array(llama.logits(list(range(1, 60))))
    assert np.isfinite(logits).all() and 0.1 < logits.std() < 10
    again = small[bits].with_name(f"again{bits}")
    write_random_model(again, with_bits(small_shape(), bits))
    assert (again / "model.safetensors").read_bytes() == (
        small[bits] / "model.safetensors"
    ).read_bytes()


def test_progress_counts_every_byte_and_a_full_disk_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int]] = []
    folder = write_random_model(
        tmp_path / "a", with_bits(small_shape(), 4), lambda *done: told.append(done)
    )
    assert told[-1][0] == told[-1][1] == open_model_directory(folder).weight_bytes
    monkeypatch.setattr(scratch, "SPARE_BYTES", 1 << 62)
    with pytest.raises(OutputError, match="take a smaller --shape or fewer --bits"):
        write_random_model(tmp_path / "b", with_bits(small_shape(), 4))
    with pytest.raises(OutputError, match="give one by --peer-model"):
        write_gguf(open_model_directory(folder), tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


# --- GGUF ----------------------------------------------------------------------------------------


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read metadata and tensors as float32, by the format's description; of the types used here."""
    data, at = path.read_bytes(), 24

    def take(form: str) -> Any:
        nonlocal at
        values = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return values[0] if len(values) == 1 else values

    def text() -> str:
        nonlocal at
        size = take("Q")
        at += size
        return data[at - size : at].decode()

    assert data[:4] == b"GGUF"
    version, n_tensors, n_entries = struct.unpack_from("<IQQ", data, 4)
    assert version == 3
    metadata = {}
    for _ in range(n_entries):
        key = text()
        metadata[key] = {4: lambda: take("I"), 6: lambda: take("f"), 8: text}[take("I")]()
    infos = []
    for _ in range(n_tensors):
        name, n_dims = text(), take("I")
        sizes = [take("Q") for _ in range(n_dims)]
        infos.append((name, tuple(reversed(sizes)), take("I"), take("Q")))
    start = -(-at // 32) * 32
    tensors = {}
    for name, shape, kind, offset in infos:
        assert offset % 32 == 0
        tensors[name] = unpack(data[start + offset :], shape, kind)
    return metadata, tensors


def unpack(data: bytes, shape: tuple[int, ...], kind: int) -> np.ndarray:
    n = math.prod(shape)
    if kind == 0:
        return np.frombuffer(data, np.float32, n).reshape(shape)
    if kind == 1:
        return np.frombuffer(data, np.float16, n).reshape(shape).astype(np.float32)
    if kind == 30:
        words = np.frombuffer(data, np.uint16, n).astype(np.uint32) << 16
        return words.view(np.float32).reshape(shape)
    size = {2: 18, 8: 34}[kind]
    blocks = np.frombuffer(data, np.uint8, n // 32 * size).reshape(-1, size)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    if kind == 8:
        return (scale * blocks[:, 2:].view(np.int8)).reshape(shape).astype(np.float32)
    codes = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1).astype(np.float32)
    return (scale * (codes - 8)).reshape(shape)


def dense(folder: Path, module: str) -> np.ndarray:
    directory = open_model_directory(folder)
    arrays, form = directory.arrays(), directory.config.quant_format(module)
    weight = arrays[f"{module}.weight"]
    if form is not None and f"{module}.scales" in arrays:
        weight = mx.dequantize(
            weight, arrays[f"{module}.scales"].astype(mx.float32),
            arrays[f"{module}.biases"].astype(mx.float32),
            group_size=form.group_size, bits=form.bits,
        )  # fmt: skip
    return np.array(weight.astype(mx.float32))


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_gguf_holds_the_same_weights(small: Mapping[int, Path], bits: int, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    directory = open_model_directory(small[bits])
    path = write_gguf(directory, tmp_path / "m.gguf", lambda *done: told.append(done))
    metadata, tensors = read_gguf(path)
    assert metadata["llama.rope.freq_base"] == 500000.0
    assert metadata["llama.attention.head_count_kv"] == 2
    assert metadata["llama.vocab_size"] == 700
    assert len(tensors) == 1 + 9 * 2 + 1 + 1  # the output is the embedding; RoPE's factors
    assert 0 < told[-1][0] <= told[-1][1]

    def assert_near(name: str, expected: np.ndarray) -> None:
        found = tensors[name]
        assert found.shape == expected.shape
        if bits == 16:
            assert (found == expected).all()
            return
        # Half a step, and what float16 rounds the scale by, over 127 steps; 4 bits end at 7 on one
        # side, which costs a whole step.
        largest = np.abs(expected.reshape(-1, 32)).max(axis=1, keepdims=True)
        step = largest / (8 if bits == 4 else 127)
        off = np.abs(found - expected).reshape(-1, 32)
        assert (off <= step * (1.01 if bits == 4 else 0.57) + 1e-6).all()

    assert_near("token_embd.weight", dense(small[bits], "model.embed_tokens"))
    assert_near("blk.1.ffn_down.weight", dense(small[bits], "model.layers.1.mlp.down_proj"))
    norm = dense(small[bits], "model.layers.1.input_layernorm")
    assert (tensors["blk.1.attn_norm.weight"] == norm).all()
    for name, module, heads in (("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2)):
        halves = dense(small[bits], f"model.layers.0.self_attn.{module}").reshape(heads, 2, 16, 128)
        adjacent = np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(heads * 32, 128)
        assert_near(f"blk.0.{name}.weight", adjacent)


def test_gguf_of_bits_without_a_counterpart_is_refused(tmp_path: Path) -> None:
    folder = write_random_model(tmp_path / "3", with_bits(small_shape(), 3))
    with pytest.raises(OptionError, match=r"3 bits, group 64, only 4 and 8.*--peer-model"):
        write_gguf(open_model_directory(folder), tmp_path / "m.gguf")
