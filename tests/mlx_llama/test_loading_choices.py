"""What loading chooses: dtype, kind, sampling, what ends an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import mlx_llama
from mlx_llama.errors import MlxLlamaError
from mlx_llama.loading import open_model_directory
from mlx_llama.sampling import SamplingDefaults
from model_folders import TINY, write_hf
from refusals import assert_refused

# --- what is chosen ----------------------------------------------------------------------------


Raw = dict[str, Any]


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
