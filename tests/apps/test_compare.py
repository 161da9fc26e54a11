"""`mlx-llama compare`: the table, the JSON, the picture, refusals, and Ctrl-C."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mlx_llama_apps.compare import costs
from mlx_llama_apps.main import main
from mlx_llama_quantize import plots
from mlx_llama_quantize.comparison import Comparison
from processes import interrupt, start
from tiny_models import write_meta

TEXT = "the thing in hello world end " * 40
QUESTION = '{"question": "hello", "choices": ["the", "thing"], "answer": 0}\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, a text and questions."""
    folder = tmp_path_factory.mktemp("compared")
    source = str(write_meta(folder / "tiny"))
    assert main(["convert", source, "--no-quantize", "-o", str(folder / "one")]) == 0
    bits = ["--bits", "4", "--group-size", "32"]
    assert main(["convert", source, *bits, "-o", str(folder / "other")]) == 0
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (folder / "q.jsonl").write_text(QUESTION, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def _home(home: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def test_table_has_both_models_and_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--text", "text.txt", "--context", "32", "--questions", "q.jsonl"]
    assert main(["compare", "one", "other", *asked]) == 0
    out = capsys.readouterr().out
    for line in (
        r"A: one +B: other",
        r"bits per weight +32\.\d\d +\d+\.\d\d",
        r"answer +[\d.]+ tokens/s +[\d.]+ tokens/s",
        r"perplexity +[\d.]+ ± [\d.]+ +[\d.]+ ± [\d.]+",
        r"Perplexity statistics \(\d+ tokens, windows of 32\)",
        r"Mean PPL\(B\)/PPL\(A\) +[\d.]+ ± [\d.]+",
        r"Mean KLD +0\.\d+ ± 0\.\d+",
        r"99\.0 % KLD +0\.\d+",
        r"RMS Δp +[\d.]+ ± [\d.]+ %",
        r"Same top token +[\d.]+ ± [\d.]+ %",
        r"^1 question$",
    ):
        assert re.search(line, out, re.MULTILINE), line


def test_json_has_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--text", "text.txt", "--context", "32", "--json", "--no-costs"]
    assert main(["compare", "one", "other", *asked]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["a"]["path"] == "one"
    assert found["costs"] is found["accuracy"] is None
    assert found["context"] == 32
    assert found["divergence"]["n_tokens"] % 15 == 0
    assert found["divergence"]["kld"]["mean"]["value"] > 0
    assert re.match(r"the last \d+ of \d+ tokens fill no window: left out\n", captured.err)


def test_a_model_beside_itself_differs_in_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "one", "one", "--text", "text.txt", "--json", "--no-costs"]) == 0
    found = json.loads(capsys.readouterr().out)["divergence"]
    assert found["kld"]["maximum"] == 0
    assert found["same_top"]["value"] == 1


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_picture_is_drawn(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"found.{suffix}"
    asked = ["--text", "text.txt", "--no-costs", "--plot", str(path)]
    assert main(["compare", "one", "other", *asked]) == 0
    if suffix == "svg":
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    else:
        assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir() if p.suffix == f".{suffix}"] == [path.name]


REFUSALS = [
    ([], 2, "nothing to compare on; give --text FILE, --questions or both"),
    (["--text", "text.txt", "--context", "3"], 2, "--context: found 3, expected 4 or more"),
    (["--text", "text.txt", "--context", "1000000"], 2, "the models were trained for"),
    (["--text", "text.txt", "--dtype", "int8"], 2, "--dtype: found 'int8'"),
    (["--text", "none.txt"], 1, "none.txt: No such file"),
    (["--text", "one/model.safetensors"], 1, "not UTF-8 text at byte"),
    (["--text", "text.txt", "--plot", "x.jpg"], 2, "expected a name that ends in .svg, .png, .pdf"),
    (["--text", "text.txt", "--plot", "none/x.svg"], 2, "there is no folder none"),
    (["--questions", "q.jsonl", "--plot", "x.svg"], 2, "--plot: does nothing without --text"),
    (["--questions", "text.txt"], 1, "text.txt:1: not valid JSON"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), REFUSALS)
def test_what_cannot_work_is_refused_in_one_line(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "one", "other", *arguments]) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_plot_without_matplotlib_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plots, "can_draw", lambda: False)
    assert main(["compare", "one", "other", "--text", "text.txt", "--plot", "x.svg"]) == 2
    assert "pip install 'mlx-llama[plot]'" in capsys.readouterr().err


def test_ctrl_c_keeps_what_is_done(folder: Path, home: Path) -> None:
    slow = (
        "import sys, time\n"
        "from mlx_llama_quantize.comparison import Comparison\n"
        "keep = Comparison._keep\n"
        "def kept(self):\n"
        "    keep(self); print(self.done, flush=True); time.sleep(0.3)\n"
        "Comparison._keep = kept\n"
        "from mlx_llama_apps.main import main\n"
        "sys.exit(main())\n"
    )
    asked = ["compare", "one", "other", "--text", "text.txt", "--context", "32", "--no-costs"]
    process = start(slow, *asked, home=home)
    _, errors = interrupt(process, at="1")
    assert process.returncode == 130
    kept = home / "cache" / "compare"
    assert f"stopped; what was compared is kept in {kept}" in errors
    assert main([*asked, "--json"]) == 0


def test_a_comparison_that_kept_nothing_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended without a word; and what an earlier run had kept was not named."""

    def stop(*given: object) -> None:
        raise KeyboardInterrupt

    asked = ["compare", "one", "other", "--text", "text.txt", "--context", "64"]
    monkeypatch.setattr(costs, "_answer", stop)
    assert main(asked) == 130
    end = capsys.readouterr().err.splitlines()[-1]
    assert end == "mlx-llama: stopped; nothing is kept: the same command begins anew"
    keep = Comparison._keep
    monkeypatch.setattr(Comparison, "_keep", lambda self: (keep(self), stop()))
    assert main([*asked, "--no-costs"]) == 130
    assert "stopped; what was compared is kept in" in capsys.readouterr().err
    assert main(asked) == 130
    assert "stopped; what was compared is kept in" in capsys.readouterr().err


def test_stopped_comparison_says_that_it_goes_on(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["compare", "one", "other", "--text", "text.txt", "--context", "32", "--no-costs"]
    keep = Comparison._keep

    def stop_at_two(self: Comparison) -> None:
        keep(self)
        if self.done == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Comparison, "_keep", stop_at_two)
    assert main(asked) == 130
    monkeypatch.setattr(Comparison, "_keep", keep)
    capsys.readouterr()
    assert main(asked) == 0
    assert re.search(r"going on behind 2 of \d+ windows", capsys.readouterr().err)
