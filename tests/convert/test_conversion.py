from __future__ import annotations

import hashlib
import json
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_llama.errors import (
    MlxLlamaError,
    OptionError,
    OutputError,
    QuantizationError,
    UnsupportedModelError,
)
from mlx_llama.loading import open_model_directory
from mlx_llama.options import ConvertOptions
from mlx_llama.weights import hf_module, is_matrix
from mlx_llama_convert import conversion, convert_checkpoint, make_plan, open_source
from mlx_llama_convert.source import CheckpointWeights
from mlx_llama_quantize import packing
from tiny_models import convert, write_meta


def arrays(folder: Path) -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}
    for file in sorted(folder.glob("*.safetensors")):
        loaded = mx.load(str(file))
        assert isinstance(loaded, dict)
        found |= loaded
    return found


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("bits", "group"), [(4, 64), (8, 32), (3, 32), (2, 64), (5, 64), (6, 64)])
def test_output_equals_mx_quantize_bit_for_bit(
    tmp_path: Path, bits: int, group: int, dtype: str
) -> None:
    source = write_meta(tmp_path / "m", dtype=dtype)
    out = arrays(convert(source, tmp_path / "out", bits=bits, group_size=group))
    weights = open_source(source, ConvertOptions()).weights
    for name in weights.names():
        values, module = weights.read(name), hf_module(name)
        if not is_matrix(name):
            assert mx.array_equal(out[f"{module}.weight"], values)
            continue
        packed = mx.quantize(values, group_size=group, bits=bits, stream=mx.cpu)
        for part, expected in zip(("weight", "scales", "biases"), packed, strict=True):
            found = out[f"{module}.{part}"]
            assert found.dtype == expected.dtype
            assert mx.array_equal(found, expected), f"{module}.{part}"


def test_unquantized_output_holds_the_sources_bits(tmp_path: Path) -> None:
    source = write_meta(tmp_path / "m", dtype="bfloat16")
    out = arrays(convert(source, tmp_path / "out", quantize=False))
    weights = open_source(source, ConvertOptions()).weights
    assert sorted(out) == sorted(f"{hf_module(n)}.weight" for n in weights.names())
    for name in weights.names():
        found = out[f"{hf_module(name)}.weight"]
        assert found.dtype == mx.bfloat16
        assert mx.array_equal(found, weights.read(name))


def test_bytes_do_not_depend_on_threads_or_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_meta(tmp_path / "m", dtype="bfloat16")
    one = digests(convert(source, tmp_path / "one", n_threads=1))
    monkeypatch.setattr(packing, "BLOCK_BYTES", 1000)
    many = digests(convert(source, tmp_path / "many", n_threads=4))
    assert one == many


def test_shards_of_the_output_have_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_meta(tmp_path / "m")
    whole = arrays(convert(source, tmp_path / "whole"))
    monkeypatch.setattr(conversion, "MAX_SHARD_BYTES", 20_000)
    out = convert(source, tmp_path / "out")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert set(index["weight_map"]) == set(whole)
    split = arrays(out)
    assert all(mx.array_equal(split[name], whole[name]) for name in whole)
    assert len(open_model_directory(out).tensors) == len(whole)


def test_config_says_what_peers_need(tmp_path: Path) -> None:
    source = write_meta(tmp_path / "m", is_tiktoken=True, dtype="bfloat16")
    out = convert(source, tmp_path / "out", kind="llama3.1-instruct", bits=8)
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500000.0
    assert config["rope_scaling"]["rope_type"] == config["rope_parameters"]["rope_type"] == "llama3"
    assert config["quantization"] == {"group_size": 64, "bits": 8, "mode": "affine"}
    assert config["max_position_embeddings"] == 131072
    assert config["torch_dtype"] == "bfloat16"
    assert config["mlx_llama"]["kind"] == "llama3.1-instruct"
    assert len(config["eos_token_id"]) == 3


def test_manifest_names_sources_and_decisions(tmp_path: Path) -> None:
    source = write_meta(tmp_path / "m", is_tiktoken=True)
    options = ConvertOptions(bits=4)
    plan = make_plan(open_source(source, options), options)
    convert_checkpoint(plan, tmp_path / "out", n_threads=1, command=["mlx-llama", "convert", "m"])
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    hashes = {f["name"]: f["sha256"] for f in manifest["source"]["files"]}
    for name in ("consolidated.00.pth", "params.json", "tokenizer.model"):
        assert hashes[name] == hashlib.sha256((source / name).read_bytes()).hexdigest()
    assert manifest["command"] == ["mlx-llama", "convert", "m"]
    assert manifest["kind"]["reason"]
    assert manifest["rope_factor"]["value"] == 8.0
    stored = sum(a.nbytes for a in arrays(tmp_path / "out").values())
    assert manifest["bits_per_weight"] == pytest.approx(8 * stored / manifest["parameters"], 1e-3)


