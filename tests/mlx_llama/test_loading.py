"""Model directories: ours, mlx-lm's and Hugging Face's load; what is no whole model is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlx_llama
from mlx_llama import Llama
from mlx_llama.config import QuantFormat
from mlx_llama.errors import CheckpointError, MlxLlamaError, TokenizerError, UnsupportedModelError
from mlx_llama.linear import Dense, Packed, Stack
from mlx_llama.loading import INDEX_NAME, open_model_directory
from mlx_llama.model import LlamaModel
from mlx_llama.sampling import SamplingDefaults
from mlx_llama.tokenizer import open_tokenizer
from mlx_llama.tokenizer.spm import SentencePieceTokenizer
from mlx_llama.tokenizer.spm_proto import SpmModel
from mlx_llama_convert.tokenizer_json import sentencepiece_json
from model_folders import TINY, TINY_SCALED, arrays_of, convert, write_hf, write_meta
from random_models import CASES, Weights, random_model, write_safetensors
from tiny_tokenizers import tiny_spm, write_spm, write_tiktoken

# Of the largest logit: the same float32 sums in another order.
ORDER_TOLERANCE = 2e-5
NORM = "model.norm.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
UNSUPPORTED = UnsupportedModelError
Raw = dict[str, Any]


def shard_name(index: int) -> str:
    return f"model-{index + 1:05d}-of-00003.safetensors"


def split(folder: Path, *, with_index: bool = True) -> dict[str, str]:
    """Cut model.safetensors into three files; return the index's weight_map."""
    weights, _ = random_model(TINY)
    names = list(weights)
    weight_map: dict[str, str] = {}
    for index in range(3):
        part = {name: weights[name] for name in names[index::3]}
        write_safetensors(folder / shard_name(index), part)
        weight_map |= dict.fromkeys(part, shard_name(index))
    (folder / "model.safetensors").unlink()
    if with_index:
        write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    content = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(content))


def logits(folder: Path) -> np.ndarray:
    return np.asarray(mlx_llama.load(folder, dtype="float32").logits(TINY.ids))


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# --- what loads --------------------------------------------------------------------------------


@pytest.mark.parametrize("with_index", [True, False])
def test_shards_load_as_one_file_does(with_index: bool, tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "model")
    expected = logits(folder)
    split(folder, with_index=with_index)
    # Meta's release beside the shards is not read.
    write_safetensors(folder / "consolidated.safetensors", random_model(TINY)[0])
    assert np.array_equal(logits(folder), expected)


def test_files_may_be_links_as_in_a_download_cache(tmp_path: Path) -> None:
    folder, store = write_hf(tmp_path / "model"), tmp_path / "blobs"
    expected = logits(folder)
    split(folder)
    store.mkdir()
    for file in list(folder.iterdir()):
        (store / file.name).write_bytes(file.read_bytes())
        file.unlink()
        file.symlink_to(store / file.name)
    assert np.array_equal(logits(folder), expected)


def test_old_buffers_are_ignored(tmp_path: Path) -> None:
    def add_buffers(weights: Weights, _: Raw) -> None:
        for layer in range(2):
            name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
            weights[name] = np.zeros(32, dtype=np.float32)

    folder = write_hf(tmp_path / "model", change=add_buffers)
    assert np.array_equal(logits(folder), logits(write_hf(tmp_path / "plain")))
    assert open_model_directory(folder).tensors.keys() == random_model(TINY)[0].keys()


@pytest.mark.parametrize("said", [None, "absent"])
@pytest.mark.parametrize("case", [TINY, TINY_SCALED], ids=["own output", "tied"])
def test_tying_is_decided_from_the_weights_where_config_is_silent(
    case: Any, said: str | None, tmp_path: Path
) -> None:
    def forget(_: Weights, raw: Raw) -> None:
        del raw["tie_word_embeddings"]
        if said is None:
            raw["tie_word_embeddings"] = None

    folder = write_hf(tmp_path / "model", case, change=forget)
    assert open_model_directory(folder).config.tied == case.is_tied
    assert np.array_equal(logits(folder), logits(write_hf(tmp_path / "plain", case)))


