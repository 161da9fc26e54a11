"""Weights that are damaged, or far from any that training gives: what is written stays readable."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_llama.config import QuantFormat
from mlx_llama_apps.main import main
from mlx_llama_quantize import plots
from mlx_llama_quantize.divergence import TokenScores
from tiny_models import write_meta, write_model

W1 = "layers.0.feed_forward.w1.weight"
V = "layers.0.attention.wv.weight"
SIZE = ["--target-bpw", "4.5"]
ODD = np.array([0.0, 1e-3, np.inf, -np.inf, np.nan])


def strict(text: str) -> Any:
    """Read JSON as a reader does that knows no Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose logits are so large that perplexities are beyond every number."""
    return write_meta(tmp_path_factory.mktemp("loud") / "loud", factors={"output.weight": 1e5})


def test_a_loss_beyond_every_number_is_written_as_null(
    loud: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["quantize", str(loud), "-o", str(out)]) == 0
    manifest = strict((out / "manifest.json").read_text())
    assert manifest["certificate"]["divergence"]["ppl_b"]["value"] is None
    assert main(["verify", str(out)]) == 0
    assert main(["show", str(out)]) == 0
    assert "Warning" not in capfd.readouterr().err


def test_compare_writes_null_and_no_warning(
    loud: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for bits in ("4", "8"):
        assert main(["convert", str(loud), "--bits", bits, "-o", str(tmp_path / bits)]) == 0
    text = tmp_path / "text.txt"
    text.write_text("The cache holds the keys and values of the tokens so far.\n" * 9)
    asked = ["compare", str(tmp_path / "8"), str(tmp_path / "4"), "--text", str(text)]
    asked += ["--context", "64", "--no-costs", "--plot", str(tmp_path / "plot.svg")]
    capfd.readouterr()
    assert main([*asked, "--json"]) == 0
    captured = capfd.readouterr()
    assert strict(captured.out)["divergence"]["ppl_a"]["value"] is None
    assert "Warning" not in captured.err
    assert main(asked) == 0


def test_run_writes_null_for_what_is_no_logarithm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "inf", factors={"output.weight": math.inf})
    assert main(["run", str(model), "Hi", "--json", "--temperature", "0", "--max-tokens", "2"]) == 0
    assert None in strict(capsys.readouterr().out)["logprobs"]


@pytest.mark.parametrize("factor", [math.nan, math.inf])
@pytest.mark.parametrize(
    "command", [["convert"], ["quantize"], ["quantize", *SIZE], ["quantize", "--method", "auto"]]
)
def test_weights_that_are_no_numbers_are_not_packed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], factor: float, command: list[str]
) -> None:
    source, out = write_meta(tmp_path / "bad", factors={W1: factor}), tmp_path / "out"
    assert main([*command, str(source), "-o", str(out), "--quiet"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"tensor {W1}: holds values that are no numbers" in line
    assert not out.exists()
    assert not list(tmp_path.glob("*.partial"))
    assert main(["convert", str(source), "--no-quantize", "-o", str(out)]) == 0


@pytest.mark.parametrize(("factor", "code"), [(1e31, 0), (1e38, 1)])
def test_large_weights_get_a_size_or_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], factor: float, code: int
) -> None:
    """Squares of weights near 1e30 are infinite: a division by zero ended the command."""
    source, out = write_meta(tmp_path / "large", factors={V: factor}), tmp_path / "out"
    options = ["--group-size", "64", "--no-report", "--quiet"]
    assert main(["quantize", *SIZE, *options, str(source), "-o", str(out)]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == code
    assert all("2 bits lose is no number" in line for line in lines)
    assert out.exists() == (code == 0)


def test_a_picture_has_a_place_for_everything(tmp_path: Path) -> None:
    """No matrix measured above 0, or one without end, ended a run of hours at its last step."""
    odd = ODD.astype(np.float32)
    scores = TokenScores(odd, odd, odd, odd, odd > 0)
    plots.draw_certificate(tmp_path / "a.svg", scores, {"layer 0": math.nan, "output": 1.0}, "odd")
    costs = {str(n): (float(x), QuantFormat(4, 64)) for n, x in enumerate(ODD)}
    plots.draw_sensitivities(tmp_path / "b.svg", costs, "odd")
    assert {path.name for path in tmp_path.iterdir()} >= {"a.svg", "b.svg"}


def test_a_picture_that_fails_ends_nothing() -> None:
    def fails() -> None:
        raise ValueError("Data cannot be log-scaled")

    assert not plots.drawn(fails)
    assert plots.drawn(lambda: None)


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (["*=4", "--target-bpw", "5.05166476"], "--override leaves no matrix to choose bits for"),
        (["*=dense", "--target-bpw", "4.5"], "--override: leaves every matrix as it is"),
        (["*=dense"], "--override: leaves every matrix as it is"),
    ],
)
def test_nothing_to_choose_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: list[str], text: str
) -> None:
    source = write_meta(tmp_path / "tiny")
    assert main(["quantize", str(source), "-o", str(tmp_path / "out"), "--override", *asked]) == 2
    assert text in capsys.readouterr().err
