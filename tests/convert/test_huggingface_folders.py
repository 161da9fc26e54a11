"""Hugging Face's folders: what config.json leaves out, what is refused, which files are taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from family import FAMILY, digests, unpack
from mlx_llama.errors import CheckpointError, MlxLlamaError, UnsupportedModelError
from mlx_llama.options import ConvertOptions
from mlx_llama_convert import open_source
from mlx_llama_convert.pth import open_pth
from pth_writer import write_pth
from tiny_models import convert

OPTIONS = ConvertOptions()


def change_config(folder: Path, **changes: Any) -> Path:
    """Set keys of config.json; None takes one away."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text("utf-8")), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Change the tensors of a folder's one pytorch_model.bin, which holds float16."""
    path = folder / "pytorch_model.bin"
    arrays = {name: np.array(ref.read()) for name, ref in open_pth(path).items()}
    change(arrays)
    write_pth(path, arrays, prefix="archive")


@pytest.mark.parametrize("key", ["head_dim", "num_key_value_heads", "vocab_size"])
@pytest.mark.parametrize("row", ["hf-safetensors", "hf-safetensors-sharded", "hf-bin-no-prefix"])
def test_missing_keys_are_read_off_the_weights(tmp_path: Path, row: str, key: str) -> None:
    folder = change_config(unpack(row, tmp_path / "m"), **{key: None})
    source = open_source(folder, OPTIONS)
    expected = FAMILY[row]["config"]
    assert source.config.head_dim == expected["head_dim"]
    assert source.config.n_kv_heads == expected["num_key_value_heads"]
    assert source.config.vocab_size == expected["vocab_size"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_attention_heads", None),
        ("num_attention_heads", 0),
        ("num_attention_heads", -4),
        ("num_attention_heads", "4"),
        ("num_attention_heads", 3),
        ("num_key_value_heads", 3),
        ("head_dim", 0),
        ("head_dim", 7),
        ("vocab_size", 10**12),
        ("vocab_size", -1),
        ("vocab_size", "320"),
        ("num_hidden_layers", 2),
        ("num_hidden_layers", 0),
        ("hidden_size", 32),
        ("intermediate_size", None),
    ],
)
def test_keys_that_contradict_the_weights_are_refused(
    tmp_path: Path, key: str, value: object
) -> None:
    with pytest.raises(MlxLlamaError) as caught:
        open_source(change_config(unpack("hf-bin", tmp_path / "m"), **{key: value}), OPTIONS)
    assert str(caught.value).isprintable()


def test_padded_rows_are_kept_and_told(tmp_path: Path) -> None:
    source = open_source(unpack("hf-safetensors", tmp_path / "m"), OPTIONS)
    assert "config.json has a vocabulary of 320, the weights 336 rows: all kept" in source.notes


def test_a_tied_output_is_decided_by_the_weights(tmp_path: Path) -> None:
    folder = unpack("hf-bin", tmp_path / "m")
    assert not open_source(folder, OPTIONS).config.tied
    change_config(folder, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
        open_source(folder, OPTIONS)
    embedding = "model.embed_tokens.weight"
    rewrite(folder, lambda arrays: arrays.update({"lm_head.weight": arrays[embedding]}))
    assert open_source(folder, OPTIONS).config.tied
    rewrite(folder, lambda arrays: arrays.pop("lm_head.weight"))
    assert open_source(folder, OPTIONS).config.tied
    change_config(folder, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match="it is not tied"):
        open_source(folder, OPTIONS)


def test_pytorch_files_are_checked_against_their_index(tmp_path: Path) -> None:
    folder = unpack("hf-bin-sharded", tmp_path / "m")
    index = folder / "pytorch_model.bin.index.json"
    table = json.loads(index.read_text("utf-8"))
    name = "model.norm.weight"
    for wrong, text in [
        ("pytorch_model-00009-of-00009.bin", "which is no file of"),
        ("../elsewhere.bin", "which is no file of"),
        ("config.json", r"end in \.bin"),
        ("pytorch_model-00001-of-00003.bin", "which it does not"),
        ("pytorch_model-00002-of-00003.bin", "which it does not"),
        ("pytorch_model-00003-of-00003.bin", "which it does not"),
    ]:
        if table["weight_map"][name] == wrong:
            continue
        changed = {**table["weight_map"], name: wrong}
        index.write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(CheckpointError, match=rf"index\.json: .*{text}"):
            open_source(folder, OPTIONS)
    index.unlink()
    out = convert(folder, tmp_path / "out", quantize=False)
    assert digests(out / "model.safetensors") == FAMILY["hf-bin-sharded"]["tensors"]


def test_hostile_pytorch_files_run_nothing(tmp_path: Path) -> None:
    folder = unpack("hf-bin", tmp_path / "m")
    payload = b"\x80\x02cposix\nsystem\n(X\x04\x00\x00\x00truetR."
    write_pth(folder / "pytorch_model.bin", {"w": np.ones(1, np.float32)}, pickle=payload)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: .*posix\.system"):
        open_source(folder, OPTIONS)


def test_safetensors_come_before_pytorch_files(tmp_path: Path) -> None:
    folder = unpack("hf-safetensors", tmp_path / "m")
    (folder / "pytorch_model.bin").write_bytes(b"damaged, and never opened")
    source = open_source(folder, OPTIONS)
    assert source.layout == "Hugging Face checkpoint, safetensors"
    assert "pytorch_model.bin is there too, not used: safetensors come first" in source.notes


def test_names_of_both_styles_together_are_refused(tmp_path: Path) -> None:
    folder = unpack("hf-bin", tmp_path / "m")

    def rename(arrays: dict[str, np.ndarray]) -> None:
        name = "model.layers.0.self_attn.q_proj.weight"
        arrays["layers.0.attention.wq.weight"] = arrays.pop(name)

    rewrite(folder, rename)
    with pytest.raises(CheckpointError, match=r"is Meta's name.*which order the rows have"):
        open_source(folder, OPTIONS)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("norm.weight", "are the same tensor"),
        ("embed_tokens.weight", "are the same tensor"),
        ("model.layers.0.self_attn.q_proj.bias", "not a Llama's"),
        ("model.vision.weight", "not a Llama's"),
        ("model.layers.7.mlp.up_proj.weight", "too many"),
    ],
)
def test_tensors_without_a_place_are_refused(tmp_path: Path, name: str, text: str) -> None:
    folder = unpack("hf-bin", tmp_path / "m")
    rewrite(folder, lambda arrays: arrays.update({name: np.ones((2, 2), np.float16)}))
    with pytest.raises(MlxLlamaError, match=text):
        open_source(folder, OPTIONS)


