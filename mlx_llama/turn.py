"""One answer on its way: what it answers, what it has yielded, and the message that it becomes.

Knows no model and no cache.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace

from mlx_llama.generation import OnForget, OnPrefill, Step
from mlx_llama.options import GenerationOptions
from mlx_llama.prompts import Message

# Why an answer ends that has not come to its own end, and can be continued; None: it was closed.
CUTS = (None, "cancelled", "timeout", "length", "context")


@dataclass(slots=True)
class Turn:
    """One answer. given: the messages that it answers, None for a plain text.

    opening: how many first ids are the system's, and kept when the context slides. begun: the cut
    answer that it continues. before: the messages there were. trimmed: the cached tokens that made
    room for it, while their rows can be counted again. steps: set when it has begun. taken: what it
    has yielded. seed: set when it is chosen.
    """

    ids: list[int]
    options: GenerationOptions
    at_start: bool
    on_prefill: OnPrefill | None
    on_forget: OnForget | None
    cancel: threading.Event | None
    given: list[Message] | None = None
    opening: int = 0
    begun: Message | None = None
    before: list[Message] = field(default_factory=list)
    trimmed: list[int] = field(default_factory=list)
    steps: Generator[Step] | None = None
    taken: list[Step] = field(default_factory=list)
    seed: int | None = None

    @property
    def answer(self) -> list[int]:
        """The tokens that it has yielded."""
        return [step.token_id for step in self.taken if step.token_id is not None]

    def take(self, step: Step) -> Step | None:
        """Note a step; return what is to be yielded of it.

        A first token that was on its way when the answer was cancelled is dropped where it would
        cost an answer: its row in the cache is then another's than the one that is kept.
        """
        if self._is_late(step) and self._costs_an_answer():
            self.trimmed = []
            if step.finish_reason is None:
                return None  # what ends the answer follows
            step = replace(step, token_id=None, text="", finish_reason="cancelled")
            step = replace(step, logprob=None, top_logprobs=())
        self.taken.append(step)
        return step

    def messages(self) -> list[Message]:
        """Return the conversation with what has come of the answer.

        It is the one before where nothing has come, and an answer would be lost for that.
        """
        if self.given is None or not self.taken or (not self.answer and self._costs_an_answer()):
            return self.before
        reason, answer = self.taken[-1].finish_reason, self.answer
        # A stop text is not part of the answer, but its tokens are among the ids.
        kept = None if reason == "stop" else tuple(answer[:-1] if reason == "eos" else answer)
        text = "".join(step.text for step in self.taken)
        if self.begun is not None:
            text = self.begun.content + text
            begun = self.begun.token_ids
            kept = None if kept is None or begun is None else (*begun, *kept)
        return [*self.given, Message("assistant", text, kept, reason in CUTS, self.seed)]

    def _is_late(self, step: Step) -> bool:
        """Whether a step is the first token, and comes after the answer was cancelled."""
        is_first = not self.taken and step.token_id is not None
        return is_first and self.cancel is not None and self.cancel.is_set()

    def _costs_an_answer(self) -> bool:
        """Whether an answer that says something would be no more."""
        lost = self.before[n_shared(self.before, self.given or ()) :]
        return self.begun is None and any(m.role == "assistant" and m.content for m in lost)


def n_shared(one: Sequence[object], other: Sequence[object]) -> int:
    """Return how many first items two sequences have in common."""
    for number, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return number
    return min(len(one), len(other))
