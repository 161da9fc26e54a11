"""The certificate's numbers and the memory that it takes."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_llama.loading import open_model_directory
from mlx_llama.options import ConvertOptions
from mlx_llama_convert import open_source
from mlx_llama_quantize import certificate as module
from mlx_llama_quantize import comparison, products
from mlx_llama_quantize.certificate import Request, certificate_bytes, certify, weight_errors
from mlx_llama_quantize.subject import Subject
from mlx_llama_quantize.texts import Text
from model_folders import TINY, convert, write_meta
from numpy_llama import dequantized
from random_models import random_model

TEXT = Text("words", "the thing in hello world end " * 12)


def test_weight_errors_agree_with_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 7 * 128 * 4)  # several blocks, the last one short
    source = open_source(write_meta(tmp_path / "meta"), ConvertOptions())
    out = convert(tmp_path / "meta", tmp_path / "out", bits=4, group_size=32)
    found = {e.tensor: e for e in weight_errors(source.weights, open_model_directory(out))}
    weights, _ = random_model(TINY)
    arrays = {n: np.array(a) for n, a in mx.load(str(out / "model.safetensors")).items()}  # pyright: ignore
    assert len(found) == 16
    for tensor, module_name in (
        ("layers.1.attention.wk.weight", "model.layers.1.self_attn.k_proj"),
        ("layers.0.feed_forward.w2.weight", "model.layers.0.mlp.down_proj"),
        ("output.weight", "lm_head"),
    ):
        exact = weights[f"{module_name}.weight"].astype(np.float64)
        parts = (arrays[f"{module_name}.{part}"] for part in ("weight", "scales", "biases"))
        rest = dequantized(*parts, bits=4) - exact
        relative = np.sqrt((rest**2).sum() / (exact**2).sum())
        assert found[tensor].relative == pytest.approx(relative, rel=1e-4)
        assert found[tensor].largest == pytest.approx(np.abs(rest).max(), rel=1e-4)
        assert found[tensor].bits_per_weight == 4 + 2 * 32 / 32


def test_measuring_takes_no_more_than_its_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Walked by blocks: the ends, a block of each, states and a slice, not the models."""
    monkeypatch.setattr(comparison, "HIDDEN_BYTES", 1 << 20)
    monkeypatch.setattr(comparison, "SLICE_BYTES", 1 << 20)
    monkeypatch.setattr(module, "HIDDEN_BYTES", 1 << 20)
    monkeypatch.setattr(module, "SLICE_BYTES", 1 << 20)
    monkeypatch.setattr(module, "BLOCK_BYTES", 1 << 20)
    monkeypatch.setattr(module, "UNPACKED_BYTES", 1 << 20)
    monkeypatch.setattr(products, "UNPACKED_BYTES", 1 << 20)
    case = TINY.__class__(7, 8, 2, 64, 5e5, dim=512, n_layers=12, vocab_size=TINY.vocab_size)
    source = open_source(write_meta(tmp_path / "meta", case), ConvertOptions())
    result = open_model_directory(convert(tmp_path / "meta", tmp_path / "out", bits=4))
    subject = Subject.of_weights("meta", source.weights, source.tokenizer, source.files)
    before = mx.get_active_memory()
    found, _ = certify(source.weights, subject, result, Request(TEXT))
    subjects = (subject, Subject.of_directory(result))
    bound = certificate_bytes(source.config, *(s.loaded_bytes(mx.float32) for s in subjects))
    assert found.peak_bytes - before < bound < subject.loaded_bytes(mx.float32)


def test_time_counts_the_parts_before_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was that of the last part alone; here a window takes a second in every block."""
    monkeypatch.setattr(comparison, "HIDDEN_BYTES", 1)  # windows go through the blocks one by one
    monkeypatch.setattr(module, "CONTEXT", 32)
    now, stop_at = 0.0, 1.0
    for each in (module, comparison):
        monkeypatch.setattr(each, "perf_counter", lambda: now)

    def tick(done: int, total: int) -> None:
        nonlocal now
        now += 1.0
        if done > stop_at * total:
            raise KeyboardInterrupt

    source = open_source(write_meta(tmp_path / "meta"), ConvertOptions())
    result = open_model_directory(convert(tmp_path / "meta", tmp_path / "out", bits=4))
    subject = Subject.of_weights("meta", source.weights, source.tokenizer, source.files)
    request = Request(TEXT, tmp_path / "certificates", tick)
    whole, _ = certify(source.weights, subject, result, request)
    assert whole.elapsed_s == now
    stop_at = 0.4
    with pytest.raises(KeyboardInterrupt):
        certify(source.weights, subject, result, request)
    stop_at = 0.8
    with pytest.raises(KeyboardInterrupt):
        certify(source.weights, subject, result, request)
    stop_at = 1.0
    found, _ = certify(source.weights, subject, result, request)
    assert found.elapsed_s == whole.elapsed_s
    assert found.divergence == whole.divergence
