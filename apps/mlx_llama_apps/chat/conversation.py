"""The chat's loop: a line is read, a command is run or a question asked, until the user leaves.

Joins the three parts: the conversation on the inference thread, the commands and the view. Ctrl-C
arrives here as a signal: it never breaks into what is being drawn or written.
"""

from __future__ import annotations

import os
import queue
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType

from mlx_llama.errors import MlxLlamaError, OptionError
from mlx_llama_apps import paths
from mlx_llama_apps.chat import export
from mlx_llama_apps.chat.answers import NOTHING, Answers, Attachment
from mlx_llama_apps.chat.commands import complete, parse
from mlx_llama_apps.chat.keeping import Folders
from mlx_llama_apps.chat.parts import Parts
from mlx_llama_apps.chat.reader import Line, Reader
from mlx_llama_apps.chat.settings import DEFAULT, Settings, key_named, with_keys
from mlx_llama_apps.chat.shelf import Shelf, first_line
from mlx_llama_apps.chat.talk import Talk
from mlx_llama_apps.chat.view import View, meter_text, stats_parts
from mlx_llama_apps.inference import Inference
from mlx_llama_apps.terminal import StatusLine, size

MEMORY_SIGNS = ("unable to allocate", "out of memory", "outofmemory", "[malloc]", "[metal]")
MEMORY_LINE = (
    "the machine is out of memory; the chat is kept. Try /set context with fewer tokens, /set "
    "kv_bits 8, or a model of fewer bits"
)
MAX_READ_BYTES = 16 << 20
MOST_COPIED = 74_994  # bytes; in base64 with its frame, the 100,000 that terminals commonly take


