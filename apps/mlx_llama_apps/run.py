"""`mlx-llama run`: one prompt, one answer; stdout carries the answer and nothing else."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from mlx_llama.errors import OptionError
from mlx_llama.options import ContextOptions, GenerationOptions, LoadOptions
from mlx_llama.strict_json import json_text
from mlx_llama_apps import paths
from mlx_llama_apps.flags import ContextFlags, GenerationFlags, LoadFlags, given
from mlx_llama_apps.inference import Inference, model_loader
from mlx_llama_apps.progress import prefill_progress, remark, told_when_forgotten
from mlx_llama_apps.terminal import StatusLine, read_stdin, write_text

if TYPE_CHECKING:
    from mlx_llama import Llama, Step


def run(
    model: str,
    prompt: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    /,
    *,
    system: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    raw: bool = False,
    date: str | None = None,
    as_json: Annotated[bool, Parameter(name="--json")] = False,
    flags: GenerationFlags | None = None,
    context_flags: ContextFlags | None = None,
    load_flags: LoadFlags | None = None,
) -> None:
    """Answer one prompt on stdout.

    Parameters
    ----------
    model
        a model directory, the name of one in the models folder, or "bundled", the guide in the box
    prompt
        the prompt; missing or "-" reads standard input, less its last newline. An empty one is for
        --raw alone, which begins a text with it
    system
        the system prompt
    raw
        continue the prompt as plain text, without the chat format; base models do so anyway
    date
        date for the system block of Llama 3.1 and later, such as "26 Jul 2024" (default: none)
    as_json
        print one JSON object: text, token ids, log-probabilities, finish reason, statistics
    """
    # A wrong option is told before the model is loaded.
    wanted, context = given(flags), given(context_flags)
    most = GenerationOptions(**wanted).max_tokens
    checked, load_options = ContextOptions(**context), LoadOptions(**given(load_flags))
    if raw and (system is not None or date is not None):
        raise OptionError("--system and --date: do nothing with --raw; leave one of them out")
    path = paths.resolve_model(model)
    text = read_stdin() if prompt in (None, "-") else prompt
    if not text and not raw:
        where = "standard input" if prompt in (None, "-") else "the prompt"
        raise OptionError(f"{where} is empty: write one, or begin a text from nothing with --raw")
    with told_when_forgotten() as on_forget, StatusLine() as status:
        # The prompt is not counted yet: what it takes is checked when it is.
        needed = None if most is None else most + 1
        loader = model_loader(path, load_options, checked, status, needed=needed)
        with Inference(loader) as inference:
            hooks = {"on_prefill": prefill_progress(status), "on_forget": on_forget}
            asking = _asking(text, raw, system, date, {**wanted, **context, **hooks}, as_json)
            steps = inference.stream(asking)
            if as_json:
                print(json_text(_as_object(steps)))
            else:
                end = _print_text(steps, status)
                if end is not None and end.finish_reason == "context" and end.stats is not None:
                    limit = end.stats.context_limit
                    remark(inference.call(lambda llama: _cut(llama, checked, limit)))


def _asking(
    text: str,
    raw: bool,
    system: str | None,
    date: str | None,
    options: dict[str, Any],
    with_logprobs: bool,
) -> Callable[[Llama, threading.Event], Iterator[Step]]:
    """Return what the inference thread is to do."""

    def ask(llama: Llama, cancel: threading.Event) -> Iterator[Step]:
        if with_logprobs:
            options["logprobs"] = 1
        if raw or llama.kind.is_base:
            if system is not None or date is not None:
                raise OptionError(
                    f"--system and --date: {llama.path.name} is a base model ({llama.kind.name}), "
                    "which has no chat format"
                )
            return llama.stream(text, cancel=cancel, **options)
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": text})
        return llama.stream_chat(messages, date=date, cancel=cancel, **options)

    return ask


def _print_text(steps: Iterator[Step], status: StatusLine) -> Step | None:
    """Print the text as it comes and end it with one newline; return the last step."""
    last, step = "", None
    try:
        for step in steps:
            status.close()
            if step.text:
                last = step.text
                write_text(step.text, sys.stdout)
    except KeyboardInterrupt:
        if last:
            _end_line(last)
        raise
    _end_line(last)
    return step


def _cut(llama: Llama, options: ContextOptions, limit: int) -> str:
    """Say that a context of so many tokens cut the answer, and what can be done here."""
    from mlx_llama.context import plan_context

    longest = plan_context(options, llama.config, dtype=llama.dtype).longest
    full = f"the answer was cut: the context of {limit} tokens is full"
    if longest > limit:
        return f"{full}; raise --context, up to {longest}, or take --on-full slide"
    return f"{full}, the longest that model and memory have; --on-full slide goes on beyond it"


def _end_line(last: str) -> None:
    """Write a newline unless what was written last ends with one."""
    if not last.endswith("\n"):
        sys.stdout.write("\n")
        sys.stdout.flush()


def _as_object(steps: Iterator[Step]) -> dict[str, Any]:
    collected = list(steps)
    tokens = [step for step in collected if step.token_id is not None]
    end = collected[-1]
    return {
        "text": "".join(step.text for step in collected),
        "token_ids": [step.token_id for step in tokens],
        "logprobs": [step.logprob for step in tokens],
        "finish_reason": end.finish_reason,
        "stats": None if end.stats is None else asdict(end.stats),
    }
