from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_llama.errors import CheckpointError, MlxLlamaError, OptionError
from mlx_llama.options import ConvertOptions
from mlx_llama_convert import open_source
from pth_writer import tiny_tensors, write_checkpoint
from tiny_models import SPM_VOCAB, TIKTOKEN_VOCAB, convert, meta_params, write_meta
from tiny_tokenizers import write_spm

OPTIONS = ConvertOptions()


def half_split(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Reorder rows from interleaved pairs to halves, as Hugging Face's converter states it."""
    rows, width = weight.shape
    paired = weight.reshape(n_heads, rows // n_heads // 2, 2, width)
    return paired.transpose(0, 2, 1, 3).reshape(rows, width)


def test_weights_are_read_in_half_split_order(tmp_path: Path) -> None:
    source = open_source(write_meta(tmp_path / "m"), OPTIONS)
    expected = tiny_tensors(dim=64, hidden_dim=192, vocab_size=SPM_VOCAB)
    for name in source.weights.names():
        wanted = expected[name]
        if name.endswith(("wq.weight", "wk.weight")):
            wanted = half_split(wanted, 4 if name.endswith("wq.weight") else 2)
        np.testing.assert_array_equal(np.array(source.weights.read(name)), wanted)
        if wanted.ndim == 2:
            some = source.weights.read(name, slice(5, 23))
            np.testing.assert_array_equal(np.array(some), wanted[5:23])


@pytest.mark.parametrize("is_tiktoken", [False, True])
@pytest.mark.parametrize("ranks", [2, 4])
def test_shards_merge_to_the_whole(tmp_path: Path, ranks: int, is_tiktoken: bool) -> None:
    heads = {"n_kv_heads": 4} if ranks == 4 else {}
    tensors = tiny_tensors(
        dim=64,
        hidden_dim=192,
        n_kv_heads=4 if ranks == 4 else 2,
        vocab_size=TIKTOKEN_VOCAB if is_tiktoken else SPM_VOCAB,
    )
    one = write_meta(tmp_path / "one", is_tiktoken=is_tiktoken)
    many = tmp_path / "many"
    shutil.copytree(one, many)
    params = json.loads((one / "params.json").read_text()) | heads
    for folder, count in ((one, 1), (many, ranks)):
        write_checkpoint(
            folder, tensors, ranks=count, embedding_axis=0 if is_tiktoken else 1, params=params
        )
    whole, merged = open_source(one, OPTIONS), open_source(many, OPTIONS)
    assert f"{ranks} files" in merged.layout
    for name in whole.weights.names():
        assert mx.array_equal(whole.weights.read(name), merged.weights.read(name))


def test_vocabulary_of_minus_one_comes_from_the_weights(tmp_path: Path) -> None:
    assert open_source(write_meta(tmp_path / "m"), OPTIONS).config.vocab_size == SPM_VOCAB


def test_tied_output_is_recognised_by_content(tmp_path: Path) -> None:
    tied = open_source(write_meta(tmp_path / "tied", tied=True), OPTIONS)
    untied = open_source(write_meta(tmp_path / "own"), OPTIONS)
    assert tied.config.tied
    assert "output.weight" not in tied.weights.names()
    assert not untied.config.tied
    assert "output.weight" in untied.weights.names()


@pytest.mark.parametrize(("tied", "factor"), [(True, 32.0), (False, 8.0)])
def test_rope_factor_of_an_unknown_shape_follows_the_output(
    tmp_path: Path, tied: bool, factor: float
) -> None:
    source = open_source(write_meta(tmp_path / "m", is_tiktoken=True, tied=tied), OPTIONS)
    assert source.config.rope_scaling is not None
    assert source.config.rope_scaling.factor == factor
    assert source.rope is not None
    assert "unknown shape" in source.rope


def test_rope_factor_can_be_asked_for(tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "m", is_tiktoken=True)
    source = open_source(folder, ConvertOptions(rope_factor=16.0))
    assert source.config.rope_scaling is not None
    assert source.config.rope_scaling.factor == 16.0
    with pytest.raises(OptionError, match="would do nothing"):
        open_source(write_meta(tmp_path / "old"), ConvertOptions(rope_factor=16.0))


@pytest.mark.parametrize(
    ("name", "is_tiktoken", "kind"),
    [
        ("llama-2-7b-chat", False, "llama2-chat"),
        ("Llama3.2-1B-Instruct", True, "llama3.2-instruct"),
        ("something", False, "llama2"),
        ("something", True, "llama3.1"),
        ("llama-3-8b-instruct", False, "llama2"),  # the name does not fit the tokenizer
    ],
)
def test_kind_comes_from_the_folders_name(
    tmp_path: Path, name: str, is_tiktoken: bool, kind: str
) -> None:
    source = open_source(write_meta(tmp_path / name, is_tiktoken=is_tiktoken), OPTIONS)
    assert source.kind.value == kind
    assert source.kind.reason


def test_tokenizer_one_level_up_is_found(tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "all" / "7B")
    (folder / "tokenizer.model").rename(folder.parent / "tokenizer.model")
    assert open_source(folder, OPTIONS).tokenizer.path.parent.name == "all"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_params(folder: Path, text: str) -> None:
    (folder / "params.json").write_text(text)


def other_heads(folder: Path) -> None:
    write_params(folder, json.dumps(meta_params(n_heads=8, n_kv_heads=8)))


BAD: list[tuple[str, Callable[[Path], object], str]] = [
    ("no params", lambda f: (f / "params.json").unlink(), "params.json is missing"),
    ("no weights", lambda f: (f / "consolidated.00.pth").unlink(), "no consolidated.00.pth"),
    ("empty weights", lambda f: (f / "consolidated.00.pth").write_bytes(b""), "empty"),
    ("cut weights", lambda f: truncate(f / "consolidated.00.pth"), "consolidated.00.pth"),
    ("text weights", lambda f: (f / "consolidated.00.pth").write_text("hello"), "consolidated"),
    ("no tokenizer", lambda f: (f / "tokenizer.model").unlink(), "tokenizer.model is missing"),
    ("bad tokenizer", lambda f: (f / "tokenizer.model").write_bytes(b"\x00" * 99), "tokenizer"),
    ("params no JSON", lambda f: write_params(f, "{"), "params.json"),
    ("params a list", lambda f: write_params(f, "[]"), "params.json"),
    ("no layers", lambda f: write_params(f, json.dumps(meta_params(n_layers=0))), "n_layers is 0"),
    ("too many", lambda f: write_params(f, json.dumps(meta_params(n_layers=10**9))), "n_layers"),
    ("more layers", lambda f: write_params(f, json.dumps(meta_params(n_layers=3))), "layers.2"),
    ("fewer layers", lambda f: write_params(f, json.dumps(meta_params(n_layers=1))), "layers.1"),
    ("other width", lambda f: write_params(f, json.dumps(meta_params(dim=128))), "tok_embeddings"),
    ("other heads", other_heads, "expected (64, 64)"),
    ("odd heads", lambda f: write_params(f, json.dumps(meta_params(n_heads=3))), "n_heads"),
    ("other vocabulary", lambda f: write_params(f, json.dumps(meta_params(vocab_size=99))), "99"),
    ("gap", lambda f: (f / "consolidated.00.pth").rename(f / "consolidated.01.pth"), "00.pth"),
]


@pytest.mark.parametrize(("change", "text"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_folders_leave_one_clear_line(
    tmp_path: Path, change: Callable[[Path], object], text: str
) -> None:
    folder = write_meta(tmp_path / "m")
    change(folder)
    with pytest.raises(MlxLlamaError) as caught:
        open_source(folder, OPTIONS)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_last_shard_is_told(tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "m", ranks=2)
    (folder / "consolidated.01.pth").unlink()
    with pytest.raises(MlxLlamaError, match="shard is missing"):
        open_source(folder, OPTIONS)


def test_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "m", is_tiktoken=True)
    write_spm(folder / "tokenizer.model")
    with pytest.raises(MlxLlamaError, match="belongs to another model"):
        open_source(folder, OPTIONS)


@pytest.mark.parametrize("below", ["", "original"])
def test_recommended_sampling_beside_metas_files_is_kept(tmp_path: Path, below: str) -> None:
    """It was left behind, and the directory recommended Meta's own temperature instead."""
    folder = write_meta(tmp_path / "source" / below)
    beside = tmp_path / "source" / "generation_config.json"
    beside.write_text('{"do_sample": true, "temperature": 0.25, "eos_token_id": 99}')
    target = convert(folder, tmp_path / "out")
    made = json.loads((target / "generation_config.json").read_text())
    assert (made["temperature"], made["eos_token_id"]) == (0.25, 2)
    manifest = json.loads((target / "manifest.json").read_text())
    assert "generation_config.json" in [file["name"] for file in manifest["source"]["files"]]
    beside.write_text('{"temperature": "warm"}')
    with pytest.raises(CheckpointError, match="temperature is 'warm'"):
        open_source(folder, ConvertOptions())
