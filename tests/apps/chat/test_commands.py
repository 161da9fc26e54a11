"""The table of commands: what a line means, what it completes to, and that help tells all."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mlx_llama.errors import OptionError
from mlx_llama_apps import paths
from mlx_llama_apps.chat import commands
from mlx_llama_apps.chat.commands import COMMANDS, complete, parse
from mlx_llama_apps.chat.settings import KEYS
from mlx_llama_apps.terminal import visible


@dataclass
class Recorder:
    """Stands for the chat: remembers what was called."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.calls.append((name, *arguments))


@pytest.mark.parametrize(
    ("line", "name", "rest"),
    [
        ("hello", None, "hello"),
        ("/help", "help", ""),
        ("/exit ", "exit", ""),
        ("/quit", "exit", ""),
        ("/q", "exit", ""),
        ("/set  top_p 0.5", "set", "top_p 0.5"),
        ("//etc/hosts is a file", None, "/etc/hosts is a file"),
        ("help", None, "help"),
        ("q", None, "q"),
        ("/save my chat.md", "save", "my chat.md"),
    ],
)
def test_commands_begin_with_one_slash(line: str, name: str | None, rest: str) -> None:
    command, text = parse(line)
    assert (command and command.name, text) == (name, rest)


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("/helo", "did you mean /help"),
        ("/zzz", "/help shows"),
        ("/quiet", "did you mean /quit"),
        ("/quit now", "/quit takes nothing"),
        ("/", "/help"),
        ("/undo it", "takes nothing"),
        ("/read", "FILE is missing"),
        ("/save", "FILE is missing"),
    ],
)
def test_lines_that_are_no_command_say_what_to_do(line: str, hint: str) -> None:
    with pytest.raises(OptionError, match=hint):
        parse(line)


ACTIONS = [
    ("/retry", ("retry",)),
    ("/continue", ("continue_answer",)),
    ("/undo", ("undo",)),
    ("/edit", ("edit",)),
    ("/copy", ("copy",)),
    ("/read a b.txt", ("read_file", "a b.txt")),
    ("/system be brief", ("system", "be brief")),
    ("/system", ("system", "")),
    ("/set", ("show_settings", "")),
    ("/set top_p", ("show_settings", "top_p")),
    ("/set top_p 0.5", ("set", "top_p", "0.5")),
    ("/set stop a b", ("set", "stop", "a b")),
    ("/plain", ("set", "plain", "toggle")),
    ("/plain on", ("set", "plain", "on")),
    ("/show", ("show",)),
    ("/stats", ("stats",)),
    ("/chats", ("chats", "")),
    ("/chats delete 2", ("chats", "delete 2")),
    ("/save x.md", ("save", "x.md")),
    ("/load x.json", ("load", "x.json")),
    ("/clear", ("clear",)),
    ("/exit", ("leave",)),
]


@pytest.mark.parametrize(("line", "call"), ACTIONS)
def test_each_command_asks_the_chat_for_one_thing(line: str, call: tuple[str, ...]) -> None:
    command, argument = parse(line)
    chat = Recorder()
    assert command is not None
    command.action(chat, argument)  # pyright: ignore[reportArgumentType]
    assert chat.calls == [call]


def test_every_command_has_an_action_that_is_tested_and_help() -> None:
    tested = {line.split()[0].lstrip("/") for line, _ in ACTIONS}
    assert tested | {"help"} == set(COMMANDS)
    chat = Recorder()
    COMMANDS["help"].action(chat, "")  # pyright: ignore[reportArgumentType]
    shown = [row[0].split()[0] for call in chat.calls for row in call[1]]
    assert {f"/{name}" for name in COMMANDS} <= set(shown)


def test_another_name_is_told_in_the_help_and_shown_once() -> None:
    chat = Recorder()
    for name in ("", "exit", "/quit"):
        COMMANDS["help"].action(chat, name)  # pyright: ignore[reportArgumentType]
    shown, _, of_exit, of_quit = (call[1] for call in chat.calls)
    assert of_exit == of_quit == [row for row in shown if "/quit" in " ".join(row)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/re", ["/retry", "/read"]),
        ("hello", []),
        ("//re", []),
        ("/set temp", ["temperature"]),
        ("/set on_full s", ["stop", "slide"]),
        ("/set plain o", ["on", "off"]),
        ("/help und", ["undo"]),
        ("/zzz a", []),
        ("/undo a", []),
    ],
)
def test_completion(text: str, expected: list[str]) -> None:
    assert [word for word, _ in complete(text)] == expected


def test_files_are_completed(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    (tmp_path / "nothing").mkdir()
    (tmp_path / ".hidden").touch()
    found = [word for word, _ in complete(f"/read {tmp_path}/n")]
    assert found == [f"{tmp_path}/notes.txt", f"{tmp_path}/nothing/"]
    assert f"{tmp_path}/.hidden" not in [word for word, _ in complete(f"/read {tmp_path}/")]


def test_every_option_of_run_is_a_key() -> None:
    from mlx_llama_apps.main import arguments_of

    names = {n.lstrip("-").replace("-", "_") for a in arguments_of("run") for n in a.names}
    # What makes run another program is no setting of a chat: the operands, --raw and --json.
    assert names - {"MODEL", "PROMPT", "raw", "json"} <= set(KEYS)


@pytest.mark.parametrize("name", ["~nobody-of-that-name/x", "~nobody-of-that-name/"])
def test_home_of_nobody_is_one_line(name: str) -> None:
    with pytest.raises(OptionError, match="no such user's home folder"):
        paths.user_path(name)
    assert list(commands._files(name)) == []


def test_halves_of_characters_are_shown_as_a_sign() -> None:
    assert visible("a\ud800b\udce9\u202e") == "a\ufffdb\ufffd\ufffd"