def test_a_tied_model_ignores_an_output_that_it_repeats(tmp_path: Path) -> None:
    def repeat(weights: Weights, _: Raw) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]

    folder = write_hf(tmp_path / "model", TINY_SCALED, change=repeat)
    assert np.array_equal(logits(folder), logits(write_hf(tmp_path / "plain", TINY_SCALED)))


# --- quantized directories of other programs ----------------------------------------------------

PARTS = ("weight", "scales", "biases")
FOUR, EIGHT = QuantFormat(4, 64), QuantFormat(8, 32)


def form_of(module: str) -> QuantFormat | None:
    if module in ("lm_head", "model.layers.1.self_attn.k_proj"):
        return None
    return EIGHT if module.endswith(("embed_tokens", "down_proj", "v_proj")) else FOUR


def write_as_mlx_lm_does(folder: Path) -> Weights:
    """Write TINY packed, settings by module in config.json; return the unpacked weights."""
    write_hf(folder)
    weights, raw = random_model(TINY)
    entry: Raw = {"group_size": FOUR.group_size, "bits": FOUR.bits}
    arrays: dict[str, mx.array] = {}
    unpacked: Weights = {}
    for name, array in arrays_of(weights).items():
        module = name.removesuffix(".weight")
        form = form_of(module) if array.ndim == 2 else None
        if form is None:
            arrays[name], unpacked[name] = array, weights[name]
            entry |= {module: False} if array.ndim == 2 else {}
            continue
        settings: Any = {"group_size": form.group_size, "bits": form.bits}
        packed = mx.quantize(array, **settings)
        arrays |= {f"{module}.{part}": a for part, a in zip(PARTS, packed, strict=True)}
        unpacked[name] = np.asarray(mx.dequantize(*packed, **settings))
        entry |= {module: settings} if form != FOUR else {}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "mlx"})
    raw |= {"quantization": entry, "quantization_config": entry}
    (folder / "config.json").write_text(json.dumps(raw))
    return unpacked


def test_a_directory_of_mlx_lm_loads_with_settings_by_module(tmp_path: Path) -> None:
    unpacked = write_as_mlx_lm_does(tmp_path / "mlx")
    llama = mlx_llama.load(tmp_path / "mlx", dtype="float32")
    plain = write_hf(tmp_path / "plain", change=lambda weights, _: weights.update(unpacked))
    assert distance(np.asarray(llama.logits(TINY.ids)), logits(plain)) < ORDER_TOLERANCE
    first, second = llama.model.blocks
    assert isinstance(first.wqkv, Stack) and isinstance(first.w13, Packed)
    assert isinstance(first.w2, Packed) and first.w2.form == EIGHT
    assert isinstance(second.wqkv, Stack) and isinstance(second.wqkv.parts[1], Dense)
    assert isinstance(llama.model.output, Dense)
    directory = open_model_directory(tmp_path / "mlx")
    assert directory.is_quantized
    assert directory.format_counts == {
        "8 bits, group 32": 5,
        "4 bits, group 64": 9,
        "float32": 2,
    }


def test_what_our_converter_writes_loads(tmp_path: Path) -> None:
    source = write_meta(tmp_path / "source")
    for bits in (4, 8):
        target = convert(source, tmp_path / f"{bits}bit", bits=bits)
        directory = open_model_directory(target)
        assert directory.format_counts == {f"{bits} bits, group 64": 16}
        assert directory.weight_bytes == sum(ref.nbytes for ref in directory.tensors.values())
        assert directory.own["kind"] == directory.kind.value == "llama2"
        assert directory.kind.reason == "recorded in config.json"
        assert distance(logits(target), logits(write_hf(tmp_path / f"hf{bits}"))) < 2.0**-bits * 16


# --- what is chosen ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "expected"), [(None, mx.float32), ("bfloat16", mx.bfloat16), ("float16", mx.float16)]
)
def test_dtype_is_what_was_asked_for(asked: str | None, expected: mx.Dtype, tmp_path: Path) -> None:
    llama = mlx_llama.load(write_hf(tmp_path / "model"), dtype=asked)
    assert llama.dtype == llama.model.norm.dtype == expected
    assert all(array.dtype == expected for array in llama.model.arrays())
    assert llama.logits(TINY.ids).dtype == mx.float32


