"""A cache on disk: it comes back whole, and a file that does not belong is refused by name."""

from __future__ import annotations

import copy
import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlx_llama
from mlx_llama import ops
from mlx_llama.cache import KVBits, KVCache, load_cache, save_cache
from mlx_llama.cache.rows import AS_COMPUTED, Storage
from mlx_llama.config import ModelConfig, QuantFormat, RopeScaling, config_from_hf
from mlx_llama.errors import CheckpointError
from mlx_llama.fingerprint import model_fingerprint
from mlx_llama.model import LlamaModel
from mlx_llama.safetensors_reader import open_with_metadata
from mlx_llama.safetensors_writer import SafetensorsWriter
from mlx_llama.weights import build_model
from model_folders import arrays_of
from random_models import CASES, random_model

CASE = CASES["llama3"]  # two heads of 64 numbers for keys and values, so that they can be packed
HALF_TYPES = (mx.bfloat16, mx.float16)
IDS = [n % 250 for n in range(1, 61)]
FORMS: dict[str, dict[str, Any]] = {
    "plain": {"capacity": 64},
    "8 bits": {"capacity": 64, "bits": KVBits(8, 8)},
    "8:4 bits, later": {"capacity": 64, "bits": KVBits(8, 4), "packed_from": 50},
    "8 bits, not yet packed": {"capacity": 64, "bits": KVBits(8, 8), "packed_from": 61},
    "sliding": {"capacity": 24, "keep": 4, "slides": True},
    "sliding, 4 bits": {"capacity": 24, "keep": 4, "slides": True, "bits": KVBits(4, 4)},
}


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return replace(
        config_from_hf(random_model(CASE)[1], kind="llama2", is_tied=None), max_context=64
    )


@pytest.fixture(scope="module")
def model(config: ModelConfig) -> LlamaModel:
    return build_model(config, arrays_of(random_model(CASE)[0]), dtype=mx.float32)


def filled(model: LlamaModel, n_tokens: int = 60, **form: Any) -> KVCache:
    cache = KVCache(model.config, **form)
    fed = 0
    while fed < n_tokens:
        size = min(7, n_tokens - fed, cache.pass_limit)
        mx.eval(model(mx.array(IDS[fed : fed + size])[None], cache))
        fed += size
    return cache


def save(path: Path, model: LlamaModel, cache: KVCache) -> Path:
    ids = IDS[: cache.offset]
    save_cache(path, cache, tokens=ids, fingerprint=model_fingerprint(model, mx.float32))
    return path


def load(path: Path, model: LlamaModel, **form: Any) -> tuple[KVCache, list[int]]:
    cache = KVCache(model.config, **form)
    fingerprint = model_fingerprint(model, mx.float32)
    return cache, load_cache(path, cache, dtype=mx.float32, fingerprint=fingerprint)


def next_logits(model: LlamaModel, cache: KVCache) -> np.ndarray:
    """Return the logits of some tokens more, one at a time."""
    return np.concatenate([model(mx.array([[n]]), cache)[0] for n in range(4)])


@pytest.mark.parametrize("form", FORMS)
def test_loaded_cache_gives_identical_logits(tmp_path: Path, model: LlamaModel, form: str) -> None:
    saved = filled(model, **FORMS[form])
    cache, ids = load(save(tmp_path / "c", model, saved), model, **FORMS[form])
    assert ids == IDS
    assert (cache.offset, cache.forgotten, cache.position, cache.is_packed) == (
        saved.offset,
        saved.forgotten,
        saved.position,
        saved.is_packed,
    )
    np.testing.assert_array_equal(next_logits(model, cache), next_logits(model, saved))


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_comes_back_bit_for_bit(tmp_path: Path, config: ModelConfig, form: str) -> None:
    model = build_model(config, arrays_of(random_model(CASE)[0]), dtype=mx.bfloat16)
    saved = filled(model, **FORMS[form])
    save_cache(tmp_path / "c", saved, tokens=IDS, fingerprint={})
    cache = KVCache(config, **FORMS[form])
    load_cache(tmp_path / "c", cache, dtype=mx.bfloat16, fingerprint={})
    np.testing.assert_array_equal(next_logits(model, cache), next_logits(model, saved))


def test_trimmed_cache_is_saved_without_what_was_dropped(tmp_path: Path, model: LlamaModel) -> None:
    saved = filled(model, capacity=64)
    saved.trim(40)
    cache, ids = load(save(tmp_path / "c", model, saved), model, capacity=64)
    assert ids == IDS[:20]
    assert cache.rows == 20
    np.testing.assert_array_equal(next_logits(model, cache), next_logits(model, saved))


