"""Tokenizer files of a model directory: other programs' libraries give our tokens from them."""

from __future__ import annotations

import re
import time
from pathlib import Path

import jinja2
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlx_llama.errors import OutputError, TokenizerError, UnsupportedModelError
from mlx_llama.kinds import KINDS, kind_named, prompt_of_template
from mlx_llama.prompts import as_messages, prompt_format
from mlx_llama.prompts.llama2 import TAGS
from mlx_llama.tokenizer import open_tokenizer
from mlx_llama.tokenizer.spm_proto import SpmModel
from mlx_llama_convert.tokenizer_files import chat_template, write_tokenizer_files
from tiny_tokenizers import tiny_spm, write_spm, write_tiktoken
from token_texts import DATE, DIALOGS, TEXTS, TOOL_DIALOG
from written_tokenizers import SOURCES, Written, read_json, written

# Seconds of the processor for Llama 3's 280,147 merges; measured 0.8.
LLAMA3_LIMIT_S = 8.0
# The `tokenizers` library takes these names for special tokens wherever they stand; we do not.
SPECIAL_TEXT = re.compile(r"<\|\w+\|>|<s>|</s>|<unk>|<step>")


CHATS = [name for name, (kind, _) in SOURCES.items() if not KINDS[kind].is_base]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


# --- ids ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
def test_tokenizer_json_gives_our_ids(name: str, base: Path) -> None:
    files = written(name, base)
    assert files.peer.get_vocab_size() == files.source.vocab_size
    for text in TEXTS:
        if not SPECIAL_TEXT.search(text):
            ids = files.source.encode(text, bos=True)
            assert files.peer.encode(text).ids == ids, text
            assert files.peer.encode(text, add_special_tokens=False).ids == ids[1:]


HARD = st.lists(
    st.sampled_from(
        [" ", "  ", "\n", "\r", "\t", "a", "aa", "hello", " world", "ing", "the", "12", "345", "é",
         "日", "😀", "\u200d", "\u3000", "\x85", "'S", "'ll", "[INST]", "\0", "\u2581", "==", "İ"]
    )
).map("".join)  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
@given(text=st.one_of(HARD, st.text()))
@settings(max_examples=150, deadline=None)
def test_any_text_gives_our_ids(name: str, base: Path, text: str) -> None:
    assume(not SPECIAL_TEXT.search(text))
    files = written(name, base)
    assert files.peer.encode(text).ids == files.source.encode(text, bos=True)


@pytest.mark.parametrize("name", ["tiny llama3", "tiny llama2", "llama2", "llama3.1"])
def test_decoding_gives_our_text(name: str, base: Path) -> None:
    files = written(name, base)
    for text in TEXTS:
        ids = files.source.encode(text)
        assert files.peer.decode(ids) == files.source.decode(ids)


@pytest.mark.parametrize("name", ["tiny llama3", "tiny llama2", "llama2", "llama3", "llama3.1"])
def test_our_own_reading_of_tokenizer_json_gives_the_same(name: str, base: Path) -> None:
    files = written(name, base)
    again = open_tokenizer(files.folder / "tokenizer.json")
    assert (again.family, again.vocab_size) == (files.source.family, files.source.vocab_size)
    assert (again.bos_id, again.eos_id) == (files.source.bos_id, files.source.eos_id)
    for text in TEXTS:
        ids = files.source.encode(text)
        assert again.encode(text) == ids
        assert again.decode(ids) == files.source.decode(ids)
    for token_id in range(0, again.vocab_size, 97):
        if token_id < again.vocab_size - 256:
            assert again.token_bytes(token_id) == files.source.token_bytes(token_id)


def test_code_llamas_added_tokens_are_read_from_tokenizer_json(base: Path) -> None:
    files = written("tiny codellama", base)
    again = open_tokenizer(files.folder / "tokenizer.json")
    step = files.source.special_tokens["<step>"]
    assert again.special_tokens["<step>"] == step
    assert step not in again.encode("a <step> b") == files.source.encode("a <step> b")