def test_an_unknown_dtype_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(MlxLlamaError, match="expected one of bfloat16, float16, float32"):
        mlx_llama.load(write_hf(tmp_path / "model"), dtype="float8")


def test_progress_counts_layers(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    mlx_llama.load(write_hf(tmp_path / "model"), on_block=lambda *done: seen.append(done))
    assert seen == [(1, 2), (2, 2)]


def test_the_kind_comes_from_record_template_and_name(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "CodeLlama-7b-Instruct-hf")
    assert open_model_directory(folder).kind.value == "codellama-instruct"
    (folder / "tokenizer_config.json").write_text('{"chat_template": "[INST]"}')
    assert "chat template" in open_model_directory(folder).kind.reason
    folder = folder.rename(tmp_path / "mine")
    assert open_model_directory(folder).kind.value == "llama2-chat"
    (folder / "chat_template.jinja").write_text("Source: system <step>")  # goes before the other
    assert open_model_directory(folder).kind.value == "codellama-70b-instruct"
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "mlx_llama": {"kind": "llama1"}}))
    assert open_model_directory(folder).kind.value == "llama1"
    assert mlx_llama.load(folder).kind.name == "llama1"


def test_names_are_read_from_links_and_from_a_download_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the last part of the resolved path was looked at, which is a commit's number there."""
    folder = write_hf(tmp_path / "models--meta-llama--Llama-2-7b-chat-hf" / "snapshots" / "08751db")
    assert open_model_directory(folder).kind.value == "llama2-chat"
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert open_model_directory(link).kind.value == "llama2-chat"
    blob = folder.rename(tmp_path / "blob123")
    link = tmp_path / "CodeLlama-7b-Instruct-hf"
    link.symlink_to(blob)
    assert open_model_directory(link).kind.value == "codellama-instruct"
    assert open_model_directory(blob).kind.value == "llama2"
    blob.rename(tmp_path / "Llama-2-7b-chat")
    monkeypatch.chdir(tmp_path / "Llama-2-7b-chat")
    assert open_model_directory(Path()).kind.value == "llama2-chat"


@pytest.mark.parametrize(
    ("templates", "kind"),
    [
        ([{"name": "default", "template": "[INST]"}], "llama2-chat"),
        ([{"name": "tool_use", "template": "x"}, {"name": "default", "template": "[INST]"}],
         "llama2-chat"),
        ([{"name": "rag", "template": "[INST]"}, {"name": "tool_use", "template": "x"}],
         "llama2-chat"),
        ([], "llama2"),
        (["[INST]", {"name": "default"}], "llama2"),
        ([{"name": "default", "template": 5}], "llama2"),
        ({"default": "[INST]"}, "llama2"),
    ],
)  # fmt: skip
def test_several_chat_templates_are_a_list(templates: object, kind: str, tmp_path: Path) -> None:
    """Since transformers 4.37 a model may have some by name; they were not read."""
    folder = write_hf(tmp_path / "model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert open_model_directory(folder).kind.value == kind


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, SamplingDefaults()),
        ({"temperature": 0.7, "top_p": 0.8, "top_k": 40}, SamplingDefaults(0.7, 0.8, 40)),
        ({"do_sample": False, "temperature": 0.7}, SamplingDefaults(temperature=0.0)),
        ({"do_sample": False, "repetition_penalty": 1.2},
         SamplingDefaults(temperature=0.0, repetition_penalty=1.2)),
        ({"do_sample": True, "min_p": 0.05, "top_p": None}, SamplingDefaults(min_p=0.05)),
        ({"repetition_penalty": 1.1}, SamplingDefaults(repetition_penalty=1.1)),
    ],
)  # fmt: skip
def test_sampling_defaults_are_those_of_the_directory(
    content: Raw, expected: SamplingDefaults, tmp_path: Path
) -> None:
    folder = write_hf(tmp_path / "model")
    assert mlx_llama.load(folder).sampling_defaults == SamplingDefaults()
    (folder / "generation_config.json").write_text(json.dumps(content))
    assert mlx_llama.load(folder).sampling_defaults == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"temperature": "hot"}, ("temperature is 'hot'", "a number from 0 to 100")),
        ({"temperature": -1}, ("temperature is -1",)),
        ({"do_sample": False, "temperature": "hot"}, ("temperature is 'hot'",)),
        ({"do_sample": "no"}, ("do_sample is 'no'", "true or false")),
        ({"top_p": 2}, ("top_p is 2",)),
        ({"top_k": 1e99}, ("top_k is 1e+99", "a whole number")),
        ({"min_p": []}, ("min_p is []",)),
        ({"repetition_penalty": True}, ("repetition_penalty is True",)),
        ({"eos_token_id": "x"}, ("eos_token_id is 'x'", "from 0 to 319")),
        ({"eos_token_id": [2, 320]}, ("eos_token_id is [2, 320]",)),
        ({"eos_token_id": -1}, ("eos_token_id is -1",)),
        ({"eos_token_id": True}, ("eos_token_id is True",)),
    ],
)
def test_recommendations_that_cannot_be_are_refused(
    content: Raw, words: tuple[str, ...], tmp_path: Path
) -> None:
    """They were ignored, and the model answered with other settings than its makers'."""
    folder = write_hf(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps(content))
    assert_refused(folder, "generation_config.json: ", *words)


