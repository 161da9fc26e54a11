"""Questions: the file's form, the choice by likelihood, and the interval of a difference."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import mlx_llama
from mlx_llama.errors import CheckpointError
from mlx_llama_quantize.questions import (
    Question,
    answer_questions,
    likeliest_choice,
    read_questions,
    summarize_answers,
)


def written(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_a_line_ends_with_a_newline_alone(tmp_path: Path) -> None:
    lines = ('{"question": "a\u2028b\u0085", "pattern": "x"}', '{"question": "c", "pattern": "x"}')
    found = read_questions(written(tmp_path, *lines))
    assert [question.text for question in found] == ["a\u2028b\u0085", "c"]


def test_questions_are_read(tmp_path: Path) -> None:
    found = read_questions(
        written(
            tmp_path,
            '{"question": "2+2?", "choices": ["3", "4"], "answer": "4"}',
            "",
            '{"question": "2+2?", "choices": ["3", "4"], "answer": 0, "system": "Be brief."}',
            '{"question": "Sky?", "pattern": "(?i)blue"}',
        )
    )
    assert found == [
        Question("2+2?", None, ("3", "4"), 1),
        Question("2+2?", "Be brief.", ("3", "4"), 0),
        Question("Sky?", pattern=re.compile("(?i)blue")),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "q.jsonl:1: not valid JSON"),
        ("[]", "q.jsonl:1: JSON holds list"),
        ('{"question": 3, "pattern": "x"}', "question and system must be texts"),
        ('{"question": "a"}', "expected either choices with answer, or pattern"),
        ('{"question": "a", "pattern": "x", "choices": ["a", "b"]}', "expected either"),
        ('{"question": "a", "pattern": "("}', "pattern is no regular expression"),
        ('{"question": "a", "pattern": 3}', "pattern is no regular expression"),
        ('{"question": "a", "choices": ["a"], "answer": 0}', "choices must be two texts or more"),
        ('{"question": "a", "choices": ["a", ""], "answer": 0}', "choices must be two texts"),
        ('{"question": "a", "choices": ["a", "b"], "answer": 2}', "answer must be one of"),
        ('{"question": "a", "choices": ["a", "b"], "answer": true}', "answer must be one of"),
        ('{"question": "a", "choices": ["a", "b"]}', "answer must be one of"),
        ('{"question": "a", "pattern": "x", "patern": "y"}', "'patern' is none of the keys"),
        ("", "no questions"),
    ],
)
def test_wrong_lines_are_refused_by_number(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read_questions(written(tmp_path, line))


@pytest.mark.parametrize("model", ["base_model", "chat_model", "llama2_chat_model"])
def test_choice_is_the_likeliest_for_its_bytes(model: str, request: pytest.FixtureRequest) -> None:
    llama = mlx_llama.load(request.getfixturevalue(model))
    question = Question("hello", None, ("the thing", "in", "world"), 0)
    scores = []
    for choice in question.choices:
        if llama.kind.is_base:
            before = llama.prompt_ids("hello")
            ids = llama.prompt_ids(f"hello {choice}")
        else:
            before = llama.prompt_format.encode([mlx_llama.Message("user", "hello")])
            ids = [*before, *llama.tokenizer.encode(choice)]
        assert ids[: len(before)] == before
        logits = np.array(llama.logits(ids), dtype=np.float64)
        logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        own = [logs[place - 1, ids[place]] for place in range(len(before), len(ids))]
        scores.append(sum(own) / len(choice))
    assert likeliest_choice(llama, question) == int(np.argmax(scores))


def test_patterns_are_looked_for_in_the_greedy_answer(chat_model: Path) -> None:
    llama = mlx_llama.load(chat_model)
    text = llama.chat([{"role": "user", "content": "hello"}], temperature=0, max_tokens=128)
    sure, never = re.compile(re.escape(text[:5])), re.compile(r"(?!)")
    seen: list[None] = []
    asked = [Question("hello", pattern=pattern) for pattern in (sure, never)]
    found = answer_questions(llama, asked, on_question=lambda: seen.append(None))
    assert (found, len(seen)) == ([True, False], 2)


def test_difference_has_the_interval_of_paired_shares() -> None:
    a = [True] * 60 + [True] * 12 + [False] * 4 + [False] * 24
    b = [True] * 60 + [False] * 12 + [True] * 4 + [False] * 24
    found = summarize_answers(a, b)
    assert (found.a, found.b) == (0.72, 0.64)
    assert found.difference == pytest.approx(-0.08)
    # Worked by hand: cells 4.5 and 12.5 of 102, middle -0.07843, error 1.96 * 0.03948.
    assert found.low == pytest.approx(-0.1558, abs=1e-3)
    assert found.high == pytest.approx(-0.0010, abs=1e-3)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.RandomState(0)
    covered = 0
    for _ in range(1000):
        draw = rng.choice(4, size=60, p=[0.5, 0.2, 0.1, 0.2])
        found = summarize_answers([d in (0, 1) for d in draw], [d in (0, 2) for d in draw])
        covered += found.low <= -0.1 <= found.high
    assert 0.93 <= covered / 1000 <= 0.98
