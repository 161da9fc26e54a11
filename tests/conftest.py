"""What every test gets: a home of its own, and models made once."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tiny_models import write_model

# A shell's job in the background ignores Ctrl-C, and under nohup a terminal that closes; programs
# that are begun here would do so too.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point the program's files at a folder that goes with the test."""
    folder = tmp_path / "home"
    monkeypatch.setenv("MLX_LLAMA_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model directory with a SentencePiece tokenizer, float32."""
    return write_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama 3.1 instruct directory with a tiktoken tokenizer, float32."""
    return write_model(tmp_path_factory.mktemp("models") / "chat", kind="llama3.1-instruct")


@pytest.fixture(scope="session")
def llama2_chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama 2 chat directory with a SentencePiece tokenizer, float32."""
    return write_model(tmp_path_factory.mktemp("models") / "llama2", kind="llama2-chat")
