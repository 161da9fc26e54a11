from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_llama
from mlx_llama.errors import CheckpointError
from mlx_llama.options import ConvertOptions
from mlx_llama_convert import convert_checkpoint, make_plan, open_source, verification
from mlx_llama_convert.source import CheckpointWeights
from mlx_llama_convert.verification import check_directory, compare_weights
from tiny_models import convert, write_meta


@pytest.mark.parametrize("block_bytes", [1, 5000, 1 << 25])
@pytest.mark.parametrize(("bits", "tied"), [(None, False), (8, False), (4, True)])
def test_numbers_are_those_of_two_loaded_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int, bits: int | None, tied: bool
) -> None:
    monkeypatch.setattr(verification, "BLOCK_BYTES", block_bytes)
    meta = write_meta(tmp_path / "m", is_tiktoken=True, tied=tied)
    plain = convert(meta, tmp_path / "plain", quantize=False)
    out = convert(meta, tmp_path / "out", bits=bits) if bits else plain
    result = compare_weights(open_source(meta, ConvertOptions()), out)
    first, second = mlx_llama.load(plain), mlx_llama.load(out)
    ids = (first.tokenizer.encode(verification.TEXT, bos=True) * 32)[:32]
    p, q = (np.array(m.logits(ids), dtype=np.float64) for m in (first, second))
    assert result.tokens == 32
    assert result.same_top == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    if bits is None:
        assert (result.same_top, result.mean_kl, result.largest_difference) == (1.0, 0.0, 0.0)
    else:
        assert result.largest_difference == pytest.approx(np.abs(p - q).max(), rel=5e-3)
        assert 0 < result.mean_kl < 1


def test_wrong_rows_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading wq and wk in the wrong row order gives another model: the check must see it."""
    meta = write_meta(tmp_path / "m", is_tiktoken=True)
    out = convert(meta, tmp_path / "out", quantize=False)
    source = open_source(meta, ConvertOptions())
    monkeypatch.setattr(source.weights, "_is_interleaved", False)
    with pytest.raises(CheckpointError, match="logits differ"):
        compare_weights(source, out)


def test_failing_verification_leaves_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = write_meta(tmp_path / "m", is_tiktoken=True)
    options = ConvertOptions(quantize=False)
    plan = make_plan(open_source(meta, options), options)
    read = CheckpointWeights.read
    calls: dict[str, int] = {}

    def failing(self: CheckpointWeights, name: str, rows: slice | None = None) -> mx.array:
        calls[name] = calls.get(name, 0) + 1
        values = read(self, name, rows)
        is_bad = name.endswith("w2.weight") and calls[name] == 1
        return values + 1.0 if is_bad else values

    monkeypatch.setattr(CheckpointWeights, "read", failing)
    with pytest.raises(CheckpointError, match="expected none without quantization"):
        convert_checkpoint(plan, tmp_path / "out", n_threads=1, verify=True)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_manifest_and_card_record_it(tmp_path: Path) -> None:
    meta = write_meta(tmp_path / "m", is_tiktoken=True)
    (meta / "LICENSE").write_text("terms")
    options = ConvertOptions(bits=8)
    plan = make_plan(open_source(meta, options), options)
    convert_checkpoint(plan, tmp_path / "out", n_threads=1, verify=True)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["verification"]["tokens"] == 32
    assert manifest["verification"]["same_top"] > 0.8
    card = (tmp_path / "out" / "README.md").read_text()
    assert "32 tokens through the source's weights" in card
    assert (tmp_path / "out" / "LICENSE").read_text() == "terms"


def test_directory_is_checked_against_its_manifest(tmp_path: Path) -> None:
    out = convert(write_meta(tmp_path / "m"), tmp_path / "out")
    names = check_directory(out)
    assert names == sorted(p.name for p in out.iterdir() if p.name != "manifest.json")
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: SHA-256 is"):
        check_directory(out)
    (out / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        check_directory(out)


def test_added_weights_are_seen(tmp_path: Path) -> None:
    out = convert(write_meta(tmp_path / "m"), tmp_path / "out")
    (out / "model-extra.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="added later"):
        check_directory(out)


@pytest.mark.parametrize("files", [None, [], {"../m/params.json": {"sha256": ""}}, {"a": 1}])
def test_forged_manifest_is_refused(tmp_path: Path, files: object) -> None:
    out = convert(write_meta(tmp_path / "m"), tmp_path / "out")
    (out / "manifest.json").write_text(json.dumps({"files": files}))
    with pytest.raises(CheckpointError, match="manifest"):
        check_directory(out)
