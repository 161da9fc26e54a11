"""The test: questions whose templates are never in the training text, with a check for the fact.

    python -m training.heldout > heldout.jsonl

writes one JSON object a line: messages up to the question, the pattern that a right answer
matches, the answer of the training text, and its group. `as_asked` gives a second test, in the
words of somebody who had not seen the training text.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator

from training.dialogs import Dialog, Guide, Turn
from training.facts import read_toml
from training.typed import a_name

SEED = 20_251
DRAWS = {
    "option in a command": 10,
    "takers": 16,
    "command": 14,
    "slash": 6,
    "no such option": 10,
    "memory": 40,
    "cache": 14,
    "shape": 34,
    "make": 24,
    "arithmetic": 50,
    "unknown": 36,
    "noise": 12,
    "repeat": 10,
}


def dialogs(guide: Guide) -> Iterator[Dialog]:
    """Yield the conversations of the test: every listed question, and draws of the others."""
    rng = random.Random(SEED)
    for entry in (*guide.howtos, *guide.talks):
        group = "howto" if "needs" in entry else "talk"
        for question in entry["held_out"]:
            yield Dialog((Turn(group, question, entry["say"], entry["key"]),))
    for question in guide.foreign["held_out"]:
        yield Dialog((Turn("foreign", question, guide.foreign["say"], guide.foreign["key"]),))
    for concept in guide.concepts:
        for _ in range(2):
            yield Dialog(tuple(guide.concept(rng, True, concept)))
    for option in guide.program.options.values():
        yield Dialog(tuple(guide.option(rng, True, option)))
    for group, count in DRAWS.items():
        for _ in range(count):
            yield Dialog(tuple(guide.families[group][1](rng, True)))
    for _ in range(10):
        yield Dialog(tuple(guide.name(rng, True, None)))
    for index in range(30):
        name = a_name(rng)
        kind = "system_held_out" if index % 2 else "system"
        system = rng.choice(guide.frames["name"][kind]).format(n=name)
        yield Dialog(tuple(guide.name(rng, True, name)), system)
    for _ in range(16):
        yield Dialog(tuple(guide.user(rng, True)))


def questions(guide: Guide) -> list[dict[str, object]]:
    """Return an object for each turn that is asked; the answers before it are the right ones."""
    found: list[dict[str, object]] = []
    seen: set[str] = set()
    for dialog in dialogs(guide):
        messages: list[dict[str, str]] = []
        if dialog.system is not None:
            messages.append({"role": "system", "content": dialog.system})
        for turn in dialog.turns:
            messages.append({"role": "user", "content": turn.question})
            group = f"{turn.group}, follow-up" if turn.is_follow_up else turn.group
            entry = {"group": group, "messages": list(messages), "pattern": turn.key}
            line = json.dumps(entry)
            if line not in seen and turn.question.strip():
                found.append(entry | {"answer": turn.answer})
                seen.add(line)
            messages.append({"role": "assistant", "content": turn.answer})
    return found


def as_asked(guide: Guide) -> Guide:
    """Put the wording of asked.toml in the place of the held-out one; return the guide."""
    asked = read_toml("asked.toml")
    for entries, wordings in ((guide.howtos, asked.pop("howto")), (guide.talks, asked.pop("talk"))):
        for entry, wording in zip(entries, wordings, strict=True):
            entry["held_out"] = wording
    tables = guide.frames | {"unknown": guide.unknown, "foreign": guide.foreign}
    for group, wording in asked.items():
        tables[group].update(wording)
    return guide


def main() -> None:
    """Print the test."""
    for entry in questions(Guide()):
        sys.stdout.write(json.dumps(entry, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
