"""Every published Llama, small: its own file layout in, the tensors that torch makes of it out.

The checkpoints and what must become of them were made by `golden/make_family.py`, which shares no
code with the converter.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from family import FAMILY, digests, unpack, write_tokenizer
from mlx_llama.errors import UnsupportedModelError
from mlx_llama.kinds import kind_named
from mlx_llama.loading import open_model_directory
from mlx_llama.options import ConvertOptions
from mlx_llama.tokenizer import open_tokenizer
from mlx_llama_convert import make_plan, open_source
from mlx_llama_convert.tokenizer_files import write_tokenizer_files
from tiny_models import convert
from tiny_tokenizers import write_tiktoken

META = [name for name in FAMILY if not name.startswith("hf-")]
HUGGING_FACE = [name for name in FAMILY if name.startswith("hf-")]
FOLDERS = [(row, name, kind) for row in FAMILY for name, kind in FAMILY[row]["folders"].items()]


@pytest.mark.parametrize("row", FAMILY)
def test_weights_and_configuration_are_those_of_the_publisher(tmp_path: Path, row: str) -> None:
    expected = FAMILY[row]
    name, kind = next(iter(expected["folders"].items()))
    source = unpack(row, tmp_path / "source" / name)
    out = convert(source, tmp_path / "out", quantize=False)
    assert digests(out / "model.safetensors") == expected["tensors"]
    config = json.loads((out / "config.json").read_text("utf-8"))
    assert {key: config[key] for key in expected["config"]} == expected["config"]
    assert config["mlx_llama"]["kind"] == kind
    scaling = config["rope_scaling"]
    assert (scaling and scaling["factor"]) == expected["factor"]
    directory = open_model_directory(out)
    assert directory.kind.value == kind
    assert len(directory.tensors) == len(expected["tensors"])
    manifest = json.loads((out / "manifest.json").read_text("utf-8"))
    hashed = {file["name"] for file in manifest["source"]["files"]}
    assert {path.name for path in source.iterdir()} <= hashed
    for note in expected["notes"]:
        assert any(note in found for found in manifest["notes"]), manifest["notes"]


@pytest.mark.parametrize(("row", "name", "kind"), FOLDERS)
def test_the_folders_name_tells_the_kind(tmp_path: Path, row: str, name: str, kind: str) -> None:
    source = open_source(unpack(row, tmp_path / name), ConvertOptions())
    assert source.kind.value == kind
    assert source.config.max_context == FAMILY[row]["config"]["max_position_embeddings"]


@pytest.mark.parametrize("row", META)
def test_the_plan_counts_shards_and_bytes(tmp_path: Path, row: str) -> None:
    source = unpack(row, tmp_path / next(iter(FAMILY[row]["folders"])))
    options = ConvertOptions(quantize=False)
    plan = make_plan(open_source(source, options), options)
    ranks = FAMILY[row]["ranks"]
    assert plan.source.layout == f"Meta checkpoint, {ranks} file{'s' if ranks > 1 else ''}"
    if "fp8" in row:
        assert plan.source_bytes < plan.output_bytes
    else:
        assert plan.source_bytes == plan.output_bytes


@pytest.mark.parametrize("row", ["hf-bin", "hf-safetensors-sharded"])
def test_tokenizer_json_alone_is_enough(tmp_path: Path, row: str) -> None:
    name = next(iter(FAMILY[row]["folders"]))
    source = unpack(row, tmp_path / name)
    (source / "tokenizer.model").unlink(missing_ok=True)
    tokenizer = open_tokenizer(write_tokenizer(row, tmp_path / "tokenizer.model"))
    written = tmp_path / "written"
    written.mkdir()
    kind = kind_named(FAMILY[row]["folders"][name])
    write_tokenizer_files(tokenizer, kind, written, max_context=100)
    (written / "tokenizer.json").rename(source / "tokenizer.json")
    out = convert(source, tmp_path / "out", quantize=False)
    assert digests(out / "model.safetensors") == FAMILY[row]["tensors"]
    assert not (out / "tokenizer.model").exists()


@pytest.mark.parametrize(("row", "text"), [("int4-qlora", "QLoRA"), ("int4-spinquant", "SpinQ")])
def test_metas_int4_releases_are_refused_by_name(tmp_path: Path, row: str, text: str) -> None:
    source = unpack(row, tmp_path / row)
    write_tiktoken(source / "tokenizer.model", ())
    with pytest.raises(UnsupportedModelError, match=rf"params\.json: .*{text}.*bfloat16 release"):
        open_source(source, ConvertOptions())
    # What the tensors say counts as well.
    params = json.loads((source / "params.json").read_text("utf-8"))
    for key in ("quantization_args", "lora_args"):
        params.pop(key, None)
    (source / "params.json").write_text(json.dumps(params))
    with pytest.raises(UnsupportedModelError, match=rf"consolidated\.00\.pth: tensor .*{text}"):
        open_source(source, ConvertOptions())


def test_the_pruned_guard_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "llama_guard_3_1b_pruned_xnnpack.pte").write_bytes(b"")
    with pytest.raises(UnsupportedModelError, match=r"ExecuTorch program.*bfloat16 release"):
        open_source(tmp_path, ConvertOptions())