def test_special_tokens_have_the_names_of_the_kinds_release(base: Path) -> None:
    added = {
        name: {
            t["id"]: t["content"]
            for t in read_json(files.folder / "tokenizer.json")["added_tokens"]
        }
        for name in ("llama3", "llama3.1")
        for files in (written(name, base),)
    }
    assert [added[name][128008] for name in added] == ["<|reserved_special_token_4|>", "<|eom_id|>"]
    assert [added[name][128255] for name in added] == [
        "<|reserved_special_token_250|>",
        "<|reserved_special_token_247|>",
    ]
    assert all(len(names) == 256 and names[128009] == "<|eot_id|>" for names in added.values())


# --- chat templates -----------------------------------------------------------------------------


def renderers() -> list[jinja2.Environment]:
    """Environments as transformers sets them up, and as Jinja is by default."""
    found = [
        ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True),
        jinja2.Environment(),
    ]
    for environment in found:
        environment.globals["raise_exception"] = raise_exception
    return found


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def rendered_ids(files: Written, dialog: list[dict[str, str]], **variables: object) -> list[int]:
    """Render as peers do and encode the text with the `tokenizers` library."""
    tokens = read_json(files.folder / "special_tokens_map.json")
    template = (files.folder / "chat_template.jinja").read_text(encoding="utf-8")
    texts = {
        environment.from_string(template).render(
            messages=dialog, add_generation_prompt=True, **tokens, **variables
        )
        for environment in renderers()
    }
    (text,) = texts
    return files.peer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", CHATS)
def test_templates_render_to_the_tokens_of_our_prompts(name: str, base: Path) -> None:
    files = written(name, base)
    kind = kind_named(SOURCES[name][0])
    prompt = prompt_format(kind, files.source)
    # In llama2's and codellama's templates the name of an end token would become that token.
    plain = [list(d) for d in DIALOGS if not SPECIAL_TEXT.search(str(d))]
    if "llama3" in name:
        plain.append([m for m in TOOL_DIALOG if m["role"] != "system"])
    assert len(plain) >= 5
    for dialog in plain:
        assert rendered_ids(files, dialog) == prompt.encode(as_messages(dialog)), dialog
        if kind.prompt == "llama3.1":
            dated = prompt.encode(as_messages(dialog), date=DATE)
            assert rendered_ids(files, dialog, date_string=DATE) == dated


CONTENT = st.one_of(HARD, st.text(max_size=20))


@pytest.mark.parametrize("name", CHATS)
@given(contents=st.lists(CONTENT, min_size=1, max_size=5), has_system=st.booleans())
@settings(max_examples=60, deadline=None)
def test_templates_render_any_content_to_our_tokens(
    name: str, base: Path, contents: list[str], has_system: bool
) -> None:
    """Llama 3.1 contents that begin with a line break are left out.

    Meta encodes the two newlines of a header apart from such a content; a rendered text cannot say
    so, and they become one token.
    """
    assume(not any(SPECIAL_TEXT.search(text) for text in contents))
    assume(not any(tag in text for tag in TAGS for text in contents))
    kind = kind_named(SOURCES[name][0])
    if kind.prompt == "llama3.1":
        assume(not any(re.match(r"\s*[\r\n]", text) for text in contents))
    contents = contents[: len(contents) - (len(contents) % 2 == has_system)]
    assume(len(contents) > has_system)
    roles = ["system"] * has_system + ["user", "assistant"] * 3
    dialog = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    files = written(name, base)
    expected = prompt_format(kind, files.source).encode(as_messages(dialog))
    assert rendered_ids(files, dialog) == expected


@pytest.mark.parametrize("name", ["tiny llama2", "tiny codellama"])
def test_templates_refuse_what_our_prompts_refuse(name: str, base: Path) -> None:
    files = written(name, base)
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}
    tag = "[INST]" if name == "tiny llama2" else "<step>"
    for dialog in ([user, user], [answer], [{**user, "content": tag}]):
        with pytest.raises(jinja2.TemplateError):
            rendered_ids(files, dialog)


