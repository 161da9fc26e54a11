"""The chat format of Code Llama 70B Instruct: sources, destinations and `<step>`.

Source: meta-llama/codellama, llama/generation.py, dialog_prompt_tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlx_llama.prompts.base import (
    Message,
    refuse_date,
    refuse_tags,
    special_id,
    split_answer,
    split_system,
)
from mlx_llama.prompts.llama2 import TAGS
from mlx_llama.tokenizer.base import Tokenizer

STEP = "<step>"
_BODY = "\n\n "


class CodeLlama70bFormat:
    """BOS, then per message a header, an indented body and `<step>`.

    Header and body are encoded apart, as in Meta's code, so each gets SentencePiece's added space.
    A system message is always there, if need be without a body.
    """

    name = "codellama-70b"
    strips_leading_space = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Take the tokenizer; TokenizerError unless it has `<step>`."""
        self._tokenizer = tokenizer
        self._step = special_id(tokenizer, STEP)

    def encode(
        self,
        messages: Sequence[Message],
        *,
        date: str | None = None,
        continue_last: bool = False,
    ) -> list[int]:
        """Return the prompt; contents are stripped, user and assistant alternate."""
        refuse_date(self.name, date)
        refuse_tags(self.name, messages, (*TAGS, STEP))
        messages, begun = split_answer(messages, continue_last=continue_last)
        system, rest = split_system(self.name, messages)
        ids = [self._tokenizer.bos_id]
        for message in (Message("system", system or ""), *rest):
            ids += [*self._header(message.role), *self._body(message), self._step]
        return ids + self._header("assistant") + self._begun(begun)

    def _header(self, role: str) -> list[int]:
        destination = "\nDestination: user" if role == "assistant" else ""
        return self._tokenizer.encode(f" Source: {role}{destination}")

    def _body(self, message: Message) -> list[int]:
        if message.token_ids is not None:
            return self._begun(message)
        if not message.content:
            return []
        return self._tokenizer.encode(_BODY + message.content.strip())

    def _begun(self, begun: Message | None) -> list[int]:
        """Return the body as far as the answer has come; generated tokens follow its indent."""
        if begun is None:
            return self._tokenizer.encode(_BODY)
        if begun.token_ids is None:
            return self._tokenizer.encode(_BODY + begun.content.lstrip())
        return [*self._tokenizer.encode(_BODY), *begun.token_ids]
