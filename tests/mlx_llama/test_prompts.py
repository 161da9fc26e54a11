"""Prompt formats: the tokens of Meta's own code, and what a format has no place for refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mlx_llama.errors import OptionError, TokenizerError, UnsupportedModelError
from mlx_llama.kinds import KINDS, kind_named
from mlx_llama.prompts import Message, PromptFormat, as_messages, prompt_format
from mlx_llama.prompts.llama2 import TAGS
from mlx_llama.tokenizer import Tokenizer, open_tokenizer
from mlx_llama.tokenizer.spm_proto import Piece, PieceType, SpmModel, parse_model
from shared_data import shared
from tiny_tokenizers import BPE_MERGES, tiny_spm, write_spm, write_tiktoken
from token_texts import DATE, DIALOGS, TOOL_DIALOG

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/tokens.json").read_text())
KIND_OF = {
    "llama2": "llama2-chat",
    "llama3": "llama3-instruct",
    "llama3.1": "llama3.1-instruct",
    "codellama-70b": "codellama-70b-instruct",
}
USER = Message("user", "hello")
TINY_SPM_SPECIALS = (0, 1, 2, len(tiny_spm().pieces))
TINY_BPE_SPECIALS = range(256 + len(BPE_MERGES), 256 + len(BPE_MERGES) + 256)


def format_named(name: str, tokenizer: Tokenizer) -> PromptFormat:
    return prompt_format(kind_named(KIND_OF[name]), tokenizer)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PromptFormat]:
    """Every format on tiny tokenizers."""
    folder = tmp_path_factory.mktemp("tiny")
    tiktoken = open_tokenizer(write_tiktoken(folder / "a.model"))
    spm = open_tokenizer(write_spm(folder / "b.model", tiny_spm(specials=("<step>",))))
    return {
        name: format_named(name, tiktoken if name.startswith("llama3") else spm) for name in KIND_OF
    }


def real_format(name: str, tmp_path: Path) -> PromptFormat:
    """A format on Meta's tokenizer; `<step>` is put behind Llama 2's pieces for Code Llama."""
    if name.startswith("llama3"):
        return format_named(name, open_tokenizer(shared("tokenizers/llama3.model")))
    path = shared("tokenizers/llama2.model")
    if name == "codellama-70b":
        pieces = parse_model(path.read_bytes()).pieces
        model = SpmModel((*pieces, Piece("<step>", 0.0, PieceType.CONTROL)))
        path = write_spm(tmp_path / "step.model", model)
    return format_named(name, open_tokenizer(path))


@pytest.mark.parametrize("name", KIND_OF)
def test_dialogs_give_the_tokens_of_metas_code(name: str, tmp_path: Path) -> None:
    prompt = real_format(name, tmp_path)
    for dialog, ids in zip(DIALOGS, GOLDEN["dialogs"][name], strict=True):
        assert prompt.encode(as_messages(dialog)) == ids, dialog


def test_a_date_stands_at_the_head_of_the_system_message(tmp_path: Path) -> None:
    prompt = real_format("llama3.1", tmp_path)
    for dialog, ids in zip(DIALOGS, GOLDEN["dialogs"]["llama3.1 dated"], strict=True):
        assert prompt.encode(as_messages(dialog), date=DATE) == ids


def test_tool_results_are_sent_as_ipython(tmp_path: Path) -> None:
    prompt = real_format("llama3.1", tmp_path)
    assert prompt.encode(as_messages(TOOL_DIALOG)) == GOLDEN["tool"]
    renamed = [{**m, "role": m["role"].replace("tool", "ipython")} for m in TOOL_DIALOG]
    assert prompt.encode(as_messages(renamed)) == GOLDEN["tool"]


def test_llama2_prompt_by_hand(tmp_path: Path) -> None:
    prompt = real_format("llama2", tmp_path)
    ids = prompt.encode([Message("user", " Hi "), Message("assistant", "Hello"), USER])
    head = [518, 25580, 29962]  # [INST]
    end = [518, 29914, 25580, 29962]  # [/INST]
    assert ids == [1, *head, 6324, *end, 15043, 29871, 2, 1, *head, 22172, *end]


def test_llama3_prompt_by_hand(tmp_path: Path) -> None:
    ids = real_format("llama3", tmp_path).encode([Message("system", " Hi\n"), USER])
    start, end, eot, newlines = 128006, 128007, 128009, 271
    assert ids == [
        128000,
        *(start, 9125, end, newlines, 13347, eot),
        *(start, 882, end, newlines, 15339, eot),
        *(start, 78191, end, newlines),
    ]


@pytest.mark.parametrize("name", ["llama2", "llama3", "llama3.1"])
def test_generated_tokens_of_canonical_answers_change_no_prompt(name: str, tmp_path: Path) -> None:
    """What the tokenizer itself makes of an answer is what Meta's joint encoding holds."""
    prompt = real_format(name, tmp_path)
    path = "tokenizers/llama2.model" if name == "llama2" else "tokenizers/llama3.model"
    tokenizer = open_tokenizer(shared(path))
    for text in ("Hello", "I am a model.", "日本 😀", "x\n\n  y", "<b>", "it's 12345", "-", "é"):
        ids = tuple(tokenizer.encode(text))
        by_text = prompt.encode([USER, Message("assistant", text), USER])
        assert prompt.encode([USER, Message("assistant", text, ids), USER]) == by_text


