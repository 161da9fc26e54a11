"""Puts what was typed to the model and shows its answer as it streams.

Owns what is to be offered again with the next prompt, and the files that go with it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mlx_llama.errors import ContextOverflowError, OptionError
from mlx_llama_apps.chat.commands import as_typed
from mlx_llama_apps.chat.parts import Parts
from mlx_llama_apps.chat.settings import with_keys
from mlx_llama_apps.chat.talk import Talk
from mlx_llama_apps.progress import prefill_progress
from mlx_llama_apps.terminal import StatusLine

if TYPE_CHECKING:
    from mlx_llama import Step

Answering = Callable[[Talk, threading.Event, Callable[[int, int], None]], "Iterator[Step]"]

UNBEGUN = {
    "cancelled": "stopped before the answer began",
    "timeout": "the timeout was over before the answer began",
}
GO_ON = "/continue goes on, or send it again"
KEPT = "what was said before is kept"


@dataclass(frozen=True, slots=True)
class Offer:
    """A draft for the next prompt. instead_of: questions, one of which it takes the place of."""

    text: str = ""
    instead_of: tuple[str, ...] = ()
    is_edit: bool = False


NOTHING = Offer()


@dataclass(frozen=True, slots=True)
class Attachment:
    """A file that goes with the next message."""

    name: str
    text: str
    n_tokens: int


class Answers:
    """Asks, asks again and goes on. clear: begins a new chat and says so."""

    def __init__(self, parts: Parts, clear: Callable[[], None]) -> None:
        self._parts = parts
        self._clear = clear
        self.attached: list[Attachment] = []
        self._offer = NOTHING
        self._is_shown = False  # something of the answer on its way

    def offered(self) -> Offer:
        """Return what is to be offered with the next prompt, once."""
        offer, self._offer = self._offer, NOTHING
        return offer

    def ask(self, message: str, offer: Offer) -> None:
        """Send a message with the files that wait for one. offer: the draft that it was made of."""
        attached, self.attached = self.attached, []
        text = "\n\n".join([*(f"{each.name}:\n{each.text}" for each in attached), message])
        refused = replace(offer, text=as_typed(message))
        stopped = replace(refused, instead_of=(*offer.instead_of, text))
        try:
            self._answer(
                lambda talk, *hooks: talk.ask(text, *hooks, instead_of=offer.instead_of),
                refused=refused,
                stopped=stopped,
                unbegun=f"{KEPT}; send it again" if offer.is_edit else GO_ON,
            )
        finally:
            if self._offer.text:  # its files are offered again with it
                self.attached = attached

    def drop_files(self) -> None:
        """Let no file wait for the next message, which is another chat's; say so."""
        if self.attached:
            names = ", ".join(each.name for each in self.attached)
            self._parts.view.say(f"no file goes with the next message any more ({names})")
            self.attached = []

    def edit(self) -> None:
        """Offer the last question to be changed; sent, it takes the old one's place."""
        asked = self._last_question()
        self._offer = Offer(as_typed(asked), (asked,), is_edit=True)

    def _last_question(self) -> str:
        messages = self._parts.inference.call(lambda talk: talk.session.messages)
        asked = [message.content for message in messages if message.role == "user"]
        if not asked:
            raise OptionError("nothing was asked yet")
        return asked[-1]

    def retry(self) -> None:
        """Answer the last question anew, with another seed."""
        self._last_question()
        if self._parts.settings.value("temperature") == 0:
            self._parts.view.say(
                "temperature is 0, so another seed changes nothing; /set temperature does"
            )
        self._answer(lambda talk, *hooks: talk.retry(*hooks), unbegun=KEPT)

    def continue_answer(self) -> None:
        """Go on with a cut answer, shown from its last block."""
        messages = self._parts.inference.call(
            lambda talk: talk.session.messages if talk.session.can_continue else []
        )
        begun = messages[-1].content if messages else ""
        self._answer(
            lambda talk, *hooks: talk.continue_answer(*hooks),
            unbegun="/continue goes on",
            begun=begun,
        )

    def _answer(
        self,
        answering: Answering,
        *,
        unbegun: str,
        refused: Offer = NOTHING,
        stopped: Offer = NOTHING,
        begun: str = "",
    ) -> None:
        """Stream an answer. What is offered when it is refused, or stopped before it began.

        unbegun: what is said then. begun: what the answer had already.
        """
        try:
            reason = self._stream(answering, begun, unbegun)
        except ContextOverflowError as error:
            self._parts.view.say(with_keys(str(error), "/set {}"))
            self._on_full(
                lambda: self._answer(answering, unbegun=unbegun, refused=refused, stopped=stopped),
                refused,
            )
            return
        except BaseException:
            # What was seen is kept with its question, and not offered again.
            self._offer = NOTHING if self._is_shown else refused
            raise
        if reason is None:
            self._offer = stopped
        elif reason == "context":
            self._on_full(self.continue_answer, NOTHING)

    def _stream(self, answering: Answering, begun: str, unbegun: str) -> str | None:
        """Show an answer as it comes; return why it ended, None when it never began."""
        reason, stats = None, None
        self._is_shown = False
        hushed = self._parts.reader.hushed(
            self._parts.inference.interrupt, self._parts.view.resumed
        )
        with hushed, StatusLine() as status:
            on_prefill = prefill_progress(status)
            # Until the first slice is over, which may take longer, there is nothing to count.
            waiting = threading.Timer(1.05, status.show, ["reading the prompt"])
            waiting.daemon = True
            waiting.start()
            steps = self._parts.inference.stream(
                lambda talk, cancel: answering(talk, cancel, on_prefill)
            )
            try:
                for step in steps:
                    reason, stats = step.finish_reason, step.stats
                    if step.token_id is None and not self._is_shown:
                        continue
                    if not self._is_shown:
                        status.close()
                        self._parts.view.begin_answer(begun)
                        self._is_shown = True
                    self._parts.view.write(step.text)
            except BaseException:
                if self._is_shown:
                    self._parts.view.end_answer(None, None)
                raise
            finally:
                waiting.cancel()
        reason = "cancelled" if reason is None else reason
        if not self._is_shown:
            self._parts.view.say(f"{UNBEGUN.get(reason, reason)}; {unbegun}")
            return None
        self._parts.view.end_answer(reason, stats)
        return reason

    def _on_full(self, go_on: Callable[[], None], offer: Offer) -> None:
        """Ask what a full context is to do, unless that was decided."""
        self._offer = offer
        if self._parts.settings.value("on_full") != "ask":
            return
        self._parts.view.say(
            "The context is full. s drops the oldest turns as needed and goes on, n begins a new "
            "chat, Enter leaves it as it is."
        )
        answer = self._parts.reader.choose("s, n or Enter?")
        choice = answer.lower()
        if choice in ("s", "slide"):
            self._offer = NOTHING
            self._parts.inference.call(lambda talk: talk.set("on_full", "slide"))
            self._parts.view.say("on_full is slide (/set)")
            go_on()
        elif choice in ("n", "new"):
            self._clear()
            self._offer = Offer(offer.text)
        elif not offer.text:
            self._offer = Offer(answer)  # what was typed ahead of the question
