"""What the guide is taught about the program, read from the program itself.

Takes the command table of the apps and the chat's own table; returns plain facts. An option or a
command that joins them is taught after the next run; one that goes is missed by the test of
`taught.json`, and by `howto.toml`, whose entries name what they need.
"""

from __future__ import annotations

import re
import tomllib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DEFAULT = re.compile(r"\(default: (.+)\)$")


@dataclass(frozen=True, slots=True)
class Option:
    """An option as the command line describes it. helps: text by command."""

    name: str
    helps: Mapping[str, str]

    @property
    def answer(self) -> str:
        """Say what it does; where commands differ, each says its own."""
        grouped: dict[str, list[str]] = defaultdict(list)
        for command, text in self.helps.items():
            grouped[text].append(command)
        if len(grouped) == 1:
            return f"{self.name}: {next(iter(grouped))}."
        parts = [f"in {', '.join(commands)}: {text}" for text, commands in grouped.items()]
        return f"{self.name} {'; '.join(parts)}."

    @property
    def default(self) -> str | None:
        """Return the default that every command names, if they agree."""
        found = {
            match[1] if (match := DEFAULT.search(text)) else None
            for text in set(self.helps.values())
        }
        return found.pop() if len(found) == 1 else None


@dataclass(frozen=True, slots=True)
class Program:
    """The command line: summaries of commands, options, and what the chat takes."""

    commands: Mapping[str, str]
    options: Mapping[str, Option]
    slashes: Mapping[str, str]

    def taught(self) -> dict[str, Any]:
        """Return what `taught.json` holds: every name that the training text speaks of."""
        return {
            "commands": dict(self.commands),
            "options": {name: dict(option.helps) for name, option in self.options.items()},
            "slashes": dict(self.slashes),
        }

    def lacks(self, taught: Mapping[str, Any]) -> list[str]:
        """Name what was taught (see `taught`) and is gone."""
        here = self.taught()
        gone = [
            f"{command} {name}"
            for name, helps in taught["options"].items()
            for command in helps
            if command not in here["options"].get(name, {})
        ]
        tables = ("commands", "slashes")
        return gone + [
            name for table in tables for name in taught[table] if name not in here[table]
        ]

    def says_otherwise(self, taught: Mapping[str, Any]) -> list[str]:
        """Name the options whose help is no longer what was taught."""
        return [
            f"{command} {name}"
            for name, helps in taught["options"].items()
            for command, text in helps.items()
            if name in self.options and self.options[name].helps.get(command, text) != text
        ]

    def knows(self, name: str) -> bool:
        """Whether an option, a command or a chat command of this name exists."""
        return name in self.options or name in self.commands or name in self.slashes or name == "-o"


def program() -> Program:
    """Read the tables of the installed code."""
    from mlx_llama_apps.chat.commands import COMMANDS as SLASHES
    from mlx_llama_apps.main import COMMANDS, arguments_of

    commands, helps = {}, defaultdict(dict)
    for command, function in COMMANDS.items():
        commands[command] = (function.__doc__ or "").strip().splitlines()[0].rstrip(".")
        for argument in arguments_of(command, parse_docstring=True):
            if (name := argument.names[0]).startswith("--"):
                helps[name][command] = " ".join((argument.parameter.help or "").split())
    return Program(
        commands,
        {name: Option(name, by_command) for name, by_command in helps.items()},
        {f"/{name}": command.help for name, command in SLASHES.items()},
    )


@dataclass(frozen=True, slots=True)
class Size:
    """A published model. The names that people use for it come first to last."""

    names: tuple[str, ...]
    folder: str
    dim: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    vocabulary: int
    context: int
    is_tied: bool = False

    @property
    def parameters(self) -> int:
        """Count them: matrices and norms, the output only where it is its own."""
        kv_width = self.dim // self.heads * self.kv_heads
        block = 2 * self.dim * (self.dim + kv_width) + 3 * self.dim * self.hidden + 2 * self.dim
        ends = self.vocabulary * self.dim * (1 if self.is_tied else 2)
        return self.layers * block + ends + self.dim

    def gigabytes(self, bits: int) -> float:
        """Return 10^9 bytes of the weights; packed ones carry 32 bits for each group of 64."""
        return self.parameters * (bits if bits == 16 else bits + 0.5) / 8e9

    def cache_gigabytes(self, tokens: int) -> float:
        """Return 10^9 bytes of keys and values at 16 bits."""
        return 2 * self.layers * self.kv_heads * (self.dim // self.heads) * 2 * tokens / 1e9


SIZES = (
    Size(
        ("Llama 3.2 1B", "the 1B", "a 1B", "3.2 1B"),
        "Llama-3.2-1B-Instruct",
        2048,
        16,
        32,
        8,
        8192,
        128256,
        131072,
        True,
    ),
    Size(
        ("Llama 3.2 3B", "the 3B", "a 3B", "3.2 3B"),
        "Llama-3.2-3B-Instruct",
        3072,
        28,
        24,
        8,
        8192,
        128256,
        131072,
        True,
    ),
    Size(("Llama 2 7B", "the 7B", "a 7B"), "llama-2-7b-chat", 4096, 32, 32, 32, 11008, 32000, 4096),
    Size(
        ("Llama 2 13B", "the 13B", "a 13B"),
        "llama-2-13b-chat",
        5120,
        40,
        40,
        40,
        13824,
        32000,
        4096,
    ),
    Size(
        ("Llama 3.1 8B", "the 8B", "an 8B", "3.1 8B", "Llama 8B"),
        "Llama-3.1-8B-Instruct",
        4096,
        32,
        32,
        8,
        14336,
        128256,
        131072,
    ),
    Size(
        ("Llama 3.1 70B", "the 70B", "a 70B", "3.1 70B", "Llama 70B"),
        "Llama-3.1-70B-Instruct",
        8192,
        80,
        64,
        8,
        28672,
        128256,
        131072,
    ),
    Size(
        ("Llama 3.1 405B", "the 405B", "a 405B", "3.1 405B"),
        "Llama-3.1-405B-Instruct",
        16384,
        126,
        128,
        8,
        53248,
        128256,
        131072,
    ),
)
SHAPE_NAMES = {
    "layers": ("layers", "blocks"),
    "heads": ("query heads", "attention heads", "heads"),
    "kv_heads": ("key/value heads", "kv heads"),
    "dim": ("dimensions",),
    "vocabulary": ("tokens in the vocabulary",),
    "context": ("tokens of context",),
}


def read_toml(name: str) -> dict[str, Any]:
    """Read one of the files beside this module."""
    return tomllib.loads((HERE / name).read_text(encoding="utf-8"))


def howtos(known: Program) -> list[dict[str, Any]]:
    """Read howto.toml; raise LookupError where an answer names what the program lacks."""
    entries = read_toml("howto.toml")["howto"]
    for entry in entries:
        gone = [name for name in entry["needs"] if not known.knows(name)]
        if gone:
            raise LookupError(
                f"howto.toml: {entry['say']!r} speaks of {', '.join(gone)}, which the program lacks"
            )
        for field in ("say", "key"):
            entry[field] = entry[field].replace("{commands}", ", ".join(known.commands))
    return entries
