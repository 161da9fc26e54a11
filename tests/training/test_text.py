"""Training rows are the tokens that the program itself would write."""

from __future__ import annotations

import random

import pytest

from mlx_llama.kinds import KINDS
from mlx_llama.prompts import Message, prompt_format
from training.dialogs import Dialog, Guide, Turn
from training.text import ODD_LENGTHS, Encoder, batch, odd_row, open_tokenizer
from training.tokenizer import N_RANKS, train_tokenizer

TURNS = (Turn("", "what is RoPE?", "It turns pairs.", ""), Turn("", "and 12 + 30?", "42", ""))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(path, Guide(), seed=1, n_turns=4000)
    return Encoder(open_tokenizer(path))


def test_dialogs_are_encoded_as_the_chat_does(encoder: Encoder) -> None:
    tokenizer = encoder.tokenizer
    row = encoder.dialog(Dialog(TURNS, "You are Ada."))
    chat = prompt_format(KINDS["llama3.1-instruct"], tokenizer)
    messages = [Message("system", "You are Ada.")]
    learnt: list[int] = []
    for turn in TURNS:
        messages.append(Message("user", turn.question))
        prompt = chat.encode(messages)
        assert row.ids[: len(prompt)] == prompt
        messages.append(Message("assistant", turn.answer))
        learnt += [*tokenizer.encode(turn.answer), tokenizer.special_tokens["<|eot_id|>"]]
    assert [i for i, is_learnt in zip(row.ids, row.is_learnt, strict=True) if is_learnt] == learnt


def test_rows_are_a_function_of_seed_and_step(encoder: Encoder) -> None:
    guide = Guide()
    rows = [batch(encoder, guide, seed=1, step=step, n_tokens=1024) for step in range(40)]
    assert rows == [batch(encoder, Guide(), seed=1, step=s, n_tokens=1024) for s in range(40)]
    assert rows != [batch(encoder, guide, seed=2, step=step, n_tokens=1024) for step in range(40)]
    sizes = [sum(len(row.ids) for row in step) for step in rows]
    assert max(sizes) <= 2 * max(ODD_LENGTHS)
    assert sum(size <= 1024 for size in sizes) >= 30
    for step in rows:
        assert all(len(row.ids) == len(row.is_learnt) and any(row.is_learnt) for row in step)
        assert all(row.ids[0] == encoder.tokenizer.bos_id for row in step)


def test_long_input_without_sense_is_answered_in_a_line(encoder: Encoder) -> None:
    guide, rng = Guide(), random.Random(1)
    rows = [(n, odd_row(rng, encoder, guide, n)) for n in ODD_LENGTHS for _ in range(60)]
    assert all(len(row.ids) <= length for length, row in rows)
    assert sum(len(row.ids) > 1024 for _, row in rows) > 5
    answers = {guide.noise["say"], guide.foreign["say"]}
    ends = encoder.tokenizer.special_tokens["<|eot_id|>"]
    for _, row in rows:
        learnt = [i for i, is_learnt in zip(row.ids, row.is_learnt, strict=True) if is_learnt]
        assert learnt.pop() == ends
        assert encoder.tokenizer.decode(learnt) in answers


def test_digits_stay_apart_and_words_are_whole(encoder: Encoder) -> None:
    tokenizer = encoder.tokenizer
    assert tokenizer.vocab_size == N_RANKS + 256
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("what is 47 + 305?")]
    assert pieces == ["what", " is", " ", "4", "7", " +", " ", "3", "0", "5", "?"]
    text = "Grüße, 你好 🙂 \n\t--kv-bits"
    assert tokenizer.decode(tokenizer.encode(text)) == text