def test_empty_cache_comes_back_empty(tmp_path: Path, model: LlamaModel) -> None:
    cache, ids = load(
        save(tmp_path / "c", model, KVCache(model.config, capacity=8)), model, capacity=8
    )
    assert (ids, cache.offset, cache.nbytes) == ([], 0, 0)


def test_whole_text_fits_into_any_context_that_is_long_enough(
    tmp_path: Path, model: LlamaModel
) -> None:
    path = save(tmp_path / "c", model, filled(model, 20, capacity=24, keep=4, slides=True))
    cache, _ = load(path, model, capacity=64)
    fresh = filled(model, 20, capacity=64)
    np.testing.assert_allclose(next_logits(model, cache), next_logits(model, fresh), atol=1e-4)
    with pytest.raises(CheckpointError, match="of 20 tokens, more than --context 16 takes"):
        load(path, model, capacity=16)


@pytest.mark.parametrize(
    ("form", "here", "reason"),
    [
        ("plain", "8 bits", "of --kv-bits 16 --kv-start 0, here --kv-bits 8 --kv-start 0"),
        (
            "8 bits",
            "8:4 bits, later",
            "of --kv-bits 8 --kv-start 0, here --kv-bits 8:4 --kv-start 50",
        ),
        (
            "sliding",
            "plain",
            "of --context 24 --on-full slide and has forgotten tokens, here --context 64 "
            "--on-full stop",
        ),
    ],
)
def test_another_context_is_refused_by_name(
    tmp_path: Path, model: LlamaModel, form: str, here: str, reason: str
) -> None:
    path = save(tmp_path / "c", model, filled(model, **FORMS[form]))
    cache = filled(model, 5, **FORMS[here])
    with pytest.raises(CheckpointError) as refusal:
        load_cache(path, cache, dtype=mx.float32, fingerprint={})
    assert str(refusal.value) == (
        f"{path}: this saved cache is {reason}; the text must be computed anew"
    )
    assert cache.offset == 5


LINEAR = RopeScaling("linear", 2.0)
LLAMA3 = RopeScaling("llama3", 8.0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rope_theta": 1e4}, "RoPE theta 500000, here theta 10000"),
        (
            {"rope_scaling": LINEAR},
            "RoPE theta 500000, here theta 500000, linear scaling, factor 2",
        ),
        (
            {"rope_scaling": LLAMA3},
            "RoPE theta 500000, here theta 500000, llama3 scaling, factor 8, 1 to 4 of 8192",
        ),
        ({"quantization": QuantFormat(4, 64)}, "quantization none, here 4 bits, group 64"),
        (
            {"n_heads": 2, "n_kv_heads": 1},
            "shape 3 layers, width 256/448, 4/2 heads of 64, 512 tokens, norm_eps 1e-05, here 3 "
            "layers, width 256/448, 2/1 heads of 64, 512 tokens, norm_eps 1e-05",
        ),
    ],
)
def test_another_models_cache_is_refused_by_the_part_that_differs(
    tmp_path: Path, model: LlamaModel, config: ModelConfig, change: dict[str, Any], reason: str
) -> None:
    path = save(tmp_path / "c", model, filled(model, 5, capacity=64))
    other = copy.copy(model)
    other.config = replace(config, **change)
    with pytest.raises(CheckpointError, match=f"this saved cache is another model's: {reason};"):
        load(path, other, capacity=64)


def test_other_weights_and_dtypes_are_told_apart(
    tmp_path: Path, model: LlamaModel, config: ModelConfig
) -> None:
    weights = arrays_of(random_model(CASE)[0])
    weights["model.layers.2.mlp.down_proj.weight"][77, 5] += 1e-3  # one number of all
    tuned = build_model(config, weights, dtype=mx.float32)
    path = save(tmp_path / "c", model, filled(model, 5, capacity=64))
    with pytest.raises(CheckpointError, match="another model's: weights "):
        load(path, tuned, capacity=64)
    half = model_fingerprint(model, mx.float16)
    with pytest.raises(CheckpointError, match="saved cache is of dtype float32, here float16"):
        load_cache(path, KVCache(config, capacity=64), dtype=mx.float16, fingerprint=half)


def test_fingerprint_is_the_same_each_time_it_is_loaded(chat_model: Path) -> None:
    assert mlx_llama.load(chat_model).fingerprint == mlx_llama.load(chat_model).fingerprint


