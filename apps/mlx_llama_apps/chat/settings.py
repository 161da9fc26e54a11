"""What a chat goes by, and where each value came from: the key is the flag's name.

Owns the order of the sources and the configuration file; a value is checked where the options are
defined. Knows no model but what it recommends.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from mlx_llama.errors import OptionError
from mlx_llama.options import (
    DEFAULT_TEMPERATURE,
    DEFAULT_TOP_P,
    FLOAT32,
    ChatOptions,
    ContextOptions,
    GenerationOptions,
    LoadOptions,
)
from mlx_llama_apps.flags import biases

GROUPS = {
    "generation": GenerationOptions,
    "context": ContextOptions,
    "load": LoadOptions,
    "chat": ChatOptions,
}
TEXT_KEYS = {
    "system": "the system prompt",
    "date": 'date for the system block of Llama 3.1 and later, such as "26 Jul 2024"',
}
OF_SOME_MODELS = ("activations", "kv_bits")  # options that not every model can be loaded with
ON_FULL = ("ask", "stop", "slide")
RECOMMENDED = "generation_config.json"  # sources by name
DEFAULT = "default"
_FLAG = re.compile(r"--([a-z][a-z-]+)")
# What is taken where neither the user nor the model directory says anything.
LAST_DEFAULTS = {
    "temperature": DEFAULT_TEMPERATURE,
    "top_p": DEFAULT_TOP_P,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "activations": FLOAT32,
}


@dataclass(frozen=True, slots=True)
class Key:
    """One setting. group: which options it belongs to; "text" for those that are not among them."""

    name: str
    group: str
    help: str
    kind: Any
    default: Any
    choices: tuple[Any, ...] = ()


def _keys() -> dict[str, Key]:
    found = {name: Key(name, "text", help, str | None, None) for name, help in TEXT_KEYS.items()}
    for group, options in GROUPS.items():
        hints = get_type_hints(options)
        for spec in fields(options):
            if not spec.metadata.get("python_only"):
                found[spec.name] = Key(
                    spec.name,
                    group,
                    spec.metadata["help"],
                    hints[spec.name],
                    _default(spec),
                    tuple(spec.metadata["choices"] or ()),
                )
    on_full = found["on_full"]
    found["on_full"] = Key("on_full", "context", on_full.help, str, "ask", ON_FULL)
    return found


def _default(spec: Field[Any]) -> Any:
    if spec.name in LAST_DEFAULTS:
        return LAST_DEFAULTS[spec.name]
    return spec.default_factory() if spec.default_factory is not MISSING else spec.default


KEYS: Mapping[str, Key] = _keys()


@dataclass(frozen=True, slots=True)
class Setting:
    """One line of `/set`. value is None where the program decides as its help says."""

    key: Key
    value: Any
    source: str

    @property
    def written(self) -> str:
        """How it was written where it came from."""
        name = self.key.name
        words = {
            "flag": f"--{name.replace('_', '-')}",
            "/set": f"/set {name}",
            "chat": f"{name} of the chat",
        }
        return words.get(self.source, f"{name} of {self.source}")


@dataclass(slots=True)
class Settings:
    """Values by source, the first source wins; `recommended` is what the model directory says.

    The configuration file and its presets speak of all models and of terminals too: what the model
    has no place for, and asking where nobody can be asked, is passed over there.
    """

    flags: dict[str, Any] = field(default_factory=dict)
    preset: str | None = None
    config: Config | None = None
    asks_when_full: bool = True
    typed: dict[str, Any] = field(default_factory=dict)
    of_chat: dict[str, Any] = field(default_factory=dict)
    recommended: dict[str, Any] = field(default_factory=dict)
    unfit: frozenset[str] = frozenset()  # what the model has no place for

    def __post_init__(self) -> None:
        self._layers()  # a preset that does not exist is told now
        self.check()

    def _layers(self) -> list[tuple[str, Mapping[str, Any]]]:
        layers: list[tuple[str, Mapping[str, Any]]] = [
            ("/set", self.typed),
            ("flag", self.flags),
            ("chat", self.of_chat),
        ]
        config = self.config
        if self.preset is not None:
            presets = {} if config is None else config.presets
            if self.preset not in presets:
                known = ", ".join(presets) or "none"
                where = "the configuration file" if config is None else config.path
                raise OptionError(
                    f"--preset {self.preset}: no such preset in {where}; there: {known}"
                )
            layers.append((f"preset {self.preset}", self._fitting(presets[self.preset])))
        if config is not None:
            layers.append((config.path.name, self._fitting(config.values)))
        layers.append((RECOMMENDED, self.recommended))
        return layers

    def _fitting(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        return {name: value for name, value in values.items() if name not in self.unfit}

    def pass_over(self, error: OptionError) -> str | None:
        """Note and name what a model refused, if the file or its preset alone asked for it."""
        name = error.option
        if name is None or name not in OF_SOME_MODELS or name in self.unfit:
            return None
        if self.find(name).source in ("/set", "flag", "chat"):
            return None
        self.unfit |= {name}
        return name

    def left_out(self) -> list[str]:
        """Return what the preset, which was asked for, says in vain: the model has no place."""
        if self.preset is None or self.config is None:
            return []
        return sorted(self.unfit & self.config.presets[self.preset].keys())

    def find(self, name: str) -> Setting:
        """Return a setting with its value and where that came from."""
        key = key_named(name)
        name = key.name
        for source, values in self._layers():
            if name in values and not (source != "flag" and self._cannot_ask(name, values[name])):
                return Setting(key, values[name], source)
        return Setting(key, "stop" if self._cannot_ask(name, key.default) else key.default, DEFAULT)

    def _cannot_ask(self, name: str, value: object) -> bool:
        return name == "on_full" and value == "ask" and not self.asks_when_full

    def all(self) -> list[Setting]:
        """Return every setting, in the order of `/set`."""
        return [self.find(name) for name in KEYS]

    def value(self, name: str) -> Any:
        """Return a setting's value."""
        return self.find(name).value

    def group(self, name: str) -> dict[str, Any]:
        """Return keywords of a group's options: what differs from the default."""
        found = {}
        for key in KEYS.values():
            setting = self.find(key.name)
            is_set = setting.source not in (DEFAULT, RECOMMENDED)
            if key.group == name and is_set and setting.value is not None:
                found[key.name] = setting.value
        if name == "context" and self.value("on_full") == "ask":
            found["on_full"] = "stop"  # the chat asks when an answer has ended there
        return found

    def explicit(self) -> dict[str, Any]:
        """Return what is kept with a chat: what was set by flag, preset, file or /set."""
        settings = [self.find(name) for name in KEYS if KEYS[name].group != "load"]
        return {
            s.key.name: s.value
            for s in settings
            if s.source not in (DEFAULT, RECOMMENDED, "config.toml") and s.key.group != "chat"
        }

    def check(self) -> None:
        """Raise OptionError for a value that cannot be, by the name that it has where it is."""
        try:
            self._check()
        except OptionError as error:
            told = _FLAG.sub(self._where_it_is, str(error))
            raise OptionError(told, option=error.option) from error

    def _where_it_is(self, match: re.Match[str]) -> str:
        name = match[1].replace("-", "_")
        is_of_chat = name in KEYS and self.find(name).source == "chat"
        return self.find(name).written if is_of_chat else match[0]

    def _check(self) -> None:
        on_full = self.value("on_full")
        if on_full == "ask" and not self.asks_when_full:
            raise OptionError(
                "--on-full ask: there is no terminal to ask at; take --on-full stop or slide"
            )
        if on_full not in ON_FULL:
            raise OptionError(f"--on-full: found {on_full!r}, expected one of {', '.join(ON_FULL)}")
        for name, options in GROUPS.items():
            options(**self.group(name))
        for name in TEXT_KEYS:
            if not isinstance(self.value(name), str | None):
                raise OptionError(f"--{name}: found {self.value(name)!r}, expected a text")

    def set(self, name: str, text: str) -> Setting:
        """Take a value as it was typed; "default" drops it, and the flag's and the chat's too.

        Then the preset, the file and the model are asked again. Raises OptionError, and changes
        nothing, for a value that cannot be.
        """
        key = key_named(name)
        name = key.name
        before = self.state()
        if text == DEFAULT:
            for values in (self.typed, self.flags, self.of_chat):
                values.pop(name, None)
        else:
            self.typed[name] = parse_value(key, text)
        try:
            self.check()
        except OptionError:
            self.go_back(before)
            raise
        return self.find(name)

    def state(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Return what a later `go_back` takes."""
        return dict(self.typed), dict(self.flags), dict(self.of_chat)

    def go_back(self, state: tuple[dict[str, Any], dict[str, Any], dict[str, Any]]) -> None:
        """Take up what there was."""
        self.typed, self.flags, self.of_chat = state


def with_keys(text: str, form: str) -> str:
    """Return an error that speaks of flags as where the key was set writes it: "/set {}"."""

    def written(match: re.Match[str]) -> str:
        name = match[1].replace("-", "_")
        return form.format(name) if name in KEYS else match[0]

    return _FLAG.sub(written, text)


def key_named(name: str) -> Key:
    """Return a key; hyphens are underscores. OptionError, with the nearest, for another name."""
    plain = name.lstrip("-").replace("-", "_")
    if plain in KEYS:
        return KEYS[plain]
    near = difflib.get_close_matches(plain, KEYS, n=1)
    raise OptionError(
        f"{name!r:.40} is no setting; " + (f"did you mean {near[0]}?" if near else "/set lists all")
    )


def parse_value(key: Key, text: str) -> Any:
    """Read what was typed for a key."""
    arms = get_args(key.kind) or (key.kind,)
    if key.kind == dict[str, float]:
        return biases([text])
    if key.kind == list[str]:
        return _texts(text)
    if bool in arms:
        if text.lower() in ("on", "true", "yes", "1"):
            return True
        if text.lower() in ("off", "false", "no", "0"):
            return False
        flag = key.name.replace("_", "-")
        raise OptionError(f"--{flag}: found {text!r:.40}, expected on or off")
    for kind in (int, float):
        if kind in arms:
            try:
                return kind(text)
            except ValueError:
                continue
    if str in arms:
        return text
    raise OptionError(f"--{key.name.replace('_', '-')}: found {text!r:.40}, expected a number")


def _texts(text: str) -> list[str]:
    """Read a list of texts as JSON, or one text as it stands."""
    if text.startswith(("[", '"')):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise OptionError(f"--stop: {text!r:.40} is no JSON: {error}") from error
        return found if isinstance(found, list) else [found]
    return [text]


# --- the configuration file ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Config:
    """What config.toml says: defaults, and presets by name."""

    path: Path
    values: Mapping[str, Any]
    presets: Mapping[str, Mapping[str, Any]]


def read_config(path: Path) -> Config | None:
    """Read the configuration file; None where there is none. OptionError for what it cannot say."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{path}: cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{path}: no TOML: {error}") from error
    presets = raw.pop("presets", {})
    if not isinstance(presets, dict) or any(not isinstance(p, dict) for p in presets.values()):
        raise OptionError(f"{path}: presets: expected a table for each, such as [presets.coder]")
    for where, values in (
        (str(path), raw),
        *((f"{path}: presets.{n}", v) for n, v in presets.items()),
    ):
        for name in values:
            if name not in KEYS:
                near = difflib.get_close_matches(name, KEYS, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise OptionError(f"{where}: {name!r:.40} is no setting{hint}")
        try:
            Settings(flags=dict(values))
        except OptionError as error:
            raise OptionError(f"{where}: {with_keys(str(error), '{}')}") from error
    return Config(path, raw, presets)
