"""The chat itself: reads a line, runs a command or streams an answer, until the user leaves."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from mlx_llama.errors import MlxLlamaError
from mlx_llama.options import ContextOptions, GenerationOptions, LoadOptions
from mlx_llama_apps import paths
from mlx_llama_apps.chat.commands import parse
from mlx_llama_apps.chat.talk import Talk, make_talk
from mlx_llama_apps.flags import ContextFlags, GenerationFlags, LoadFlags, given
from mlx_llama_apps.inference import Inference, model_loader
from mlx_llama_apps.progress import prefill_progress
from mlx_llama_apps.terminal import StatusLine, size

if TYPE_CHECKING:
    from mlx_llama import Step
    from mlx_llama_apps.chat.screen import Screen


def chat(
    model: str,
    /,
    *,
    system: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    date: str | None = None,
    flags: GenerationFlags | None = None,
    context_flags: ContextFlags | None = None,
    load_flags: LoadFlags | None = None,
) -> None:
    """Talk to a model. /help shows the commands, Ctrl-C stops an answer, Ctrl-D leaves.

    Parameters
    ----------
    model
        a model directory, or the name of one in the models folder
    system
        the system prompt
    date
        date for the system block of Llama 3.1 and later, such as "26 Jul 2024" (default: none)
    """
    from mlx_llama_apps.chat.screen import Screen

    # A wrong option is told before the model is loaded.
    options, context = given(flags), given(context_flags)
    GenerationOptions(**options)
    checked, load_options = ContextOptions(**context), LoadOptions(**given(load_flags))
    path = paths.resolve_model(model)
    screen = Screen()
    status = StatusLine()
    load = model_loader(path, load_options, checked, status)

    def begin() -> Talk:
        return make_talk(load(), system=system, date=date, options=options, context=context)

    with status, Inference(begin) as inference:
        status.close()
        _Conversation(inference, screen).run()


class _Conversation:
    """The loop between the screen and the inference thread."""

    def __init__(self, inference: Inference[Talk], screen: Screen) -> None:
        self._inference = inference
        self._screen = screen
        self._is_leaving = False

    def run(self) -> None:
        """Converse until the user leaves or the input ends."""
        if self._screen.is_interactive:
            self.say(self._inference.call(lambda talk: _greeting(talk)))
        while not self._is_leaving:
            try:
                line = self._screen.read()
            except KeyboardInterrupt:
                self.say("Ctrl-D or /exit leaves")
                continue
            if line is None:
                return
            if line.strip():
                self._try(line)
            if not self._screen.is_interactive:
                return

    def say(self, text: str) -> None:
        """Print a remark of the program's own."""
        self._screen.say(text)

    def clear(self) -> None:
        """Forget the conversation."""
        self._inference.call(lambda talk: talk.clear())

    def leave(self) -> None:
        """End the chat after this command."""
        self._is_leaving = True

    def _try(self, line: str) -> None:
        """Handle a line; at a terminal no error ends the conversation."""
        if not self._screen.is_interactive:
            self._handle(line)
            return
        try:
            self._handle(line)
        except MlxLlamaError as error:
            self.say(str(error))
        except KeyboardInterrupt:
            self.say("stopped")

    def _handle(self, line: str) -> None:
        if not self._screen.is_interactive:  # what is piped is a message, slashes and all
            self._answer(line)
            return
        try:
            command, message = parse(line)
        except LookupError as error:
            self.say(str(error.args[0]))
            return
        if command is None:
            self._answer(message)
        else:
            command.action(self)

    def _answer(self, message: str) -> None:
        reason, stats = None, None
        with StatusLine() as status:
            on_prefill = prefill_progress(status)

            def ask(talk: Talk, cancel: threading.Event) -> Iterator[Step]:
                return talk.answer(message, on_prefill=on_prefill, cancel=cancel)

            try:
                for step in self._inference.stream(ask):
                    status.close()
                    self._screen.write(step.text)
                    reason, stats = step.finish_reason, step.stats
            except KeyboardInterrupt:
                if not self._screen.is_interactive:
                    raise
                reason = "cancelled"
        self._screen.end_answer(reason, stats)


def _greeting(talk: Talk) -> str:
    llama, context = talk.llama, talk.session.context
    how = "continues your text" if llama.kind.is_base else "/help shows the commands"
    base = " (base model)" if llama.kind.is_base else ""
    return (
        f"{llama.path.name}: {llama.kind.name}{base}, context {context.capacity} "
        f"({context.reason}), up to {size(context.plan.total)} beside the weights; {how}"
    )