@pytest.mark.parametrize("name", KIND_OF)
def test_generated_tokens_extend_the_prompt_they_were_generated_from(
    name: str, tiny: dict[str, PromptFormat]
) -> None:
    """Also where the model chose other tokens than the tokenizer would."""
    prompt = tiny[name]
    generated = (70, 71, 72, 200, 70)
    first = prompt.encode([USER])
    cut = [USER, Message("assistant", "whatever", generated)]
    assert prompt.encode(cut, continue_last=True) == [*first, *generated]
    second = prompt.encode([*cut, USER])
    assert second[: len(first) + len(generated)] == [*first, *generated]
    assert len(second) > len(first) + len(generated)


@pytest.mark.parametrize("name", KIND_OF)
def test_a_cut_answer_is_continued_inside_its_turn(
    name: str, tiny: dict[str, PromptFormat]
) -> None:
    prompt = tiny[name]
    begun = prompt.encode([USER, Message("assistant", "hello the ")], continue_last=True)
    whole = prompt.encode([USER, Message("assistant", "hello the end"), USER])
    assert begun[:-1] == whole[: len(begun) - 1]
    with pytest.raises(OptionError, match="only an answer can be continued"):
        prompt.encode([USER], continue_last=True)


@pytest.mark.parametrize("name", KIND_OF)
def test_prompts_grow_without_changing_what_stands_before(
    name: str, tiny: dict[str, PromptFormat]
) -> None:
    messages = [Message("system", "be brief"), USER]
    known = tiny[name].encode(messages)
    for turn in range(3):
        messages += [Message("assistant", "aa", (75, 76, turn)), USER]
        ids = tiny[name].encode(messages)
        assert ids[: len(known)] == known
        known = ids


@given(text=st.text(max_size=30))
@settings(max_examples=100, deadline=None)
def test_no_content_makes_a_special_token(tiny: dict[str, PromptFormat], text: str) -> None:
    assume(not any(tag in text for tag in (*TAGS, "<step>")))
    for name, prompt in tiny.items():
        specials = TINY_BPE_SPECIALS if name.startswith("llama3") else TINY_SPM_SPECIALS
        usual = [i for i in prompt.encode([USER]) if i in specials]
        for special in ("<|eot_id|>", "<|start_header_id|>", "<s>", "</s>"):
            ids = prompt.encode([Message("user", f"a{text}{special}{text}b")])
            assert [i for i in ids if i in specials] == usual


@pytest.mark.parametrize("name", ["llama2", "llama3", "codellama-70b"])
def test_a_date_that_cannot_take_effect_is_an_error(
    name: str, tiny: dict[str, PromptFormat]
) -> None:
    with pytest.raises(OptionError, match=f"{name} prompt format has no place"):
        tiny[name].encode([USER], date=DATE)