def test_templates_are_recognised_as_their_own_format() -> None:
    for kind in KINDS.values():
        template = chat_template(kind)
        assert (template is None) == (kind.prompt in ("raw", "guard"))
        assert template is None or prompt_of_template(template) == kind.prompt


# --- files --------------------------------------------------------------------------------------


def test_names_and_settings(base: Path) -> None:
    files = written("tiny llama3", base)
    assert sorted(files.names) == sorted(path.name for path in files.folder.iterdir())
    assert (files.folder / "tokenizer.model").read_bytes() == files.source.path.read_bytes()
    config = read_json(files.folder / "tokenizer_config.json")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_max_length"] == 4096
    assert (config["bos_token"], config["eos_token"]) == ("<|begin_of_text|>", "<|eot_id|>")
    assert config["chat_template"] == (files.folder / "chat_template.jinja").read_text()


ENDS = {
    "tiny llama2": "</s>",
    "tiny codellama": "<step>",
    "tiny extra": "</s>",
    "tiny llama3": "<|eot_id|>",
}


@pytest.mark.parametrize("name", ENDS)
def test_eos_is_what_ends_an_answer(name: str, base: Path) -> None:
    files = written(name, base)
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        assert read_json(files.folder / file)["eos_token"] == ENDS[name]


def test_base_models_get_no_template(tmp_path: Path) -> None:
    source = open_tokenizer(write_tiktoken(tmp_path / "a.model"))
    folder = tmp_path / "out"
    folder.mkdir()
    names = write_tokenizer_files(source, kind_named("llama3.2"), folder, max_context=1)
    assert "chat_template.jinja" not in names
    config = read_json(folder / "tokenizer_config.json")
    assert "chat_template" not in config and config["eos_token"] == "<|end_of_text|>"


@pytest.mark.parametrize("name", ["tiny llama3", "tiny llama2", "llama3.1"])
def test_writing_again_gives_the_same_bytes(name: str, base: Path, tmp_path: Path) -> None:
    files = written(name, base)
    kind = kind_named(SOURCES[name][0])
    start = time.process_time()
    write_tokenizer_files(files.source, kind, tmp_path, max_context=4096)
    assert time.process_time() - start < LLAMA3_LIMIT_S
    for file in files.names:
        assert (tmp_path / file).read_bytes() == (files.folder / file).read_bytes()


@pytest.mark.parametrize("name", ["tiny llama3", "tiny codellama"])
def test_a_tokenizer_json_is_copied_as_it_is(name: str, base: Path, tmp_path: Path) -> None:
    files = written(name, base)
    source = open_tokenizer(files.folder / "tokenizer.json")
    names = write_tokenizer_files(source, kind_named(SOURCES[name][0]), tmp_path, max_context=4096)
    assert "tokenizer.model" not in names
    for file in names:
        assert (tmp_path / file).read_bytes() == (files.folder / file).read_bytes()


def test_what_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    source = open_tokenizer(write_spm(tmp_path / "a.model"))
    with pytest.raises(TokenizerError, match="no token <step>"):
        write_tokenizer_files(source, kind_named("codellama-70b-instruct"), tmp_path, max_context=1)
    with pytest.raises(OutputError, match="cannot be written"):
        write_tokenizer_files(source, kind_named("llama2"), tmp_path / "none", max_context=1)
    source.path.unlink()
    with pytest.raises(TokenizerError, match="cannot be read again"):
        write_tokenizer_files(source, kind_named("llama2"), tmp_path, max_context=1)
    kept = write_spm(tmp_path / "b.model", SpmModel(tiny_spm().pieces, escape_whitespaces=False))
    with pytest.raises(UnsupportedModelError, match="not the identity"):
        write_tokenizer_files(open_tokenizer(kept), kind_named("llama2"), tmp_path, max_context=1)