def test_stop_ids_are_those_of_all_files(tmp_path: Path) -> None:
    """generation_config.json, where Llama 3's releases name <|eot_id|>, was not read."""
    folder = write_hf(tmp_path / "model", change=lambda _, raw: raw.update(eos_token_id=7))
    assert mlx_llama.load(folder).stop_ids == {2, 7}
    for ids, expected in ((9, {2, 7, 9}), ([9, 7, 11], {2, 7, 9, 11}), (None, {2, 7})):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        assert mlx_llama.load(folder).stop_ids == expected


def test_ends_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "model", change=lambda _, raw: raw.update(eos_token_id=[2, 999]))
    assert_refused(
        folder, "config.json: eos_token_id is [2, 999], expected token ids from 0 to 319"
    )


def test_the_dtype_of_the_weights_is_the_stored_one(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "model", change=lambda _, raw: raw.update(torch_dtype="bfloat16"))
    assert open_model_directory(folder).stored_dtype == "float32"


# --- a tokenizer with fewer tokens than the embedding has rows -----------------------------------

ADDED = ("<|im_start|>", "<|im_end|>")


def write_padded(folder: Path, *, specials: tuple[str, ...] | None = None, **changes: Any) -> Path:
    """Write TINY (320 rows) with a tokenizer.model of 314 tokens.

    specials: what a tokenizer.json has behind them; None writes none.
    """
    write_hf(folder, change=lambda _, raw: raw.update(changes))
    if specials is not None:
        more = open_tokenizer(write_spm(folder / "tokenizer.model", tiny_spm(specials=specials)))
        assert isinstance(more, SentencePieceTokenizer)
        (folder / "tokenizer.json").write_text(json.dumps(sentencepiece_json(more)))
    write_spm(folder / "tokenizer.model")
    return folder


