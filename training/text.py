"""Turns conversations into tokens: rows of training text, with what the loss is taken on.

Takes a guide and a tokenizer that our own reader has opened. A row is a function of its seed alone,
so a run that is continued sees what it would have seen.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_llama.tokenizer import Tokenizer
from training.dialogs import Dialog, Guide, Turn, dialogs_of

ROW_LENGTHS = (96, 192, 384, 768)
ROW_SHARES = (0.25, 0.35, 0.25, 0.15)
PLAIN_SHARE = 0.04  # of the batches: text without a chat format, learnt from the first token on
COPY_SHARE = 0.06  # of the batches: random tokens again and again, which teach attention to copy
ODD_SHARE = 0.08  # of the batches: a long input without sense, or in another language
ODD_LENGTHS = (512, 1024, 2048, 4096)  # tokens of such an input at most
AROUND_ODD = 64  # tokens of the headers and the answer, at most
SUMS_SHARE = 0.08  # of the batches: sums as they are answered, line by line; results are learnt
DATE = "Cutting Knowledge Date: December 2023\nToday Date: {day} {month} {year}\n\n"
MONTHS = "January February March April May June July August September October November December"


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens, and for each whether the model is to learn it."""

    ids: list[int]
    is_learnt: list[bool]


class Encoder:
    """Writes Llama 3's chat format; a test compares it with `mlx_llama.prompts`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Take a tokenizer with Llama 3's special tokens."""
        self.tokenizer = tokenizer
        special = tokenizer.special_tokens
        self._start, self._end = special["<|start_header_id|>"], special["<|end_header_id|>"]
        self.eot = special["<|eot_id|>"]
        self._newlines = tokenizer.encode("\n\n")

    def header(self, role: str) -> list[int]:
        """Return what stands before a message."""
        return [self._start, *self.tokenizer.encode(role), self._end, *self._newlines]

    def begin(self, system: str | None) -> Row:
        """Return BOS and the system message, if there is one."""
        ids = [self.tokenizer.bos_id]
        if system is not None:
            ids += [*self.header("system"), *self.tokenizer.encode(system), self.eot]
        return Row(ids, [False] * len(ids))

    def turn(self, turn: Turn) -> Row:
        """Return a question, which is not learnt, and its answer, which is."""
        asked = self.header("user") + self.tokenizer.encode(turn.question)
        asked += [self.eot, *self.header("assistant")]
        answer = [*self.tokenizer.encode(turn.answer), self.eot]
        return Row(asked + answer, [False] * len(asked) + [True] * len(answer))

    def dialog(self, dialog: Dialog) -> Row:
        """Return a whole conversation."""
        row = self.begin(dialog.system)
        for turn in dialog.turns:
            more = self.turn(turn)
            row = Row(row.ids + more.ids, row.is_learnt + more.is_learnt)
        return row


def batch(encoder: Encoder, guide: Guide, *, seed: int, step: int, n_tokens: int) -> list[Row]:
    """Return the rows of a step, of one length, about n_tokens together."""
    rng = random.Random(f"{seed}/{step}")
    length = rng.choices(ROW_LENGTHS, ROW_SHARES)[0]
    shares = (PLAIN_SHARE, COPY_SHARE, SUMS_SHARE, ODD_SHARE)
    kinds = (plain_row, copy_row, sums_row, odd_row, chat_row)
    make = rng.choices(kinds, (*shares, 1 - sum(shares)))[0]
    if make is odd_row:
        length, n_tokens = rng.choice(ODD_LENGTHS), 2 * max(ODD_LENGTHS)
    return [make(rng, encoder, guide, length) for _ in range(max(1, n_tokens // length))]


def chat_row(rng: random.Random, encoder: Encoder, guide: Guide, length: int) -> Row:
    """Return a conversation that fills a row as far as whole subjects do."""
    system, name = guide.system(rng)
    if rng.random() < 0.05:
        day, year = rng.randint(1, 28), rng.randint(2023, 2030)
        system = DATE.format(day=day, month=rng.choice(MONTHS.split()), year=year) + (system or "")
    row = encoder.begin(system)
    misses = 0
    while misses < 4:
        part = Row([], [])
        for turn in dialogs_of(rng, guide.segment(rng, False, name=name)):
            more = encoder.turn(turn)
            part = Row(part.ids + more.ids, part.is_learnt + more.is_learnt)
        if len(row.ids) + len(part.ids) > length:
            misses += 1
            continue
        row = Row(row.ids + part.ids, row.is_learnt + part.is_learnt)
    return row


def plain_row(rng: random.Random, encoder: Encoder, guide: Guide, length: int) -> Row:
    """Return questions and answers as plain text, cut to the row's length."""
    ids = encoder.begin(None).ids
    while len(ids) < length:
        for turn in dialogs_of(rng, guide.segment(rng, False)):
            ids += encoder.tokenizer.encode(f"{turn.question}\n{turn.answer}\n\n")
    return Row(ids[:length], [False] + [True] * (length - 1))


def copy_row(rng: random.Random, encoder: Encoder, guide: Guide, length: int) -> Row:
    """Return spans of random tokens, each of them repeated; what repeats is learnt."""
    del guide
    row = encoder.begin(None)
    while len(row.ids) < length:
        span = rng.choices(range(encoder.tokenizer.bos_id), k=rng.randint(2, 24))
        times = rng.randint(2, 3)
        is_learnt = [False] * len(span) + [True] * len(span) * (times - 1)
        row = Row(row.ids + span * times, row.is_learnt + is_learnt)
    return Row(row.ids[:length], row.is_learnt[:length])


def sums_row(rng: random.Random, encoder: Encoder, guide: Guide, length: int) -> Row:
    """Return the answers to sums, one in a line, of which what stands behind = is learnt."""
    row = encoder.begin(None)
    while len(row.ids) < length:
        (turn, *_) = guide.arithmetic(rng, False)
        task, result = turn.answer.split("=")
        asked = encoder.tokenizer.encode(f"{task}=")
        learnt = encoder.tokenizer.encode(f"{result}\n")
        is_learnt = [False] * len(asked) + [True] * len(learnt)
        row = Row(row.ids + asked + learnt, row.is_learnt + is_learnt)
    return Row(row.ids[:length], row.is_learnt[:length])


def odd_row(rng: random.Random, encoder: Encoder, guide: Guide, length: int) -> Row:
    """Return one long input that says the same again and again, and its short answer."""
    (turn,) = rng.choice((guide.gibberish, guide.other_language))(rng, False)
    text = (turn.question or " ") + rng.choice(("", " "))
    times = (length - AROUND_ODD) // len(encoder.tokenizer.encode(text))
    question = text * rng.randint(1, min(60, max(1, times)))
    row = encoder.begin(None)
    more = encoder.turn(replace(turn, question=question))
    return Row(row.ids + more.ids, row.is_learnt + more.is_learnt)


def sample_text(guide: Guide, *, seed: int, n_turns: int, held: bool = False) -> str:
    """Return plain text of questions and answers, to train a tokenizer or to measure on."""
    rng = random.Random(seed)
    parts: list[str] = []
    while len(parts) < n_turns:
        name = guide.system(rng)[1]
        turns: Sequence[Turn] = guide.segment(rng, held, name=name)
        if not held:
            turns = dialogs_of(rng, turns)
        parts += [f"{turn.question}\n{turn.answer}\n" for turn in turns]
    return "\n".join(parts)


def open_tokenizer(path: Path) -> Tokenizer:
    """Open a tokenizer.model with the program's own reader."""
    from mlx_llama.tokenizer.bpe import read_tiktoken

    return read_tiktoken(path, path.read_bytes())
