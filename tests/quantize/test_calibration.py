"""Walking through a model: what blocks read, scales that change nothing, going on, memory."""

from __future__ import annotations

import os
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_llama import ops
from mlx_llama.config import QuantFormat
from mlx_llama.options import ConvertOptions
from mlx_llama.weights import is_matrix
from mlx_llama_convert import SourceModel, open_source
from mlx_llama_quantize import awq, products, quantize_weights
from mlx_llama_quantize.calibration import Calibration, calibration_bytes
from mlx_llama_quantize.comparison import Comparison
from mlx_llama_quantize.subject import Subject
from mlx_llama_quantize.texts import Text
from mlx_llama_quantize.walk_record import forget_stale
from mlx_llama_quantize.windows import cut_windows
from model_folders import TINY, write_hf, write_meta
from random_models import random_model

TEXT = Text("words", "the thing in hello world end " * 40)
FORM = QuantFormat(4, 32)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceModel:
    return open_source(write_meta(tmp_path_factory.mktemp("walked") / "meta"), ConvertOptions())


def walk(source: SourceModel, folder: Path, method: str) -> Calibration:
    forms = {n: FORM if is_matrix(n) else None for n in source.weights.names()}
    return Calibration(source.weights, source.tokenizer, forms, method, TEXT, folder)


