"""The chat in a pipe: one message in, its answer out, and nothing else on stdout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from terminal import CODE, environment


def run(home: Path, *arguments: object, given: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CODE, *map(str, arguments)],
        input=given,
        env=environment(home),
        capture_output=True,
        text=True,
        check=False,
    )


def test_pipe_gets_the_answer_alone(home: Path, chat_model: Path) -> None:
    options = ("--temperature", 0, "--max-tokens", 9)
    given = "hello\n/exit is text here\n"
    chatted = run(home, "chat", chat_model, *options, given=given)
    ran = run(home, "run", chat_model, *options, given=given)
    assert (chatted.stdout, chatted.stderr, chatted.returncode) == (ran.stdout, "", 0)
    assert "\x1b" not in chatted.stdout
    assert not (home / "data" / "chats").exists()  # saved only with --resume


def test_context_that_is_full_is_told_on_stderr(home: Path, chat_model: Path) -> None:
    options = ("--ignore-eos", "--context", 40)
    done = run(home, "chat", chat_model, *options, given="hello")
    assert "the context is full" in done.stderr
    done = run(
        home, "chat", chat_model, *options, "--on-full", "slide", "--max-tokens", 60, given="hello"
    )
    assert "tokens (part of 1 turn) are dropped" in done.stderr


def test_file_for_all_models_asks_in_vain_of_a_dense_one_in_bfloat16(
    home: Path, chat_model: Path
) -> None:
    """Once no chat began: nothing is packed that int8 rounds, and bfloat16 has no 32 bits."""
    (home / "config").mkdir(parents=True)
    file = home / "config" / "config.toml"
    file.write_text('activations = "int8"\nkv_bits = 32\n', encoding="utf-8")
    options = ("--temperature", 0, "--max-tokens", 9, "--dtype", "bfloat16")
    chatted = run(home, "chat", chat_model, *options, given="hello")
    ran = run(home, "run", chat_model, *options, given="hello")
    assert (chatted.stdout, chatted.stderr, chatted.returncode) == (ran.stdout, "", 0)
    refused = run(home, "chat", chat_model, *options, "--activations", "int8", given="hello")
    assert refused.returncode == 2 and refused.stderr.count("--activations int8: ") == 1


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["CHAT", "--on-full", "ask"], "no terminal to ask at"),
        (["CHAT", "--preset", "x"], "no such preset"),
        (["CHAT", "--resume"], "no chat is saved"),
        (["CHAT", "--resume", "2026"], "no chat of that ID"),
        (["BASE", "--system", "x"], "is a base model"),
        (["CHAT", "--logit-bias", "hello hello=1"], "no single token"),
        (["LLAMA2", "--date", "26 Jul 2024"], "has no place for"),
    ],
)
def test_what_cannot_be_is_one_line(
    home: Path,
    chat_model: Path,
    base_model: Path,
    llama2_chat_model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    problem: str,
) -> None:
    import io

    from mlx_llama_apps.main import main

    monkeypatch.setenv("HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello")))
    models = {"CHAT": chat_model, "BASE": base_model, "LLAMA2": llama2_chat_model}
    assert main(["chat", *(str(models.get(a, a)) for a in arguments)]) in (1, 2)
    error = capsys.readouterr().err
    assert problem in error
    assert len(error.splitlines()) == 1


def test_nothing_to_answer_is_told(home: Path, chat_model: Path) -> None:
    done = run(home, "chat", chat_model, given="")
    assert done.returncode != 0
    assert "standard input is empty" in done.stderr


def test_chat_whose_model_has_gone_says_how_to_go_on(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlx_llama import Message
    from mlx_llama_apps.chat.store import ChatFile
    from mlx_llama_apps.main import main

    header = {"model": "/gone", "created": "", "tokenizer": "", "settings": {}}
    file = ChatFile.new(home / "data" / "chats", header=header, on_trouble=lambda _: None)
    file.sync([Message("user", "hello")])
    assert main(["chat", "--resume"]) == 1
    error = capsys.readouterr().err
    assert f"name one: mlx-llama chat MODEL --resume {file.path.stem}" in error
    assert len(error.splitlines()) == 1
