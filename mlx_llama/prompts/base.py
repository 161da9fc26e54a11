"""Messages, and what a prompt format makes of them.

Owns `Message`, the check of what callers pass as messages, and the protocol of the formats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mlx_llama.errors import OptionError, TokenizerError
from mlx_llama.tokenizer.base import Tokenizer

ROLES = ("system", "user", "assistant", "tool", "ipython")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    role: one of ROLES; "ipython" is Llama 3's word for "tool". token_ids: of an answer, the tokens
    that the model generated, without the one that ended it; they stand for the content in later
    prompts, which then extend what a cache holds. is_cut: the answer did not come to its own end,
    and can be continued. seed: what an answer was drawn with, and goes on with; no part of what was
    said, so that messages are compared without it.
    """

    role: str
    content: str
    token_ids: tuple[int, ...] | None = None
    is_cut: bool = False
    seed: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise OptionError(f"messages: role {self.role!r:.40} is not one of {', '.join(ROLES)}")
        if not isinstance(self.content, str):
            raise OptionError(
                f"messages: the content of a {self.role} message is a "
                f"{type(self.content).__name__}, expected text"
            )
        if self.token_ids is not None and self.role != "assistant":
            raise OptionError(f"messages: token_ids belong to an answer, not to role {self.role}")


class PromptFormat(Protocol):
    """From messages to tokens, as one kind of model was trained.

    strips_leading_space: whether an answer begins with a space that is not part of its text.
    """

    @property
    def name(self) -> str:
        """Return the format's name, `Kind.prompt`."""
        ...

    @property
    def strips_leading_space(self) -> bool:
        """Return what `Tokenizer.detokenizer(at_start=...)` takes for an answer."""
        ...

    def encode(
        self,
        messages: Sequence[Message],
        *,
        date: str | None = None,
        continue_last: bool = False,
    ) -> list[int]:
        """Return the whole prompt, up to where the answer begins.

        date: today, such as "26 Jul 2024", for formats that tell the model; None leaves it out.
        continue_last: the last message is a cut answer, and the prompt ends inside it.

        Raises: OptionError for messages or settings that the format has no place for.
        """
        ...


def as_messages(items: Sequence[Message | Mapping[str, str]]) -> list[Message]:
    """Return checked messages; mappings hold "role" and "content" and nothing else."""
    if isinstance(items, (str, bytes, Mapping)) or not isinstance(items, Sequence):
        raise OptionError(f"messages: expected a list of messages, not {type(items).__name__}")
    return [_as_message(item, number) for number, item in enumerate(items, 1)]


def _as_message(item: Message | Mapping[str, str], number: int) -> Message:
    if isinstance(item, Message):
        return item
    if not isinstance(item, Mapping) or set(item) != {"role", "content"}:
        raise OptionError(
            f"messages: number {number} is not {{'role': ..., 'content': ...}} and nothing else"
        )
    return Message(item["role"], item["content"])


def special_id(tokenizer: Tokenizer, name: str) -> int:
    """Return the id of a special token that a format cannot do without."""
    token_id = tokenizer.special_tokens.get(name)
    if token_id is None:
        raise TokenizerError(
            f"{tokenizer.path}: no token {name}, so this tokenizer belongs to another kind of "
            "model; check --kind"
        )
    return token_id


def refuse_date(name: str, date: str | None) -> None:
    """Raise OptionError when a format without a place for it is given a date."""
    if date is not None:
        raise OptionError(f"date: the {name} prompt format has no place for {date!r:.40}")


def split_answer(
    messages: Sequence[Message], *, continue_last: bool
) -> tuple[Sequence[Message], Message | None]:
    """Return the finished messages and, with continue_last, the answer that goes on."""
    if not messages:
        raise OptionError("messages: there are none; give one of the user's at least")
    if not continue_last:
        return messages, None
    if messages[-1].role != "assistant":
        raise OptionError(
            f"messages: only an answer can be continued, and the last message is the "
            f"{messages[-1].role}'s"
        )
    return messages[:-1], messages[-1]


def split_system(name: str, messages: Sequence[Message]) -> tuple[str | None, Sequence[Message]]:
    """Return the system text and the rest, which must go user, assistant, ..., user."""
    system = messages[0].content if messages and messages[0].role == "system" else None
    rest = messages if system is None else messages[1:]
    for index, message in enumerate(rest):
        expected = ("user", "assistant")[index % 2]
        if message.role != expected:
            number = index + 1 + (system is not None)
            raise OptionError(
                f"messages: number {number} is the {message.role}'s, but {name} takes system "
                f"first, then user and assistant in turn: expected {expected}"
            )
    if len(rest) % 2 == 0:
        raise OptionError(f"messages: {name} answers a user's message, and none is left to answer")
    return system, rest


def refuse_tags(name: str, messages: Sequence[Message], tags: Sequence[str]) -> None:
    """Raise OptionError when a content holds the format's own tags, as Meta's code refuses it.

    Answers with token_ids pass: the model wrote them itself.
    """
    for number, message in enumerate(messages, 1):
        for tag in tags:
            if message.token_ids is None and tag in message.content:
                raise OptionError(
                    f"messages: number {number} holds {tag}, which {name} uses to mark turns; "
                    "write it differently"
                )
