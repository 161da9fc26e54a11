"""What is trained in PyTorch is what the program runs; skipped where torch is not installed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import mlx_llama
from mlx_llama_apps.main import main
from training.dialogs import Guide
from training.tokenizer import train_tokenizer

LOGIT_TOLERANCE = 2e-3  # float32 on both sides, of weights that were rounded to bfloat16


def test_a_written_checkpoint_gives_torchs_logits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch = pytest.importorskip("torch")
    from training.model import Shape
    from training.train import load, open_run, write_checkpoint

    folder = tmp_path / "Llama-3.1-Trial-Instruct"
    folder.mkdir()
    train_tokenizer(folder / "tokenizer.model", Guide(), seed=1, n_turns=2000)
    n_tokens = len((folder / "tokenizer.model").read_text().splitlines()) + 256
    torch.manual_seed(1)
    run = open_run(folder, Shape(n_tokens, dim=128, n_layers=2, n_heads=2, n_kv_heads=1))
    for weight in run.model.parameters():
        weight.data.mul_(4 if weight.ndim == 2 else 1)  # far from uniform predictions
    write_checkpoint(run)
    out = tmp_path / "model"
    assert main(["convert", str(folder), "-o", str(out), "--no-quantize", "--quiet"]) == 0
    capsys.readouterr()
    assert json.loads((out / "config.json").read_text())["rope_scaling"]["factor"] == 8.0
    llama = mlx_llama.load(out, dtype="float32")
    assert llama.kind.name == "llama3.1-instruct"
    ids = list(np.random.default_rng(0).integers(0, n_tokens, 300))
    ids = [int(i) for i in ids]
    with torch.no_grad():
        expected = load(folder)(torch.tensor([ids]))[0].numpy()
    assert expected.std() > 0.1
    np.testing.assert_allclose(np.array(llama.logits(ids)), expected, atol=LOGIT_TOLERANCE)


def test_a_run_is_taken_up_and_a_student_learns_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch = pytest.importorskip("torch")
    from training import train

    monkeypatch.setattr(train, "N_PROBES", 4)
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    teacher.mkdir()
    train_tokenizer(teacher / "tokenizer.model", Guide(), seed=1, n_turns=2000)

    def run(folder: Path, steps: int, *more: object) -> int:
        arguments = [folder, "--steps", steps, "--batch-tokens", 128, *more]
        monkeypatch.setattr("sys.argv", ["train", *map(str, arguments)])
        train.main()
        return torch.load(folder / "state.pt", weights_only=True)["step"]

    assert run(teacher, 2) == 2
    assert run(teacher, 3) == 3
    assert run(student, 2, "--distill", teacher) == 2
    err = capsys.readouterr().err
    assert "vocabulary 2304, step 2" in err
    assert "held-out answers right" in err
    for folder in (teacher, student):
        names = {path.name for path in folder.iterdir()}
        wanted = {"consolidated.00.pth", "params.json", "tokenizer.model", "checklist.chk"}
        assert names >= wanted | {"curve.svg", "taught.json"}
    count, other = (
        sum(weight.numel() for weight in train.load(folder).parameters())
        for folder in (teacher, student)
    )
    assert 0.15 < other / count < 0.35
