"""`mlx-llama chat`: reads the flags, loads the model on its thread, and begins to converse."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from mlx_llama.errors import MlxLlamaError, OptionError
from mlx_llama_apps import bundled, paths
from mlx_llama_apps.flags import ChatContextFlags, ChatFlags, GenerationFlags, LoadFlags, given
from mlx_llama_apps.terminal import StatusLine, read_stdin, size

if TYPE_CHECKING:
    from mlx_llama import Llama, Step
    from mlx_llama_apps.chat.keeping import Folders
    from mlx_llama_apps.chat.settings import Settings
    from mlx_llama_apps.chat.store import SavedChat
    from mlx_llama_apps.chat.talk import Talk
    from mlx_llama_apps.inference import Inference

LAST = "last"


def chat(
    model: str | None = None,
    /,
    *,
    system: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    date: str | None = None,
    resume: Annotated[str | None, Parameter(name="--resume")] = None,
    no_save: bool = False,
    preset: str | None = None,
    chat_flags: ChatFlags | None = None,
    flags: GenerationFlags | None = None,
    context_flags: ChatContextFlags | None = None,
    load_flags: LoadFlags | None = None,
) -> None:
    """Talk to a model. /help shows the commands, Ctrl-C stops an answer, Ctrl-D leaves.

    Parameters
    ----------
    model
        a model directory, or the name of one in the models folder (default: the resumed chat's, a
        choice of what is at hand, or bundled, the small guide that ships with the program)
    system
        the system prompt
    date
        date for the system block of Llama 3.1 and later, such as "26 Jul 2024" (default: none)
    resume
        go on with the saved chat of this ID, or of its beginning; without an ID with the last one
    no_save
        do not save the chat
    preset
        a preset of the configuration file: its values go before the file's defaults
    """
    from mlx_llama_apps.chat.keeping import Folders
    from mlx_llama_apps.chat.settings import KEYS, Settings, read_config

    is_interactive = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    texts = {"system": system, "date": date}
    wanted = {name: value for name, value in texts.items() if value is not None}
    for some in (chat_flags, flags, context_flags, load_flags):
        wanted |= given(some)
    saved = None if resume is None else _saved(resume)
    of_chat = {} if saved is None else saved.settings
    # A wrong option is told before the model is loaded.
    settings = Settings(
        flags=wanted,
        preset=preset,
        config=read_config(paths.config_file()),
        asks_when_full=is_interactive,
        of_chat={name: value for name, value in of_chat.items() if name in KEYS},
    )
    path = _model_path(model, saved, is_interactive)
    is_saved = not no_save and (is_interactive or saved is not None)
    folders = Folders(paths.chats_folder() if is_saved else None, paths.chat_caches_folder())
    if is_interactive:
        _converse(path, settings, folders, saved)
    else:
        _answer_pipe(path, settings, folders, saved)


def _saved(name: str) -> SavedChat:
    from mlx_llama_apps.chat.folders import find_chat
    from mlx_llama_apps.chat.store import ChatError

    try:
        return find_chat(paths.chats_folder(), name)
    except ChatError as error:
        raise ChatError(f"--resume: {error}") from error


def _model_path(model: str | None, saved: SavedChat | None, is_interactive: bool) -> Path:
    if model is not None:
        return paths.resolve_model(model)
    if saved is not None and saved.model:
        return _model_of(saved)
    from mlx_llama_apps.chat.choice import choices_at_hand, choose_model

    found = choices_at_hand()
    guide = bundled.target() if bundled.is_made() else None
    if all(path == guide for path, _ in found):  # nothing to choose from
        return bundled.model_directory()
    if is_interactive:
        return choose_model(found)
    at_hand = ", ".join(path.name for path, _ in found) or "none"
    raise OptionError(
        "MODEL is missing: give a model directory, such as mlx-llama convert makes of a "
        f"checkpoint; at hand: {at_hand}"
    )


def _model_of(saved: SavedChat) -> Path:
    """Return the model of a saved chat; the bundled one is made again where it is gone."""
    from mlx_llama_apps.chat.store import ChatError

    made = bundled.target()
    if Path(saved.model) == made and (bundled.is_made() or not made.exists()):
        return bundled.model_directory()
    try:
        return paths.resolve_model(saved.model)
    except MlxLlamaError as error:
        raise ChatError(
            f"--resume: the model of chat {saved.id} is not there any more; name one: "
            f"mlx-llama chat MODEL --resume {saved.id} ({error})"
        ) from error


def _loader(
    path: Path, settings: Settings, status: StatusLine, on_open: Callable[[], None]
) -> Callable[[Mapping[str, Any]], Llama]:
    def load(options: Mapping[str, Any]) -> Llama:
        from mlx_llama.options import ContextOptions, LoadOptions
        from mlx_llama_apps.inference import model_loader

        left = dict(options)
        while True:
            context = ContextOptions(**settings.group("context"))
            try:
                return model_loader(path, LoadOptions(**left), context, status, on_open=on_open)()
            except OptionError as error:  # before the first weight is read
                if (name := settings.pass_over(error)) is None:
                    raise
                left.pop(name, None)

    return load


def _begin(
    path: Path,
    settings: Settings,
    folders: Folders,
    saved: SavedChat | None,
    status: StatusLine,
    on_open: Callable[[], None] = lambda: None,
) -> Callable[[], Talk]:
    def begin() -> Talk:
        from mlx_llama_apps.chat.talk import Talk

        talk = Talk(_loader(path, settings, status, on_open), settings, folders)
        if saved is not None:
            talk.resumed = talk.resume(saved)
        return talk

    return begin


def _converse(path: Path, settings: Settings, folders: Folders, saved: SavedChat | None) -> None:
    from mlx_llama_apps.chat.hush import hushed
    from mlx_llama_apps.inference import Inference

    status = StatusLine()
    with status, ExitStack() as stack:
        with hushed():  # what is typed meanwhile waits for the prompt
            inference = stack.enter_context(
                Inference(_begin(path, settings, folders, saved, status, _begin_screen))
            )
        status.close()
        _talk_at_terminal(inference, settings, folders, saved)


def _begin_screen() -> None:
    """Import the line editor and rich, while the weights are read: that is no work of Python's."""

    def work() -> None:
        import mlx_llama_apps.chat.conversation  # noqa: F401

    threading.Thread(target=work, name="screen", daemon=True).start()


