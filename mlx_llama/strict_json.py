"""JSON from strangers: `params.json`, `config.json`, index files and safetensors headers; results.

Takes a file or a text, returns the top level object. Ambiguous or unbounded JSON is refused:
duplicate keys, NaN and infinities, deep nesting, broken Unicode, files larger than they can be.
Knows nothing of what the keys mean.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from mlx_llama.errors import CheckpointError

MAX_JSON_BYTES = 64 << 20  # of a model directory's largest ones

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def load_json(path: Path, *, max_bytes: int) -> dict[str, Any]:
    """Read the object in a JSON file of at most `max_bytes` bytes.

    Raises: CheckpointError of one line, starting with the path.
    """
    return parse_json_bytes(_read(path, max_bytes), where=str(path))


def load_jsonl(path: Path, *, max_bytes: int) -> list[tuple[str, dict[str, Any]]]:
    """Read the objects of a JSONL file, one a line, each with where it stands: "path:line".

    Only a newline ends a line: JSON may hold U+2028 as it is. Raises as `load_json` does.
    """
    lines = load_text(path, max_bytes=max_bytes).split("\n")
    places = [(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    return [(where, parse_json(line, where=where)) for where, line in places]


def load_text(path: Path, *, max_bytes: int) -> str:
    """Read a UTF-8 text; a byte order mark is dropped, a line ends with a newline alone.

    Raises as `load_json` does.
    """
    text = _decoded(_read(path, max_bytes), str(path))
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > max_bytes:
        raise CheckpointError(f"{path}: larger than {max_bytes} bytes, which is the most expected")
    return data


def parse_json_bytes(data: bytes, *, where: str) -> dict[str, Any]:
    """Parse the object in UTF-8 encoded JSON; see `parse_json`."""
    return parse_json(_decoded(data, where), where=where)


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: not UTF-8 text at byte {error.start}") from error


def parse_json(text: str, *, where: str) -> dict[str, Any]:
    """Parse the object in a JSON text; `where` (a path) begins every message.

    Raises: CheckpointError for invalid JSON, a duplicate key, a number that is not finite or has
    thousands of digits, nesting beyond Python's recursion limit, half of a surrogate pair, and for
    anything but an object at the top.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_float=_finite,
            parse_constant=_refuse_constant,
        )
        if _SURROGATE.search(text):
            # Half a pair survives parsing and fails much later, when it is printed or is a path.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise CheckpointError(f"{where}: JSON is nested too deeply") from error
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{where}: JSON holds half of a surrogate pair") from error
    except ValueError as error:
        # JSONDecodeError and what our hooks raise; Python's own text on huge integers is one line.
        raise CheckpointError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{where}: JSON holds {type(value).__name__}, expected an object {{...}}"
        )
    return value


def json_text(content: object, *, indent: int | None = None) -> str:
    """Write a result as JSON that every reader takes: null for a number that is not finite."""
    return json.dumps(_with_nulls(content), ensure_ascii=False, indent=indent, allow_nan=False)


def _with_nulls(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _with_nulls(each) for key, each in value.items()}
    return [_with_nulls(each) for each in value] if isinstance(value, list | tuple) else value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key[:80]!r} stands twice")
            seen.add(key)
    return unique


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {text[:80]} is too large")
    return value


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number in JSON")
