from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest

import mlx_llama
from mlx_llama_apps.main import main


class Stdin(io.TextIOWrapper):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["run", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_json_is_one_object_with_everything(
    chat_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = run(capsys, chat_model, "hello", "--json", "--max-tokens", 6, "--seed", 4, "--top-k", 5)
    (line,) = text.splitlines()
    answer = json.loads(line)
    assert list(answer) == ["text", "token_ids", "logprobs", "finish_reason", "stats"]
    llama = mlx_llama.load(chat_model)
    steps = list(
        llama.stream_chat([{"role": "user", "content": "hello"}], max_tokens=6, seed=4, top_k=5)
    )
    assert answer["token_ids"] == [s.token_id for s in steps]
    assert answer["text"] == "".join(s.text for s in steps)
    assert answer["finish_reason"] == "length"
    assert len(answer["logprobs"]) == 6
    assert all(p <= 0 for p in answer["logprobs"])
    assert answer["stats"]["seed"] == 4
    assert answer["stats"]["answer_tokens"] == 6


@pytest.mark.parametrize("prompt", [[], ["-"]])
def test_prompt_comes_from_standard_input(
    chat_model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    prompt: list[str],
) -> None:
    monkeypatch.setattr("sys.stdin", Stdin("hello 😀\n".encode()))
    piped = run(capsys, chat_model, *prompt, "--temperature", 0, "--max-tokens", 5)
    assert piped == run(capsys, chat_model, "hello 😀", "--temperature", 0, "--max-tokens", 5)


def test_input_that_is_no_utf8_is_one_line(
    chat_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", Stdin(b"abc\xff"))
    assert main(["run", str(chat_model)]) == 1
    assert "byte 0xff at 3 is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("prompt", ["-5 + 3 =", "- item", "-hello", "--help me"])
def test_prompt_may_begin_with_a_hyphen(
    base_model: Path, capsys: pytest.CaptureFixture[str], prompt: str
) -> None:
    found = run(capsys, base_model, prompt, "--temperature", 0, "--max-tokens", 4, "--ignore-eos")
    llama = mlx_llama.load(base_model)
    text = llama.generate(prompt, temperature=0, max_tokens=4, ignore_eos=True)
    assert found == text.removesuffix("\n") + "\n"


def test_raw_leaves_the_chat_format_out(
    chat_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def count(*flags: str) -> int:
        text = run(capsys, chat_model, "hello", "--json", "--max-tokens", 1, *flags)
        return json.loads(text)["stats"]["prompt_tokens"]

    assert count("--raw") == 2  # BOS and one token
    assert count() > 10
    assert count("--system", "the") > count()
    assert count("--date", "26 Jul 2024") > count()


def test_stop_and_repeatable_flags_reach_the_model(
    base_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(capsys, base_model, "hello", "--temperature", 0, "--max-tokens", 12)
    assert len(whole) > 4
    stop = whole[3:5]
    cut = run(capsys, base_model, "hello", "--temperature", 0, "--stop", "zzz", "--stop", stop)
    assert cut == whole[: whole.index(stop)].removesuffix("\n") + "\n"


def test_models_own_defaults_are_used(
    chat_model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """generation_config.json says what temperature an answer has when nobody says another."""
    cold = tmp_path / "cold"
    shutil.copytree(chat_model, cold)
    config = json.loads((cold / "generation_config.json").read_text())
    (cold / "generation_config.json").write_text(json.dumps({**config, "temperature": 0.0}))
    answers = {run(capsys, cold, "hello", "--max-tokens", 8) for _ in range(3)}
    greedy = run(capsys, chat_model, "hello", "--max-tokens", 8, "--temperature", 0)
    assert answers == {greedy}


def test_what_a_sliding_context_dropped_is_said_once_on_stderr(
    base_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--context", "16", "--max-tokens", "40", "--ignore-eos", "--temperature", "0"]
    assert main(["run", str(base_model), "hello", *options, "--on-full", "slide"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "tokens behind the kept ones were dropped" in line
    assert main(["run", str(base_model), "hello", *options]) == 0
    assert "dropped" not in capsys.readouterr().err


def test_answer_that_the_context_cut_says_so(
    base_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["run", str(base_model), "hello", "--ignore-eos"]
    assert main([*asked, "--context", "12"]) == 0
    assert capsys.readouterr().err == (
        "the answer was cut: the context of 12 tokens is full; raise --context, up to 4096, or "
        "take --on-full slide\n"
    )
    assert main([*asked, "--max-tokens", "4"]) == 0
    assert capsys.readouterr().err == ""


def test_where_there_is_no_longer_context_none_is_advised(
    base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It said to raise --context, which could not be followed."""
    model = Path(shutil.copytree(base_model, tmp_path / "m"))
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["max_position_embeddings"] = 16
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert main(["run", str(model), "", "--raw", "--ignore-eos"]) == 0
    assert capsys.readouterr().err == (
        "the answer was cut: the context of 16 tokens is full, the longest that model and memory "
        "have; --on-full slide goes on beyond it\n"
    )
    assert main(["run", str(model), "the thing in hello world end " * 5]) == 1
    assert "shorten the prompt or take --on-full slide" in capsys.readouterr().err


@pytest.mark.parametrize("prompt", [[], ["-"]])
def test_empty_input_is_told_before_the_model_is_loaded(
    base_model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    prompt: list[str],
) -> None:
    monkeypatch.setattr("sys.stdin", Stdin(b"\n"))
    assert main(["run", str(base_model), *prompt]) == 2
    assert "standard input is empty" in capsys.readouterr().err


def test_prompt_behind_two_hyphens_is_taken_as_it_is(
    base_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(base_model), "--max-tokens", "1", "--ignore-eos", "--", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
