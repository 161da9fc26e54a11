"""Turning back and going on: undo, retry, a cut answer continued as if it had not been cut."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlx_llama
from mlx_llama import Llama, Message, Session, generation
from mlx_llama.errors import ContextOverflowError, OptionError
from mlx_llama.options import ContextOptions
from mlx_llama.prompts import PlainFormat

KINDS = ["chat_model", "llama2_chat_model", "base_model"]


@pytest.fixture(scope="module", params=KINDS)
def llama(request: pytest.FixtureRequest) -> Llama:
    return mlx_llama.load(request.getfixturevalue(request.param))


def begin(llama: Llama, **context: object) -> Session:
    """A session with any model: a base model's goes on with the user's text."""
    plain = PlainFormat(llama.tokenizer) if llama.kind.is_base else None
    return Session(llama, ContextOptions(**context), prompt_format=plain)  # pyright: ignore


def answer(session: Session, text: str, **options: object) -> str:
    return "".join(step.text for step in session.ask(text, **{"seed": 5, **options}))


OPTIONS = [
    {"temperature": 0},
    {"temperature": 1.5, "top_p": 1.0, "seed": 7},
    {"temperature": 1.5, "seed": 3, "presence_penalty": 0.5, "frequency_penalty": 0.7},
    {"temperature": 1.0, "seed": 4, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("n_first", [1, 4, 11])
def test_continued_answer_is_the_one_that_was_not_cut(
    llama: Llama, options: dict[str, Any], n_first: int
) -> None:
    """Whole answers are compared: text and tokens, through broken characters too."""
    options = {"ignore_eos": True, **options}
    whole = begin(llama)
    text = answer(whole, "hello", max_tokens=24, **options)
    cut = begin(llama)
    shown, cancel = "", threading.Event()
    for number, step in enumerate(cut.ask("hello", cancel=cancel, **options), 1):
        shown += step.text
        if number == n_first:
            cancel.set()
    assert cut.messages[-1].is_cut
    assert text.startswith(shown)
    rest = cut.continue_answer(max_tokens=24 - n_first, **options)
    assert shown + "".join(step.text for step in rest) == text
    assert cut.messages == whole.messages


def test_answer_cut_by_its_length_shows_nothing_twice(llama: Llama) -> None:
    options = {"ignore_eos": True, "seed": 9, "temperature": 2.0, "top_p": 1.0}
    whole = begin(llama)
    answer(whole, "hello", max_tokens=30, **options)
    pieces = begin(llama)
    answer(pieces, "hello", max_tokens=1, **options)
    for _ in range(29):
        list(pieces.continue_answer(max_tokens=1, **options))
    assert whole.messages == pieces.messages


def test_stop_text_is_found_across_a_cut(llama: Llama) -> None:
    options = {"ignore_eos": True, "temperature": 0}
    text = answer(begin(llama), "hello", max_tokens=24, **options)
    stop = text[3:7]
    whole = begin(llama)
    expected = answer(whole, "hello", stop=[stop], max_tokens=24, **options)
    for n_first in range(1, 8):
        cut = begin(llama)
        answer(cut, "hello", stop=[stop], max_tokens=n_first, **options)
        if cut.can_continue:
            list(cut.continue_answer(stop=[stop], max_tokens=24, **options))
        assert cut.messages[-1].content[: len(expected)] == expected


def test_only_a_cut_answer_is_continued(llama: Llama) -> None:
    session = begin(llama)
    for _ in range(2):
        with pytest.raises(OptionError, match="nothing to continue"):
            session.continue_answer()
        session.messages = [Message("user", "a"), Message("assistant", "b")]


def test_undo_takes_back_a_turn_and_its_tokens(llama: Llama) -> None:
    session = begin(llama)
    held, messages = [], []
    for text in ("hello", "the thing", "in"):
        messages.append(list(session.messages))
        answer(session, text, max_tokens=5)
        held.append(session._starts[len(messages[-1])])
    for text in ("in", "the thing", "hello"):
        assert session.undo() == text
        assert session.messages == messages.pop()
        assert session.cache.offset == len(session.tokens) == held.pop()
    with pytest.raises(OptionError, match="nothing was asked"):
        session.undo()


def test_turn_after_undo_prefills_its_own_tokens(llama: Llama) -> None:
    session = begin(llama)
    answer(session, "hello", max_tokens=6)
    answer(session, "the thing", max_tokens=6)
    first = session.tokens[: session._starts[2]]
    session.undo()
    *_, last = session.ask("in", max_tokens=2, temperature=0)
    assert last.stats is not None
    assert last.stats.cached_tokens == len(first)
    prompt = session.prompt_format.encode(session.messages[:-1])
    fresh = llama.logits(prompt, positions=[-1])[0]
    assert session.messages[-1].token_ids is not None
    assert session.messages[-1].token_ids[0] == int(np.argmax(np.array(fresh)))


def test_retry_answers_the_same_question(llama: Llama) -> None:
    session = begin(llama)
    answer(session, "hello", max_tokens=6)
    answer(session, "the thing", max_tokens=6, seed=1, temperature=3.0)
    before = session.messages
    *_, last = session.retry(max_tokens=6, seed=2, temperature=3.0)
    assert last.stats is not None
    assert last.stats.prompt_tokens - last.stats.cached_tokens == 1
    assert session.messages[:-1] == before[:-1]
    assert session.messages[-1] != before[-1]


def test_cuts_at_random_moments_leave_history_and_cache_in_agreement(llama: Llama) -> None:
    """What is cached is always what the messages begin with, token for token."""
    session, dice = begin(llama), random.Random(8)
    for number in range(60):
        cancel, n_first = threading.Event(), dice.randrange(7)
        if n_first == 0:
            cancel.set()
        wish = dice.choice(["ask", "ask", "continue", "retry", "undo"])
        if not session.messages or session.cache.offset > 1500:
            wish = "ask" if not session.messages else "undo"
        if wish == "continue" and not session.can_continue:
            wish = "ask"
        if wish == "undo":
            session.undo()
        else:
            hooks = {"cancel": cancel, "seed": number, "temperature": 1.0, "max_tokens": 9}
            match wish:
                case "ask":
                    steps = session.ask("the thing", **hooks)
                case "retry":
                    steps = session.retry(**hooks)
                case _:
                    steps = session.continue_answer(**hooks)
            for count, _ in enumerate(steps, 1):
                if count >= n_first:
                    cancel.set()
        held, shared = session.cached_share()
        assert held == session.cache.offset
        # The token that ended an answer may differ from the format's.
        assert shared >= held - 1, wish


def test_full_context_can_begin_to_slide(chat_model: Path) -> None:
    llama = mlx_llama.load(chat_model)
    session = begin(llama, context=64)
    session.messages = [Message("system", "the thing")]
    *_, last = session.ask("hello", ignore_eos=True, seed=1)
    assert last.finish_reason == "context"
    session.begin_sliding()
    *_, last = session.continue_answer(ignore_eos=True, seed=1, max_tokens=40)
    assert last.finish_reason == "length"
    assert last.stats is not None
    assert last.stats.forgotten_tokens > 0
    assert session.cache.keep > 4


def test_answer_ends_when_its_time_is_up(llama: Llama) -> None:
    session = begin(llama)
    *_, last = session.ask("hello", timeout=0.001)
    assert last.finish_reason == "timeout"
    assert session.can_continue


def test_question_without_an_answer_is_taken_back_by_the_next(chat_model: Path) -> None:
    llama = mlx_llama.load(chat_model)
    session, alone = llama.session(), llama.session()
    cancel = threading.Event()
    cancel.set()
    list(session.ask("the thing", cancel=cancel))
    assert session.can_continue
    for each in (session, alone):
        list(each.ask("hello", max_tokens=4, seed=1))
    assert session.messages == alone.messages


@pytest.mark.parametrize("unset", [{}, {"seed": None}])
def test_answer_goes_on_with_its_own_seed(llama: Llama, unset: dict[str, Any]) -> None:
    """Once the seed of the last answer was taken, whichever answer went on."""
    options: dict[str, Any] = {"temperature": 1.5, "top_p": 1.0, "ignore_eos": True}
    whole, cut = begin(llama), begin(llama)
    answer(whole, "hello", max_tokens=20, **{**options, "seed": 11})
    answer(cut, "hello", max_tokens=6, **{**options, "seed": 11})
    assert cut.messages[-1].seed == 11
    answer(cut, "the", max_tokens=6, **{**options, "seed": 12})
    cut.undo()
    list(cut.continue_answer(max_tokens=14, **options, **unset))
    assert cut.messages == whole.messages
    assert cut.messages[-1].seed == 11


@pytest.mark.parametrize("is_edited", [False, True])
def test_answer_that_nothing_takes_the_place_of_comes_back(llama: Llama, is_edited: bool) -> None:
    """Stopped before its first token, a retry threw the answer away that it was to replace."""
    options: dict[str, Any] = {"temperature": 1.0, "ignore_eos": True, "max_tokens": 8}
    session, other = begin(llama), begin(llama)
    for each in (session, other):
        answer(each, "hello", **options)
        answer(each, "the thing", **options)
    before, tokens = list(session.messages), list(session.tokens)
    cancel = threading.Event()
    cancel.set()
    asked = [*before[:2], Message("user", "world")]
    again = session.stream(asked, cancel=cancel) if is_edited else session.retry(cancel=cancel)
    assert [step.finish_reason for step in again] == ["cancelled"]
    assert session.messages == before
    if not is_edited:
        assert session.tokens == tokens
        assert session.cache.offset == len(tokens)
    costs = []
    for each in (session, other):
        *_, last = each.ask("a", **{**options, "temperature": 0})
        assert last.stats is not None
        costs.append(last.stats.prompt_tokens - last.stats.cached_tokens)
    assert session.messages == other.messages  # the rows are those of the tokens
    assert is_edited or costs[0] == costs[1]


def test_a_long_answer_comes_back_with_its_rows(llama: Llama) -> None:
    """The buffers were shortened to the question, and its rows could not be counted again."""
    session = begin(llama, context=2048)
    answer(session, "hello", max_tokens=1200, ignore_eos=True)
    before, tokens = list(session.messages), list(session.tokens)
    cancel = threading.Event()
    cancel.set()
    assert [step.finish_reason for step in session.retry(cancel=cancel)] == ["cancelled"]
    assert session.messages == before
    assert session.tokens == tokens and session.cache.offset == len(tokens) > 1024
    answer(session, "the", max_tokens=4)
    assert session.messages[: len(before)] == before


@pytest.mark.parametrize("max_tokens", [1, 8])
@pytest.mark.parametrize("wish", ["retry", "edit", "ask"])
def test_first_token_that_comes_after_the_stop_costs_no_answer(
    llama: Llama, monkeypatch: pytest.MonkeyPatch, wish: str, max_tokens: int
) -> None:
    """A token on its way when a retry was stopped took the old answer's place."""
    options: dict[str, Any] = {"temperature": 1.0, "ignore_eos": True}
    session, other = begin(llama), begin(llama)
    for each in (session, other):
        answer(each, "hello", max_tokens=8, **options)
        answer(each, "the thing", max_tokens=8, **options)
    before, cancel, read = list(session.messages), threading.Event(), generation._Draw.read

    def read_late(draw: generation._Draw) -> int:
        cancel.set()
        return read(draw)

    with monkeypatch.context() as patch:
        patch.setattr(generation._Draw, "read", read_late)
        hooks: dict[str, Any] = {"cancel": cancel, "seed": 6, "max_tokens": max_tokens, **options}
        match wish:
            case "retry":
                steps = list(session.retry(**hooks))
            case "edit":
                steps = list(session.stream([*before[:2], Message("user", "world")], **hooks))
            case _:
                steps = list(session.ask("world", **hooks))
    held, shared = session.cached_share()
    assert held == session.cache.offset
    assert shared == held or wish == "edit"  # whose question is cached, and is not the history's
    if wish == "ask":  # nothing is lost for it
        assert steps[0].token_id is not None
        assert session.messages[:-2] == before
        return
    assert [(step.token_id, step.text, step.finish_reason) for step in steps] == [
        (None, "", "cancelled")
    ]
    assert session.messages == before
    for each in (session, other):
        answer(each, "a", max_tokens=8, **{**options, "temperature": 0})
    assert session.messages == other.messages  # the rows are those of the tokens


