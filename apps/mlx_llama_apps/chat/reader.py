"""Reads what the user types: the line editor with its keys, history and completion.

Owns the keyboard; the toolbar's text is given to it. Knows no model.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app, run_in_terminal
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.input.typeahead import get_typeahead, store_typeahead
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import ColorDepth
from prompt_toolkit.shortcuts import CompleteStyle
from prompt_toolkit.styles import Style

from mlx_llama_apps.chat.hush import hushed

PROMPT = "> "
QUOTES = '"""'
LEAVE_HINT = "Ctrl-C again or Ctrl-D leaves"
DRAFT_HINT = "the draft is kept; Ctrl-C again drops it (Up brings it back)"


@dataclass(frozen=True, slots=True)
class Line:
    """What was typed. is_draft: it was made of the draft that was offered."""

    text: str
    is_draft: bool = False


Complete = Callable[[str], Iterable[tuple[str, int]]]  # text before the cursor → (text, start)


class History(FileHistory):
    """What was typed, on disk for its owner alone; a text of several lines is one entry.

    What begins with a space is not kept. A disk that refuses is passed over.
    """

    def load_history_strings(self) -> Iterable[str]:
        """Return the entries, the newest first."""
        try:
            return list(super().load_history_strings())
        except (OSError, ValueError):
            return []

    def store_string(self, string: str) -> None:
        """Keep an entry."""
        if string.startswith(" ") or not string.strip():
            return
        lines = "".join(f"+{line}\n" for line in string.split("\n"))
        with contextlib.suppress(OSError):
            path = Path(os.fsdecode(self.filename))
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                # One write, so that two programs do not write into each other's entries.
                os.write(descriptor, f"\n# typed\n{lines}".encode("utf-8", "replace"))
            finally:
                os.close(descriptor)


class _Completer(Completer):
    def __init__(self, complete: Complete) -> None:
        self._complete = complete

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterable[Completion]:
        for text, start in self._complete(document.text_before_cursor):
            yield Completion(text, start_position=start)


def is_open(text: str) -> bool:
    """Whether a text goes on with the next line: a trailing backslash, or quotes without an end."""
    return text.endswith("\\") or (
        text.lstrip().startswith(QUOTES)
        and (text.count(QUOTES) < 2 or not text.rstrip().endswith(QUOTES))
    )


def unquoted(text: str) -> str:
    """Return the text between the quotes that stand round a message."""
    bare = text.strip()
    if len(bare) >= 2 * len(QUOTES) and bare.startswith(QUOTES) and bare.endswith(QUOTES):
        return bare[len(QUOTES) : -len(QUOTES)].strip("\n")
    return text


class Reader:
    """A line editor; a message may have many lines."""

    def __init__(self, history: Path, *, complete: Complete, toolbar: Callable[[], str]) -> None:
        self._toolbar = toolbar
        self._hint = ""
        self._is_armed = False  # the next Ctrl-C leaves, or drops the draft
        self.is_draft = False  # what stands there was offered, and never emptied
        depth = ColorDepth.DEPTH_1_BIT if os.environ.get("NO_COLOR") else None
        self._session: PromptSession[str] = PromptSession(
            history=History(str(history)),
            multiline=True,
            prompt_continuation="  ",
            key_bindings=self._keys(),
            completer=_Completer(complete),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            reserve_space_for_menu=0,
            tempfile_suffix=".md",
            enable_suspend=True,
            bottom_toolbar=self._toolbar_text,
            style=Style.from_dict({"bottom-toolbar": "noreverse"}),
            color_depth=depth,
        )
        self._session.default_buffer.on_text_changed += self._on_text_changed

    def read(self, draft: str = "") -> Line | None:
        """Read a message; None at the end of input. KeyboardInterrupt when Ctrl-C leaves."""
        self._disarm()
        self.is_draft = bool(draft)
        try:
            # Ctrl-C is a key here; a signal that comes while the prompt closes is the caller's.
            text = self._session.prompt(PROMPT, default=draft, handle_sigint=False)
            # Bytes that were no UTF-8 come as halves of surrogate pairs, which nothing can write.
            text = unquoted(text.encode("utf-8", "replace").decode("utf-8"))
            return Line(text, self.is_draft)
        except EOFError:
            return None
        finally:
            self.is_draft = False

    def choose(self, question: str) -> str:
        """Ask a short question; an empty answer for Ctrl-C and the end of input."""
        session: PromptSession[str] = PromptSession(history=InMemoryHistory())
        try:
            return session.prompt(question + " ").strip()
        except (EOFError, KeyboardInterrupt):
            return ""

    def _toolbar_text(self) -> str:
        width = get_app().output.get_size().columns
        return (self._hint or self._toolbar())[: max(1, width - 1)]

    def _on_text_changed(self, buffer: Buffer) -> None:
        self._disarm()
        self.is_draft = self.is_draft and bool(buffer.text)

    def _disarm(self) -> None:
        self._hint, self._is_armed = "", False

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()

        @keys.add("enter", filter=has_focus("DEFAULT_BUFFER"))
        def _(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            self._disarm()
            if buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
                buffer.delete_before_cursor()
                buffer.insert_text("\n")
            elif is_open(buffer.text):
                buffer.insert_text("\n")
            else:
                buffer.validate_and_handle()

        @keys.add("escape", "enter", filter=has_focus("DEFAULT_BUFFER"))
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @keys.add("c-x", "c-e", filter=has_focus("DEFAULT_BUFFER"))
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.open_in_editor()  # back as a draft, which Enter sends

        @keys.add("c-c", filter=has_focus("DEFAULT_BUFFER"))
        @keys.add(Keys.SIGINT)
        def _(event: KeyPressEvent) -> None:
            self._interrupted(event)

        return keys

    def _interrupted(self, event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if not self._is_armed:
            self._is_armed = True
            self._hint = DRAFT_HINT if buffer.text else LEAVE_HINT
            if not event.app.renderer.height_is_known:  # so there is no toolbar
                run_in_terminal(lambda: print(self._hint))
        elif buffer.text:
            self._session.history.append_string(" " + buffer.text)  # with a space: not on disk
            buffer.reset()
            self.is_draft = False
            self._disarm()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    @contextlib.contextmanager
    def hushed(
        self, on_interrupt: Callable[[], None], on_resume: Callable[[], None]
    ) -> Iterator[None]:
        """Keep what is typed while an answer streams for the next prompt.

        on_interrupt: called when Ctrl-C was typed before the terminal made a signal of it.
        on_resume: called by a signal handler when the program goes on after it was stopped.
        """
        with hushed(on_resume) as descriptor:
            if descriptor is not None and self._took_interrupt():
                on_interrupt()
            yield

    def _took_interrupt(self) -> bool:
        """Take Ctrl-C out of what was typed behind the last message; the rest waits."""
        source = self._session.app.input
        # Its own parser, which keeps the beginning of a paste whose end has not come yet.
        keys = [*get_typeahead(source), *source.read_keys(), *source.flush_keys()]
        rest = [key for key in keys if key.key != Keys.ControlC]
        store_typeahead(source, rest)
        return len(rest) < len(keys)
