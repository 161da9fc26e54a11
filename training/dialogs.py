"""Makes the guide's conversations: each family of questions gives turns with the answer's key fact.

A family takes a random generator and whether to draw from the held-out templates; the training
text is drawn without them. The same seed gives the same text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from training.facts import SHAPE_NAMES, SIZES, Option, Program, Size, howtos, program, read_toml
from training.typed import SYLLABLES, a_name, as_typed, made_up, noise

BITS = (16, 8, 6, 5, 4, 3, 2)
CONTEXTS = (2048, 4096, 8192, 32768, 131072)
LARGEST = 50  # of the numbers that are added and subtracted
ACT = re.compile(r"how (?:do|can) I (.+)\?")
DEFAULT_NAME = "I am the guide of mlx-llama, a small Llama."


@dataclass(frozen=True, slots=True)
class Turn:
    """A question, its answer, and the regular expression that a right answer matches."""

    group: str
    question: str
    answer: str
    key: str
    is_follow_up: bool = False


@dataclass(frozen=True, slots=True)
class Dialog:
    """Turns that belong together, under a system prompt or none."""

    turns: tuple[Turn, ...]
    system: str | None = None


def first_clause(text: str) -> str:
    """Return the words of a help text that carry its fact, as a regular expression."""
    return re.escape(re.split(r"[;(,]| by default", text)[0].strip())


class Guide:
    """All that the guide can be asked."""

    def __init__(self, known: Program | None = None) -> None:
        """Read the program's tables and the texts."""
        self.program = program() if known is None else known
        self.frames = read_toml("questions.toml")
        self.concepts = read_toml("concepts.toml")["concept"]
        self.howtos = howtos(self.program)
        talk = read_toml("talk.toml")
        self.talks = talk["talk"]
        self.unknown, self.foreign, self.noise = talk["unknown"], talk["foreign"], talk["noise"]
        self.shared = [o for o in self.program.options.values() if len(set(o.helps.values())) > 1]
        self.with_default = [o for o in self.program.options.values() if o.default]
        self.families: dict[str, tuple[float, Callable[[random.Random, bool], list[Turn]]]] = {
            "concept": (18, self.concept),
            "howto": (20, self.howto),
            "option": (16, self.option),
            "option in a command": (2.5, self.option_in),
            "takers": (2, self.takers),
            "command": (3, self.command),
            "slash": (1.5, self.slash),
            "no such option": (3, self.no_option),
            "memory": (8, self.memory),
            "cache": (4, self.cache),
            "shape": (6, self.shape),
            "make": (5, self.make),
            "arithmetic": (12, self.arithmetic),
            "repeat": (4, self.repeat),
            "talk": (7, self.talk),
            "unknown": (10, self.not_known),
            "foreign": (3, self.other_language),
            "noise": (2, self.gibberish),
        }

    def pick(
        self, rng: random.Random, frames: str, held: bool, kind: str = "", **slots: Any
    ) -> str:
        """Fill a random frame. kind: its suffix, such as _bits; `follow` has a key of its own."""
        table = self.frames[frames]
        if kind.startswith("follow"):
            options = table[f"{kind}_held_out" if held else kind]
        else:
            options = table[f"held_out{kind}" if held else f"ask{kind}"]
        return rng.choice(options).format(**slots)

    def concept(
        self, rng: random.Random, held: bool, entry: dict[str, Any] | None = None
    ) -> list[Turn]:
        """Ask for a concept by one of its names."""
        entry = entry or rng.choice(self.concepts)
        question = self.pick(rng, "concept", held, x=rng.choice(entry["names"]))
        return [Turn("concept", question, entry["say"], entry["key"])]

    def howto(self, rng: random.Random, held: bool) -> list[Turn]:
        """Ask how something is done."""
        turn = self._listed("howto", rng, rng.choice(self.howtos), held)
        act = None if held else ACT.fullmatch(turn.question)
        if act is None or rng.random() < 0.4:
            return [turn]
        return [replace(turn, question=self.pick(rng, "act", held, x=act[1]))]

    def talk(self, rng: random.Random, held: bool) -> list[Turn]:
        """Say something friendly."""
        return [self._listed("talk", rng, rng.choice(self.talks), held)]

    def _listed(self, group: str, rng: random.Random, entry: dict[str, Any], held: bool) -> Turn:
        question = rng.choice(entry["held_out" if held else "ask"])
        return Turn(group, question, entry["say"], entry["key"])

    def option(self, rng: random.Random, held: bool, option: Option | None = None) -> list[Turn]:
        """Ask what an option does, and sometimes for its default then."""
        option = option or rng.choice(list(self.program.options.values()))
        name = option.name if rng.random() < 0.85 else option.name.removeprefix("--")
        if name == option.name.removeprefix("--"):
            name = f"the {name} option"
        key = re.escape(option.name) + ".*" + first_clause(next(iter(option.helps.values())))
        turns = [Turn("option", self.pick(rng, "option", held, x=name), option.answer, key)]
        if option.default and (held or rng.random() < 0.5):
            turns.append(self._default(rng, option, held, is_follow_up=True))
        elif option.default and rng.random() < 0.2:
            turns = [self._default(rng, option, held, is_follow_up=False)]
        return turns

    def _default(
        self, rng: random.Random, option: Option, held: bool, *, is_follow_up: bool
    ) -> Turn:
        kind = "follow" if is_follow_up else ""
        question = self.pick(rng, "default", held, kind, x=option.name)
        answer = f"The default of {option.name} is: {option.default}."
        return Turn("default", question, answer, re.escape(answer[:-1]), is_follow_up)

    def option_in(self, rng: random.Random, held: bool) -> list[Turn]:
        """Ask for an option of one command, where commands differ."""
        option = rng.choice(self.shared)
        command, text = rng.choice(list(option.helps.items()))
        question = self.pick(rng, "option_in", held, x=option.name, c=command)
        answer = f"{option.name} in {command}: {text}."
        return [Turn("option in a command", question, answer, first_clause(text))]

    def takers(self, rng: random.Random, held: bool) -> list[Turn]:
        """Ask which commands take an option."""
        option = rng.choice(list(self.program.options.values()))
        answer = f"{option.name} is an option of {', '.join(option.helps)}."
        question = self.pick(rng, "takers", held, x=option.name)
        return [Turn("takers", question, answer, re.escape(answer))]

    def command(self, rng: random.Random, held: bool) -> list[Turn]:
        """Ask what a command does."""
        name, summary = rng.choice(list(self.program.commands.items()))
        answer = f"mlx-llama {name}: {summary[0].lower()}{summary[1:]}."
        question = self.pick(rng, "command", held, x=name)
        return [Turn("command", question, answer, f"mlx-llama {name}.*{first_clause(summary[1:])}")]

    def slash(self, rng: random.Random, held: bool) -> list[Turn]:
        """Ask what a command of the chat does."""
        name, text = rng.choice(list(self.program.slashes.items()))
        question = self.pick(rng, "slash", held, x=name)
        return [Turn("slash", question, f"{name}: {text}.", first_clause(text))]

    def no_option(self, rng: random.Random, held: bool) -> list[Turn]:
        """Ask for an option that does not exist."""
        words = [*list(self.program.options), "--fast", "--gpu", "--turbo", "--magic", "--model"]
        while True:
            parts = [
                made_up(rng) if rng.random() < 0.5 else rng.choice(words).strip("-").split("-")[0]
            ]
            if rng.random() < 0.5:
                parts.append(made_up(rng))
            name = "--" + "-".join(parts).lower()
            if name not in self.program.options:
                break
        question = self.pick(rng, "no_option", held, x=name)
        answer = "I know no such option. mlx-llama COMMAND --help lists what there is."
        return [Turn("no such option", question, answer, "no such option")]

    def memory(self, rng: random.Random, held: bool) -> list[Turn]:
        """Ask for the size of a model's weights, and follow with other bits or another model."""
        size, bits = rng.choice(SIZES), rng.choice(BITS)
        question = self.pick(rng, "memory", held, m=rng.choice(size.names), b=bits)
        turns = [_memory_turn(question, size, bits)]
        while rng.random() < (1.0 if held and len(turns) == 1 else 0.45) and len(turns) < 4:
            if rng.random() < 0.6:
                bits = rng.choice([b for b in BITS if b != bits])
                question = self.pick(rng, "memory", held, "follow_bits", b=bits)
            else:
                size = rng.choice([s for s in SIZES if s is not size])
                question = self.pick(rng, "memory", held, "follow_model", m=rng.choice(size.names))
            turns.append(replace(_memory_turn(question, size, bits), is_follow_up=True))
        return turns

    def cache(self, rng: random.Random, held: bool) -> list[Turn]:
        """Ask for the size of a cache."""
        size = rng.choice(SIZES)
        tokens = rng.choice([n for n in CONTEXTS if n <= size.context])
        question = self.pick(rng, "cache", held, m=rng.choice(size.names), n=tokens)
        needed = f"{size.cache_gigabytes(tokens):.3g} GB"
        answer = f"The cache of {size.names[0]} takes {needed} at {tokens} tokens and 16 bits."
        return [Turn("cache", question, answer, rf"(?<![\d.]){re.escape(needed)}")]

    def shape(self, rng: random.Random, held: bool) -> list[Turn]:
        """Ask for a number of a model's shape, and for the same of another."""
        size, field = rng.choice(SIZES), rng.choice(list(SHAPE_NAMES))
        name = rng.choice(SHAPE_NAMES[field])
        question = self.pick(rng, "shape", held, m=rng.choice(size.names), a=name)
        turns = [_shape_turn(question, size, field)]
        if held or rng.random() < 0.35:
            other = rng.choice([s for s in SIZES if s is not size])
            question = self.pick(rng, "shape", held, "follow", m=rng.choice(other.names))
            turns.append(replace(_shape_turn(question, other, field), is_follow_up=True))
        return turns

    def make(self, rng: random.Random, held: bool) -> list[Turn]:
        """Ask for the command that converts a model."""
        size = rng.choice(SIZES)
        bits = rng.choice(BITS[1:]) if rng.random() < 0.5 else None
        kind = "" if bits is None else "_bits"
        question = self.pick(rng, "make", held, kind, m=rng.choice(size.names), b=bits)
        turns = [_make_turn(question, size, bits)]
        if held or rng.random() < 0.4:
            bits = rng.choice([b for b in BITS[1:] if b != bits])
            question = self.pick(rng, "make", held, "follow", b=bits)
            turns.append(replace(_make_turn(question, size, bits), is_follow_up=True))
        return turns

    def arithmetic(self, rng: random.Random, held: bool) -> list[Turn]:
        """Add or subtract, and go on with the result."""
        limit = 20 if rng.random() < 0.4 else LARGEST
        left, right = rng.randint(0, limit), rng.randint(0, limit)
        kind = rng.choice(("plus", "minus"))
        question = self.pick(rng, kind, held, a=left, b=right)
        turns = [_sum_turn(question, left, right, kind)]
        result = left + right if kind == "plus" else left - right
        if (held or rng.random() < 0.4) and 0 <= result <= LARGEST:
            kind, other = rng.choice(("plus", "minus")), rng.randint(0, 20)
            question = self.pick(rng, "minus", held, f"follow_{kind}", c=other)
            turns.append(replace(_sum_turn(question, result, other, kind), is_follow_up=True))
        return turns

    def repeat(self, rng: random.Random, held: bool) -> list[Turn]:
        """Ask for one's own words back: what teaches to copy names and numbers."""
        words = [a_name(rng) for _ in range(rng.choice((1, 1, 2, 3)))]
        said = " ".join(words) if rng.random() < 0.7 else str(rng.randint(0, 9999))
        question = self.pick(rng, "repeat", held, x=said)
        return [Turn("repeat", question, said, rf"^{re.escape(said)}$")]

    def not_known(self, rng: random.Random, held: bool) -> list[Turn]:
        """Ask for what the guide does not know."""
        slots = {name: rng.choice(values) for name, values in self.unknown["slots"].items()}
        slots["word"] = made_up(rng).lower() + rng.choice(SYLLABLES)
        question = rng.choice(self.unknown["held_out" if held else "ask"]).format(**slots)
        return [Turn("unknown", question, self.unknown["say"], self.unknown["key"])]

    def other_language(self, rng: random.Random, held: bool) -> list[Turn]:
        """Ask in another language."""
        return [self._listed("foreign", rng, self.foreign, held)]

    def gibberish(self, rng: random.Random, held: bool) -> list[Turn]:
        """Send what no one can understand: nothing, keys, repeated signs."""
        return [Turn("noise", noise(rng), self.noise["say"], self.noise["key"])]

    def name(self, rng: random.Random, held: bool, name: str | None) -> list[Turn]:
        """Ask the guide who it is."""
        question = self.pick(rng, "name", held)
        if name is None:
            return [Turn("name", question, DEFAULT_NAME, "guide of mlx-llama")]
        return [Turn("name", question, f"I am {name}.", rf"I am {re.escape(name)}\b")]

    def user(self, rng: random.Random, held: bool) -> list[Turn]:
        """Tell one's name, and ask for it later."""
        name = a_name(rng)
        told = self.pick(rng, "user", held, n=name)
        asked = self.pick(rng, "user", held, "follow")
        key = rf"\b{re.escape(name)}\b"
        turns = [Turn("user", told, f"Nice to meet you, {name}.", key)]
        for _ in range(rng.choice((0, 0, 1, 2))):
            turns += self.segment(rng, held, may_ask_names=False)
        return [*turns, Turn("user", asked, f"Your name is {name}.", key, is_follow_up=True)]

    def segment(
        self, rng: random.Random, held: bool, *, name: str | None = None, may_ask_names: bool = True
    ) -> list[Turn]:
        """Draw the turns of one subject."""
        if may_ask_names and rng.random() < (0.06 if name is None else 0.35):
            return self.name(rng, held, name)
        if may_ask_names and rng.random() < 0.05:
            return self.user(rng, held)
        families = list(self.families.values())
        draw = rng.choices(families, [weight for weight, _ in families])[0][1]
        return draw(rng, held)

    def system(self, rng: random.Random, held: bool = False) -> tuple[str | None, str | None]:
        """Draw a system prompt and the name that it gives, either of them None."""
        draw = rng.random()
        if draw < 0.65:
            return None, None
        if draw < 0.9:
            name = a_name(rng)
            frames = self.frames["name"]["system_held_out" if held else "system"]
            return rng.choice(frames).format(n=name), name
        return rng.choice(self.frames["name"]["plain_system"]), None


