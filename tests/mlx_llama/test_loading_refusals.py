"""Model directories that are no whole model, or another's, are refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_llama.errors import TokenizerError, UnsupportedModelError
from mlx_llama.loading import INDEX_NAME, open_model_directory
from model_folders import (
    TINY,
    TINY_SCALED,
    shard_name,
    split,
    write_as_mlx_lm_does,
    write_hf,
    write_index,
    write_meta,
)
from random_models import CASES, Weights, random_model, write_safetensors
from refusals import assert_refused
from tiny_tokenizers import write_tiktoken

NORM = "model.norm.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
UNSUPPORTED = UnsupportedModelError
Raw = dict[str, Any]


def test_what_is_no_model_directory_is_told_what_to_do(tmp_path: Path) -> None:
    assert_refused(tmp_path / "none", "no such folder", "mlx-llama convert", "show NAME")
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
