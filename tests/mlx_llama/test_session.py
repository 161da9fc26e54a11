"""Conversations: only the new turn is computed, and what is cached is what was said."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

import mlx_llama
from mlx_llama import Llama, Message, Session
from mlx_llama.errors import OptionError, UnsupportedModelError


@pytest.fixture(scope="module", params=["chat_model", "llama2_chat_model"])
def llama(request: pytest.FixtureRequest) -> Llama:
    return mlx_llama.load(request.getfixturevalue(request.param))


def ask(session: Session, text: str, max_tokens: int = 8) -> mlx_llama.Stats:
    steps = list(session.ask(text, temperature=0, max_tokens=max_tokens))
    assert steps[-1].stats is not None
    return steps[-1].stats


def test_new_turn_prefills_its_own_tokens_alone(llama: Llama) -> None:
    session = llama.session()
    session.messages = [Message("system", "in the thing")]
    first = ask(session, "hello")
    assert first.cached_tokens == 0
    held = len(session.tokens)
    for text in ("the", "thing"):
        stats = ask(session, text)
        assert stats.cached_tokens == held
        held = len(session.tokens)
    assert [m.role for m in session.messages] == ["system", *["user", "assistant"] * 3]


def test_cache_agrees_with_a_fresh_computation_after_turns(llama: Llama) -> None:
    session = llama.session()
    for text in ("hello", "the thing", "in"):
        ask(session, text)
    prompt = llama.prompt_format.encode([*session.messages, Message("user", "end")])
    assert prompt[: len(session.tokens)] == session.tokens
    (step,) = session.ask("end", temperature=0, max_tokens=1)
    fresh = llama.logits(prompt, positions=[-1])[0]
    assert step.token_id == int(np.argmax(np.array(fresh)))


def test_bos_and_system_prompt_stand_once(chat_model: Path) -> None:
    llama = mlx_llama.load(chat_model)
    session = llama.session()
    session.messages = [Message("system", "hello world")]
    for text in ("in", "the"):
        ask(session, text)
    assert session.tokens.count(llama.tokenizer.bos_id) == 1
    system = llama.tokenizer.encode("hello world")
    joined = ",".join(map(str, session.tokens))
    assert joined.count(",".join(map(str, system))) == 1


def test_cut_answer_is_kept_as_far_as_it_went(llama: Llama) -> None:
    session = llama.session()
    cancel = threading.Event()
    shown = ""
    for number, step in enumerate(session.ask("hello", cancel=cancel, seed=1, ignore_eos=True)):
        shown += step.text
        if number == 3:
            cancel.set()
    answer = session.messages[-1]
    assert (answer.role, answer.content) == ("assistant", shown)
    assert answer.token_ids is not None
    assert len(answer.token_ids) == 4
    assert ask(session, "the").cached_tokens >= len(session.tokens) // 3


def test_changed_history_is_computed_again_from_where_it_differs(llama: Llama) -> None:
    session = llama.session()
    ask(session, "hello")
    ask(session, "the thing")
    kept = session.messages[:2]
    steps = list(session.stream([*kept, Message("user", "in the end")], max_tokens=1))
    assert steps[-1].stats is not None
    assert 0 < steps[-1].stats.cached_tokens < steps[-1].stats.prompt_tokens
    fresh = llama.session()
    other = list(fresh.stream([*kept, Message("user", "in the end")], max_tokens=1, temperature=0))
    again = list(
        session.stream([*kept, Message("user", "in the end")], max_tokens=1, temperature=0)
    )
    assert other[0].token_id == again[0].token_id


def test_stop_text_is_not_in_the_history(llama: Llama) -> None:
    session = llama.session()
    (first, *_) = llama.session().ask("hello", temperature=0, max_tokens=6)
    text = "".join(s.text for s in llama.session().ask("hello", temperature=0, max_tokens=6))
    assert first is not None
    stop = text[2:4]
    list(session.ask("hello", temperature=0, max_tokens=6, stop=[stop]))
    assert session.messages[-1].content == text[: text.index(stop)]
    assert session.messages[-1].token_ids is None


def test_clear_forgets_everything(llama: Llama) -> None:
    session = llama.session()
    ask(session, "hello")
    session.clear()
    assert (session.messages, session.tokens, session.cache.offset) == ([], [], 0)


@pytest.mark.parametrize("messages", [[], [{"role": "assistant", "content": "hi"}]])
def test_messages_that_ask_nothing_are_refused(
    llama: Llama, messages: list[dict[str, str]]
) -> None:
    with pytest.raises(OptionError):
        llama.chat(messages)


def test_chat_and_stream_chat_agree(llama: Llama) -> None:
    messages = [{"role": "user", "content": "hello"}]
    text = llama.chat(messages, temperature=0, max_tokens=5)
    steps = llama.stream_chat(messages, temperature=0, max_tokens=5)
    assert text == "".join(step.text for step in steps)


def test_base_model_has_no_chat_format(base_model: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="--raw"):
        mlx_llama.load(base_model).chat([{"role": "user", "content": "hi"}])


def test_failed_turn_leaves_the_session_as_it_was(llama: Llama) -> None:
    session = llama.session()
    ask(session, "hello")
    before = list(session.messages)
    with pytest.raises(OptionError):
        list(session.ask("the", logit_bias={"hello hello": 1.0}))
    assert session.messages == before
    assert ask(session, "the").cached_tokens > 0


def test_beginning_an_answer_ends_the_one_before(llama: Llama) -> None:
    """Two answers at once overwrote each other's tokens: later ones were silently wrong."""
    session = llama.session()
    first = session.ask("hello", temperature=0, ignore_eos=True)
    next(first)
    ask(session, "the thing")
    assert list(first) == []
    assert [m.role for m in session.messages] == ["user", "assistant"] * 2
    assert session.messages[2].content == "the thing"
    prompt = llama.prompt_format.encode([*session.messages, Message("user", "in")])
    (step,) = session.ask("in", temperature=0, max_tokens=1)
    assert step.token_id == int(np.argmax(np.array(llama.logits(prompt, positions=[-1])[0])))


def test_ids_that_a_model_lacks_are_refused(llama: Llama) -> None:
    messages = [Message("user", "a"), Message("assistant", "b", (10**8,)), Message("user", "c")]
    with pytest.raises(OptionError, match="token id 100000000"):
        llama.chat(messages)