def test_error_in_a_retry_leaves_no_row_of_another_token(
    llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "ignore_eos": True, "max_tokens": 8}
    session, other = begin(llama), begin(llama)
    for each in (session, other):
        answer(each, "hello", **options)
    before = list(session.messages)

    def interrupted(draw: generation._Draw) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(generation._Draw, "read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(session.retry(seed=5, **{**options, "temperature": 3.0}))
    assert session.messages == before
    held, shared = session.cached_share()
    assert held == shared == session.cache.offset
    for each in (session, other):
        answer(each, "a", **{**options, "temperature": 0})
    assert session.messages == other.messages  # the rows are those of the tokens


def test_refused_question_leaves_the_cache_as_it_was(chat_model: Path) -> None:
    session = begin(mlx_llama.load(chat_model), context=64)
    answer(session, "hello", max_tokens=4)
    before, tokens = list(session.messages), list(session.tokens)
    with pytest.raises(ContextOverflowError):
        list(session.stream([Message("user", "the thing " * 60)]))
    assert session.messages == before
    assert session.tokens == tokens
    assert session.cache.offset == len(tokens)


def test_undo_trims_what_another_session_has_read(llama: Llama, tmp_path: Path) -> None:
    """Where a turn began was unknown to a session that took it up, and nothing was trimmed."""
    one = begin(llama)
    answer(one, "hello", max_tokens=4)
    n_first = len(one.tokens)
    answer(one, "the thing", max_tokens=4)
    one.save_cache(tmp_path / "cache")
    other = begin(llama)
    other.messages = list(one.messages)
    other.load_cache(tmp_path / "cache")
    assert other.undo() == "the thing"
    assert n_first <= other.cache.offset < len(one.tokens)
    held, shared = other.cached_share()
    assert shared == held == other.cache.offset