def test_width_that_no_group_divides_stays_and_is_told(tmp_path: Path) -> None:
    source = write_meta(tmp_path / "m", params={"multiple_of": 4})  # feed-forward 172
    folder = tmp_path / "m"
    from pth_writer import tiny_tensors, write_checkpoint
    from tiny_models import SPM_VOCAB

    write_checkpoint(folder, tiny_tensors(dim=64, hidden_dim=172, vocab_size=SPM_VOCAB))
    options = ConvertOptions()
    plan = make_plan(open_source(source, options), options)
    assert any("width 172 not packed" in note for note in plan.notes)
    out = arrays(convert(source, tmp_path / "out"))
    assert "model.layers.0.mlp.down_proj.scales" not in out
    assert "model.layers.0.mlp.up_proj.scales" in out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"]["model.layers.0.mlp.down_proj"] is False


def test_group_is_the_largest_that_divides(tmp_path: Path) -> None:
    source = write_meta(tmp_path / "m")  # widths 64 and 192
    options = ConvertOptions(group_size=128)
    plan = make_plan(open_source(source, options), options)
    assert plan.format_counts == {"4 bits, group 64": 16}


def test_float16_that_would_overflow_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_meta(tmp_path / "m", dtype="bfloat16")
    read = CheckpointWeights.read

    def huge(self: CheckpointWeights, name: str, rows: slice | None = None) -> mx.array:
        values = read(self, name, rows)
        return values * 1e6 if name.endswith("w2.weight") else values

    monkeypatch.setattr(CheckpointWeights, "read", huge)
    with pytest.raises(QuantizationError, match=r"w2\.weight: holds .* float16 ends at 65504"):
        convert(source, tmp_path / "out", dtype="float16", quantize=False)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "home") == ["m"]


def test_dtype_changes_scales_and_norms(tmp_path: Path) -> None:
    source = write_meta(tmp_path / "m", dtype="float32")
    out = arrays(convert(source, tmp_path / "out", dtype="bfloat16"))
    assert {a.dtype for n, a in out.items() if not n.endswith("proj.weight")} <= {
        mx.bfloat16,
        mx.uint32,
    }
    assert out["model.norm.weight"].dtype == mx.bfloat16


def test_settings_without_effect_are_refused(tmp_path: Path) -> None:
    source = open_source(write_meta(tmp_path / "m"), ConvertOptions())
    with pytest.raises(OptionError, match="--group-size: does nothing"):
        make_plan(source, ConvertOptions(quantize=False, group_size=32))


def test_quantized_folder_is_not_quantized_again(tmp_path: Path) -> None:
    out = convert(write_meta(tmp_path / "m"), tmp_path / "out")
    with pytest.raises(UnsupportedModelError, match="already quantized"):
        convert(out, tmp_path / "again")


def test_unquantized_output_is_itself_a_source(tmp_path: Path) -> None:
    source = write_meta(tmp_path / "m", dtype="bfloat16")
    plain = convert(source, tmp_path / "plain", quantize=False)
    direct = arrays(convert(source, tmp_path / "direct"))
    detour = arrays(convert(plain, tmp_path / "detour"))
    assert sorted(direct) == sorted(detour)
    assert all(mx.array_equal(direct[name], detour[name]) for name in direct)


@pytest.mark.parametrize("name", ["nothing", "file", "empty", "bin", "gguf"])
def test_what_is_no_source_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    for folder, content in (("empty", None), ("bin", "pytorch_model.bin"), ("gguf", "m.gguf")):
        (tmp_path / folder).mkdir()
        if content:
            (tmp_path / folder / content).write_text("")
    with pytest.raises(MlxLlamaError) as caught:
        open_source(tmp_path / name, ConvertOptions())
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("below", ["", "original"])
def test_output_does_not_replace_its_own_source(tmp_path: Path, below: str) -> None:
    plain = convert(write_meta(tmp_path / "m" / below), tmp_path / "plain", quantize=False)
    source, target = (plain, plain) if not below else (tmp_path / "m" / below, tmp_path / "m")
    options = ConvertOptions(bits=4)
    plan = make_plan(open_source(source, options), options)
    with pytest.raises(OutputError, match="holds the source"):
        convert_checkpoint(plan, target, n_threads=1, force=True)
    assert any(source.iterdir())
