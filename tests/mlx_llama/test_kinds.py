"""Which member of the family a name, a template or a shape stands for."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_llama.errors import OptionError
from mlx_llama.kinds import (
    KINDS,
    base_kind,
    decide_kind,
    decide_rope_factor,
    kind_named,
    kind_of_name,
    prompt_of_template,
)
from mlx_llama_convert.tokenizer_files import chat_template

# Folders as Meta's download scripts make them, repositories as Hugging Face has them, and what
# people make of both.
NAMES = {
    # LLaMA 1
    "llama-7b": "llama1",
    "llama-13b-hf": "llama1",
    "llama-65b": "llama1",
    "LLaMA-30B": "llama1",
    "llama_7B": "llama1",
    "7B": "llama1",
    "65B": "llama1",
    # Llama 2
    "llama-2-7b": "llama2",
    "llama-2-13b": "llama2",
    "llama-2-70b": "llama2",
    "llama-2-7b-chat": "llama2-chat",
    "llama-2-70b-chat": "llama2-chat",
    "Llama-2-7b-hf": "llama2",
    "Llama-2-7b-chat-hf": "llama2-chat",
    "Llama-2-70b-chat-hf": "llama2-chat",
    "Llama-2-7B-Chat-4bit": "llama2-chat",
    # Code Llama
    "CodeLlama-7b": "codellama",
    "CodeLlama-7b-hf": "codellama",
    "CodeLlama-34b-Instruct": "codellama-instruct",
    "CodeLlama-34b-Instruct-hf": "codellama-instruct",
    "CodeLlama-13b-Python-hf": "codellama",
    "CodeLlama-70b-hf": "codellama",
    "CodeLlama-70b-Instruct-hf": "codellama-70b-instruct",
    "CodeLlama-70b-Instruct": "codellama-70b-instruct",
    "codellama_7b_instruct": "codellama-instruct",
    # Llama 3
    "Meta-Llama-3-8B": "llama3",
    "Meta-Llama-3-8B-Instruct": "llama3-instruct",
    "Meta-Llama-3-70B-Instruct": "llama3-instruct",
    "llama-3-8b-Instruct-bnb-4bit": "llama3-instruct",
    "Llama-3-8B": "llama3",
    "Llama3-8B": "llama3",
    # Llama 3.1
    "Meta-Llama-3.1-8B": "llama3.1",
    "Meta-Llama-3.1-8B-Instruct": "llama3.1-instruct",
    "Meta-Llama-3.1-405B-Instruct-FP8": "llama3.1-instruct",
    "Llama-3.1-70B": "llama3.1",
    "Llama3.1-70B": "llama3.1",
    "Llama3.1-8B-Instruct": "llama3.1-instruct",
    "Llama-3.1-405B-MP8": "llama3.1",
    "Llama3.1-405B-Instruct:bf16-mp16": "llama3.1-instruct",
    # Llama 3.2
    "Llama-3.2-1B": "llama3.2",
    "Llama3.2-3B": "llama3.2",
    "Llama-3.2-1B-Instruct": "llama3.2-instruct",
    "Llama-3.2-3B-Instruct-4bit": "llama3.2-instruct",
    "meta-llama_Llama-3.2-1B-Instruct": "llama3.2-instruct",
    # Llama 3.3, published as an instruct model alone
    "Llama-3.3-70B-Instruct": "llama3.3-instruct",
    "Llama3.3-70B-Instruct": "llama3.3-instruct",
    # Llama Guard
    "LlamaGuard-7b": "llama-guard-1",
    "Llama-Guard-7b": "llama-guard-1",
    "llama-guard": "llama-guard-1",
    "Meta-Llama-Guard-2-8B": "llama-guard-2",
    "Llama-Guard-2": "llama-guard-2",
    "Llama-Guard-3-8B": "llama-guard-3",
    "Llama-Guard-3-1B": "llama-guard-3",
    "Llama-Guard-3-8B-INT8": "llama-guard-3",
    # Not of the family, or a member that is not known here
    "": None,
    "model": None,
    "stories260k": None,
    "tinyllama": None,
    "Mistral-7B-Instruct-v0.3": None,
    "Prompt-Guard-86M": None,
    "Llama-4-Scout-17B-16E-Instruct": None,
    "Llama-Guard-4-12B": None,
    "Llama-Prompt-Guard-2-86M": None,
    "70B": None,
    "7B-Instruct": None,
    "Llama-3.4-8B": None,
    "Llama-30": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_tells_the_kind(name: str) -> None:
    assert kind_of_name(name) == NAMES[name]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_recognised_by_its_own_name(kind: str) -> None:
    assert kind_of_name(kind) == kind
    assert kind_named(kind).name == kind


def test_an_unknown_kind_is_answered_with_the_known_ones() -> None:
    with pytest.raises(OptionError, match=r"'llama9' is unknown.*llama3\.2-instruct"):
        kind_named("llama9")


def test_what_the_kinds_fix() -> None:
    tiktoken = {name for name, kind in KINDS.items() if kind.is_tiktoken}
    assert tiktoken == {name for name in KINDS if name >= "llama3"} - {"llama-guard-1"} | {
        "llama-guard-2",
        "llama-guard-3",
    }
    bases = {"llama1", "llama2", "codellama", "llama3", "llama3.1", "llama3.2"}
    assert {name for name, kind in KINDS.items() if kind.is_base} == bases
    for kind in KINDS.values():
        # A base model ends at the tokenizer's EOS alone.
        assert not (kind.is_base and kind.stops)
        assert ("<|eot_id|>" in kind.stops) == (kind.is_tiktoken and not kind.is_base)


# --- the decision ------------------------------------------------------------------------------


def decided(**given: Any) -> str:
    arguments: dict[str, Any] = {
        "flag": None,
        "recorded": None,
        "chat_template": None,
        "names": [],
        "base": "llama2",
        "is_tiktoken": False,
    }
    return decide_kind(**{**arguments, **given}).value


LLAMA2_TEMPLATE = "{% for m in messages %}[INST] {{ m }} [/INST]{% endfor %}"


def test_the_order_of_evidence() -> None:
    """Flag, record, template, names, base."""
    evidence: list[tuple[str, Any, str]] = [
        ("flag", "llama1", "llama1"),
        ("recorded", "codellama", "codellama"),
        ("chat_template", LLAMA2_TEMPLATE, "llama2-chat"),
        ("names", ["CodeLlama-7b"], "codellama"),
    ]
    for start, (_, _, expected) in enumerate(evidence):
        given = {name: value for name, value, _ in evidence[start:]}
        assert decided(**given) == expected
    assert decided() == "llama2"


def test_every_decision_says_why() -> None:
    arguments: dict[str, Any] = {"names": [], "base": "llama3", "is_tiktoken": True}
    reasons = {
        "asked for with --kind": {"flag": "llama3"},
        "recorded in config.json": {"recorded": "llama3"},
        "chat template": {"chat_template": "<|start_header_id|>"},
        "the name 'Llama-3.2-1B'": {"names": ["Llama-3.2-1B"]},
        "no name or chat template says more: taken for a base model": {},
    }
    for reason, given in reasons.items():
        nothing = {"flag": None, "recorded": None, "chat_template": None}
        assert decide_kind(**{**nothing, **arguments, **given}).reason == reason


def test_names_are_asked_in_turn_and_those_of_another_tokenizer_passed_over() -> None:
    names = ["original", "Llama-2-7b-chat", "Llama-3.2-1B-Instruct"]
    assert decided(names=names) == "llama2-chat"
    assert decided(names=names, base="llama3.2", is_tiktoken=True) == "llama3.2-instruct"
    assert decided(names=["Llama-3-8B"]) == "llama2"


def test_a_name_that_fits_the_template_says_more_than_it() -> None:
    template = LLAMA2_TEMPLATE
    name = ["CodeLlama-7b-Instruct-hf"]
    assert decided(chat_template=template, names=name) == "codellama-instruct"
    # A base model's name beside an instruct model's template: the template is believed.
    assert decided(chat_template=template, names=["Llama-2-7b"]) == "llama2-chat"


@pytest.mark.parametrize(
    ("flag", "is_tiktoken"), [("llama3.1", False), ("llama2-chat", True), ("llama-guard-1", True)]
)
def test_a_flag_that_does_not_fit_the_tokenizer_is_refused(flag: str, is_tiktoken: bool) -> None:
    with pytest.raises(OptionError, match=f"--kind {flag}: needs a .* tokenizer"):
        decided(flag=flag, is_tiktoken=is_tiktoken)


@pytest.mark.parametrize("kind", [k for k, v in KINDS.items() if not v.is_base])
def test_our_own_templates_are_recognised(kind: str) -> None:
    template = chat_template(KINDS[kind])
    if template is not None:
        assert prompt_of_template(template) == KINDS[kind].prompt


def test_a_template_without_marks_of_the_family_says_nothing() -> None:
    assert prompt_of_template("{{ messages }}<|im_start|>") is None
    assert decided(chat_template="<|im_start|>", names=["Llama-2-7b-chat"]) == "llama2-chat"


DATED = "<|start_header_id|>system Cutting Knowledge Date"


@pytest.mark.parametrize(
    ("template", "base", "expected"),
    [
        ("<|start_header_id|>", "llama3", "llama3-instruct"),
        (DATED, "llama3.1", "llama3.1-instruct"),
        (DATED, "llama3.2", "llama3.2-instruct"),
        ("[INST]", "llama2", "llama2-chat"),
        ("Source: system <step>", "llama2", "codellama-70b-instruct"),
    ],
)
def test_a_template_gives_the_instruct_kind_of_the_base(
    template: str, base: str, expected: str
) -> None:
    is_tiktoken = base.startswith("llama3")
    assert decided(chat_template=template, base=base, is_tiktoken=is_tiktoken) == expected


@pytest.mark.parametrize(
    ("is_tiktoken", "is_rope_scaled", "is_tied", "norm_eps", "expected"),
    [
        (False, False, False, 1e-6, "llama1"),
        (False, False, False, 1e-5, "llama2"),
        (True, False, False, 1e-5, "llama3"),
        (True, True, False, 1e-5, "llama3.1"),
        (True, True, True, 1e-5, "llama3.2"),
    ],
)
def test_weights_and_tokenizer_tell_the_base(
    is_tiktoken: bool, is_rope_scaled: bool, is_tied: bool, norm_eps: float, expected: str
) -> None:
    found = base_kind(
        is_tiktoken=is_tiktoken,
        is_rope_scaled=is_rope_scaled,
        is_tied=is_tied,
        norm_eps=norm_eps,
        rope_theta=1e4,
    )
    assert found == expected


# --- the RoPE factor ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "dim", "n_layers", "is_tied", "factor"),
    [
        ("3.1 8B", 4096, 32, False, 8.0),
        ("3.1 and 3.3 70B", 8192, 80, False, 8.0),
        ("3.1 405B", 16384, 126, False, 8.0),
        ("3.2 1B", 2048, 16, True, 32.0),
        ("3.2 3B", 3072, 28, True, 32.0),
        ("3.2 1B with its own output", 2048, 16, False, 32.0),
        ("unknown, tied", 1024, 16, True, 32.0),
        ("unknown, own output", 2048, 12, False, 8.0),
    ],
)
def test_the_rope_factor_of_a_shape(
    model: str, dim: int, n_layers: int, is_tied: bool, factor: float
) -> None:
    found, reason = decide_rope_factor(
        flag=None, recorded=None, dim=dim, n_layers=n_layers, is_tied=is_tied
    )
    assert found == factor, model
    assert ("the known shape" in reason) != model.startswith("unknown")


def test_flag_and_config_go_before_the_shape() -> None:
    shape: dict[str, Any] = {"dim": 2048, "n_layers": 16, "is_tied": True}
    found = decide_rope_factor(flag=4.0, recorded=16.0, **shape)
    assert found == (4.0, "asked for with --rope-factor")
    assert decide_rope_factor(flag=None, recorded=16.0, **shape) == (16.0, "config.json")


@pytest.mark.parametrize(("theta", "kind"), [(None, "llama2"), (1e4, "llama2"), (1e6, "codellama")])
def test_theta_tells_code_llama(theta: float | None, kind: str) -> None:
    found = base_kind(
        is_tiktoken=False, is_rope_scaled=False, is_tied=False, norm_eps=1e-5, rope_theta=theta
    )
    assert found == kind


@pytest.mark.parametrize(
    ("names", "base", "kind"),
    [
        (["7B", "llama-2"], "llama2", "llama2"),
        (["7B", "x"], "llama1", "llama1"),
        (["7B", "x"], "llama2", "llama2"),
        (["65B", "x"], "llama2", "llama1"),  # its eps is that of Llama 2
        (["original", "Llama-2-7b-chat-hf"], "llama2", "llama2-chat"),
    ],
)
def test_bare_size_is_the_weakest_name(names: list[str], base: str, kind: str) -> None:
    found = decide_kind(
        flag=None, recorded=None, chat_template=None, names=names, base=base, is_tiktoken=False
    )
    assert found.value == kind


@pytest.mark.parametrize(
    ("name", "base", "is_tiktoken", "kind"),
    [
        ("Llama-Guard-3-8B", "llama3.1", True, "llama-guard-3"),
        ("LlamaGuard-7b", "llama2", False, "llama-guard-1"),
        ("Meta-Llama-Guard-2-8B", "llama3", True, "llama-guard-2"),
        ("blob", "llama3", True, "llama-guard-2"),
        ("blob", "llama3.2", True, "llama-guard-3"),
    ],
)
def test_guards_template_is_no_chat_format(
    name: str, base: str, is_tiktoken: bool, kind: str
) -> None:
    """Guard's templates have a chat model's tags; they made it one, and verdicts meaningless."""
    template = (
        "<|start_header_id|>user<|end_header_id|> [INST] Task: Check if there is unsafe content"
    )
    found = decide_kind(
        flag=None,
        recorded=None,
        chat_template=template,
        names=[name],
        base=base,
        is_tiktoken=is_tiktoken,
    )
    assert found.value == kind
