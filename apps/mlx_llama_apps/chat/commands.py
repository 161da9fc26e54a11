"""What begins with a slash: one table of name, help and action."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol


class Chat(Protocol):
    """What an action may do."""

    def say(self, text: str) -> None:
        """Print a remark of the program's own."""
        ...

    def clear(self) -> None:
        """Forget the conversation."""
        ...

    def leave(self) -> None:
        """End the chat after this command."""
        ...


@dataclass(frozen=True, slots=True)
class Command:
    """One command of the chat. The name has no slash."""

    name: str
    help: str
    action: Callable[[Chat], None]


def _help(chat: Chat) -> None:
    width = max(len(name) for name in COMMANDS)
    for command in COMMANDS.values():
        chat.say(f"/{command.name:<{width}}  {command.help}")
    chat.say("//text sends a line that begins with a slash")
    chat.say("Ctrl-C stops an answer, Ctrl-D leaves")


def _clear(chat: Chat) -> None:
    chat.clear()
    chat.say("The conversation is forgotten; system prompt and settings stay.")


COMMANDS: Mapping[str, Command] = {
    command.name: command
    for command in (
        Command("help", "show the commands", _help),
        Command("clear", "forget the conversation, keep the system prompt", _clear),
        Command("exit", "leave", lambda chat: chat.leave()),
    )
}


def parse(line: str) -> tuple[Command | None, str]:
    """Tell a command from a message: (command, "") or (None, the message to send).

    A message that begins with a slash is typed with two. Raises LookupError, with the nearest
    name, for a command that does not exist.
    """
    if not line.startswith("/"):
        return None, line
    if line.startswith("//"):
        return None, line[1:]
    name = line[1:].strip()
    if name in COMMANDS:
        return COMMANDS[name], ""
    word = name.split(" ", 1)[0]
    near = difflib.get_close_matches(word, COMMANDS, n=1)
    hint = f"did you mean /{near[0]}?" if near else "/help shows them"
    raise LookupError(f"/{word} is no command; {hint}")
