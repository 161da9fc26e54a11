"""Trains a tokenizer.model in Llama 3's format on the guide's text.

Merges are learnt by the `tokenizers` library and written as tiktoken's ranks. Digits are never
merged: sums are learnt digit by digit.
"""

from __future__ import annotations

import base64
from pathlib import Path

from mlx_llama.tokenizer.bpe import PATTERN
from training.dialogs import Guide
from training.text import sample_text

N_RANKS = 2048
N_TURNS = 60_000


def train_tokenizer(path: Path, guide: Guide, *, seed: int, n_turns: int = N_TURNS) -> None:
    """Write tokenizer.model: the 256 bytes, then merges by rank."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = Regex(PATTERN.replace(r"\p{N}{1,3}", r"\p{N}"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=N_RANKS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sample_text(guide, seed=seed, n_turns=n_turns)], trainer)
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    letters = byte_letters()
    merged = [bytes(letters[c] for c in by_id[number]) for number in range(len(by_id))]
    tokens = [bytes((value,)) for value in range(256)]
    tokens += [token for token in merged if len(token) > 1]
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    path.write_text("".join(lines), encoding="ascii")


def byte_letters() -> dict[str, int]:
    """Return the byte that each letter of GPT-2's byte alphabet stands for."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(value): value for value in printable}
    others = [value for value in range(256) if value not in printable]
    return letters | {chr(256 + index): value for index, value in enumerate(others)}
