"""What begins with a slash: one table of name, arguments, help, completion and action.

An action takes the chat and what stands behind the name. Draws nothing and knows no model: it asks
the chat, whose methods these are.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mlx_llama.errors import OptionError
from mlx_llama_apps.chat.settings import KEYS


class Chat(Protocol):
    """What an action may do; each method is one command's."""

    def say(self, text: str) -> None:
        """Print a remark of the program's own."""
        ...

    def table(self, rows: list[tuple[str, ...]]) -> None:
        """Print rows in columns."""
        ...

    def clear(self) -> None:
        """Begin a new chat."""
        ...

    def undo(self) -> None:
        """Take back the last turn."""
        ...

    def retry(self) -> None:
        """Answer the last question anew."""
        ...

    def edit(self) -> None:
        """Offer the last question to be changed."""
        ...

    def continue_answer(self) -> None:
        """Go on with a cut answer."""
        ...

    def copy(self) -> None:
        """Copy the last answer."""
        ...

    def show_settings(self, name: str) -> None:
        """List settings, or one of them."""
        ...

    def set(self, name: str, value: str) -> None:
        """Change a setting."""
        ...

    def system(self, text: str) -> None:
        """Show or set the system prompt."""
        ...

    def show(self) -> None:
        """Say what the model is."""
        ...

    def stats(self) -> None:
        """Say what the last answer cost."""
        ...

    def read_file(self, name: str) -> None:
        """Put a file before the next message."""
        ...

    def chats(self, argument: str) -> None:
        """List the saved chats, open or delete one."""
        ...

    def save(self, name: str) -> None:
        """Write the chat to a file."""
        ...

    def load(self, name: str) -> None:
        """Take up a chat from a file."""
        ...

    def leave(self) -> None:
        """End the chat after this command."""
        ...


@dataclass(frozen=True, slots=True)
class Command:
    """One command of the chat. The name has no slash; arguments as the help shows them.

    needs: how many words it must have at least, takes: whether it takes any. completes: what its
    argument is: "file", "key", "command", or words.
    """

    name: str
    arguments: str
    help: str
    action: Callable[[Chat, str], None]
    completes: str | tuple[str, ...] = ()
    needs: int = 0

    @property
    def takes(self) -> bool:
        """Whether anything may stand behind the name."""
        return bool(self.arguments)

    @property
    def usage(self) -> str:
        """How it is written."""
        return f"/{self.name} {self.arguments}".rstrip()


KEYS_HELP = (
    ("Enter", 'sends; Alt-Enter, a trailing \\ or """ begin a new line'),
    ("Ctrl-C", "stops an answer; twice at an empty prompt leaves, as Ctrl-D does"),
    ("Ctrl-Z", "back to the shell, also in mid-answer; fg goes on"),
    ("Ctrl-R, Up", "search and walk through what was typed; a leading space keeps it out"),
    ("Ctrl-X Ctrl-E", "opens the draft in $VISUAL"),
    ("Tab", "completes commands, settings and file names"),
    ("//text", "sends a line that begins with a slash"),
)


def _help(chat: Chat, argument: str) -> None:
    if argument:
        command = command_named(argument.lstrip("/"))
        chat.table([(command.usage, command.help)])
        return
    chat.table([(command.usage, command.help) for command in COMMANDS.values()])
    chat.table(list(KEYS_HELP))


def _set(chat: Chat, argument: str) -> None:
    name, _, value = argument.partition(" ")
    if value.strip():
        chat.set(name, value.strip())
    else:
        chat.show_settings(name)


def _plain(chat: Chat, argument: str) -> None:
    chat.set("plain", argument or "toggle")


