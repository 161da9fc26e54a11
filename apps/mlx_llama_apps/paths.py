"""Where files have their home; nothing else knows.

`MLX_LLAMA_HOME` moves everything into one folder; tests set it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import platformdirs

from mlx_llama.errors import CheckpointError, OptionError

APP_NAME = "mlx-llama"
BUNDLED = "bundled"  # as a model's name: the checkpoint that ships with the program


def data_folder() -> Path:
    """Return the folder of what the user keeps."""
    return _folder("data", platformdirs.user_data_path)


def cache_folder() -> Path:
    """Return the folder of what can be made again."""
    return _folder("cache", platformdirs.user_cache_path)


def _folder(what: str, usual: Callable[..., Path]) -> Path:
    home = os.environ.get("MLX_LLAMA_HOME")
    return user_path(home) / what if home else usual(APP_NAME, appauthor=False)


def chats_folder() -> Path:
    """Return the folder of the chats that were saved."""
    return data_folder() / "chats"


def history_file() -> Path:
    """Return the file of what was typed."""
    return data_folder() / "history"


def config_file() -> Path:
    """Return the file of the user's own defaults."""
    return _folder("config", platformdirs.user_config_path) / "config.toml"


def chat_caches_folder() -> Path:
    """Return the folder of the caches of the newest chats."""
    return cache_folder() / "chats"


def models_at_hand() -> list[Path]:
    """Return the model directories in the models folder, by name; none that is being made."""
    from mlx_llama_convert.output import JOURNAL

    return sorted(
        p
        for p in models_folder().glob("*")
        if (p / "config.json").is_file() and not (p / JOURNAL).exists()
    )


def models_folder() -> Path:
    """Return the folder that `convert` writes to without --output."""
    return data_folder() / "models"


def default_output(source: str, *, size: str | None) -> Path:
    """Return where a conversion goes when the user does not say: `<models>/<name>-4bit`.

    size: how the name ends; None adds nothing.
    """
    resolved = user_path(source).resolve()
    name = resolved.parent.name if resolved.name == "original" else resolved.name
    return models_folder() / (name if size is None else f"{name}-{size}")


def user_path(text: str) -> Path:
    """Return the path that a user wrote.

    Raises OptionError for a home folder that nobody has, and for a name that is not UTF-8: neither
    MLX nor a manifest can hold it.
    """
    try:
        path = Path(text).expanduser()
        str(path).encode()
    except RuntimeError as error:
        raise OptionError(f"{text}: there is no such user's home folder") from error
    except UnicodeEncodeError as error:
        raise OptionError(f"{text}: a name in it is not UTF-8; rename that folder") from error
    return path


def is_bundled(text: str) -> bool:
    """Whether a name means the bundled checkpoint; a folder of that name goes first."""
    return text == BUNDLED and not Path(text).exists()


def resolve_model(text: str) -> Path:
    """Return the folder that MODEL means: a path, a name in the models folder, or "bundled".

    The bundled checkpoint is converted where that has not been done yet.
    Raises CheckpointError with the command that would make a model of what was given.
    """
    path = user_path(text)
    if path.exists():
        return path
    is_name = Path(text).name == text and text not in ("", ".", "..")
    if is_name and (models_folder() / text).is_dir():
        return models_folder() / text
    if is_bundled(text):
        from mlx_llama_apps.bundled import model_directory

        return model_directory()
    known = [p.name for p in models_at_hand()]
    at_hand = f"; at hand: {', '.join(known)}" if known else ""
    raise CheckpointError(
        f"{text}: no such folder, and no model of that name in {models_folder()}{at_hand}; make "
        "one: mlx-llama convert FOLDER"
    )
