"""Folders of two layouts: which one is taken, and that the plan says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from family import FAMILY, digests, unpack
from mlx_llama.errors import MlxLlamaError, UnsupportedModelError
from mlx_llama.options import ConvertOptions
from mlx_llama_convert import SourceModel, make_plan, open_source
from tiny_models import convert

OPTIONS = ConvertOptions(quantize=False)
SCALING = {"rope_type": "llama3", "factor": 16.0}


def notes(folder: Path) -> tuple[str, ...]:
    return make_plan(open_source(folder, OPTIONS), OPTIONS).notes


def opened(folder: Path) -> SourceModel:
    return open_source(folder, OPTIONS)


def write_config(path: Path, **content: Any) -> None:
    path.write_text(json.dumps({"model_type": "llama", **content}))


def test_hugging_faces_files_come_before_original(tmp_path: Path) -> None:
    folder = unpack("hf-safetensors-sharded", tmp_path / "Llama-3.1-8B")
    unpack("llama3.1-8b", folder / "original")
    assert opened(folder).layout == "Hugging Face checkpoint, safetensors"
    assert notes(folder)[0] == (
        "Hugging Face's files are taken, Meta's files in original/ are not: config.json says more "
        "than params.json"
    )


@pytest.mark.parametrize("row", ["hf-bin", "hf-safetensors"])
def test_hugging_faces_files_come_before_metas_in_one_folder(tmp_path: Path, row: str) -> None:
    folder = unpack(row, tmp_path / "Llama-2-7b-hf")
    unpack("llama2-7b", folder)
    assert opened(folder).layout.startswith("Hugging Face checkpoint")
    assert notes(folder)[0] == (
        "Hugging Face's files are taken, Meta's files beside them are not: config.json says more "
        "than params.json"
    )


def test_original_alone_is_taken(tmp_path: Path) -> None:
    folder = tmp_path / "Llama-3.1-8B-Instruct"
    unpack("llama3.1-8b", folder / "original")
    write_config(folder / "config.json", rope_scaling=SCALING)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    (folder / "LICENSE").write_text("terms")
    source = opened(folder)
    assert source.path == folder
    assert source.layout == "Meta checkpoint, 1 file"
    assert source.kind.value == "llama3.1-instruct"
    assert notes(folder)[0] == (
        "Meta's files in original/ are taken: the folder itself holds no weights"
    )
    # config.json says what params.json does not.
    assert source.config.rope_scaling is not None
    assert source.config.rope_scaling.factor == 16.0
    assert source.rope == "config.json"
    assert folder / "config.json" in [file.resolve() for file in source.files]
    out = convert(folder, tmp_path / "out", quantize=False)
    assert digests(out / "model.safetensors") == FAMILY["llama3.1-8b"]["tensors"]
    assert (out / "LICENSE").read_text() == "terms"


def test_metas_files_come_before_those_in_original(tmp_path: Path) -> None:
    folder = unpack("llama3.1-8b", tmp_path / "m")
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy").rename(folder / "original")
    assert notes(folder)[0] == (
        "Meta's files are taken, Meta's files in original/ are not: the folder's own come first"
    )


def test_one_layout_needs_no_note(tmp_path: Path) -> None:
    assert notes(unpack("llama2-7b", tmp_path / "meta")) == ()
    assert notes(unpack("hf-bin", tmp_path / "hf")) == ()


@pytest.mark.parametrize(
    "path",
    [
        "models--meta-llama--Llama-3.1-8B-Instruct/snapshots/0e9e39f249a16976918f6564b8830bc894c89659",
        "Llama-3.1-8B-Instruct/original",
        "models--meta-llama--Llama-3.1-8B-Instruct/snapshots/0e9e39f249a1/original",
        "Llama-3.1-8B-Instruct/original/mp8",
    ],
)
def test_the_repositorys_name_is_found_above(tmp_path: Path, path: str) -> None:
    folder = unpack("llama3.1-8b", tmp_path / path)
    assert opened(folder).kind.value == "llama3.1-instruct"


# --- a config.json beside Meta's files ------------------------------------------------------------


def test_guard_3_takes_the_scaling_of_its_config(tmp_path: Path) -> None:
    folder = unpack("llama-guard-3-8b-unscaled", tmp_path / "Llama-Guard-3-8B")
    assert opened(folder).config.rope_scaling is None
    assert any("not scaled; put its config.json beside" in note for note in notes(folder))
    write_config(folder / "config.json", rope_scaling={"rope_type": "llama3", "factor": 8.0})
    source = opened(folder)
    assert source.config.rope_scaling is not None
    assert (source.config.rope_scaling.factor, source.rope) == (8.0, "config.json")
    assert any("config.json scales RoPE: it is scaled" in note for note in notes(folder))
    assert not any("put its config.json" in note for note in notes(folder))


@pytest.mark.parametrize("content", [{"model_type": "other"}, {"rope_scaling": None}])
def test_a_config_that_says_nothing_of_it_changes_nothing(
    tmp_path: Path, content: dict[str, Any]
) -> None:
    folder = unpack("llama3.1-8b", tmp_path / "Llama-3.1-8B")
    write_config(folder / "config.json", **content)
    source = opened(folder)
    assert source.config.rope_scaling is not None
    assert source.config.rope_scaling.factor == 8.0
    assert folder / "config.json" not in source.files


def test_a_flag_goes_before_the_config(tmp_path: Path) -> None:
    folder = unpack("llama3.1-8b", tmp_path / "m")
    write_config(folder / "config.json", rope_scaling=SCALING)
    source = open_source(folder, ConvertOptions(rope_factor=4.0))
    assert source.config.rope_scaling is not None
    assert source.config.rope_scaling.factor == 4.0


# --- what is no checkpoint ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("model-q4_k_m.gguf", "GGUF is not converted"),
        ("llama_guard.pte", "ExecuTorch"),
        ("adapter_model.safetensors", "merge it into its model"),
        ("adapter_model.bin", "merge it into its model"),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(b"")
    write_config(tmp_path / "config.json")
    with pytest.raises(UnsupportedModelError, match=text):
        opened(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "tokenizer.model"])
def test_a_folder_without_weights_says_what_is_expected(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text("{}")
    with pytest.raises(MlxLlamaError, match=r"no checkpoint: expected params\.json with"):
        opened(tmp_path)
