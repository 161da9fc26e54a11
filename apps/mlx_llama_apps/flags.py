"""Turns the option dataclasses of `mlx_llama.options` into command-line flags.

Every flag keeps the field's name, help and check; one that is not given is left out, so that a
model directory's own defaults can take its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

from cyclopts import CoercionError, Parameter, Token, convert

from mlx_llama.errors import OptionError
from mlx_llama.options import (
    ChatOptions,
    ContextOptions,
    ConvertOptions,
    GenerationOptions,
    LoadOptions,
)
from mlx_llama_apps import paths

ON_FULL_IN_CHAT = (
    "what a full context does: ask (the default at a terminal), stop, which ends the answer, or "
    "slide, which drops the oldest tokens behind the kept ones and says so"
)


def _flags_of(
    options: type,
    *,
    only: Sequence[str] = (),
    helps: Mapping[str, str] = MappingProxyType({}),
    **types: Any,
) -> type:
    """Make a dataclass of optional flags; `types` says how some are given on a command line.

    only: the names to take, where not all of them mean something to a command. helps: what is said
    of some in place of their own help.
    """
    hints = get_type_hints(options)
    made: list[tuple[str, Any, Any]] = []
    for spec in fields(options):
        if spec.metadata.get("python_only") or (only and spec.name not in only):
            continue
        kind = types.get(spec.name, hints[spec.name])
        parameter = Parameter(
            help=helps.get(spec.name) or spec.metadata["help"] + _default_help(spec),
            allow_leading_hyphen=True,
        )
        made.append((spec.name, Annotated[kind | None, parameter], field(default=None)))
    name = f"{'Some' if only else ''}{options.__name__}Flags"
    made_class = make_dataclass(name, made, frozen=True)
    made_class.__module__ = __name__  # cyclopts does not look into classes of the standard library
    return made_class


def read_value(kind: Any, tokens: Sequence[Token]) -> Any:
    """Read what was given for a parameter.

    Cyclopts itself would round 3.5 to a whole number, and take ~ for the name of a folder.
    """
    kinds = {kind, *get_args(kind)}
    if int in kinds:
        numbers = [_whole_number(token) for token in tokens]
        return numbers if list in (kind, get_origin(kind)) else numbers[0]
    if Path in kinds:
        return paths.user_path(tokens[0].value)
    return convert(kind, tokens)


def _whole_number(token: Token) -> int:
    try:
        return int(token.value)
    except ValueError:
        message = f"found {token.value!r}, expected a whole number"
        raise CoercionError(msg=message, token=token) from None


def _default_help(spec: Field[Any]) -> str:
    if spec.default in (MISSING, None, False, True) or "default" in spec.metadata["help"]:
        return ""
    return f" (default: {spec.default})"


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class MakingFlags:
    """What every command takes that makes a model directory of a checkpoint."""

    output: Annotated[
        Path | None,
        Parameter(
            name=("--output", "-o"),
            help="the directory to write (default: in the models folder, named after source and "
            "bits)",
        ),
    ] = None
    dry_run: Annotated[bool, Parameter(help="print the plan and stop")] = False
    force: Annotated[bool, Parameter(help="replace a model directory that exists")] = False
    quiet: Annotated[bool, Parameter(help="print no plan and no progress")] = False
    revision: Annotated[
        str | None,
        Parameter(help="branch, tag or commit of a hub repository (default: main)"),
    ] = None
    offline: Annotated[
        bool,
        Parameter(help="open no connection: take a hub repository's files from the cache"),
    ] = False


AS_USUAL = MakingFlags()

if TYPE_CHECKING:

    class GenerationFlags:
        """The fields of `GenerationOptions`, each None when it was not given."""

    class ConvertFlags:
        """The fields of `ConvertOptions` that a plain conversion has, None when not given."""

    class QuantizeFlags:
        """All fields of `ConvertOptions`, each None when it was not given."""

    class ContextFlags:
        """The fields of `ContextOptions`, each None when it was not given."""

    class ChatContextFlags:
        """The same for the chat, which can ask when the context is full."""

    class ChatFlags:
        """The fields of `ChatOptions`, each None when it was not given."""

    class PlanFlags:
        """Those of them that decide how much memory a model takes."""

    class CacheFlags:
        """Those that decide how a text is read and cached, whatever its length."""

    class LoadFlags:
        """The fields of `LoadOptions`, each None when it was not given."""

else:
    GenerationFlags = Parameter(name="*")(
        _flags_of(
            GenerationOptions,
            logit_bias=list[str],
        )
    )
    ConvertFlags = Parameter(name="*")(
        _flags_of(ConvertOptions, only=("bits", "group_size", "dtype", "kind", "rope_factor"))
    )
    QuantizeFlags = Parameter(name="*")(_flags_of(ConvertOptions))
    CONTEXT_TYPES = {"context": str, "kv_bits": str}
    ContextFlags = Parameter(name="*")(_flags_of(ContextOptions, **CONTEXT_TYPES))
    ChatContextFlags = Parameter(name="*")(
        _flags_of(ContextOptions, helps={"on_full": ON_FULL_IN_CHAT}, **CONTEXT_TYPES)
    )
    ChatFlags = Parameter(name="*")(_flags_of(ChatOptions))
    PlanFlags = Parameter(name="*")(
        _flags_of(ContextOptions, only=("context", "kv_bits", "prefill_chunk"), **CONTEXT_TYPES)
    )
    CacheFlags = Parameter(name="*")(
        _flags_of(ContextOptions, only=("kv_bits", "prefill_chunk"), **CONTEXT_TYPES)
    )
    LoadFlags = Parameter(name="*")(_flags_of(LoadOptions))


def given(flags: object) -> dict[str, Any]:
    """Return the flags that were given, as keywords of the option dataclass."""
    if flags is None:
        return {}
    found = {spec.name: getattr(flags, spec.name) for spec in fields(flags)}  # pyright: ignore[reportArgumentType]
    found = {name: value for name, value in found.items() if value is not None}
    if "logit_bias" in found:
        found["logit_bias"] = biases(found["logit_bias"])
    for name in ("context", "kv_bits"):  # a number, or a word such as max or 8:4
        if found.get(name, "").isdecimal():
            found[name] = int(found[name])
    return found


def biases(texts: Iterable[str]) -> dict[str, float]:
    """Read texts such as " yes=2.5"; OptionError for others."""
    found: dict[str, float] = {}
    for text in texts:
        token, bias = _bias(text)
        if token in found:
            raise OptionError(f"--logit-bias: {token!r} is given twice; leave one of them out")
        found[token] = bias
    return found


def _bias(text: str) -> tuple[str, float]:
    token, equals, number = text.rpartition("=")
    try:
        if equals and token:
            return token, float(number)
    except ValueError:
        pass
    raise OptionError(f"--logit-bias: found {text!r}, expected TEXT=NUMBER, such as ' yes=2.5'")