def likely(llama: Llama, monkeypatch: pytest.MonkeyPatch, *tokens: int) -> None:
    """Make the model find these tokens the likeliest at each step, the first one most."""
    row = mx.zeros(llama.config.vocab_size)
    for rank, token in enumerate(tokens):
        row = row.at[token].add(90.0 - 10 * rank)

    def logits(_: LlamaModel, hidden: mx.array) -> mx.array:
        return mx.broadcast_to(row, (*hidden.shape[:-1], row.size))

    monkeypatch.setattr(LlamaModel, "logits", logits)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_token_are_never_drawn(
    temperature: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a row was drawn, and the answer ended in "token id 319 is not between 0 and 313"."""
    llama = mlx_llama.load(write_padded(tmp_path / "model"))
    likely(llama, monkeypatch, 319, 314, 70)
    steps = list(llama.stream("the", temperature=temperature, max_tokens=3))
    assert [step.token_id for step in steps] == [70, 70, 70]


def test_rows_that_end_an_answer_need_no_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = mlx_llama.load(write_padded(tmp_path / "model", eos_token_id=315))
    likely(llama, monkeypatch, 319, 315, 70)
    (step,) = llama.stream("the", temperature=0, max_tokens=3)
    assert (step.token_id, step.finish_reason) == (315, "eos")
    steps = list(llama.stream("the", temperature=0, max_tokens=3, ignore_eos=True))
    assert [step.token_id for step in steps] == [70, 70, 70]


def test_added_tokens_are_read_from_the_tokenizer_json(tmp_path: Path) -> None:
    """A ChatML model's <|im_end|> stands in tokenizer.json alone, which was not looked at."""
    folder = write_padded(tmp_path / "model", specials=ADDED)
    llama = mlx_llama.load(folder)
    assert llama.tokenizer.path.name == "tokenizer.json"
    assert [llama.tokenizer.special_tokens[name] for name in ADDED] == [314, 315]
    assert llama.sampling_defaults.padding == {316, 317, 318, 319}
    plain = open_tokenizer(folder / "tokenizer.model")
    assert llama.tokenizer.encode("hello the") == plain.encode("hello the")


@pytest.mark.parametrize("name", ["damaged", "too large", "another", "no larger"])
def test_a_tokenizer_json_that_does_not_fit_is_passed_over(name: str, tmp_path: Path) -> None:
    specials = tuple(f"<{n}>" for n in range({"too large": 7, "no larger": 0}.get(name, 2)))
    folder = write_padded(tmp_path / "model", specials=specials)
    file = folder / "tokenizer.json"
    if name == "damaged":
        file.write_text(file.read_text()[:-20])
    elif name == "another":
        pieces = list(tiny_spm(specials=specials).pieces)
        at = next(i for i, piece in enumerate(pieces) if piece.text == "日")
        pieces[at] = replace(pieces[at], text="月")
        other = open_tokenizer(write_spm(folder / "other.model", SpmModel(tuple(pieces))))
        assert isinstance(other, SentencePieceTokenizer)
        file.write_text(json.dumps(sentencepiece_json(other)))
    llama = mlx_llama.load(folder)
    assert llama.tokenizer.path.name == "tokenizer.model"
    assert llama.sampling_defaults.padding == frozenset(range(314, 320))


# --- what is refused ---------------------------------------------------------------------------


def assert_refused(folder: Path, *words: str, kind: type[MlxLlamaError] = CheckpointError) -> None:
    """Check that loading fails with one line that has the words."""
    with pytest.raises(kind) as caught:
        mlx_llama.load(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_what_is_no_model_directory_is_told_what_to_do(tmp_path: Path) -> None:
    assert_refused(tmp_path / "none", "no such folder", "mlx-llama convert")
    assert_refused(tmp_path, "no config.json", "mlx-llama convert")
    assert_refused(
        write_hf(tmp_path / "model") / "config.json", "a file, expected a model directory"
    )


def test_a_meta_checkpoint_is_answered_with_the_command(tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "llama-2-7b")
    assert_refused(folder, "a Meta checkpoint", f"mlx-llama convert {folder}")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.safetensors")
    assert_refused(folder, "no model.safetensors", INDEX_NAME)
    folder = write_hf(tmp_path / "no tokenizer")
    (folder / "tokenizer.model").unlink()
    assert_refused(folder, "tokenizer", kind=TokenizerError)
    folder = write_hf(tmp_path / "no shard")
    split(folder)
    (folder / shard_name(1)).unlink()
    assert_refused(folder, INDEX_NAME, shard_name(1), "no file of")


@pytest.mark.parametrize("name", [NORM, QUERY, "lm_head.weight", "model.embed_tokens.weight"])
def test_a_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "model", change=lambda weights, _: weights.pop(name))
    assert_refused(folder, name, "missing")


@pytest.mark.parametrize("name", [NORM, QUERY, "lm_head.weight", "model.embed_tokens.weight"])
def test_a_wrong_shape_is_named(name: str, tmp_path: Path) -> None:
    def cut(weights: Weights, _: Raw) -> None:
        weights[name] = weights[name][:-2]

    assert_refused(write_hf(tmp_path / "model", change=cut), name, "shape", "expected")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 3}, ("model.layers.2", "missing")),
        ({"num_hidden_layers": 1}, ("model.layers.1", "is too many", "1 layers")),
        ({"hidden_size": 64}, ("shape",)),
        ({"intermediate_size": 64}, ("mlp.gate_proj.weight", "shape")),
        ({"num_attention_heads": 4}, ("q_proj.weight", "shape")),
        ({"vocab_size": 400}, ("model.embed_tokens.weight", "shape")),
        ({"num_hidden_layers": 10**9}, ("n_layers",)),
    ],
)
def test_weights_of_another_shape_than_config_says_are_refused(
    change: Raw, words: tuple[str, ...], tmp_path: Path
) -> None:
    folder = write_hf(tmp_path / "model", change=lambda _, raw: raw.update(change))
    assert_refused(folder, *words)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "model", CASES["llama3"])
    write_tiktoken(folder / "tokenizer.model")
    assert_refused(folder, "the tokenizer has 536 tokens, the weights 512", "different models")


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "../other/model.safetensors",
        "sub/model.safetensors",
        "./model.safetensors",
        "..",
        ".",
        "",
        "none.safetensors",
        "model.safetensors\0",
        "x" * 300,
    ],
)
def test_an_index_names_files_of_its_folder_alone(name: str, tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "model")
    for other in (tmp_path, tmp_path / "other", folder / "sub"):
        other.mkdir(exist_ok=True)
        shutil.copy(folder / "model.safetensors", other)
    write_index(folder, {NORM: "model.safetensors", QUERY: name})
    assert_refused(folder, INDEX_NAME, "no file of")