# --- hostile and damaged files -----------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path, model: LlamaModel) -> Path:
    return save(tmp_path / "c", model, filled(model, **FORMS["sliding"]))


def rewrite(path: Path, state: dict[str, Any], arrays: dict[str, mx.array | None]) -> None:
    """Change counts and arrays of a file; None takes an array away."""
    refs, metadata = open_with_metadata(path)
    held = {name: ref.read() for name, ref in refs.items()}
    for name, array in arrays.items():
        if array is None:
            del held[name]
        else:
            held[name] = array
    metadata["cache"] = json.dumps({**json.loads(metadata["cache"]), **state})
    entries = [(n, str(a.dtype).removeprefix("mlx.core."), a.shape) for n, a in held.items()]
    with SafetensorsWriter(path, entries, metadata) as file:
        for name, array in held.items():
            file.write(name, array)


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"version": 2}, "version 2 of the format, expected 1"),
        ({"offset": -1}, "damaged: offset -1"),
        ({"offset": "60"}, "damaged: a count is missing or no possible number"),
        ({"offset": True}, "damaged: a count is missing or no possible number"),
        ({"offset": 10**30}, "damaged: a count is missing or no possible number"),
        ({"version": True}, "version True of the format"),
        ({"packed_from": False}, "of --kv-bits 16 --kv-start False, here"),
        ({"bits": "16\n\x1b[2J"}, r"of --kv-bits 16\\n\\x1b\[2J --kv-start 0, here"),
        ({"first": 2}, "damaged: "),
        ({"first": 61}, "damaged: "),
        ({"shift": 50}, "damaged: "),
        ({"shift": -5}, "damaged: "),
        ({"keep": -1}, "damaged: "),
        ({"keep": 23}, "damaged: "),
        ({"offset": 59}, "damaged: the arrays are not those"),
        ({"is_packed": True, "bits": "8"}, "of --kv-bits 8"),
    ],
)
def test_counts_that_cannot_be_are_refused(
    path: Path, model: LlamaModel, state: dict[str, Any], reason: str
) -> None:
    rewrite(path, state, {})
    with pytest.raises(CheckpointError, match=reason):
        load(path, model, **FORMS["sliding"])


