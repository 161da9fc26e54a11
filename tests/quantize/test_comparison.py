"""Two models over one text: against a Llama in NumPy, in both ways of reading, and resumed."""

from __future__ import annotations

import threading
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from divergence_oracle import oracle
from mlx_llama.errors import CheckpointError
from mlx_llama.loading import open_model_directory
from mlx_llama.options import ConvertOptions
from mlx_llama_convert import open_source
from mlx_llama_quantize import comparison as module
from mlx_llama_quantize.comparison import Comparison
from mlx_llama_quantize.divergence import summarize
from mlx_llama_quantize.subject import Subject
from mlx_llama_quantize.windows import Windows, cut_windows
from model_folders import TINY, convert, write_hf, write_meta
from numpy_llama import dequantized, llama_logits
from random_models import CASES, random_model

GOLDEN = np.load(Path(__file__).parents[1] / "golden/logits.npz")
IDS = [n * 7 % 300 for n in range(8 * 24 + 5)]


def opened(folder: Path) -> Subject:
    return Subject.of_directory(open_model_directory(folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, and the same in 4 bits."""
    folder = tmp_path_factory.mktemp("compared")
    write_hf(folder / "source")
    convert(folder / "source", folder / "dense", quantize=False)
    convert(folder / "source", folder / "packed", bits=4, group_size=32)
    return folder


@pytest.fixture(scope="module")
def dense(folder: Path) -> Subject:
    return opened(folder / "dense")


@pytest.fixture(scope="module")
def packed(folder: Path) -> Subject:
    return opened(folder / "packed")


@pytest.fixture(scope="module")
def windows(dense: Subject) -> Windows:
    return cut_windows(IDS, bos_id=dense.tokenizer.bos_id, context=24)


def test_numpys_llama_agrees_with_transformers() -> None:
    case = CASES["llama2"]
    weights, raw = random_model(case)
    found = llama_logits(weights, raw, case.ids)[case.positions]
    expected = GOLDEN["llama2"]
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_numbers_agree_with_an_independent_computation(
    folder: Path, dense: Subject, packed: Subject, windows: Windows
) -> None:
    """The base as transformers computes it, the other through a dequantizer of NumPy's own."""
    found = summarize(Comparison(dense, packed, windows).run())
    weights, raw = random_model(TINY)
    arrays = {}
    for file in (folder / "packed").glob("*.safetensors"):
        arrays |= {n: np.array(a) for n, a in mx.load(str(file)).items()}  # pyright: ignore
    unpacked = {
        name: array
        if name.replace(".weight", ".scales") not in arrays
        else dequantized(
            array,
            arrays[name.replace(".weight", ".scales")],
            arrays[name.replace(".weight", ".biases")],
            bits=4,
        )
        for name, array in arrays.items()
        if name.endswith(".weight")
    }
    parts = []
    for number, ids in enumerate(windows.ids):
        a, b = (
            llama_logits(w, raw, ids.astype(int))[windows.scored, : dense.tokenizer.vocab_size]
            for w in (weights, unpacked)
        )
        parts.append(oracle(a, b, windows.targets(number).astype(int)))
    expected = summarize(type(parts[0]).joined(parts))
    assert found.n_tokens == expected.n_tokens == 8 * 11
    for name in ("ppl_a", "ppl_b", "ratio", "difference", "rms_dp", "same_top"):
        mine, theirs = getattr(found, name), getattr(expected, name)
        assert mine.value == pytest.approx(theirs.value, rel=1e-3), name
        assert mine.error == pytest.approx(theirs.error, rel=1e-3), name
    assert found.kld.mean.value == pytest.approx(expected.kld.mean.value, rel=1e-3)
    assert found.kld.maximum == pytest.approx(expected.kld.maximum, rel=1e-3)
    assert expected.kld.mean.value > 1e-3


def test_both_ways_of_reading_give_the_same(
    dense: Subject,
    packed: Subject,
    windows: Windows,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resident = Comparison(dense, packed, windows, is_resident=True).run()
    for hidden_bytes in (1, 3 * 2 * 24 * 128 * 4, 1 << 30):  # 1, 3 and all windows together
        monkeypatch.setattr(module, "HIDDEN_BYTES", hidden_bytes)
        streamed = Comparison(dense, packed, windows, is_resident=False).run()
        np.testing.assert_allclose(streamed.kld, resident.kld, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(streamed.nll_b, resident.nll_b, rtol=1e-5)


def test_a_checkpoint_is_walked_as_the_directory_made_of_it(
    folder: Path, dense: Subject, packed: Subject, windows: Windows
) -> None:
    """Meta's order of rows and all: what is read of the source gives the directory's scores."""
    source = open_source(write_meta(folder / "meta"), ConvertOptions())
    subject = Subject.of_weights("meta", source.weights, source.tokenizer, source.files)
    expected = Comparison(dense, packed, windows).run()
    for is_resident in (True, False):
        found = Comparison(subject, packed, windows, is_resident=is_resident).run()
        np.testing.assert_allclose(found.kld, expected.kld, rtol=1e-4, atol=1e-7)


def test_slices_of_logits_give_the_same(
    dense: Subject,
    packed: Subject,
    windows: Windows,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = Comparison(dense, packed, windows).run()
    monkeypatch.setattr(module, "SLICE_BYTES", 1)
    np.testing.assert_allclose(Comparison(dense, packed, windows).run().kld, whole.kld, rtol=1e-4)


def test_walking_by_blocks_needs_the_memory_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bound: the ends of both, two copies of a block (parts and their join), and the workspace."""
    case = CASES["llama3"].__class__(
        7, 4, 2, 64, 5e5, dim=512, n_layers=12, vocab_size=TINY.vocab_size
    )
    write_hf(tmp_path / "source", case)
    convert(tmp_path / "source", tmp_path / "model", quantize=False)
    directory = opened(tmp_path / "model")
    windows = cut_windows(IDS[:64], bos_id=1, context=32)
    weights = directory.loaded_bytes(mx.float32)
    ends = 2 * case.vocab_size * case.dim * 4
    block = (weights - ends) // case.n_layers
    bound = 2 * ends + 2 * block + (4 << 20)

    def peak(*, is_resident: bool) -> int:
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        Comparison(directory, directory, windows, is_resident=is_resident).run()
        return mx.get_peak_memory() - before

    assert peak(is_resident=False) < bound < weights < peak(is_resident=True)


# --- going on ------------------------------------------------------------------------------------


def test_stopped_comparison_goes_on_where_it_was(
    tmp_path: Path, dense: Subject, packed: Subject, windows: Windows
) -> None:
    whole = Comparison(dense, packed, windows).run()
    cancel, seen = threading.Event(), []

    def on_progress(done: int, total: int) -> None:
        seen.append((done, total))
        if len(seen) == 14:  # 4 blocks a window: in the fourth window
            cancel.set()

    with pytest.raises(KeyboardInterrupt):
        Comparison(dense, packed, windows, states=tmp_path).run(
            on_progress=on_progress, cancel=cancel
        )
    again = Comparison(dense, packed, windows, states=tmp_path)
    assert again.done == 3
    seen.clear()
    found = again.run(on_progress=lambda done, total: seen.append((done, total)))
    assert (seen[0], seen[-1]) == ((13, 32), (32, 32))
    np.testing.assert_array_equal(found.kld, whole.kld)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [b"", b"nonsense", b"PK\x03\x04 cut"])
def test_damaged_state_is_begun_anew(
    tmp_path: Path, dense: Subject, packed: Subject, windows: Windows, damage: bytes
) -> None:
    comparison = Comparison(dense, packed, windows, states=tmp_path)
    assert comparison._state is not None
    comparison._state.write_bytes(damage)
    again = Comparison(dense, packed, windows, states=tmp_path)
    assert again.done == 0
    assert len(again.run()) == 88


def test_another_text_or_model_is_another_comparison(
    tmp_path: Path, dense: Subject, packed: Subject, windows: Windows
) -> None:
    other = cut_windows(IDS[1:], bos_id=1, context=24)
    names = {
        Comparison(*each, states=tmp_path)._state
        for each in (
            (dense, packed, windows),
            (packed, dense, windows),
            (dense, dense, windows),
            (dense, packed, other),
        )
    }
    assert len(names) == 4


# --- vocabularies --------------------------------------------------------------------------------


def test_other_vocabularies_are_refused_by_name(
    tmp_path: Path, dense: Subject, windows: Windows
) -> None:
    write_hf(tmp_path / "three", CASES["llama3"])
    convert(tmp_path / "three", tmp_path / "model", quantize=False)
    other = opened(tmp_path / "model")
    with pytest.raises(CheckpointError) as refusal:
        Comparison(dense, other, windows)
    assert str(refusal.value) == (
        "dense has 320 tokens (sentencepiece), model has 512 (tiktoken): only models of one "
        "vocabulary can be compared token by token"
    )
