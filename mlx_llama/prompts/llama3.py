"""The chat formats of Llama 3 and of 3.1 to 3.3: headers and ends made of special tokens.

Source: meta-llama/llama3, llama/tokenizer.py, ChatFormat (contents stripped), and
meta-llama/llama-models, models/llama3/chat_format.py, ChatFormat (not stripped).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mlx_llama.errors import OptionError
from mlx_llama.prompts.base import Message, refuse_date, special_id, split_answer
from mlx_llama.tokenizer.base import Tokenizer

DATE_BLOCK = "Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n"


class Llama3Format:
    """BOS, then `<|start_header_id|>role<|end_header_id|>`, two newlines, content, `<|eot_id|>`."""

    strips_leading_space = False

    def __init__(
        self, tokenizer: Tokenizer, *, name: str, is_dated: bool, is_stripped: bool
    ) -> None:
        """Take the tokenizer and what tells Llama 3 from its successors."""
        self.name = name
        self._tokenizer = tokenizer
        self._is_dated = is_dated
        self._is_stripped = is_stripped
        self._start = special_id(tokenizer, "<|start_header_id|>")
        self._end = special_id(tokenizer, "<|end_header_id|>")
        self._eot = special_id(tokenizer, "<|eot_id|>")

    def encode(
        self,
        messages: Sequence[Message],
        *,
        date: str | None = None,
        continue_last: bool = False,
    ) -> list[int]:
        """Return the prompt; special tokens named in contents stay plain text."""
        messages, begun = split_answer(messages, continue_last=continue_last)
        if date is not None:
            messages = self._dated(messages, date)
        ids = [self._tokenizer.bos_id]
        for message in messages:
            ids += self._header(message.role)
            ids += self._content(message)
            ids.append(self._eot)
        ids += self._header("assistant")
        return ids if begun is None else ids + self._begun(begun)

    def _header(self, role: str) -> list[int]:
        name = "ipython" if role == "tool" else role
        # Meta encodes the newlines apart from the content: "\n\n" and "\n" stay two tokens.
        newlines = self._tokenizer.encode("\n\n")
        return [self._start, *self._tokenizer.encode(name), self._end, *newlines]

    def _content(self, message: Message) -> list[int]:
        text = message.content.strip() if self._is_stripped else message.content
        return self._ids(message, text)

    def _begun(self, message: Message) -> list[int]:
        text = message.content.lstrip() if self._is_stripped else message.content
        return self._ids(message, text)

    def _ids(self, message: Message, text: str) -> list[int]:
        if message.token_ids is not None:
            return list(message.token_ids)
        return self._tokenizer.encode(text)

    def _dated(self, messages: Sequence[Message], date: str) -> list[Message]:
        """Return the messages with the date at the head of the system message."""
        if not self._is_dated:
            refuse_date(self.name, date)
        if not date.strip() or len(date.splitlines()) != 1:
            raise OptionError(f'date: {date!r:.40} is not one line such as "26 Jul 2024"')
        block = DATE_BLOCK.format(date=date)
        if messages and messages[0].role == "system":
            first = messages[0]
            return [replace(first, content=block + first.content), *messages[1:]]
        return [Message("system", block), *messages]