def _memory_turn(question: str, size: Size, bits: int) -> Turn:
    needed = f"{size.gigabytes(bits):.3g} GB"
    answer = f"The weights of {size.names[0]} take {needed} at {bits} bits."
    return Turn("memory", question, answer, rf"(?<![\d.]){re.escape(needed)} at {bits} bits")


def _shape_turn(question: str, size: Size, field: str) -> Turn:
    value = getattr(size, field)
    answer = f"{size.names[0]} has {value} {SHAPE_NAMES[field][0]}."
    return Turn("shape", question, answer, rf"(?<!\d){value} ")


def _make_turn(question: str, size: Size, bits: int | None) -> Turn:
    command = f"mlx-llama convert {size.folder}" + ("" if bits is None else f" --bits {bits}")
    end = r"(?! --bits)" if bits is None else ""
    return Turn("make", question, command, re.escape(command) + end)


def _sum_turn(question: str, left: int, right: int, kind: str) -> Turn:
    result = left + right if kind == "plus" else left - right
    answer = f"{left} {'+' if kind == 'plus' else '-'} {right} = {result}."
    return Turn("arithmetic", question, answer, rf"= {result}(?!\d)")


def dialogs_of(rng: random.Random, turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """Return the turns as typed by a user."""
    # What the answer repeats stays as it is.
    return tuple(
        turn
        if turn.group in ("user", "repeat")
        else replace(turn, question=as_typed(rng, turn.question))
        for turn in turns
    )
