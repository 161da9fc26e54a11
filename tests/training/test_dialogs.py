"""The training text and the test that is held out of it."""

from __future__ import annotations

import json
import random
import re
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from training.dialogs import SIZES, Guide, Turn, dialogs_of
from training.facts import Option, Program, howtos, program, read_toml
from training.heldout import as_asked, questions
from training.typed import as_typed, noise

TAUGHT = Path(__file__).resolve().parents[2] / "training" / "taught.json"
MIN_QUESTIONS = 400


@pytest.fixture(scope="module")
def guide() -> Guide:
    return Guide()


def segments(guide: Guide, count: int, *, held: bool, seed: int = 1) -> list[Turn]:
    rng = random.Random(seed)
    return [turn for _ in range(count) for turn in guide.segment(rng, held, name="Ada")]


def test_nothing_that_was_taught_is_gone() -> None:
    """Train the model anew when an option or a command is taken away."""
    taught = json.loads(TAUGHT.read_text(encoding="utf-8"))
    assert len(taught["options"]) > 30
    assert program().lacks(taught) == []


def test_what_is_gone_is_named() -> None:
    known = program()
    taught = known.taught()
    options = {name: o for name, o in known.options.items() if name != "--top-k"}
    slashes = {name: text for name, text in known.slashes.items() if name != "/clear"}
    lacking = Program(known.commands, options, slashes)
    assert lacking.lacks(taught) == ["run --top-k", "chat --top-k", "/clear"]
    only_run = {**known.options, "--top-k": Option("--top-k", {"run": "another help"})}
    changed = Program(known.commands, only_run, known.slashes)
    assert changed.lacks(taught) == ["chat --top-k"]
    assert changed.says_otherwise(taught) == ["run --top-k"]


def test_answers_speak_of_options_that_exist() -> None:
    known = program()
    without = {name: o for name, o in known.options.items() if name != "--kv-bits"}
    with pytest.raises(LookupError, match="--kv-bits"):
        howtos(Program(known.commands, without, known.slashes))
    for entry in howtos(known):
        named = set(re.findall(r"(?<!\S)--[a-z][a-z-]+", entry["say"])) - {"--help"}
        assert named <= set(entry["needs"]), entry["say"]
        commands = set(re.findall(r"mlx-llama ([a-z]+)(?= [A-Z-])", entry["say"]))
        assert commands <= set(known.commands), entry["say"]


def test_the_same_seed_gives_the_same_text(guide: Guide) -> None:
    assert segments(guide, 200, held=False) == segments(Guide(), 200, held=False)


def test_every_answer_holds_its_key_fact_and_not_another(guide: Guide) -> None:
    unknown, noise_answer = guide.unknown["say"], guide.noise["say"]
    for held in (False, True):
        for turn in segments(guide, 3000, held=held):
            assert re.search(turn.key, turn.answer), turn
            others = {unknown, noise_answer} - {turn.answer}
            assert not any(re.search(turn.key, other) for other in others), turn


def templates(table: Any, *, held: bool) -> set[str]:
    """Return every template in a file, of training or of the test."""
    found: set[str] = set()
    entries = table.items() if isinstance(table, dict) else enumerate(table)
    for name, value in entries:
        if isinstance(value, dict) or (
            isinstance(value, list) and value and isinstance(value[0], dict)
        ):
            found |= templates(value, held=held)
        elif isinstance(value, list) and re.match("ask|held_out|follow|system", str(name)):
            is_held = "held_out" in str(name)
            found |= {text.lower().strip("?. ") for text in value} if is_held == held else set()
    return found


def test_held_out_templates_are_not_in_the_training_text() -> None:
    files = ("questions.toml", "howto.toml", "talk.toml")
    trained = set(chain.from_iterable(templates(read_toml(f), held=False) for f in files))
    held = set(chain.from_iterable(templates(read_toml(f), held=True) for f in files))
    assert len(trained) > 500
    assert len(held) > 200
    assert trained & held == set()


def test_the_test_is_large_and_of_many_kinds(guide: Guide) -> None:
    found = questions(guide)
    assert len(found) >= MIN_QUESTIONS
    assert len({entry["group"] for entry in found}) >= 20
    assert sum("follow-up" in str(entry["group"]) for entry in found) >= 100
    trained = {turn.question for turn in segments(guide, 20_000, held=False)}
    rng = random.Random(2)
    trained |= {turn.question for turn in dialogs_of(rng, segments(guide, 20_000, held=False))}
    asked = [str(entry["messages"][-1]["content"]) for entry in found]  # type: ignore[index]
    kinds = [str(entry["group"]) for entry in found]
    seen = [q for q, kind in zip(asked, kinds, strict=True) if q in trained and kind != "noise"]
    assert seen == []


def test_the_second_test_asks_the_same_in_other_words(guide: Guide) -> None:
    first, second = questions(guide), questions(as_asked(Guide()))
    assert len(second) >= MIN_QUESTIONS
    assert {entry["group"] for entry in second} == {entry["group"] for entry in first}
    assert {str(entry["answer"]) for entry in second} >= {entry["say"] for entry in guide.howtos}
    wordings = [{str(entry["messages"]) for entry in test} for test in (first, second)]
    assert len(wordings[0] & wordings[1]) < len(second) / 20
    for entry in second:
        assert re.search(str(entry["pattern"]), str(entry["answer"])), entry


def test_memory_is_that_of_the_published_shapes() -> None:
    counts = [
        1235814400,
        3212749824,
        6738415616,
        13015864320,
        8030261248,
        70553706496,
        405853388800,
    ]
    assert [size.parameters for size in SIZES] == counts
    eight = SIZES[4]
    assert f"{eight.gigabytes(4):.2f} {eight.gigabytes(16):.2f}" == "4.52 16.06"
    assert eight.cache_gigabytes(131072) == pytest.approx(16 * 2**30 / 1e9)


def test_typing_keeps_a_question_readable() -> None:
    rng = random.Random(5)
    typed = {as_typed(rng, "what does --top-k do?") for _ in range(300)}
    assert len(typed) > 20
    assert sum("--top-k" in text for text in typed) > 0.8 * len(typed)


def test_noise_is_short_and_encodable() -> None:
    rng = random.Random(5)
    for _ in range(500):
        text = noise(rng)
        assert len(text.encode()) < 1000
