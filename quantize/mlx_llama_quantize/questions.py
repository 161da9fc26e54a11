"""A user's own questions: which of two models answers them, and how sure the difference is.

One JSON object a line: `question`, perhaps `system`, and either `choices` with `answer` (the index
or the text of the right one), chosen by likelihood, or `pattern`, a regular expression that the
greedy answer must hold.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_llama import Llama, Message
from mlx_llama.errors import CheckpointError
from mlx_llama.strict_json import load_jsonl

MAX_ANSWER_TOKENS = 128
MAX_BYTES = 64 << 20  # of the file
Z_95 = 1.959964


@dataclass(frozen=True, slots=True)
class Question:
    """choices: of which the one at `right` is; or pattern: what an answer must hold."""

    text: str
    system: str | None = None
    choices: tuple[str, ...] = ()
    right: int = 0
    pattern: re.Pattern[str] | None = None


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Shares of right answers; difference: B's minus A's, low to high its 95 % interval."""

    n_questions: int
    a: float
    b: float
    difference: float
    low: float
    high: float


def read_questions(path: Path) -> list[Question]:
    """Read a JSONL file; CheckpointError names the line that is wrong."""
    found = [_question(raw, where) for where, raw in load_jsonl(path, max_bytes=MAX_BYTES)]
    if not found:
        raise CheckpointError(f"{path}: no questions, expected one JSON object a line")
    return found


def _question(raw: dict[str, Any], where: str) -> Question:
    text, system, choices, pattern = (
        raw.get(name) for name in ("question", "system", "choices", "pattern")
    )
    unknown = raw.keys() - {"question", "system", "choices", "answer", "pattern"}
    if unknown:
        raise CheckpointError(f"{where}: {min(unknown)!r} is none of the keys of a question")
    if not isinstance(text, str) or not isinstance(system, str | None):
        raise CheckpointError(f"{where}: question and system must be texts")
    if (choices is None) == (pattern is None):
        raise CheckpointError(f"{where}: expected either choices with answer, or pattern")
    if pattern is not None:
        try:
            return Question(text, system, pattern=re.compile(pattern))
        except (re.error, TypeError) as error:
            raise CheckpointError(f"{where}: pattern is no regular expression: {error}") from error
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(choice, str) and choice for choice in choices)
    ):
        raise CheckpointError(f"{where}: choices must be two texts or more")
    answer = raw.get("answer")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise CheckpointError(f"{where}: answer must be one of the choices, or its index from 0")
    return Question(text, system, tuple(choices), answer)


def answer_questions(
    llama: Llama, questions: Sequence[Question], *, on_question: Callable[[], None]
) -> list[bool]:
    """Say which questions a model answers right; on_question is called after each."""
    found: list[bool] = []
    for question in questions:
        found.append(_is_right(llama, question))
        on_question()
    return found


def _is_right(llama: Llama, question: Question) -> bool:
    if question.pattern is None:
        return likeliest_choice(llama, question) == question.right
    options: dict[str, Any] = {"temperature": 0, "max_tokens": MAX_ANSWER_TOKENS}
    if llama.kind.is_base:
        text = llama.generate(_plain(question), **options)
    else:
        text = llama.chat(_messages(question), **options)
    return question.pattern.search(text) is not None


def likeliest_choice(llama: Llama, question: Question) -> int:
    """Return the choice of the highest log-probability for each of its bytes.

    By bytes, as lm-evaluation-harness's acc_norm does: short choices would win else.
    """
    scores = [
        _log_probability(llama, question, choice) / len(choice.encode())
        for choice in question.choices
    ]
    return int(np.argmax(scores))


def _log_probability(llama: Llama, question: Question, choice: str) -> float:
    if llama.kind.is_base:
        before = llama.prompt_ids(_plain(question))
        ids = llama.prompt_ids(f"{_plain(question)} {choice}")
    else:
        before = llama.prompt_format.encode(_messages(question))
        ids = [*before, *llama.tokenizer.encode(choice)]
    start = _shared(before, ids)
    positions = range(start - 1, len(ids) - 1)
    logits = np.array(llama.logits(ids, positions=list(positions)), dtype=np.float64)
    most = logits.max(axis=-1)
    norm = most + np.log(np.exp(logits - most[:, None]).sum(axis=-1))
    return float((logits[np.arange(len(positions)), ids[start:]] - norm).sum())


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many first ids are the same: a choice may join the last word's token."""
    n = 0
    while n < min(len(one), len(other) - 1) and one[n] == other[n]:
        n += 1
    return n


def _plain(question: Question) -> str:
    return question.text if question.system is None else f"{question.system}\n\n{question.text}"


def _messages(question: Question) -> list[Message]:
    system = [] if question.system is None else [Message("system", question.system)]
    return [*system, Message("user", question.text)]


def summarize_answers(a: Sequence[bool], b: Sequence[bool]) -> Accuracy:
    """Compare the answers to the same questions.

    The interval is for paired shares, with half a question added to each of the four cells, so
    that it holds for few questions, too (Agresti and Min 2005).
    """
    n = len(a)
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    gained, lost, total = only_b + 0.5, only_a + 0.5, n + 2
    middle = (gained - lost) / total
    error = Z_95 * math.sqrt((gained + lost) / total - middle**2) / math.sqrt(total)
    low, high = max(-1.0, middle - error), min(1.0, middle + error)
    return Accuracy(n, sum(a) / n, sum(b) / n, (only_b - only_a) / n, low, high)
