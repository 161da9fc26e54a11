"""A session's cache on the disk, and shared by forks."""

from __future__ import annotations

from pathlib import Path

import pytest

import mlx_llama
from mlx_llama import Llama, Session
from mlx_llama.errors import CheckpointError


@pytest.fixture(scope="module")
def llama(chat_model: Path) -> Llama:
    return mlx_llama.load(chat_model)


def test_resumed_session_computes_the_new_turn_alone(tmp_path: Path, llama: Llama) -> None:
    one, other = llama.session(), llama.session()
    say(one, "hello")
    one.save_cache(tmp_path / "c")
    other.load_cache(tmp_path / "c")
    other.messages = list(one.messages)
    held = len(one.tokens)
    answers = [say(session, "the thing") for session in (one, other)]
    assert answers[0] == answers[1]
    assert one.tokens == other.tokens
    assert answers[1][1] == held


def test_cache_of_another_keep_is_refused(tmp_path: Path, llama: Llama) -> None:
    one = llama.session(context=64, on_full="slide", keep=4)
    list(one.complete("hello the thing", max_tokens=90, ignore_eos=True))
    one.save_cache(str(tmp_path / "c"))
    other = llama.session(context=64, on_full="slide", keep=9)
    with pytest.raises(CheckpointError, match=r"of --keep 4 and has .* here --keep 9"):
        other.load_cache(str(tmp_path / "c"))
    llama.session(context=64, on_full="slide").load_cache(str(tmp_path / "c"))


def test_forked_sessions_go_on_by_themselves(llama: Llama) -> None:
    one, alone = llama.session(), llama.session()
    say(one, "hello")
    say(alone, "hello")
    other = one.fork()
    assert say(other, "in the end")[1] > 0
    assert say(one, "the thing") == say(alone, "the thing")
    assert one.tokens == alone.tokens
    assert [len(each.messages) for each in (one, other)] == [4, 4]


def say(session: Session, text: str) -> tuple[str, int]:
    """Return the answer and how many tokens of the prompt were not computed."""
    steps = list(session.ask(text, temperature=0, max_tokens=6, ignore_eos=True))
    assert steps[-1].stats is not None
    return "".join(step.text for step in steps), steps[-1].stats.cached_tokens