def test_an_index_with_an_absolute_path_is_refused(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "model")
    write_index(folder, {NORM: str(folder / "model.safetensors")})
    assert_refused(folder, INDEX_NAME, "no file of")


@pytest.mark.parametrize("weight_map", [None, [], "x", {NORM: 1}, {NORM: None}, {NORM: ["a"]}])
def test_an_index_without_a_table_is_refused(weight_map: object, tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "model")
    write_index(folder, weight_map)
    assert_refused(folder, INDEX_NAME, "weight_map")


def test_an_empty_index_is_no_whole_model(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "model")
    write_index(folder, {})
    assert_refused(folder, "missing")


def test_an_index_names_safetensors_alone(tmp_path: Path) -> None:
    """MLX was given weights.bin and raised a ValueError of its own."""
    folder = write_hf(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "weights.bin")
    write_index(folder, dict.fromkeys(random_model(TINY)[0], "weights.bin"))
    assert_refused(folder, INDEX_NAME, "names 'weights.bin'", "end in .safetensors")


def test_an_index_that_leaves_a_tensor_out_is_refused(tmp_path: Path) -> None:
    """transformers takes the index's word; here the tensor was loaded all the same."""
    folder = write_hf(tmp_path / "model")
    weight_map = split(folder)
    file = weight_map.pop("lm_head.weight")
    write_index(folder, weight_map)
    assert_refused(folder, INDEX_NAME, f"does not name tensor lm_head.weight of {file}")


def test_an_index_that_is_wrong_about_a_tensor_is_refused(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "model")
    weight_map = split(folder)
    other = next(file for file in weight_map.values() if file != weight_map[QUERY])
    write_index(folder, {**weight_map, QUERY: other})
    assert_refused(folder, INDEX_NAME, f"says that {other} holds tensor {QUERY}")
    write_index(folder, {**weight_map, "model.layers.9.mlp.up_proj.weight": other})
    assert_refused(folder, INDEX_NAME, f"says that {other} holds tensor model.layers.9")


