"""The saved chats as the user meets them: listed, opened, deleted, written to files and loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mlx_llama.errors import OptionError
from mlx_llama_apps import paths
from mlx_llama_apps.chat import export
from mlx_llama_apps.chat.folders import cache_file, find_chat, is_open, saved_chats
from mlx_llama_apps.chat.keeping import Folders
from mlx_llama_apps.chat.parts import Parts
from mlx_llama_apps.chat.settings import KEYS
from mlx_llama_apps.chat.store import ChatError, SavedChat, read_chat
from mlx_llama_apps.terminal import StatusLine, size


class Shelf:
    """What /chats, /save and /load do. on_other: called when another chat was taken up."""

    def __init__(self, parts: Parts, folders: Folders, on_other: Callable[[], None]) -> None:
        self._parts = parts
        self._on_other = on_other
        self._folders = folders
        self._listed: list[SavedChat] = []  # what was shown with numbers

    def chats(self, argument: str) -> None:
        """List the saved chats, open or delete one."""
        if self._folders.chats is None:
            raise OptionError("/chats: this chat was begun with --no-save")
        if not argument:
            self._list_chats(self._folders.chats)
            return
        word, _, rest = argument.partition(" ")
        if word != "delete":
            self.resume(self._chat_named(argument))
            return
        chat = self._chat_named(rest.strip())
        if chat.id == self._parts.inference.call(lambda talk: talk.chat_id):
            raise ChatError(f"chat {chat.id} is the one that is open; /clear begins another")
        if is_open(chat):
            raise ChatError(f"chat {chat.id} is open in another window")
        title = first_line(chat.title)
        if self._parts.reader.choose(f"Delete {chat.id}, {title}? y/N").lower() in ("y", "yes"):
            chat.path.unlink()
            cache_file(self._folders.caches, chat.id).unlink(missing_ok=True)
            self._parts.view.say(f"{chat.id} is deleted")

    def _list_chats(self, folder: Path) -> None:
        self._listed = saved_chats(folder)
        if not self._listed:
            self._parts.view.say("no chat is saved yet")
            return
        rows = []
        for number, chat in enumerate(self._listed, 1):
            cache = cache_file(self._folders.caches, chat.id)
            kept = f" + cache {size(cache.stat().st_size)}" if cache.is_file() else ""
            turns = "1 turn" if chat.n_turns == 1 else f"{chat.n_turns} turns"
            about = f"{turns}, {size(chat.nbytes)}{kept}"
            rows.append((str(number), chat.id, about, first_line(chat.title)))
        self._parts.view.table(rows)
        self._parts.view.say("/chats NUMBER opens one, /chats delete NUMBER removes it")

    def _chat_named(self, name: str) -> SavedChat:
        """Return the chat of a number in the list, as it was shown if it was, or of an ID."""
        assert self._folders.chats is not None
        if name.isdecimal() and len(name) < len("YYYYMMDD"):
            listed = self._listed or saved_chats(self._folders.chats)
            if 1 <= int(name) <= len(listed):
                return read_chat(listed[int(name) - 1].path)
            if len(name) < len("YYYY"):  # too short to mean an ID's beginning
                chats = "1 chat" if len(listed) == 1 else f"{len(listed)} chats"
                raise ChatError(f"{name}: the list has {chats}; /chats shows it")
        return find_chat(self._folders.chats, name)

    def resume(self, chat: SavedChat, *, is_saved: bool = True) -> None:
        """Take up a saved chat and show where it ended. is_saved: it goes on in its own file."""
        # What it was said with is taken up too; what decides the context stays as it is.
        settings = {
            name: value
            for name, value in chat.settings.items()
            if name in KEYS and KEYS[name].group in ("generation", "text")
        }
        with StatusLine() as status:
            status.show("restoring the cache")
            how = self._parts.inference.call(
                lambda talk: talk.resume(chat, is_saved=is_saved, settings=settings)
            )
        self.show_resumed(chat, how)
        self._on_other()

    def show_resumed(self, chat: SavedChat, how: str) -> None:
        """Say how a chat was taken up, and show where it ended."""
        damaged = f"; {chat.n_damaged} damaged lines were left out" if chat.n_damaged else ""
        self._parts.view.say(f"{chat.id}, {len(chat.messages)} messages: {how}{damaged}")
        for message in chat.messages[-2:]:
            if message.role != "system":
                self._parts.view.show_message(message.role, message.content)
        if chat.messages and chat.messages[-1].is_cut:
            self._parts.view.say("the last answer was cut; /continue goes on")

    def save(self, name: str) -> None:
        """Write the chat to a file."""
        path = paths.user_path(name)
        messages, model, tokenizer = self._parts.inference.call(
            lambda talk: (talk.session.messages, talk.llama.path.name, talk.tokenizer)
        )
        if path.exists():
            answer = self._parts.reader.choose(f"{path} exists. Replace it? y/N")
            if answer.lower() not in ("y", "yes"):
                return
        content = export.render(
            path,
            messages,
            model=model,
            settings=self._parts.settings.explicit(),
            tokenizer=tokenizer,
        )
        export.write_private(path, content)
        self._parts.view.say(f"{len(messages)} messages written to {path}")

    def load(self, name: str) -> None:
        """Take up a chat from a file, as a new chat."""
        self.resume(export.load(paths.user_path(name)), is_saved=False)


def first_line(text: str) -> str:
    """Return the first line that says something, cut to what fits a remark."""
    line = next((line for line in text.splitlines() if line.strip()), "")
    return line if len(line) <= 60 else line[:59] + "…"