_TABLE = (
    Command("help", "[COMMAND]", "show the commands and keys", _help, "command"),
    Command("retry", "", "answer the last question anew, with another seed",
            lambda chat, _: chat.retry()),
    Command("continue", "", "go on with an answer that was cut",
            lambda chat, _: chat.continue_answer()),
    Command("undo", "", "take back the last question and its answer",
            lambda chat, _: chat.undo()),
    Command("edit", "", "change the last question and ask it again",
            lambda chat, _: chat.edit()),
    Command("copy", "", "copy the last answer, as it was written, to the clipboard",
            lambda chat, _: chat.copy()),
    Command("read", "FILE", "put a text file before the next message; /read none drops it",
            lambda chat, text: chat.read_file(text), "file", needs=1),
    Command("system", "[TEXT]", "show or set the system prompt; /system default brings it back",
            lambda chat, text: chat.system(text)),
    Command("set", "[KEY [VALUE]]", "list settings, or change one; the value default drops it",
            _set, "key"),
    Command("plain", "[on|off]", "show answers as they come, or as Markdown", _plain,
            ("on", "off")),
    Command("show", "", "what the model is and how it runs", lambda chat, _: chat.show()),
    Command("stats", "", "what the last answer cost, and its seed", lambda chat, _: chat.stats()),
    Command("chats", "[ID|NUMBER | delete ID|NUMBER]", "list the saved chats, open or delete one",
            lambda chat, text: chat.chats(text), ("delete",)),
    Command("save", "FILE", "write the chat to FILE.md, for people, or FILE.json, for /load",
            lambda chat, text: chat.save(text), "file", needs=1),
    Command("load", "FILE", "take up a chat from a .json that /save wrote, or a .jsonl",
            lambda chat, text: chat.load(text), "file", needs=1),
    Command("clear", "", "begin a new chat; system prompt and settings stay",
            lambda chat, _: chat.clear()),
    Command("exit", "", "leave; /quit and /q do, too", lambda chat, _: chat.leave()),
)  # fmt: skip

COMMANDS: Mapping[str, Command] = {command.name: command for command in _TABLE}
_OTHER_NAMES = {"quit": "exit", "q": "exit"}  # what other programs call it


def command_named(name: str) -> Command:
    """Return a command; OptionError, with the nearest name, for one that does not exist."""
    command = COMMANDS.get(_OTHER_NAMES.get(name, name))
    if command is not None:
        return command
    near = difflib.get_close_matches(name, (*COMMANDS, *_OTHER_NAMES), n=1)
    hint = f"did you mean /{near[0]}?" if near else "/help shows them"
    raise OptionError(f"/{name} is no command; {hint} (//{name} sends it as text)")


def parse(line: str) -> tuple[Command | None, str]:
    """Tell a command from a message: (command, its argument) or (None, the message to send).

    A message that begins with a slash is typed with two. Raises OptionError for a command that
    does not exist, lacks its argument or takes none.
    """
    if not line.startswith("/"):
        return None, line
    if line.startswith("//"):
        return None, line[1:]
    name, _, argument = line[1:].strip().partition(" ")
    command, argument = command_named(name), argument.strip()
    if argument and not command.takes:
        raise OptionError(f"/{name} takes nothing behind it, found {argument!r:.40}")
    if len(argument.split()) < command.needs:
        raise OptionError(f"/{name}: {command.arguments} is missing")
    return command, argument


def as_typed(message: str) -> str:
    """Return how a message is typed, so that `parse` gives it back."""
    return f"/{message}" if message.startswith("/") else message


def complete(text: str) -> Iterable[tuple[str, int]]:
    """Yield what a line may go on with, and where that begins, counted from the end."""
    if not text.startswith("/") or text.startswith("//"):
        return
    name, space, argument = text[1:].partition(" ")
    if not space:
        for known in COMMANDS:
            if known.startswith(name):
                yield f"/{known}", -len(text)
        return
    command = COMMANDS.get(name)
    if command is None:
        return
    match command.completes:
        case "file":
            yield from _files(argument)
        case "key":
            yield from _settings(argument)
        case "command":
            yield from _words(argument, tuple(COMMANDS))
        case words if isinstance(words, tuple):
            yield from _words(argument, words)


def _words(argument: str, words: Iterable[str]) -> Iterable[tuple[str, int]]:
    for word in words:
        if word.startswith(argument):
            yield word, -len(argument)


def _settings(argument: str) -> Iterable[tuple[str, int]]:
    name, space, value = argument.partition(" ")
    if not space:
        yield from _words(name, KEYS)
    elif name in KEYS:
        key = KEYS[name]
        values = key.choices or (("on", "off") if key.kind is bool else ())
        yield from _words(value, (*map(str, values), "default"))


def _files(argument: str) -> Iterable[tuple[str, int]]:
    """Yield the files and folders that a path may go on with."""
    folder, _, beginning = argument.rpartition("/")
    shown = f"{folder}/" if "/" in argument else ""
    try:
        entries = sorted(Path(shown or ".").expanduser().iterdir())
    except (OSError, RuntimeError):  # no such folder, or nobody's home
        return
    for entry in entries:
        is_hidden = entry.name.startswith(".") and not beginning.startswith(".")
        if entry.name.startswith(beginning) and not is_hidden:
            yield f"{shown}{entry.name}{'/' if entry.is_dir() else ''}", -len(argument)