MLX = {"group_size": 64, "bits": 4, "mode": "affine"}


@pytest.mark.parametrize(
    ("entry", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}, "GPTQ"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "AWQ"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "fbgemm_fp8"}}, "FBGEMM FP8"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization_config": {"quant_method": "quip\n" * 99}}, "quip"),
        ({"quantization_config": {"load_in_4bit": True}}, "an unknown method"),
        ({"quantization_config": "gptq"}, "an unknown method"),
        ({"quantization": MLX, "quantization_config": MLX}, "MLX"),
        ({"quantization_config": MLX}, "MLX"),
    ],
)
def test_packed_weights_are_refused_by_name(
    tmp_path: Path, entry: dict[str, Any], method: str
) -> None:
    folder = change_config(unpack("hf-bin", tmp_path / "m"), **entry)
    with pytest.raises(
        UnsupportedModelError, match=rf"already quantized with .*{method}"
    ) as caught:
        open_source(folder, OPTIONS)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


@pytest.mark.parametrize(("name", "method"), [("quantize_config.json", "GPTQ"),
                                              ("quant_config.json", "AWQ")])  # fmt: skip
def test_files_beside_packed_weights_are_known(tmp_path: Path, name: str, method: str) -> None:
    folder = unpack("hf-bin", tmp_path / "m")
    (folder / name).write_text("{}")
    with pytest.raises(UnsupportedModelError, match=f"already quantized with {method}"):
        open_source(folder, OPTIONS)


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        ("qweight", "GPTQ or AWQ"),
        ("qzeros", "GPTQ or AWQ"),
        ("weight.absmax", "bitsandbytes"),
        ("SCB", "bitsandbytes"),
        ("weight_scale", "FP8"),
        ("weight_packed", "compressed-tensors"),
        ("scales", "MLX"),
        ("lora_A.weight", r"adapter \(LoRA\)"),
    ],
)
def test_tensors_of_packed_weights_are_known(tmp_path: Path, suffix: str, text: str) -> None:
    """A config.json without `quantization_config` does not make them weights."""
    folder = unpack("hf-bin", tmp_path / "m")
    name = f"model.layers.0.mlp.up_proj.{suffix}"
    rewrite(folder, lambda arrays: arrays.update({name: np.ones((2, 2), np.float16)}))
    with pytest.raises(UnsupportedModelError, match=text):
        open_source(folder, OPTIONS)


def test_every_file_that_decides_something_is_hashed(tmp_path: Path) -> None:
    folder = unpack("hf-bin-sharded", tmp_path / "m")
    for name in ("generation_config.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    (folder / "chat_template.jinja").write_text("[INST]")
    (folder / "README.md").write_text("not read")
    files = {file.name for file in open_source(folder, OPTIONS).files}
    assert files == {file.name for file in folder.iterdir()} - {"README.md"}


def test_rows_of_a_merged_or_plain_tensor_are_the_same(tmp_path: Path) -> None:
    row = "hf-safetensors-sharded"
    weights = open_source(unpack(row, tmp_path / "m"), OPTIONS).weights
    for name in weights.names():
        whole = weights.read(name)
        if whole.ndim == 2:
            assert mx.array_equal(weights.read(name, slice(3, 7)), whole[3:7])
