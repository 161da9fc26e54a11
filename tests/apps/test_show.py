"""`mlx-llama show` says what a directory is, whatever its files say of themselves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_llama.memory import Demand
from mlx_llama_apps.main import main
from mlx_llama_apps.terminal import visible
from model_folders import write_hf

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\x7f\nmodel  /fake"


@pytest.fixture
def model(base_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base_model, tmp_path / "model"))


def change(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    edit(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def test_control_characters_become_visible() -> None:
    assert visible("a\x1b[2Jb\x9b\x7f\x00c\r") == "a\ufffd[2Jb\ufffd\ufffd\ufffdc\ufffd"
    assert visible("é\t日\n😀") == "é\t日\n😀"


@pytest.mark.parametrize("as_json", [False, True])
def test_texts_of_the_files_send_nothing_to_the_terminal(
    as_json: bool, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An ESC in the manifest or in config.json was printed as it stood."""
    change(model / "config.json", lambda raw: raw["mlx_llama"].update(kind_reason=HOSTILE))
    file = {"name": HOSTILE, "bytes": 5, "sha256": HOSTILE}
    change(model / "manifest.json", lambda raw: raw["source"].update(files=[file]))
    assert main(["show", str(model), *(["--json"] if as_json else [])]) == 0
    shown = capsys.readouterr().out
    assert visible(shown) == shown
    if as_json:
        assert json.loads(shown)["source_files"][0]["bytes"] == 5
    else:
        assert not any(line.startswith("model  /fake") for line in shown.splitlines())


@pytest.mark.parametrize(
    ("contexts", "told"),
    [
        (
            {"32": 4096, "16": 4096, "8": 4096},
            "4096, the model's longest, with --kv-bits 32, 16 or 8",
        ),
        ({"32": 1024, "16": 4096}, "1024 with --kv-bits 32, 4096 with --kv-bits 16"),
        ({"32": 1024, "16": 1024}, "1024 with --kv-bits 32, 1024 with --kv-bits 16"),
        ({"16": 4096}, "4096 with --kv-bits 16"),
    ],
)
def test_contexts_that_are_all_the_models_longest_are_said_once(
    contexts: dict[str, int],
    told: str,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Demand, "largest_contexts", lambda self, found: contexts)
    assert main(["show", str(model)]) == 0
    assert f"\nfits          contexts up to {told}\n" in capsys.readouterr().out


@pytest.mark.parametrize("nbytes", ["many", None, True, -1, 1.5, [], 10**400])
def test_a_size_that_is_none_is_no_error(
    nbytes: object, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = {"name": "consolidated.00.pth", "bytes": nbytes}
    change(model / "manifest.json", lambda raw: raw["source"].update(files=[file]))
    assert main(["show", str(model)]) == 0
    assert "consolidated.00.pth, size unknown, sha256" in capsys.readouterr().out


def test_dtype_is_that_of_the_weights_as_load_has_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """config.json said bfloat16, `load` looked at the weights and took float32."""
    folder = write_hf(tmp_path / "m", change=lambda _, raw: raw.update(torch_dtype="bfloat16"))
    assert main(["show", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "float32"


def test_show_as_json_has_the_facts(chat_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(chat_model), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == {"value": "llama3.1-instruct", "reason": "asked for with --kind"}
    assert facts["prompt_format"] == "llama3.1"
    assert facts["rope"]["factor"] == 8.0
    assert facts["context"] == 131072
    assert [f["name"] for f in facts["source_files"]] == [
        "consolidated.00.pth",
        "params.json",
        "tokenizer.model",
    ]
    assert facts["backend"] in ("cpu", "metal", "cuda")
