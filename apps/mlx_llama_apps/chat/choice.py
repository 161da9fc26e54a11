"""Which model, when none was named: what is at hand, and a short question."""

from __future__ import annotations

import sys
from pathlib import Path

from mlx_llama.errors import CheckpointError
from mlx_llama_apps import paths
from mlx_llama_apps.progress import remark
from mlx_llama_apps.terminal import visible


def choices_at_hand() -> list[tuple[Path, str]]:
    """Return model directories with what is shown of each: the models folder, the hub's cache."""
    from mlx_llama_convert.hub import cached_models

    found = [(path, path.name) for path in paths.models_at_hand()]
    return found + [(path, f"{name} (hub cache)") for name, path in cached_models()]


def choose_model(found: list[tuple[Path, str]]) -> Path:
    """List models and ask until one is picked by number or name. KeyboardInterrupt: none is."""
    if not found:
        raise CheckpointError(
            f"no model is at hand in {paths.models_folder()}; make one: mlx-llama convert "
            "meta-llama/Llama-3.2-1B-Instruct, or convert a checkpoint's folder"
        )
    for number, (_, name) in enumerate(found, 1):
        print(visible(f"{number:>3}  {name}"), file=sys.stderr)
    while (path := _named(found, _answer())) is None:
        pass
    return path


def _answer() -> str:
    from prompt_toolkit import prompt

    try:
        return prompt("Which model? [1] ").strip() or "1"
    except EOFError:
        raise KeyboardInterrupt from None


def _named(found: list[tuple[Path, str]], text: str) -> Path | None:
    """Return the model of a number or a name; None, and say what would do, for neither."""
    if text.isdecimal() and 1 <= int(text) <= len(found):
        return found[int(text) - 1][0]
    for path, name in found:
        if text in (name, path.name):
            return path
    remark(f"{text!r:.60} is none of those; give a number from 1 to {len(found)}, or a name")
    return None