@pytest.mark.parametrize("date", ["", " ", "26 Jul\n2024"])
def test_a_date_is_one_line(date: str, tiny: dict[str, PromptFormat]) -> None:
    with pytest.raises(OptionError, match="is not one line"):
        tiny["llama3.1"].encode([USER], date=date)


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
def test_llama2_refuses_its_own_tags_in_contents(tag: str, tiny: dict[str, PromptFormat]) -> None:
    for messages in (
        [Message("user", f"a {tag}")],
        [Message("system", tag), USER],
        [USER, Message("assistant", tag), USER],
    ):
        with pytest.raises(OptionError, match="uses to mark turns"):
            tiny["llama2"].encode(messages)
    generated = Message("assistant", tag, (70, 71))
    assert tiny["llama2"].encode([USER, generated, USER])
    with pytest.raises(OptionError, match="<step>"):
        tiny["codellama-70b"].encode([Message("user", "a <step> b")])


ORDERS = {
    "nothing": [],
    "system only": ["system"],
    "answer first": ["assistant", "user"],
    "two questions": ["user", "user"],
    "answer last": ["user", "assistant"],
    "late system": ["user", "assistant", "system"],
    "tool": ["user", "tool"],
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["llama2", "codellama-70b"])
def test_formats_with_turns_refuse_another_order(
    name: str, order: str, tiny: dict[str, PromptFormat]
) -> None:
    with pytest.raises(OptionError, match=r"^messages: "):
        tiny[name].encode([Message(role, "a") for role in ORDERS[order]])


@pytest.mark.parametrize("name", KIND_OF)
def test_no_messages_are_refused(name: str, tiny: dict[str, PromptFormat]) -> None:
    for continue_last in (False, True):
        with pytest.raises(OptionError, match="there are none"):
            tiny[name].encode([], continue_last=continue_last)


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ("hello", "expected a list of messages, not str"),
        ({"role": "user", "content": "a"}, "expected a list of messages, not dict"),
        (["hello"], "number 1 is not"),
        ([{"role": "user"}], "number 1 is not"),
        ([USER, {"role": "user", "content": "a", "name": "b"}], "number 2 is not"),
        ([{"role": "robot", "content": "a"}], "role 'robot' is not one of"),
        ([{"role": ["user"], "content": "a"}], r"role \['user'\] is not one of"),
        ([{"role": "user", "content": ["a"]}], "content of a user message is a list"),
    ],
)
def test_messages_of_another_shape_are_refused(items: object, expected: str) -> None:
    with pytest.raises(OptionError, match=expected) as caught:
        as_messages(items)  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(caught.value)


def test_messages_pass_as_they_are() -> None:
    assert as_messages([USER, {"role": "assistant", "content": ""}]) == [
        USER,
        Message("assistant", ""),
    ]
    with pytest.raises(OptionError, match="token_ids belong to an answer"):
        Message("user", "a", (1,))


def test_kinds_without_a_chat_format_point_to_raw(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(write_spm(tmp_path / "a.model"))
    for kind in KINDS.values():
        if kind.prompt in ("raw", "guard"):
            with pytest.raises(UnsupportedModelError, match="--raw"):
                prompt_format(kind, tokenizer)


def test_a_tokenizer_without_the_formats_tokens_is_refused(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(write_spm(tmp_path / "a.model"))
    for name, token in (("codellama-70b", "<step>"), ("llama3", "start_header_id")):
        with pytest.raises(TokenizerError, match=token):
            format_named(name, tokenizer)


def test_only_sentencepiece_answers_begin_with_a_space(tiny: dict[str, PromptFormat]) -> None:
    assert {name: f.strips_leading_space for name, f in tiny.items()} == {
        "llama2": True,
        "llama3": False,
        "llama3.1": False,
        "codellama-70b": True,
    }
    assert {f.name for f in tiny.values()} == set(KIND_OF)
