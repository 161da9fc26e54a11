"""Where a setting comes from, and what is refused."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from mlx_llama import ops
from mlx_llama.cache import KVBits
from mlx_llama.errors import OptionError
from mlx_llama_apps.chat.settings import KEYS, Settings, read_config, with_keys


def config(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path


EXAMPLE = """
temperature = 0.3
top_p = 0.8
min_p = 0.1
stop = ["END"]
[presets.coder]
system = "You write code."
top_p = 0.7
min_p = 0.2
"""


def test_sources_come_in_their_order(tmp_path: Path) -> None:
    settings = Settings(
        flags={"min_p": 0.4}, preset="coder", config=read_config(config(tmp_path, EXAMPLE))
    )
    settings.recommended = {"top_k": 5, "temperature": 0.9}
    found = {name: (settings.find(name).value, settings.find(name).source) for name in KEYS}
    assert found["min_p"] == (0.4, "flag")
    assert found["top_p"] == (0.7, "preset coder")
    assert found["temperature"] == (0.3, "config.toml")
    assert found["top_k"] == (5, "generation_config.json")
    assert found["seed"] == (None, "default")
    assert found["system"] == ("You write code.", "preset coder")
    settings.set("min_p", "0.5")
    assert (settings.value("min_p"), settings.find("min_p").source) == (0.5, "/set")
    settings.set("min-p", "default")
    assert (settings.value("min_p"), settings.find("min_p").source) == (0.2, "preset coder")
    settings.of_chat["top_k"] = 7
    settings.set("top_k", "default")
    assert (settings.value("top_k"), settings.find("top_k").source) == (5, "generation_config.json")
    assert settings.group("generation") == {
        "top_p": 0.7, "temperature": 0.3, "min_p": 0.2, "stop": ["END"]
    }  # fmt: skip


VALUES = [
    ("temperature", "0.25", 0.25),
    ("top_k", "40", 40),
    ("stop", "END", ["END"]),
    ("stop", '["a", "b"]', ["a", "b"]),
    ("logit_bias", " yes=2.5", {" yes": 2.5}),
    ("ignore_eos", "on", True),
    ("context", "max", "max"),
    ("context", "4096", 4096),
    ("kv_bits", "8:4", "8:4"),
    ("kv_bits", "8", 8),
    ("on_full", "slide", "slide"),
    ("chat_cache_bytes", "0", 0),
    ("date", "26 Jul 2024", "26 Jul 2024"),
]


@pytest.mark.parametrize(("name", "text", "value"), VALUES)
def test_values_are_read_by_their_kind(name: str, text: str, value: object) -> None:
    settings = Settings()
    assert settings.set(name, text).value == value


REFUSED = [
    ("temperature", "hot", "--temperature"),
    ("temperature", "-1", "expected from 0"),
    ("top_k", "1.5", "expected a number"),
    ("ignore_eos", "maybe", "expected on or off"),
    ("on_full", "burst", "expected one of ask, stop, slide"),
    ("temprature", "1", "did you mean temperature"),
    ("stop", '["a"', "no JSON"),
    ("stop", "[" * 100_000, "no JSON"),
    ("kv_start", "10", "--kv-start: does nothing"),
]


@pytest.mark.parametrize(("name", "text", "problem"), REFUSED)
def test_what_cannot_be_is_refused_and_changes_nothing(name: str, text: str, problem: str) -> None:
    settings = Settings()
    before = [(s.value, s.source) for s in settings.all()]
    with pytest.raises(OptionError, match=problem.replace("[", r"\[")):
        settings.set(name, text)
    assert [(s.value, s.source) for s in settings.all()] == before


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("temperature = ", "no TOML"),
        ("temprature = 1", "did you mean temperature"),
        ("temperature = 'hot'", "expected a number"),
        ("presets = 3", "expected a table"),
        ("[presets.x]\ntop_q = 1", "presets?.*x.*top_q|x: 'top_q'"),
        ("system = 3", "expected a text"),
    ],
)
def test_configuration_that_says_nothing_sensible_is_refused(
    tmp_path: Path, text: str, problem: str
) -> None:
    with pytest.raises(OptionError, match=problem) as caught:
        read_config(config(tmp_path, text))
    assert "config.toml" in str(caught.value)


def test_no_configuration_and_no_preset(tmp_path: Path) -> None:
    assert read_config(tmp_path / "none.toml") is None
    with pytest.raises(OptionError, match="--preset coder: no such preset"):
        Settings(preset="coder")


def test_asking_needs_a_terminal() -> None:
    assert Settings(asks_when_full=False).value("on_full") == "stop"
    assert Settings().group("context")["on_full"] == "stop"
    with pytest.raises(OptionError, match="no terminal to ask at"):
        Settings(flags={"on_full": "ask"}, asks_when_full=False)


def test_file_for_all_models_and_places_is_passed_over_where_it_cannot_be(tmp_path: Path) -> None:
    """Once a pipe, or a base model, was refused because of it."""
    file = read_config(config(tmp_path, 'on_full = "ask"\nsystem = "be brief"'))
    piped = Settings(config=file, asks_when_full=False)
    assert piped.value("on_full") == "stop"
    piped.unfit = frozenset({"system"})
    assert piped.find("system").source == "default"
    assert Settings(config=file).value("system") == "be brief"


def test_what_a_model_refuses_is_passed_over_where_the_file_alone_asks(tmp_path: Path) -> None:
    file = read_config(config(tmp_path, 'activations = "int8"\nkv_bits = 32\ncontext = 64'))
    with pytest.raises(OptionError) as caught:
        ops.choose_activations([], asked="int8")
    refused = caught.value  # whatever its words are
    settings = Settings(config=file)
    assert settings.pass_over(refused) == "activations"
    assert settings.find("activations").source == "default"
    assert settings.pass_over(refused) is None
    with pytest.raises(OptionError) as caught:
        ops.cache_dtype(mx.bfloat16, KVBits(32, 32))
    assert settings.pass_over(caught.value) == "kv_bits"
    assert settings.pass_over(OptionError("the context is too long", option="context")) is None
    assert settings.pass_over(OptionError("--activations int8: of another kind")) is None
    asked = Settings(config=file, flags={"activations": "int8"})
    assert asked.pass_over(refused) is None


def test_a_wrong_value_of_a_saved_chat_is_no_flags() -> None:
    with pytest.raises(OptionError, match=r"^temperature of the chat: found 'hot'"):
        Settings(of_chat={"temperature": "hot"})
    with pytest.raises(OptionError, match=r"^--temperature: found -1"):
        Settings(of_chat={"temperature": "hot"}, flags={"temperature": -1.0})
    with pytest.raises(OptionError, match=r"^system of the chat: found 3"):
        Settings(of_chat={"system": 3})


def test_errors_speak_of_keys_where_keys_were_set() -> None:
    said = with_keys("--top-p: found 2; see --resume and --on-full slide", "/set {}")
    assert said == "/set top_p: found 2; see --resume and /set on_full slide"