class Conversation:
    """The chat at a terminal. Its methods are the commands' actions."""

    def __init__(
        self, inference: Inference[Talk], view: View, settings: Settings, folders: Folders
    ) -> None:
        self._inference = inference
        self._view = view
        self._settings = settings
        self._talk = inference.call(lambda talk: talk)  # for what any thread may read
        self._reader = Reader(paths.history_file(), complete=complete, toolbar=self._toolbar)
        parts = Parts(inference, view, self._reader, settings)
        self._answers = Answers(parts, self.clear)
        self.shelf = Shelf(parts, folders, self._answers.drop_files)
        self._offer = NOTHING  # what the prompt was begun with
        self._is_leaving = False

    def run(self) -> None:
        """Converse until the user leaves. KeyboardInterrupt when Ctrl-C leaves."""
        with self._signals():
            try:
                while not self._is_leaving:
                    self._tell()
                    self._offer = self._answers.offered()
                    # Not behind it: Ctrl-C right after Enter is meant for the answer.
                    self._inference.listen()
                    line = self._reader.read(self._offer.text)
                    if line is None:
                        break
                    if line.text.strip():
                        self._try(partial(self._handle, line))
            finally:
                self._inference.listen()
                self._end()

    def _end(self) -> None:
        """Keep the cache; Ctrl-C goes without."""
        with StatusLine() as status:
            status.show("keeping the cache for --resume; Ctrl-C goes without")
            try:
                found = self._inference.call(lambda talk: talk.close())
            except KeyboardInterrupt:
                found = None
        self._tell()
        if found:
            self.say(found)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def on_interrupt(number: int, frame: FrameType | None) -> None:
            del number, frame
            self._inference.interrupt()

        before = signal.signal(signal.SIGINT, on_interrupt)
        hangup = signal.signal(signal.SIGHUP, self._on_hangup)
        if hangup is signal.SIG_IGN:  # nohup
            signal.signal(signal.SIGHUP, hangup)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
            signal.signal(signal.SIGHUP, hangup)

    def _on_hangup(self, number: int, frame: FrameType | None) -> None:
        """Keep the chat and its cache, as when it is left: the terminal has gone."""
        del frame
        signal.signal(number, signal.SIG_IGN)  # shells send it again
        self._inference.interrupt()
        self._inference.listen()
        try:
            self._inference.call(lambda talk: talk.close())
        finally:
            os._exit(128 + number)  # there is nobody to draw or complain to

    def _try(self, action: Callable[[], None]) -> None:
        """Do what was asked; no error ends the conversation."""
        try:
            action()
        except MlxLlamaError as error:
            self._view.say(with_keys(str(error), "/set {}"))
        except KeyboardInterrupt:
            self._view.say("stopped")
        except OSError as error:
            self._view.say(f"{error.filename or 'output'}: {error.strerror}")
        except Exception as error:
            text = str(error)
            if isinstance(error, MemoryError) or any(s in text.lower() for s in MEMORY_SIGNS):
                self._view.say(MEMORY_LINE)
            else:
                self._view.say(f"unexpected {type(error).__name__}: {text}; the chat goes on")

    def _handle(self, line: Line) -> None:
        command, argument = parse(line.text)
        if command is not None:
            command.action(self, argument)
        else:
            self._answers.ask(argument, self._offer if line.is_draft else NOTHING)

    def _tell(self) -> None:
        """Say what has happened on the thread meanwhile."""
        while True:
            try:
                self._view.say(self._talk.notices.get_nowait())
            except queue.Empty:
                return

    def _toolbar(self) -> str:
        used, limit = self._talk.meter
        parts = [meter_text(used, limit)]
        if self._view.width < 40:
            parts = [f"{100 * used // max(limit, 1)} % of {limit}"]
        if self._offer.is_edit and self._reader.is_draft:
            parts.insert(0, "changes the last question")
        parts += [f"+ {each.name} ({each.n_tokens})" for each in self._answers.attached]
        return " · ".join(parts)

    # --- turning back ----------------------------------------------------------------------------

    def retry(self) -> None:
        """Answer the last question anew, with another seed."""
        self._answers.retry()

    def continue_answer(self) -> None:
        """Go on with a cut answer."""
        self._answers.continue_answer()

    def edit(self) -> None:
        """Offer the last question to be changed; sent, it takes the old one's place."""
        self._answers.edit()

    def undo(self) -> None:
        """Take back the last question and its answer."""
        text = self._inference.call(lambda talk: talk.undo())
        self._view.say(f"taken back: {first_line(text)}")

    # --- what the commands say -------------------------------------------------------------------

    def say(self, text: str) -> None:
        """Print a remark."""
        self._view.say(text)

    def table(self, rows: list[tuple[str, ...]]) -> None:
        """Print rows in columns."""
        self._view.table(rows)

    def leave(self) -> None:
        """End the chat after this command."""
        self._is_leaving = True

    def copy(self) -> None:
        """Copy the last answer's raw text."""
        messages = self._inference.call(lambda talk: talk.session.messages)
        answers = [message.content for message in messages if message.role == "assistant"]
        if not answers:
            raise OptionError("there is no answer to copy yet")
        self._view.copy(answers[-1])
        nbytes = len(answers[-1].encode("utf-8", "replace"))
        more = f"; it has {nbytes} bytes, and many terminals drop what is over {MOST_COPIED}: "
        more = f"{more}/save FILE.md has it whole" if nbytes > MOST_COPIED else ""
        if "TMUX" in os.environ:
            more += "; tmux hands it on only with: set -g set-clipboard on"
        self._view.say(
            f"{len(answers[-1])} characters handed to the terminal's clipboard (OSC 52){more}"
        )

    def stats(self) -> None:
        """Say what the last answer cost."""
        stats, (held, shared) = self._inference.call(lambda talk: (talk.last, talk.agreement()))
        if stats is None:
            self._view.say("nothing was answered yet")
        else:
            rows = [
                *(tuple(part.split(" ", 1)) for part in stats_parts(stats)),
                ("reused", f"{stats.cached_tokens} tokens of the cache"),
                ("time", f"{stats.elapsed_s:.2f} s"),
                ("seed", str(stats.seed)),
            ]
            self._view.table(rows)
        self._view.say(f"cache: {held} tokens, {shared} of them begin the history")

    def show(self) -> None:
        """Say what the model is and how it runs."""
        from mlx_llama.loading import open_model_directory
        from mlx_llama.options import ContextOptions, LoadOptions
        from mlx_llama_apps.show import model_rows

        path, settings = self._inference.call(lambda talk: talk.llama.path), self._settings
        asked = ContextOptions(**settings.group("context"))
        rows = model_rows(open_model_directory(path), asked, LoadOptions(**settings.group("load")))
        context, nbytes, chat_id = self._inference.call(
            lambda talk: (talk.session.context, talk.session.cache.nbytes, talk.chat_id)
        )
        policy = f"{settings.value('on_full')}s when full"  # asks, stops or slides
        held = f"{context.capacity} tokens ({context.reason}), {policy}, cache {size(nbytes)}"
        self._view.table([*rows, ("chat", chat_id or "not saved"), ("in use", held)])

    def show_settings(self, name: str) -> None:
        """List value, default and source of the settings."""
        settings = [self._settings.find(key_named(name).name)] if name else self._settings.all()
        rows = [(s.key.name, _text(s.value), _text(s.key.default), s.source) for s in settings]
        if self._view.has_room(n_columns=4):
            self._view.table([("setting", "value", "default", "from"), *rows])
        else:
            self._view.table([_in_two(*row) for row in rows])
        if name:
            self._view.say(settings[0].key.help)

    def set(self, name: str, value: str) -> None:
        """Change a setting, and what depends on it."""
        key = key_named(name)
        if key.name == "plain" and value == "toggle":
            value = "off" if self._settings.value("plain") else "on"
        with StatusLine() as status:
            status.show("loading")
            setting = self._inference.call(lambda talk: talk.set(key.name, value))
        self._view.is_plain = self._settings.value("plain")
        value = "not set" if _text(setting.value) == "-" else _text(setting.value)
        self._view.say(f"{key.name} is {value} ({setting.source})")

    def system(self, text: str) -> None:
        """Show or set the system prompt."""
        if text:
            self.set("system", text)
        else:
            setting = self._settings.find("system")
            self._view.say(
                "there is no system prompt"
                if setting.value is None
                else f"{setting.value}\n(from: {setting.source})"
            )

    def read_file(self, name: str) -> None:
        """Put a text file before the next message; say how many tokens it has."""
        if name == "none":
            self._answers.attached.clear()
            self._view.say("no file goes with the next message")
            return
        path = paths.user_path(name)
        text = export.read_text(path, most_bytes=MAX_READ_BYTES)
        n_tokens = self._inference.call(lambda talk: talk.count_tokens(text))
        self._answers.attached.append(Attachment(path.name, text, n_tokens))
        used, limit = self._talk.meter
        more = "" if used + n_tokens < limit else f"; that is more than the {limit - used} left"
        self._view.say(
            f"{path.name}: {n_tokens} tokens go with the next message{more}; /read none drops them"
        )

    # --- chats -----------------------------------------------------------------------------------

    def clear(self) -> None:
        """Begin a new chat."""
        chat_id = self._inference.call(lambda talk: talk.chat_id)
        self._inference.call(lambda talk: talk.clear())
        kept = f"; the one before is kept as {chat_id}" if chat_id else ""
        self._view.say(f"a new chat; system prompt and settings stay{kept}")
        self._answers.drop_files()

    def chats(self, argument: str) -> None:
        """List the saved chats, open or delete one."""
        self.shelf.chats(argument)

    def save(self, name: str) -> None:
        """Write the chat to a file."""
        self.shelf.save(name)

    def load(self, name: str) -> None:
        """Take up a chat from a file, as a new chat."""
        self.shelf.load(name)


def _in_two(name: str, value: str, default: str, source: str) -> tuple[str, str]:
    """Return a setting in two cells, the second empty where nothing was set."""
    if source == DEFAULT:
        return f"{name}  {value} (default)", ""
    return f"{name}  {value}", f"{source}; default {default}"


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "on" if value else "off"
    return "-" if value in ([], {}) else str(value)
