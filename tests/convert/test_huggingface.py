"""Hugging Face folders as sources: what their files say is kept, and what cannot be is refused."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import mlx_llama
import refusals
from mlx_llama.errors import OptionError, UnsupportedModelError
from mlx_llama.options import ConvertOptions
from mlx_llama.tokenizer import open_tokenizer
from mlx_llama.tokenizer.spm import SentencePieceTokenizer
from mlx_llama_convert import make_plan, open_source
from mlx_llama_convert.tokenizer_json import sentencepiece_json
from model_folders import TINY, TINY_SCALED, convert, write_hf
from random_models import Case
from tiny_tokenizers import tiny_spm, write_spm

LINEAR = Case(
    102, 2, 1, 64, 1e4, {"rope_type": "linear", "factor": 4.0}, dim=128, n_layers=2,
    vocab_size=TINY.vocab_size,
)  # fmt: skip
ADDED = ("<|im_start|>", "<|im_end|>")


def write(folder: Path, case: Case = TINY, **config: Any) -> Path:
    return write_hf(folder, case, change=lambda _, raw: raw.update(config))


def write_generation(folder: Path, **content: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps(content))


assert_refused = partial(refusals.assert_refused, by=lambda f: open_source(f, ConvertOptions()))


def test_stop_ids_of_the_source_are_kept(tmp_path: Path) -> None:
    """The ids of config.json and generation_config.json were dropped: answers did not end."""
    source = write(tmp_path / "source", eos_token_id=[7, 2])
    write_generation(source, eos_token_id=9, temperature=0.7)
    target = convert(source, tmp_path / "target")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((target / name).read_text())["eos_token_id"] == [2, 7, 9]
    expected = mlx_llama.load(source).stop_ids
    assert mlx_llama.load(target).stop_ids == expected == {2, 7, 9}


def test_ends_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    assert_refused(
        write(tmp_path / "a", eos_token_id=320), "config.json: eos_token_id is 320", "0 to 319"
    )
    source = write(tmp_path / "b")
    write_generation(source, eos_token_id=[2, -1])
    assert_refused(source, f"{source / 'generation_config.json'}: eos_token_id is [2, -1]")


def test_recommendations_that_cannot_be_are_refused(tmp_path: Path) -> None:
    """They would be written into a model directory that does not load."""
    source = write(tmp_path / "source")
    write_generation(source, temperature="hot")
    assert_refused(source, f"{source / 'generation_config.json'}: temperature is 'hot'")


@pytest.mark.parametrize("kind", ["llama9", "llama3"])
def test_a_recorded_kind_that_cannot_be_is_refused(kind: str, tmp_path: Path) -> None:
    source = write(tmp_path / "source", mlx_llama={"kind": kind})
    assert_refused(
        source, f"{source / 'config.json'}: mlx_llama.kind", kind, kind=UnsupportedModelError
    )
    assert open_source(source, ConvertOptions(kind="llama2")).kind.value == "llama2"


def test_a_factor_is_for_the_scaling_of_llama3_alone(tmp_path: Path) -> None:
    """--rope-factor changed the factor of linear scaling, too."""
    linear, options = write(tmp_path / "linear", LINEAR), ConvertOptions(rope_factor=8.0)
    with pytest.raises(OptionError, match=r"--rope-factor: .* config\.json has linear scaling"):
        open_source(linear, options)
    scaling = open_source(linear, ConvertOptions()).config.rope_scaling
    assert scaling is not None and scaling.factor == 4.0
    scaling = open_source(write(tmp_path / "llama3", TINY_SCALED), options).config.rope_scaling
    assert scaling is not None and scaling.factor == 8.0


def test_rows_without_a_token_are_noted(tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    assert open_source(source, ConvertOptions()).notes == ()
    write_spm(source / "tokenizer.model")
    (note,) = open_source(source, ConvertOptions()).notes
    assert note.startswith("6 rows of the embedding have no token in tokenizer.model")


def test_added_tokens_go_into_the_model_directory(tmp_path: Path) -> None:
    """They stand in tokenizer.json alone, and tokenizer.model was what was copied."""
    source = write(tmp_path / "source")
    more = open_tokenizer(write_spm(source / "tokenizer.model", tiny_spm(specials=ADDED)))
    assert isinstance(more, SentencePieceTokenizer)
    (source / "tokenizer.json").write_text(json.dumps(sentencepiece_json(more)))
    write_spm(source / "tokenizer.model")
    options = ConvertOptions()
    plan = make_plan(open_source(source, options), options)
    assert source / "tokenizer.json" in plan.source.files
    tokenizer = mlx_llama.load(convert(source, tmp_path / "target")).tokenizer
    assert [tokenizer.special_tokens[name] for name in ADDED] == [314, 315]