def _talk_at_terminal(
    inference: Inference[Talk], settings: Settings, folders: Folders, saved: SavedChat | None
) -> None:
    from mlx_llama_apps.chat.conversation import Conversation
    from mlx_llama_apps.chat.view import View

    view = View(is_plain=settings.value("plain"))
    conversation = Conversation(inference, view, settings, folders)
    view.say(inference.call(greeting))
    if saved is not None:
        conversation.shelf.show_resumed(saved, inference.call(lambda talk: talk.resumed))
    conversation.run()


def greeting(talk: Talk) -> str:
    """Say in one line what was loaded and whether it fits."""
    llama, context = talk.llama, talk.session.context
    plan = context.plan
    how = "it continues your text; /help" if llama.kind.is_base else "/help"
    base = " (base model)" if llama.kind.is_base else ""
    weights = sum(array.nbytes for array in llama.model.arrays())
    free = "" if plan.found is None else f", {size(plan.found)} are free"
    longer = ""
    if context.longest > context.capacity:
        longer = f"; a context of up to {context.longest} tokens would fit"
    return (
        f"{llama.path.name}: {llama.kind.name}{base}, weights {size(weights)}; context "
        f"{context.capacity} tokens ({context.reason}): model and context take at most "
        f"{size(plan.total)} of memory{free}{longer}; {how} shows the commands"
    )


def _answer_pipe(path: Path, settings: Settings, folders: Folders, saved: SavedChat | None) -> None:
    """Answer what standard input holds, as one message, and leave; stdout gets the text alone."""
    from mlx_llama_apps.chat.view import View
    from mlx_llama_apps.inference import Inference
    from mlx_llama_apps.progress import prefill_progress, remark

    text = read_stdin()
    if not text:
        raise OptionError("standard input is empty: there is no message to answer")
    view = View(is_plain=settings.value("plain"))
    status = StatusLine()
    with status, Inference(_begin(path, settings, folders, saved, status)) as inference:
        on_prefill = prefill_progress(status)

        def ask(talk: Talk, cancel: threading.Event) -> Iterator[Step]:
            return talk.ask(text, cancel, on_prefill)

        reason = None
        try:
            for number, step in enumerate(inference.stream(ask)):
                if number == 0:
                    status.close()
                    view.begin_answer()
                view.write(step.text)
                reason = step.finish_reason
        finally:
            view.end_answer(None, None)
        talk = inference.call(lambda talk: talk)
        inference.call(lambda talk: talk.close())
        while not talk.notices.empty():
            remark(talk.notices.get())
        if reason == "context":
            remark("the answer ended where the context is full; --on-full slide would go on")


def with_optional_values(tokens: list[str]) -> list[str]:
    """Return a command line on which --resume without an ID has one: the last chat's."""
    if tokens[:1] != ["chat"]:
        return tokens
    found: list[str] = []
    for token, following in zip(tokens, [*tokens[1:], "-"], strict=True):
        is_bare = token == "--resume" and following.startswith("-")
        found.append(f"--resume={LAST}" if is_bare else token)
    return found
