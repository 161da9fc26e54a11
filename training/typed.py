"""How people type: names, slips, words that say nothing, and what nobody can understand."""

from __future__ import annotations

import itertools
import random

from training.facts import read_toml

_WORDS = read_toml("words.toml")
NAMES: list[str] = _WORDS["names"].split()
SYLLABLES: list[str] = _WORDS["syllables"].split()
SMALL_WORDS = frozenset(_WORDS["small_words"].split())
LEADS: list[str] = _WORDS["leads"]
TAILS: list[str] = _WORDS["tails"]


def made_up(rng: random.Random) -> str:
    """Return a word that nobody knows."""
    return "".join(rng.choices(SYLLABLES, k=rng.randint(2, 3))).capitalize()


def a_name(rng: random.Random) -> str:
    """Return a name, known or made up."""
    return rng.choice(NAMES) if rng.random() < 0.5 else made_up(rng)


def noise(rng: random.Random) -> str:
    """Return an input without a meaning, of up to some hundred characters."""
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice(("", " ", "\n", "?", "...", "!!!", ".", "-"))
    if kind == 1:
        return "".join(rng.choices("asdfghjklqwertyuiopzxcvbnm", k=rng.randint(4, 40)))
    if kind == 2:
        return rng.choice("aex?!.7=#*") * rng.randint(5, 120)
    if kind == 3:
        return "".join(
            chr(rng.choice((rng.randint(33, 126), rng.randint(160, 0x2FFF))))
            for _ in range(rng.randint(4, 40))
        )
    if kind == 4:
        return " ".join(made_up(rng).lower() for _ in range(rng.randint(4, 40)))
    return "".join(rng.choices("0123456789 ,;", k=rng.randint(8, 60)))


def as_typed(rng: random.Random, question: str) -> str:
    """Vary a question as people do: capitals, marks, politeness, a slip of the finger."""
    if rng.random() < 0.2:
        question = reworded(rng, question)
    if rng.random() < 0.1 and question[:1].isalpha():
        question = rng.choice(("please ", "hi, ", "hello, ", "ok, ", "so, ", "well, ")) + question
    if rng.random() < 0.15:
        question = question.removesuffix("?")
    if rng.random() < 0.45:
        question = question[:1].upper() + question[1:]
    if rng.random() < 0.05:
        question += rng.choice((" please", " Thanks!", " thanks", "??", "!"))
    if rng.random() < 0.04:
        letters = [
            i
            for i, (a, b) in enumerate(itertools.pairwise(question))
            if a.isalpha() and b.isalpha() and a.islower()
        ]
        if letters:
            at = rng.choice(letters)
            question = question[:at] + question[at + 1] + question[at] + question[at + 2 :]
    return question


def reworded(rng: random.Random, question: str) -> str:
    """Lose a small word, or add words that say nothing: what is asked stays the same."""
    kind = rng.randrange(5)
    if kind == 0:
        return f"{rng.choice(LEADS)} {question}"
    if kind == 1:
        mark = "?" if question.endswith("?") else ""
        return f"{question.removesuffix('?')} {rng.choice(TAILS)}{mark}"
    words = question.split(" ")
    if kind == 2:
        words.insert(rng.randint(0, len(words)), made_up(rng).lower())
        return " ".join(words)
    small = [i for i, word in enumerate(words) if word.lower() in SMALL_WORDS]
    for i in sorted(rng.sample(small, min(len(small), rng.choice((1, 1, 2)))), reverse=True):
        if len(words) > 3:
            del words[i]
    return " ".join(words)
