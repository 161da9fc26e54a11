"""A conversation with a model, as the inference thread holds it; knows no terminal."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from mlx_llama.errors import OptionError

if TYPE_CHECKING:
    from mlx_llama import Llama, Session, Step

OnPrefill = Callable[[int, int], None]


class Talk(Protocol):
    """What the chat needs of a conversation."""

    llama: Llama
    session: Session

    def answer(
        self, text: str, *, on_prefill: OnPrefill, cancel: threading.Event
    ) -> Iterator[Step]:
        """Add what the user typed and answer it."""
        ...

    def clear(self) -> None:
        """Forget the conversation; the system prompt stays."""
        ...


class MessageTalk:
    """Messages in the model's chat format."""

    def __init__(
        self,
        llama: Llama,
        *,
        system: str | None,
        date: str | None,
        options: dict[str, Any],
        context: dict[str, Any],
    ) -> None:
        from mlx_llama import Message

        self.llama = llama
        self._date = date
        self._options = options
        self._opening = [] if system is None else [Message("system", system)]
        self.session = llama.session(**context)
        # Tried now, so that what cannot work is refused before the first question.
        llama.prompt_format.encode([*self._opening, Message("user", "")], date=date)
        self.clear()

    def answer(
        self, text: str, *, on_prefill: OnPrefill, cancel: threading.Event
    ) -> Iterator[Step]:
        """Ask the session, which prefills the new turn alone."""
        return self.session.ask(
            text, date=self._date, on_prefill=on_prefill, cancel=cancel, **self._options
        )

    def clear(self) -> None:
        """Forget the conversation; the system prompt stays."""
        self.session.clear()
        self.session.messages = list(self._opening)


class TextTalk:
    """A base model: one growing text, which the model continues where the user stops."""

    def __init__(self, llama: Llama, *, options: dict[str, Any], context: dict[str, Any]) -> None:
        self.llama = llama
        self._options = options
        self.session = llama.session(**context)
        self._ids: list[int] = []

    def answer(
        self, text: str, *, on_prefill: OnPrefill, cancel: threading.Event
    ) -> Iterator[Step]:
        """Append the text and continue it; an error leaves everything as it was."""
        ids = self._ids + self._encode(text, is_first=not self._ids)
        answer, shown = list[int](), ""
        steps = self.session.complete(ids, on_prefill=on_prefill, cancel=cancel, **self._options)
        for step in steps:
            if step.token_id is not None:
                answer.append(step.token_id)
            shown += step.text
            if (
                step.finish_reason == "stop"
            ):  # the tokens hold the stop text, what is shown does not
                answer = self._encode(shown, is_first=False)
            elif step.finish_reason == "eos":  # what the user adds continues the same text
                answer.pop()
            if step.finish_reason is not None:
                self._ids = ids + answer
            yield step

    def _encode(self, text: str, *, is_first: bool) -> list[int]:
        """Return the tokens of a text that follows other text."""
        tokenizer = self.llama.tokenizer
        if is_first or tokenizer.family != "sentencepiece":
            return tokenizer.encode(text, bos=is_first)
        # SentencePiece puts a space before every text; a line break, which joins nothing, takes it.
        return tokenizer.encode("\n" + text)[len(tokenizer.encode("\n")) :]

    def clear(self) -> None:
        """Begin a new text."""
        self._ids.clear()
        self.session.clear()


def make_talk(
    llama: Llama,
    *,
    system: str | None,
    date: str | None,
    options: dict[str, Any],
    context: dict[str, Any],
) -> Talk:
    """Begin the conversation that suits the model's kind."""
    from mlx_llama.sampling import bias_by_token

    bias_by_token(options.get("logit_bias", {}), llama.tokenizer)
    if not llama.kind.is_base:
        return MessageTalk(llama, system=system, date=date, options=options, context=context)
    if system is not None or date is not None:
        raise OptionError(
            f"--system and --date: {llama.path.name} is a base model ({llama.kind.name}), which "
            "has no chat format"
        )
    return TextTalk(llama, options=options, context=context)
