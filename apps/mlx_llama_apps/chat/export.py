"""Chats as files of the user: Markdown for people, JSON to be loaded again; and texts to read.

Nothing that is read is trusted.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_llama.errors import MlxLlamaError, OptionError
from mlx_llama.prompts import Message
from mlx_llama_apps.chat.store import (
    MAX_CHAT_BYTES,
    ChatError,
    SavedChat,
    as_message,
    as_record,
    read_chat,
)

FORMAT = "mlx-llama chat"
HEADINGS = {"system": "System", "user": "You", "assistant": "Model"}


def render(
    path: Path,
    messages: Sequence[Message],
    *,
    model: str,
    settings: Mapping[str, Any],
    tokenizer: str,
) -> str:
    """Return the chat as the file's ending asks for; OptionError for another ending."""
    if path.suffix == ".md":
        parts = [f"# Chat with {model}\n"]
        for message in messages:
            cut = " (cut)" if message.is_cut else ""
            parts.append(
                f"## {HEADINGS.get(message.role, message.role)}{cut}\n\n{message.content}\n"
            )
        return "\n".join(parts)
    if path.suffix == ".json":
        content = {
            "format": FORMAT,
            "version": 1,
            "model": model,
            "tokenizer": tokenizer,
            "settings": dict(settings),
            "messages": [
                {name: value for name, value in as_record(message).items() if name != "type"}
                for message in messages
            ],
        }
        return json.dumps(content, ensure_ascii=False, indent=1) + "\n"
    raise OptionError(f"{path}: expected a name that ends in .md or .json")


def write_private(path: Path, content: str) -> None:
    """Write a file whole or not at all, for its owner alone."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}")
    except OSError as error:
        raise MlxLlamaError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):  # it would name the file beside it
            raise MlxLlamaError(f"{path}: cannot be written: {error.strerror}") from error
        raise


def load(path: Path) -> SavedChat:
    """Read what `render` wrote as JSON, or a saved chat's own file; ChatError for anything else."""
    if path.suffix == ".jsonl":
        return read_chat(path)
    if path.suffix == ".md":
        raise ChatError(f"{path}: Markdown is for people; /load takes the .json of /save")
    text = read_text(path, most_bytes=MAX_CHAT_BYTES)
    try:
        raw = json.loads(text)
        if raw.get("format") != FORMAT or raw.get("version") != 1:
            raise ValueError("no chat of this program")
        messages = [as_message(record) for record in raw["messages"]]
        settings = raw.get("settings", {})
        if not isinstance(settings, dict):
            raise ValueError("settings are no object")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ChatError(f"{path}: not a chat that /save wrote: {error}") from error
    return SavedChat(
        path,
        model=str(raw.get("model", "")),
        tokenizer=str(raw.get("tokenizer", "")),
        settings=settings,
        messages=messages,
        nbytes=len(text),
    )


def read_text(path: Path, *, most_bytes: int) -> str:
    """Read a text file; MlxLlamaError for one that is binary, too long or not there."""
    try:
        if path.is_dir():
            raise MlxLlamaError(f"{path}: a folder; name a text file in it")
        if not path.exists():
            raise MlxLlamaError(f"{path}: no such file")
        if not path.is_file():
            raise MlxLlamaError(f"{path}: no regular file; copy what it gives into one")
        nbytes = path.stat().st_size
        if nbytes > most_bytes:
            raise MlxLlamaError(f"{path}: {nbytes} bytes, at most {most_bytes} are read")
        data = path.read_bytes()
    except OSError as error:
        raise MlxLlamaError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise MlxLlamaError(f"{path}: binary, or no UTF-8 text; only text can be sent")
    return text
