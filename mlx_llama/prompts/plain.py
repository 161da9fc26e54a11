"""A base model's "chat": one growing text that the user and the model write in turn.

Nothing stands between the messages: each goes on where the one before it ended.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlx_llama.errors import OptionError
from mlx_llama.prompts.base import Message, refuse_date
from mlx_llama.tokenizer.base import Tokenizer


class PlainFormat:
    """BOS, then the texts of all messages without anything between them."""

    name = "raw"
    strips_leading_space = False

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(
        self,
        messages: Sequence[Message],
        *,
        date: str | None = None,
        continue_last: bool = False,
    ) -> list[int]:
        """Return the text's tokens; OptionError for what a plain text has no place for."""
        del continue_last  # a text always goes on inside its last message
        refuse_date(self.name, date)
        ids: list[int] = []
        for message in messages:
            if message.role not in ("user", "assistant"):
                raise OptionError(
                    f"messages: a base model has no place for a {message.role} message"
                )
            if message.token_ids is not None:
                ids += message.token_ids
            else:
                ids += self._encode(message.content, is_first=not ids)
        return ids

    def _encode(self, text: str, *, is_first: bool) -> list[int]:
        """Return the tokens of a text that follows other text."""
        tokenizer = self._tokenizer
        if is_first or tokenizer.family != "sentencepiece":
            return tokenizer.encode(text, bos=is_first)
        # SentencePiece puts a space before every text; a line break, which joins nothing, takes it.
        return tokenizer.encode("\n" + text)[len(tokenizer.encode("\n")) :]
