"""What a sliding context has dropped of a conversation, in tokens and turns."""

from __future__ import annotations

from mlx_llama import Message, Session


class Dropped:
    """Remembers what was said of it, so that each loss is said once."""

    def __init__(self) -> None:
        self._told = 0  # tokens
        self._ends: dict[int, int] = {}  # by number of messages: tokens that they take

    def are_told(self, session: Session) -> None:
        """Say nothing of what a session has dropped so far."""
        self._told = session.cache.forgotten

    def forget_ends(self) -> None:
        """Count messages anew: they begin otherwise."""
        self._ends.clear()

    def note_end(self, session: Session) -> None:
        """Note what the messages take, of which the last has just been answered."""
        self._ends[len(session.messages)] = len(session.tokens)

    def said(self, session: Session, *, date: str | None) -> str | None:
        """Return what is to be said when an answer has ended; None when nothing new was dropped."""
        cache, told = session.cache, self._told
        self._told = cache.forgotten
        if cache.forgotten <= told:
            return None
        until, messages = cache.keep + cache.forgotten, session.messages
        n_turns = sum(
            self._end_of(number, session, date) <= until
            for number, message in enumerate(messages, 1)
            if message.role == "assistant"
        )
        turns = {0: "part of 1 turn", 1: "1 turn"}.get(n_turns, f"{n_turns} turns")
        has_system = bool(messages) and messages[0].role == "system"
        kept = "the system prompt is" if has_system else "its first tokens are"
        return (
            f"the context is full: the oldest {cache.forgotten} tokens ({turns}) are dropped, "
            f"{kept} kept"
        )

    def _end_of(self, number: int, session: Session, date: str | None) -> int:
        if number not in self._ends:
            messages = [*session.messages[:number], Message("user", "")]
            self._ends[number] = len(session.prompt_format.encode(messages, date=date))
        return self._ends[number]