@pytest.mark.parametrize(
    "arrays",
    [
        {"tokens": None},
        {"tokens": mx.zeros((60,), dtype=mx.int32)},
        {"layers.2.values.0": None},
        {"layers.3.keys.0": mx.zeros((1, 2, 24, 64))},
        {"layers.0.keys.0": mx.zeros((1, 2, 24, 64), dtype=mx.bfloat16)},
        {"layers.0.keys.0": mx.zeros((1, 2, 23, 64))},
        {"layers.0.keys.0": mx.zeros((2, 2, 24, 64))},
        {"../../x": mx.zeros((1,))},
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    path: Path, model: LlamaModel, arrays: dict[str, mx.array | None]
) -> None:
    rewrite(path, {}, arrays)
    with pytest.raises(CheckpointError, match="damaged: the arrays are not those"):
        load(path, model, **FORMS["sliding"])


def test_unknown_tokens_are_refused(path: Path, model: LlamaModel) -> None:
    rewrite(path, {}, {"tokens": mx.full((60,), 2**32 - 1, dtype=mx.uint32)})
    with pytest.raises(CheckpointError, match="there is no token 4294967295"):
        load(path, model, **FORMS["sliding"])


def test_other_files_are_refused(tmp_path: Path, model: LlamaModel) -> None:
    path = tmp_path / "c"
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(path, model, capacity=8)
    mx.save_safetensors(str(tmp_path / "c.safetensors"), {"tokens": mx.zeros((1,))})
    with pytest.raises(CheckpointError, match="not a saved cache: its metadata has no 'cache'"):
        load(tmp_path / "c.safetensors", model, capacity=8)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_file_that_was_cut_short_is_refused(path: Path, model: LlamaModel, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(CheckpointError, match="damaged, or something else; the text must be"):
        load(path, model, **FORMS["sliding"])


# --- writing -----------------------------------------------------------------------------------


def test_file_is_its_owners_alone_and_replaces_another(tmp_path: Path, model: LlamaModel) -> None:
    path = tmp_path / "c"
    path.write_text("older")
    save(path, model, filled(model, 5, capacity=8))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    assert load(path, model, capacity=8)[1] == IDS[:5]


def test_failed_save_leaves_what_was_there(
    tmp_path: Path, model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "c", model, filled(model, 5, capacity=8))
    before = path.read_bytes()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space"):
        save(path, model, filled(model, 6, capacity=8))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_several_texts_are_not_saved_as_one(tmp_path: Path, model: LlamaModel) -> None:
    cache = KVCache(model.config, capacity=8)
    mx.eval(model(mx.array([[1, 2], [3, 4]]), cache))
    with pytest.raises(ValueError, match="a cache of several texts"):
        save_cache(tmp_path / "c", cache, tokens=IDS[:2], fingerprint={})
    assert list(tmp_path.iterdir()) == []


def test_ids_that_the_cache_does_not_count_are_refused(tmp_path: Path, model: LlamaModel) -> None:
    with pytest.raises(ValueError, match="6 tokens for a cache of 5"):
        save_cache(tmp_path / "c", filled(model, 5, capacity=8), tokens=IDS[:6], fingerprint={})


def test_a_cache_outlives_the_native_kernels(model: LlamaModel, monkeypatch: Any) -> None:
    """With them scales stay in 16 bits, without they are widened: it was refused."""
    halves = [mx.arange(64, dtype=mx.float32).reshape(8, 8).astype(kind) for kind in HALF_TYPES]
    found = []
    for arrays in (
        halves,
        [half.astype(mx.float32) for half in halves],
        [halves[0], halves[0] + 1],
    ):
        monkeypatch.setattr(LlamaModel, "arrays", lambda _, arrays=arrays: arrays)
        found.append(model_fingerprint(model, mx.float32))
    assert found[0] == found[1] != found[2]


# --- dtypes of other devices -------------------------------------------------------------------

HALVES = Storage(mx.float16)  # as the native kernels have it, written by MLX's operations


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("to", [HALVES, AS_COMPUTED], ids=["narrower", "wider"])
def test_numbers_of_another_device_become_those_of_this_one(
    tmp_path: Path, model: LlamaModel, form: str, to: Storage
) -> None:
    """Chats that were kept in float32 go on where the cache is in half precision, and back."""
    there, here = (AS_COMPUTED, HALVES) if to is HALVES else (HALVES, AS_COMPUTED)
    saved = filled(model, **FORMS[form], storage=there)
    cache, ids = load(save(tmp_path / "c", model, saved), model, **FORMS[form], storage=here)
    assert ids == IDS
    expected = mx.float16 if here is HALVES else mx.float32
    for mine, other in zip(cache.layers(), saved.layers(), strict=True):
        for array, before in zip(mine.arrays, other.arrays, strict=True):
            kind = mx.uint32 if before.dtype == mx.uint32 else expected
            assert array.dtype == kind
            np.testing.assert_array_equal(np.array(array), np.array(before.astype(kind)))
    assert {array.dtype for layer in saved.layers() for array in layer.arrays} != {expected}


def storages() -> list[Storage]:
    """Return what keeps half precision here: MLX's operations, and the kernels where they are."""
    ours = ops.cache_storage(mx.float32, KVBits())
    return [HALVES] if ours.dtype is None else [HALVES, ours]


@pytest.mark.parametrize("storage", storages(), ids=lambda s: s.put.__name__)
def test_numbers_too_large_for_half_precision_stay_finite(tmp_path: Path, storage: Storage) -> None:
    config = replace(config_from_hf(random_model(CASE)[1], kind="llama2", is_tied=None), n_layers=1)
    saved = KVCache(config, capacity=8)
    huge = mx.full((1, config.n_kv_heads, 3, config.head_dim), -1e30)
    saved.begin(3)
    saved.append(0, huge, -huge)
    saved.advance(3)
    save_cache(tmp_path / "c", saved, tokens=IDS[:3], fingerprint={})
    cache = KVCache(config, capacity=8, storage=storage)
    load_cache(tmp_path / "c", cache, dtype=mx.float32, fingerprint={})
    (layer,) = cache.layers()
    keys, values = (np.array(array) for array in layer.arrays)
    assert keys.dtype == np.float16 and (keys == -65504).all() and (values == 65504).all()


def test_halves_are_not_taken_for_bfloat16(tmp_path: Path, config: ModelConfig) -> None:
    half = build_model(config, arrays_of(random_model(CASE)[0]), dtype=mx.float16)
    saved = filled(half, 5, capacity=64)
    save_cache(tmp_path / "c", saved, tokens=IDS[:5], fingerprint={})
    with pytest.raises(CheckpointError, match="damaged: the arrays are not those"):
        load_cache(tmp_path / "c", KVCache(config, capacity=64), dtype=mx.bfloat16, fingerprint={})