def test_hessian_is_that_of_what_the_layer_reads(
    source: SourceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first layer's attention: the embedding's rows, unpacked, normed; NumPy's own."""
    seen: list[dict[str, np.ndarray]] = []
    fold = Calibration._fold

    def watching(self: Calibration, index: int, hessians: dict[str, np.ndarray]) -> None:
        seen.append({place: hessian.copy() for place, hessian in hessians.items()})
        fold(self, index, hessians)

    monkeypatch.setattr(Calibration, "_fold", watching)
    calibration = walk(source, tmp_path, "awq")
    calibration.forms = {**calibration.forms, "tok_embeddings.weight": None}
    calibration.run()
    weights, raw = random_model(TINY)
    x = weights["model.embed_tokens.weight"][calibration.windows.ravel()].astype(np.float64)
    x /= np.sqrt((x**2).mean(axis=1, keepdims=True) + raw["rms_norm_eps"])
    x *= weights["model.layers.0.input_layernorm.weight"]
    expected = x.T @ x
    assert np.abs(seen[0]["attention"] - expected).max() < 1e-4 * np.abs(expected).max()
    assert [h.shape[0] for h in seen[1].values()] == [128, 128, 128, weights[
        "model.layers.0.mlp.down_proj.weight"
    ].shape[1]]  # fmt: skip


def test_folded_scales_change_nothing_but_rounding(source: SourceModel, tmp_path: Path) -> None:
    calibrated = walk(source, tmp_path, "awq").run()
    name = "layers.0.feed_forward.w2.weight"
    assert not np.allclose(calibrated.weights.read(name), source.weights.read(name), rtol=0.05)
    windows = cut_windows([n * 7 % 300 for n in range(96)], bos_id=1, context=32)
    a, b = (
        Subject.of_weights(str(n), weights, source.tokenizer, source.files)
        for n, weights in enumerate((source.weights, calibrated.weights))
    )
    scores = Comparison(a, b, windows).run()
    assert scores.kld.max() < 1e-6
    assert scores.same_top.all()


def test_walks_that_nobody_takes_up_are_removed(tmp_path: Path) -> None:
    long_ago, lately = time.time() - 31 * 86400, time.time() - 86400
    for name, file, changed in (
        ("old", "block-0.safetensors", long_ago),
        ("new", "block-0.safetensors", lately),
        ("another", "notes.txt", long_ago),
    ):
        (tmp_path / name).mkdir()
        path = tmp_path / name / file
        path.write_bytes(b"")
        for each in (path, path.parent):
            os.utime(each, (changed, changed))
    forget_stale(tmp_path)
    forget_stale(tmp_path / "none")
    assert {path.name for path in tmp_path.iterdir()} == {"new", "another"}


def test_folded_rows_are_those_of_the_whole(source: SourceModel, tmp_path: Path) -> None:
    weights = walk(source, tmp_path, "awq").run().weights
    for name in weights.names():
        whole = np.array(weights.read(name))
        np.testing.assert_array_equal(np.array(weights.read(name, slice(3, 29))), whole[3:29])


def test_heads_of_one_value_share_its_scales() -> None:
    random = np.random.default_rng(1)
    x = random.standard_normal((256, 4 * 16)) * np.exp(random.standard_normal(4 * 16))
    weight = random.standard_normal((32, 64)).astype(np.float32)
    hessian = (x.T @ x).astype(np.float32)
    scales = awq.find_scales([(weight, FORM)], hessian, mx.float32, shared=2, width=16)
    runs = scales.reshape(2, 2, 16)
    np.testing.assert_array_equal(runs[:, 0], runs[:, 1])
    assert scales.std() > 0


def test_norms_take_scales_up_exactly() -> None:
    norm = mx.array([1.0, -0.5, 0.0, 3.0]).astype(mx.bfloat16)
    scales = awq.foldable(norm, np.array([3.0, 0.7, 5.0, 1e-3], np.float32))
    stored = (norm.astype(mx.float32) / mx.array(scales)).astype(mx.bfloat16)
    back = np.array(stored.astype(mx.float32)) * scales
    np.testing.assert_allclose(back, np.array(norm.astype(mx.float32)), rtol=1e-6)


@pytest.mark.parametrize("method", ["gptq", "awq", "awq+gptq"])
def test_stopped_walk_goes_on_to_the_same_bytes(
    source: SourceModel, tmp_path: Path, method: str
) -> None:
    def packed(calibration: Calibration) -> dict[str, list[np.ndarray]]:
        calibrated = calibration.run()
        pieces: dict[str, list[np.ndarray]] = {}
        for name, array in quantize_weights(
            calibrated.weights, calibration.forms, dtype=None, n_threads=2, method="mse",
            ready=calibrated,
        ):  # fmt: skip
            pieces.setdefault(name, []).append(np.array(array))
        return pieces

    whole = packed(walk(source, tmp_path / "whole", method))
    seen: list[int] = []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        if done == total:  # in the second of two blocks
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        walk(source, tmp_path / "parts", method).run(on_progress=stop)
    again = walk(source, tmp_path / "parts", method)
    seen.clear()
    again.run(on_progress=lambda done, total: seen.append(done))
    n_windows = len(again.windows)
    assert seen == list(range(n_windows + 1, 2 * n_windows + 1))
    found = packed(again)
    assert whole.keys() == found.keys()
    for name, arrays in whole.items():
        for a, b in zip(arrays, found[name], strict=True):
            np.testing.assert_array_equal(a, b)
    again.forget()
    assert not (tmp_path / "parts").exists()


def test_output_is_packed_by_what_it_reads(source: SourceModel, tmp_path: Path) -> None:
    calibrated = walk(source, tmp_path, "gptq").run()
    assert "tok_embeddings.weight" not in calibrated.ready  # this one is not tied
    arrays = calibrated.read("output.weight")
    exact = source.weights.read("output.weight")
    nearest = mx.quantize(exact, group_size=32, bits=4)
    found = mx.dequantize(*(arrays[p] for p in ("weight", "scales", "biases")), group_size=32)
    assert found.shape == exact.shape
    assert not np.array_equal(np.array(arrays["weight"]), np.array(nearest[0]))
    assert float(mx.linalg.norm(found - exact) / mx.linalg.norm(exact)) < 0.2


def test_damaged_state_is_walked_anew(source: SourceModel, tmp_path: Path) -> None:
    calibration = walk(source, tmp_path, "gptq")
    calibration.run()
    (tmp_path / "behind-1.safetensors").write_bytes(b"cut")
    seen: list[int] = []
    walk(source, tmp_path, "gptq").run(on_progress=lambda done, total: seen.append(done))
    assert len(seen) == 2 * len(calibration.windows)


def test_memory_does_not_grow_with_layers(tmp_path: Path) -> None:
    """Four layers more take less than one of them would, in float32.

    Without the native kernels MLX allocates ahead of what it computes, by as much as threads race.
    """
    peaks: list[int] = []
    for n_layers in (2, 6):
        case = TINY.__class__(7, 2, 1, 64, 5e5, dim=128, n_layers=n_layers, vocab_size=320)
        source = open_source(write_hf(tmp_path / f"{n_layers}", case), ConvertOptions())
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        walk(source, tmp_path / f"walk-{n_layers}", "gptq").run()
        peaks.append(mx.get_peak_memory() - before)
        assert peaks[-1] < calibration_bytes(source.weights, "gptq")
    block = 4 * case.dim * (2 * 128 + 2 * 64 + 3 * source.config.hidden_dim)
    assert peaks[1] - peaks[0] < block * (3 if ops.runs_ahead() else 1)


def test_moments_are_those_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """In slabs of which the last one is short; against one product in float64."""
    monkeypatch.setattr(products, "SLAB", 48)
    x = np.random.default_rng(3).normal(size=(3, 7, 160)).astype(np.float32)
    moments = products.Moments()
    for window in x:
        moments.add(mx.array(window[None]))
    rows = x.reshape(-1, 160).astype(np.float64)
    np.testing.assert_allclose(moments.taken(), rows.T @ rows, rtol=1e-4, atol=1e-4)