@pytest.mark.parametrize("is_named", [True, False])
def test_an_index_may_name_old_buffers_or_not(is_named: bool, tmp_path: Path) -> None:
    buffer, file = "model.layers.0.self_attn.rotary_emb.inv_freq", shard_name(0)
    folder = write_hf(tmp_path / "model")
    weight_map = split(folder)
    if is_named:
        write_index(folder, {**weight_map, buffer: file})
    else:
        arrays = {n: array for n, array in random_model(TINY)[0].items() if weight_map[n] == file}
        write_safetensors(folder / file, {**arrays, buffer: np.zeros(32, dtype=np.float32)})
    assert open_model_directory(folder).tensors.keys() == weight_map.keys()


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "model")
    weight_map = split(folder)
    extra = {NORM: random_model(TINY)[0][NORM]}
    write_safetensors(folder / "model-extra.safetensors", extra)
    write_index(folder, {**weight_map, "lm_head.weight": "model-extra.safetensors"})
    assert_refused(folder, f"tensor {NORM} stands in two files")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_proj.lora_a",
        "model.layers.0.block_sparse_moe.gate.weight",
        "vision_model.patch_embedding.weight",
        "score.weight",
        "weight",
    ],
)
def test_unknown_tensors_are_refused_by_name(name: str, tmp_path: Path) -> None:
    def add(weights: Weights, _: Raw) -> None:
        weights[name] = np.zeros(4, dtype=np.float32)

    assert_refused(write_hf(tmp_path / "model", change=add), f"tensor {name} is not a Llama's")


@pytest.mark.parametrize("n_bytes", [0, 7, 8, 1000, -1])
def test_a_truncated_file_is_refused_before_it_is_mapped(n_bytes: int, tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:n_bytes])
    assert_refused(folder, str(file))


def test_a_download_that_is_a_pointer_or_a_page_is_recognised(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "model")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid 1\n")
    assert_refused(folder, "model.safetensors", "LFS")
    (folder / "config.json").write_text("<html>")
    assert_refused(folder, "config.json", "not valid JSON")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "qwen2"}, "qwen2"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ],
)
def test_other_models_and_quantizers_are_refused(change: Raw, word: str, tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "model", change=lambda _, raw: raw.update(change))
    assert_refused(folder, word, kind=UnsupportedModelError)


def test_scales_without_settings_are_refused(tmp_path: Path) -> None:
    write_as_mlx_lm_does(tmp_path / "model")
    config = tmp_path / "model/config.json"
    raw = json.loads(config.read_text())
    del raw["quantization"], raw["quantization_config"]
    config.write_text(json.dumps(raw))
    assert_refused(tmp_path / "model", ".scales", "does not say how it is quantized")


def test_settings_that_do_not_fit_the_packed_tensors_are_refused(tmp_path: Path) -> None:
    write_as_mlx_lm_does(tmp_path / "model")
    config = tmp_path / "model/config.json"
    raw = json.loads(config.read_text())
    raw["quantization"] |= {"bits": 3}
    config.write_text(json.dumps(raw))
    assert_refused(tmp_path / "model", ".weight", "shape")


@pytest.mark.parametrize("kind", ["llama9", "", "LLAMA2"])
def test_an_unknown_recorded_kind_is_refused(kind: str, tmp_path: Path) -> None:
    folder = write_hf(
        tmp_path / "model", change=lambda _, raw: raw.update(mlx_llama={"kind": kind})
    )
    assert_refused(
        folder, f"{folder / 'config.json'}: ", repr(kind), "llama2-chat", kind=UNSUPPORTED
    )


@pytest.mark.parametrize("kind", [5, ["llama2"], True])
def test_a_recorded_kind_that_is_no_text_is_refused(kind: object, tmp_path: Path) -> None:
    folder = write_hf(
        tmp_path / "model", change=lambda _, raw: raw.update(mlx_llama={"kind": kind})
    )
    assert_refused(folder, f"mlx_llama.kind is {kind!r}", kind=UNSUPPORTED)


@pytest.mark.parametrize(
    ("case", "kind", "words"),
    [
        (TINY, "llama3-instruct", ("has a tiktoken tokenizer", "here is SentencePiece")),
        (TINY_SCALED, "llama2", ("has a SentencePiece tokenizer", "here is tiktoken")),
    ],
)
def test_a_recorded_kind_of_the_other_tokenizer_is_refused(
    case: Any, kind: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    folder = write_hf(
        tmp_path / "model", case, change=lambda _, raw: raw.update(mlx_llama={"kind": kind})
    )
    assert_refused(
        folder, f"{folder / 'config.json'}: mlx_llama.kind {kind}", *words, kind=UNSUPPORTED
    )
