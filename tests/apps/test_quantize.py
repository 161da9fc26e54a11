"""`mlx-llama quantize`: formats, overrides, refusals; what is written loads."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_llama import load
from mlx_llama_apps.main import main
from tiny_models import write_meta


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_meta(tmp_path_factory.mktemp("quantize") / "tiny")


def arrays(folder: Path) -> dict[str, mx.array]:
    return mx.load(str(folder / "model.safetensors"))  # pyright: ignore


def test_rounding_to_nearest_is_what_convert_writes(source: Path, tmp_path: Path) -> None:
    asked = [str(source), "--bits", "4", "--group-size", "32"]
    assert main(["convert", *asked, "-o", str(tmp_path / "a")]) == 0
    assert main(["quantize", *asked, "-o", str(tmp_path / "b"), "--method", "rtn"]) == 0
    assert main(["quantize", *asked, "-o", str(tmp_path / "c")]) == 0
    a, b, c = (arrays(tmp_path / name) for name in "abc")
    assert all(np.array_equal(np.array(a[n]), np.array(b[n])) for n in a)
    assert any(not np.array_equal(np.array(a[n]), np.array(c[n])) for n in a)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_every_mode_loads_and_speaks(source: Path, tmp_path: Path, mode: str) -> None:
    assert main(["quantize", str(source), "-o", str(tmp_path / "out"), "--mode", mode]) == 0
    llama = load(tmp_path / "out")
    assert np.isfinite(np.array(llama.logits([1, 5, 9]))).all()
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_overrides_stand_in_the_plan_and_the_configuration(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--override", "head=8", "--override", "layers.0.attention.*=6:32"]
    asked += ["--override", "embedding=dense"]
    out = tmp_path / "out"
    assert main(["quantize", str(source), "-o", str(out), *asked]) == 0
    plan = capsys.readouterr().err
    for line in (
        "attention: 4 × 6 bits, group 32, 4 × 4 bits, group 64",
        "feed-forward: 6 × 4 bits, group 64",
        "embedding: 1 × float32",
        "head: 1 × 8 bits, group 64",
        "norms: never packed",
    ):
        assert line in plan
    entry = json.loads((out / "config.json").read_text())["quantization"]
    assert entry["lm_head"] == {"group_size": 64, "bits": 8, "mode": "affine"}
    assert entry["model.embed_tokens"] is False
    assert entry["model.layers.0.self_attn.v_proj"]["bits"] == 6
    assert "model.layers.1.self_attn.v_proj" not in entry
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["method"] == "mse"
    assert manifest["policy"]["head"] == {"8 bits, group 64": 1}


def test_requantizing_is_refused_unless_allowed(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    once, again = tmp_path / "once", tmp_path / "again"
    assert main(["quantize", str(source), "-o", str(once), "--bits", "8"]) == 0
    assert main(["quantize", str(once), "-o", str(again)]) == 1
    assert "already quantized with MLX" in capsys.readouterr().err
    asked = ["--allow-requantize", "--bits", "4", "--override", "*.w3=mxfp8"]
    assert main(["quantize", str(once), "-o", str(again), *asked]) == 0
    assert "its errors stay" in capsys.readouterr().err
    a, b = (np.array(load(folder).logits([1, 5, 9])) for folder in (once, again))
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.9


@pytest.mark.parametrize(
    ("asked", "code", "text"),
    [
        (["--override", "norm=8"], 2, "--override norm: means no matrix"),
        (["--override", "head=7"], 2, "expected bits of"),
        (["--mode", "mxfp4", "--bits", "8"], 2, "mode mxfp4 has 4"),
        (["--mode", "mxfp4", "--method", "mse"], 2, "take --method rtn"),
        (["--method", "best"], 2, "expected one of rtn, mse"),
        (["--mode", "int4"], 2, "expected one of affine"),
    ],
)
def test_what_cannot_be_is_refused(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    asked: list[str],
    code: int,
    text: str,
) -> None:
    assert main(["quantize", str(source), "-o", str(tmp_path / "out"), *asked]) == code
    assert text in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
