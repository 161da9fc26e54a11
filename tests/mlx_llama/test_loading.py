"""Model directories: ours, mlx-lm's and Hugging Face's load."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlx_llama
from mlx_llama import Llama, ops
from mlx_llama.config import QuantFormat
from mlx_llama.errors import CheckpointError
from mlx_llama.linear import Dense, Packed, Stack
from mlx_llama.loading import open_model_directory
from mlx_llama.model import LlamaModel
from mlx_llama.tokenizer import open_tokenizer
from mlx_llama.tokenizer.spm import SentencePieceTokenizer
from mlx_llama.tokenizer.spm_proto import SpmModel
from mlx_llama_convert.tokenizer_json import sentencepiece_json
from model_folders import (
    TINY,
    TINY_SCALED,
    convert,
    split,
    write_as_mlx_lm_does,
    write_hf,
    write_meta,
)
from random_models import Weights, random_model, write_safetensors
from tiny_tokenizers import tiny_spm, write_spm

# Of the largest logit: the native kernels count prompts of packed models in 16 bits.
COUNTED_TOLERANCE = 5e-4
Raw = dict[str, Any]


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


def test_a_file_that_goes_after_it_was_opened_is_told(tmp_path: Path) -> None:
    if ops.kernels() is None:
        pytest.skip("MLX says nothing of what it cannot read: no native kernels")
    directory = open_model_directory(write_hf(tmp_path / "model"))
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"weights cannot be loaded: .*model\.safetensors"):
        mlx_llama.load(directory)


def test_loading_and_generating_import_no_numpy(tmp_path: Path) -> None:
    """Its import takes as long as a third of all others together."""
    code = (
        "import sys; from mlx_llama import load; "
        "print(*load(sys.argv[1]).generate('once', max_tokens=2)); "
        "sys.exit('numpy' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(write_hf(tmp_path / "model"))]
    assert subprocess.run(command, cwd=Path(__file__).parents[2], check=False).returncode == 0


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


def test_a_directory_of_mlx_lm_loads_with_settings_by_module(tmp_path: Path) -> None:
    unpacked = write_as_mlx_lm_does(tmp_path / "mlx")
    llama = mlx_llama.load(tmp_path / "mlx", dtype="float32")
    plain = write_hf(tmp_path / "plain", change=lambda weights, _: weights.update(unpacked))
    assert distance(np.asarray(llama.logits(TINY.ids)), logits(plain)) < COUNTED_TOLERANCE
    first, second = llama.model.blocks
    assert isinstance(first.wqkv, Stack) and isinstance(first.w13, Packed)
    assert isinstance(first.w2, Packed) and first.w2.form == QuantFormat(8, 32)
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
    monkeypatch.setattr(LlamaModel, "_pass_token", lambda *_: None)


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
