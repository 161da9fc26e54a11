"""What `mlx-llama bench --activations int8` says that it costs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlx_llama
from bench_peer import peer
from divergence_oracle import oracle
from mlx_llama import native
from mlx_llama.cache import KVBits
from mlx_llama.config import QuantFormat
from mlx_llama_apps.bench import machine, rounding
from mlx_llama_apps.main import main
from mlx_llama_quantize.texts import CERTIFICATE, shipped
from tiny_models import write_model

pytestmark = pytest.mark.skipif(
    not native.takes_bytes(QuantFormat(4, 64)), reason="no kernels here round activations"
)
FEW = ["--prompt", "8", "--generate", "4", "--repetitions", "1", "--depth", "0"]
ROUNDED = [*FEW, "--activations", "int8"]
SUMS = 2e-5  # of logarithms in float32, by two ways through the model


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "measured_bandwidth", lambda **_: 1e9)
    monkeypatch.setattr(rounding, "MOST_TOKENS", 100)
    monkeypatch.setattr(rounding, "CONTEXT", 40)


@pytest.fixture
def packed_model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "packed", bits=4, quantize=True)


def found_by(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["bench", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_holds_the_divergence_and_the_text(
    packed_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = found_by([str(packed_model), *ROUNDED], capsys)
    assert found["model"]["activations"] == "int8"
    assert "activations in 8 bits" in found["machine"]["kernels"]
    cost = found["rounding"]
    assert cost["text"] == "mlx-llama's certificate.txt"
    assert cost["n_tokens"] == 2 * 19  # two windows of 40; of each second half all but the last
    assert 0 < cost["kld"]["mean"]["value"] < 1e-2
    assert 0.5 < cost["same_top"]["value"] <= 1


def test_floats_are_not_compared_with_themselves(
    packed_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = found_by([str(packed_model), *FEW], capsys)
    assert found["rounding"] is None
    assert found["model"]["activations"] == "float32"


def test_scores_are_those_of_whole_texts(packed_model: Path) -> None:
    """Perplexity with float activations, from logits of whole windows in NumPy."""
    llama = mlx_llama.load(packed_model, activations="int8")
    windows: list[tuple[int, int]] = []
    cost = rounding.measure_cost(llama, KVBits(32, 32), lambda *which: windows.append(which))
    assert windows == [(1, 2), (2, 2)]
    llama = mlx_llama.load(packed_model)
    ids = llama.tokenizer.encode(shipped(CERTIFICATE).content)[:80]
    losses: list[np.ndarray] = []
    for first in (0, 40):
        window = [llama.tokenizer.bos_id, *ids[first + 1 : first + 40]]
        scores = np.array(llama.logits(window))[20:39, : llama.tokenizer.vocab_size]
        losses.append(oracle(scores, scores, np.array(window[21:])).nll_a)
    assert np.log(cost.divergence.ppl_a.value) == pytest.approx(np.mean(losses), abs=SUMS)
    assert cost.divergence.ppl_b.value != cost.divergence.ppl_a.value


def test_both_sides_go_the_same_way(packed_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without rounding nothing differs, to the last bit; the model itself still rounds."""
    monkeypatch.setattr(rounding, "INT8", "float32")
    llama = mlx_llama.load(packed_model, activations="int8")
    rounded = np.array(llama.logits([1, 2, 3]))
    cost = rounding.measure_cost(llama, KVBits(), lambda *_: None)
    assert cost.divergence.kld.maximum == 0
    assert cost.divergence.same_top.value == 1
    assert (np.array(llama.logits([1, 2, 3])) == rounded).all()


def test_the_caches_are_of_the_bits_asked_for(packed_model: Path) -> None:
    llama = mlx_llama.load(packed_model, activations="int8")
    found = [
        rounding.measure_cost(llama, bits, lambda *_: None).divergence.ppl_a.value
        for bits in (KVBits(32, 32), KVBits())
    ]
    assert len(set(found)) == len(found)
    assert found == pytest.approx([found[0]] * len(found), rel=0.05)


@pytest.mark.parametrize("form", [[], ["--markdown"]])
def test_the_table_says_it_in_a_line_beside_a_peer_too(
    form: list[str], packed_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beside = ["--against", "mlx-lm", "--peer", peer(tmp_path)]
    assert main(["bench", str(packed_model), *ROUNDED, *beside, *form]) == 0
    out = capsys.readouterr().out
    line = r"^activations in 8 bits: mean KL divergence \d\.\de-\d\d ± \de-\d\d from float32, "
    assert re.search(line + r"same .* of 38 positions \(mlx-llama's certificate", out, re.MULTILINE)
    assert "ratio" in out


def test_random_weights_are_said_to_tell_little(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--shape", "15m", *ROUNDED]) == 0
    assert "of random weights, which says little" in capsys.readouterr().out
