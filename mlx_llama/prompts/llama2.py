"""The chat format of Llama 2 and of Code Llama Instruct up to 34B: tags in plain text.

Source: meta-llama/llama, llama/generation.py, Llama.chat_completion.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlx_llama.prompts.base import (
    Message,
    refuse_date,
    refuse_tags,
    split_answer,
    split_system,
)
from mlx_llama.tokenizer.base import Tokenizer

TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")


class Llama2Format:
    """`BOS [INST] user [/INST] answer EOS` for every turn; the system text is in the first one."""

    name = "llama2"
    strips_leading_space = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Take the tokenizer of the model; the format needs only BOS and EOS of it."""
        self._tokenizer = tokenizer

    def encode(
        self,
        messages: Sequence[Message],
        *,
        date: str | None = None,
        continue_last: bool = False,
    ) -> list[int]:
        """Return the prompt; contents are stripped, user and assistant alternate."""
        refuse_date(self.name, date)
        refuse_tags(self.name, messages, TAGS)
        messages, begun = split_answer(messages, continue_last=continue_last)
        system, rest = split_system(self.name, messages)
        questions = [message.content for message in rest[::2]]
        if system is not None:
            questions[0] = f"<<SYS>>\n{system}\n<</SYS>>\n\n{questions[0]}"
        opened = [f"[INST] {question.strip()} [/INST]" for question in questions]
        ids: list[int] = []
        for head, answer in zip(opened[:-1], rest[1::2], strict=True):
            ids += self._turn(head, answer)
        return ids + self._open_turn(opened[-1], begun)

    def _turn(self, head: str, answer: Message) -> list[int]:
        """Return a finished turn.

        Generated tokens give the same ids as Meta's joint encoding of the text whenever they are
        the tokenizer's own choice for the stripped answer: no piece joins a space to what stands
        before it. Otherwise they differ, and agree with the cache.
        """
        tokenizer = self._tokenizer
        if answer.token_ids is None:
            return tokenizer.encode(f"{head} {answer.content.strip()} ", bos=True, eos=True)
        ids = [*tokenizer.encode(head, bos=True), *answer.token_ids]
        return [*ids, *self._trailing_space(), tokenizer.eos_id]

    def _open_turn(self, head: str, begun: Message | None) -> list[int]:
        tokenizer = self._tokenizer
        if begun is None:
            return tokenizer.encode(head, bos=True)
        if begun.token_ids is None:
            return tokenizer.encode(f"{head} {begun.content.lstrip()}", bos=True)
        return [*tokenizer.encode(head, bos=True), *begun.token_ids]

    def _trailing_space(self) -> list[int]:
        """Return what the space behind an answer adds (nothing where extra spaces are removed)."""
        before = self._tokenizer.encode(TAGS[1])
        return self._tokenizer.encode(TAGS[1] + " ")[len(before) :]
