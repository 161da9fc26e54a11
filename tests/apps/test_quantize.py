"""`mlx-llama quantize`: formats, overrides, refusals; what is written loads."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import mlx.core as mx
import numpy as np
import pytest

from mlx_llama import load
from mlx_llama.errors import CheckpointError
from mlx_llama.weights import hf_module
from mlx_llama_apps.main import main
from mlx_llama_quantize import plots
from mlx_llama_quantize.calibration import Calibration
from mlx_llama_quantize.comparison import Comparison
from mlx_llama_quantize.texts import CALIBRATION, CERTIFICATE, read_text, shipped
from mlx_llama_quantize.variants import VariantWalk
from shared_data import shared
from tiny_models import write_meta


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_meta(tmp_path_factory.mktemp("quantize") / "tiny")


def arrays(folder: Path) -> dict[str, mx.array]:
    return mx.load(str(folder / "model.safetensors"))  # pyright: ignore


def quantize(source: Path, out: Path, *asked: str) -> int:
    return main(["quantize", str(source), "-o", str(out), "--no-report", *asked])


def test_rounding_to_nearest_is_what_convert_writes(source: Path, tmp_path: Path) -> None:
    asked = [str(source), "--bits", "4", "--group-size", "32"]
    assert main(["convert", *asked, "-o", str(tmp_path / "a")]) == 0
    assert quantize(source, tmp_path / "b", *asked[1:], "--method", "rtn") == 0
    assert quantize(source, tmp_path / "c", *asked[1:]) == 0
    a, b, c = (arrays(tmp_path / name) for name in "abc")
    assert all(np.array_equal(np.array(a[n]), np.array(b[n])) for n in a)
    assert any(not np.array_equal(np.array(a[n]), np.array(c[n])) for n in a)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_every_mode_loads_and_speaks(source: Path, tmp_path: Path, mode: str) -> None:
    assert quantize(source, tmp_path / "out", "--mode", mode) == 0
    llama = load(tmp_path / "out")
    assert np.isfinite(np.array(llama.logits([1, 5, 9]))).all()
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_overrides_stand_in_the_plan_and_the_configuration(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--override", "head=8", "--override", "layers.0.attention.*=6:32"]
    asked += ["--override", "embedding=dense"]
    out = tmp_path / "out"
    assert quantize(source, out, *asked) == 0
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
    assert quantize(source, once, "--bits", "8") == 0
    assert quantize(once, again) == 1
    assert "already quantized with MLX" in capsys.readouterr().err
    asked = ["--allow-requantize", "--bits", "4", "--override", "*.w3=mxfp8"]
    assert quantize(once, again, *asked) == 0
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
        (["--text", "a.txt"], 2, "--text: does nothing with --no-report"),
        (["--calibration", "a.txt"], 2, "--calibration: does nothing with --method mse"),
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
    assert quantize(source, tmp_path / "out", *asked) == code
    assert text in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


# --- the certificate -----------------------------------------------------------------------------

TEXT = "the thing in hello world end " * 40


def test_certificate_is_what_compare_finds(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    out, plain = str(tmp_path / "out"), str(tmp_path / "plain")
    assert main(["quantize", str(source), "-o", out, "--text", str(text)]) == 0
    assert main(["convert", str(source), "-o", plain, "--no-quantize"]) == 0
    capsys.readouterr()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    found = manifest["certificate"]
    context = str(found["text"]["context"])
    asked = ["--text", str(text), "--context", context, "--json", "--no-costs"]
    assert main(["compare", plain, out, *asked, "--dtype", "float32"]) == 0
    compared = json.loads(capsys.readouterr().out)["divergence"]
    for name in ("kld", "dp"):
        mean = compared[name]["mean"]["value"]
        assert found["divergence"][name]["mean"]["value"] == pytest.approx(mean, rel=1e-5)
    assert found["divergence"]["n_tokens"] == compared["n_tokens"] == found["text"]["n_scored"]
    assert found["text"]["sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()
    assert found["dtype"] == "float32"
    assert found["elapsed_s"] > 0
    assert found["peak_bytes"] > 0
    assert len(found["weights"]) == 16
    assert found["weights"][0]["format"] == "4 bits, group 64"
    assert main(["verify", out]) == 0


def test_the_end_says_what_was_lost(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only how long it took was said."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    text = ["--text", str(tmp_path / "text.txt")]
    assert main(["quantize", str(source), "-o", str(tmp_path / "out"), *text]) == 0
    lost = capsys.readouterr().err.splitlines()[-1]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    names = ("mean KL divergence, nats", "same top token", "perplexity, this", "perplexity, source")
    kld, same, own, of_source = (re.findall(rf"\| {name} \| (.*) \|", card)[0] for name in names)
    assert lost == (
        f"lost      mean KL divergence {kld} nats, same top token {same}, perplexity {own} "
        f"(source {of_source}); more in {tmp_path / 'out' / 'README.md'}"
    )
    assert main(["quantize", str(source), "-o", str(tmp_path / "b"), *text, "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert quantize(source, tmp_path / "c") == 0
    assert "lost  " not in capsys.readouterr().err


def test_card_shows_the_certificate(source: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    text = ["--text", str(tmp_path / "text.txt")]
    assert main(["quantize", str(source), "-o", str(tmp_path / "out"), *text]) == 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for line in (
        r"Both models read text\.txt \(\d+ tokens in windows of \d+, \d+ of them scored, float32",
        r"\| mean KL divergence, nats \| [\d.]+ ± [\d.]+ \|",
        r"\| same top token \| [\d.]+ ± [\d.]+ % \|",
        r"!\[What was lost\]\(certificate\.svg\)",
        r"\| layer 1 \| \d+\.\d\d % \|",
    ):
        assert re.search(line, card), line
    root = ElementTree.parse(tmp_path / "out" / "certificate.svg").getroot()
    assert root.tag.endswith("svg")


def test_without_report_the_card_says_so(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "can_draw", lambda: False)
    assert quantize(source, tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "Predictions were not compared (`--no-report`)" in card
    assert "No picture: matplotlib was not installed" in card
    assert "| tok_embeddings |" in card
    assert not (tmp_path / "out" / "certificate.svg").exists()


def test_a_stopped_certificate_says_what_it_keeps_and_goes_on(
    source: Path,
    tmp_path: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """OUT.partial was left without a word."""
    (tmp_path / "text.txt").write_text(TEXT * 3, encoding="utf-8")
    asked = ["quantize", str(source), "-o", str(tmp_path / "out"), "--text"]
    asked += [str(tmp_path / "text.txt"), "--quiet"]
    score, seen = Comparison._score, []

    def stopping(self: Comparison, *given: Any) -> Any:
        seen.append(given[1])
        if len(seen) == 3:
            raise KeyboardInterrupt
        return score(self, *given)

    monkeypatch.setattr(Comparison, "_score", stopping)
    assert main(asked) == 130
    assert (tmp_path / "out.partial" / "model.safetensors").is_file()
    (scores,) = (home / "cache" / "certificates").iterdir()
    assert capsys.readouterr().err == (
        f"mlx-llama: stopped; what was compared is kept in {scores}; 1 finished file is kept in "
        f"{tmp_path / 'out.partial'}: the same command goes on from there\n"
    )
    assert main(asked) == 0
    assert seen[:4] == [0, 1, 2, 2]
    assert list((home / "cache" / "certificates").iterdir()) == []


def test_a_stopped_calibration_says_what_it_keeps(
    source: Path,
    tmp_path: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    asked = ["--method", "awq", "--calibration", str(tmp_path / "text.txt"), "--quiet"]
    block = Calibration._block

    def stopping(self: Calibration, model: Any, index: int, *given: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        block(self, model, index, *given)

    monkeypatch.setattr(Calibration, "_block", stopping)
    assert quantize(source, tmp_path / "out", *asked) == 130
    (kept,) = (home / "cache" / "calibrations").iterdir()
    assert capsys.readouterr().err == (
        f"mlx-llama: stopped; what was learned is kept in {kept}: the same command goes on from "
        "there\n"
    )
    assert not list(tmp_path.glob("out*"))


def test_calibration_loses_less_than_rounding(tmp_path: Path, home: Path) -> None:
    """Of stories260K, on a text that the method has not seen."""
    source = shared("checkpoints/stories260k")
    texts = {name: tmp_path / name for name in (CERTIFICATE, CALIBRATION)}
    for name, path in texts.items():
        path.write_text(shipped(name).content[:1500], encoding="utf-8")
    found: dict[str, float] = {}
    for method in ("rtn", "awq+gptq"):
        out = tmp_path / method
        asked = ["--group-size", "32", "--text", str(texts[CERTIFICATE]), "--quiet"]
        asked += ["--method", method]
        if method != "rtn":
            asked += ["--calibration", str(texts[CALIBRATION])]
        assert main(["quantize", str(source), "-o", str(out), *asked]) == 0
        manifest = json.loads((out / "manifest.json").read_text())
        found[method] = manifest["certificate"]["divergence"]["kld"]["mean"]["value"]
    assert found["awq+gptq"] < 0.9 * found["rtn"]
    assert manifest["calibration"]["name"] == CALIBRATION
    assert list((home / "cache" / "calibrations").iterdir()) == []


# --- a size -----------------------------------------------------------------------------------


def test_a_size_is_kept_and_explained(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    text = str(tmp_path / "text.txt")
    asked = ["--target-bpw", "4.5", "--calibration", text, "--text", text]
    out = tmp_path / "out"
    assert main(["quantize", str(source), "-o", str(out), *asked]) == 0
    printed = capsys.readouterr().err
    assert "bits and group of each are chosen by what it costs" in printed
    more = "measuring, trying formats, comparing"
    assert f"for packing alone (the time of {more} is told on the way)" in printed
    stages = ("measuring", "trying formats", "packing", "comparing")
    for number, stage in enumerate(stages, 1):  # nobody watches: a line for each
        name = f"{stage}, part {number} of 4"
        assert len(re.findall(rf"^{name}: \d+ %", printed, re.MULTILINE)) == 1
    assert re.search(r"^chosen    \d+ × \d bits", printed, re.MULTILINE)
    end = ", ".join(rf"{stage} [\d.]+ s" for stage in stages)
    assert re.search(rf"^done in [\d.]+ s: {end}$", printed, re.MULTILINE)
    assert "limited by" not in printed

    manifest = json.loads((out / "manifest.json").read_text())
    stored = sum(array.nbytes for array in arrays(out).values())
    assert 4 < 8 * stored / manifest["parameters"] <= 4.5
    assert manifest["weight_bytes"] == stored
    found = manifest["sensitivities"]
    assert found["target_bits_per_weight"] == 4.5
    assert len(found["tensors"]) == 16
    assert all(len(each["measured"]) == 2 for each in found["tensors"])
    assert found["expected_kld"] == pytest.approx(
        sum(each["expected_kld"] for each in found["tensors"])
    )
    entry = json.loads((out / "config.json").read_text())["quantization"]
    for each in found["tensors"]:
        own = entry.get(hf_module(each["tensor"]), entry)
        assert each["chosen"] == f"{own['bits']} bits, group {own['group_size']}"
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "## How bits were chosen" in card
    assert re.search(r"\| layers\.1\.feed_forward\.w2\.weight \| [\d.e-]+ \| [\d.e-]+ \| ", card)
    assert "![What packing costs](sensitivities.svg)" in card
    assert "Not compared with the source" not in card
    assert ElementTree.parse(out / "sensitivities.svg").getroot().tag.endswith("svg")
    assert np.isfinite(np.array(load(out).logits([1, 5, 9]))).all()

    def unwanted(*given: Any) -> None:
        raise AssertionError(f"measured again: {given}")

    monkeypatch.setattr(VariantWalk, "run", unwanted)
    again = ["quantize", str(source), "-o", str(tmp_path / "again"), *asked]
    assert main(again) == 0
    assert "done in" in (printed := capsys.readouterr().err)
    assert not re.search(r"^measuring, ", printed, re.MULTILINE)
    smaller = ["quantize", str(source), "-o", str(tmp_path / "less"), "--target-bpw", "4"]
    assert main([*smaller, "--calibration", text, "--no-report"]) == 0
    less = sum(array.nbytes for array in arrays(tmp_path / "less").values())
    assert less < stored
    assert main(["verify", str(tmp_path / "less")]) == 0


def test_a_size_is_planned_without_measuring(
    source: Path, tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(source, tmp_path / "out", "--target-bpw", "4.5", "--dry-run") == 0
    assert "at most, 4.5 bits per weight" in capsys.readouterr().out
    assert not list(home.rglob("sensitivities"))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (["--target-bpw", "2"], "are the fewest"),
        (["--target-bpw", "1.5"], "expected from 2.0 to 16.0"),
        (["--target-bpw", "12"], "are the most that there is to choose"),
        (["--target-bpw", "4", "--bits", "4"], "--bits: --target-bpw chooses it"),
        (["--target-bpw", "4", "--mode", "mxfp4"], "--mode: --target-bpw chooses it"),
        (["--target-bpw", "0"], "--target-bpw"),
        (["--target-bpw", "nan"], "--target-bpw"),
    ],
)
def test_a_size_that_cannot_be_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: list[str], text: str
) -> None:
    assert quantize(source, tmp_path / "out", *asked) == 2
    assert text in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("size", [["--bits", "4"], ["--target-bpw", "5"]])
def test_auto_learns_and_loads(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: list[str]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT * 4, encoding="utf-8")
    out = tmp_path / "out"
    asked = [*size, "--method", "auto", "--calibration", str(tmp_path / "text.txt")]
    assert quantize(source, out, *asked) == 0
    printed = capsys.readouterr().err
    assert len(re.findall(r"^calibrating, part \d of \d: \d+ %", printed, re.MULTILINE)) == 1
    assert re.search(r"^done in [\d.]+ s: .*calibrating [\d.]+ s, packing", printed, re.MULTILINE)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["method"] == "auto"
    assert manifest["calibration"]["name"] == "text.txt"
    assert manifest["bits_per_weight"] <= (5.1 if "--bits" in size else 5)  # float32 scales
    assert np.isfinite(np.array(load(out).logits([1, 5, 9]))).all()


def test_shipped_texts_share_no_line() -> None:
    one, other = (shipped(name).content for name in (CERTIFICATE, CALIBRATION))
    assert len(one.split()) > 2000
    assert len(other.split()) > 1800
    shared = {line for line in one.splitlines() if len(line) > 20} & set(other.splitlines())
    assert not shared


def test_texts_of_users(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "more": 1}\n')
    assert read_text(tmp_path / "a.jsonl").content == "one\n\ntwo"
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"words": "two"}\n')
    with pytest.raises(CheckpointError, match=r"b\.jsonl:2: expected an object with text"):
        read_text(tmp_path / "b.jsonl")
    odd = ["\ufeff" + '{"text": "a\u2028b"}\r', "[" * 100_000, r'{"text": "\ud800"}', '{"text": 3}']
    (tmp_path / "d.jsonl").write_text(odd[0], encoding="utf-8")
    assert read_text(tmp_path / "d.jsonl").content == "a\u2028b"
    for line, message in zip(
        odd[1:], ("nested too deeply", "surrogate", "is a string"), strict=True
    ):
        (tmp_path / "d.jsonl").write_text(line, encoding="utf-8")
        with pytest.raises(CheckpointError, match=rf"d\.jsonl:1: .*{message}"):
            read_text(tmp_path / "d.jsonl")
    (tmp_path / "c.txt").write_bytes(b"ab\xff")
    with pytest.raises(CheckpointError, match="not UTF-8 text at byte 2"):
        read_text(tmp_path / "c.txt")
