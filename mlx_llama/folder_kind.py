"""Which member of the family a folder holds: what it records, is called, and has as a template."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_llama.config import ModelConfig
from mlx_llama.errors import UnsupportedModelError
from mlx_llama.kinds import KINDS, Decision, base_kind, decide_kind
from mlx_llama.strict_json import MAX_JSON_BYTES, load_json
from mlx_llama.tokenizer import Tokenizer

_ANY_MODELS_NAME = re.compile(r"original|mp[0-9]+|fp8")


def own_entry(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a config.json says under `mlx_llama`, which only this project writes."""
    own = raw.get("mlx_llama")
    return own if isinstance(own, Mapping) else {}


def decide_folder_kind(
    path: Path,
    raw: Mapping[str, Any],
    config: ModelConfig,
    tokenizer: Tokenizer,
    *,
    flag: str | None = None,
    name: str | None = None,
) -> Decision:
    """Choose the kind of a folder in Hugging Face's layout.

    raw: its config.json. name: what the model is called, where the folder's name does not tell.
    Raises UnsupportedModelError for a recorded kind that is unknown or of the other tokenizer.
    """
    is_tiktoken = tokenizer.family == "tiktoken"
    return decide_kind(
        flag=flag,
        recorded=None if flag else _recorded_kind(path, raw, is_tiktoken=is_tiktoken),
        chat_template=_chat_template_text(path),
        names=[
            *([name] if name else []),
            *folder_names(path),
            str(raw.get("_name_or_path", "")),
        ],
        base=base_kind(
            is_tiktoken=is_tiktoken,
            is_rope_scaled=config.rope_scaling is not None,
            is_tied=config.tied,
            norm_eps=config.norm_eps,
            rope_theta=config.rope_theta,
        ),
        is_tiktoken=is_tiktoken,
    )


def _recorded_kind(path: Path, raw: Mapping[str, Any], *, is_tiktoken: bool) -> str | None:
    recorded = own_entry(raw).get("kind")
    if recorded is None:
        return None
    if not isinstance(recorded, str) or recorded not in KINDS:
        raise UnsupportedModelError(
            f"{path / 'config.json'}: mlx_llama.kind is {repr(recorded)[:60]}, expected one of "
            f"{', '.join(KINDS)}"
        )
    if KINDS[recorded].is_tiktoken != is_tiktoken:
        wanted, found = ("tiktoken", "SentencePiece")[:: -1 if is_tiktoken else 1]
        raise UnsupportedModelError(
            f"{path / 'config.json'}: mlx_llama.kind {recorded} has a {wanted} tokenizer, the one "
            f"here is {found}; they belong to different models"
        )
    return recorded


def folder_names(path: Path) -> list[str]:
    """Return what a folder is called, nearest first: as given, itself, and the two above it.

    A download cache keeps `models--meta-llama--Llama-2-7b-chat-hf/snapshots/<commit>`, and Meta's
    own files in a folder below that, whose name is every model's.
    """
    place = path.resolve()
    while _ANY_MODELS_NAME.fullmatch(place.name):
        place = place.parent
    return [path.absolute().name, place.name, *(above.name for above in place.parents[:2])]


def _chat_template_text(path: Path) -> str | None:
    """Return a folder's chat template, to be recognised and never executed."""
    file = path / "chat_template.jinja"
    if file.is_file() and file.stat().st_size < MAX_JSON_BYTES:
        return file.read_text(encoding="utf-8", errors="replace")
    if not (path / "tokenizer_config.json").is_file():
        return None
    stored = load_json(path / "tokenizer_config.json", max_bytes=MAX_JSON_BYTES).get(
        "chat_template"
    )
    if isinstance(stored, list):  # several of them by name
        templates = [entry for entry in stored if isinstance(entry, dict)]
        templates.sort(key=lambda entry: entry.get("name") != "default")
        stored = templates[0].get("template") if templates else None
    return stored if isinstance(stored, str) else None
