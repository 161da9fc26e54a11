"""The architecture: logits as peers compute them, and what must not change them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_llama
from mlx_llama import ops
from mlx_llama.cache import KVCache
from mlx_llama.config import ModelConfig, QuantFormat, config_from_hf
from mlx_llama.linear import Dense, Matrix, Packed, Stack, stack_rows
from mlx_llama.model import Block, LlamaModel
from mlx_llama.weights import build_model
from model_folders import TINY, TINY_SCALED, arrays_of, convert, write_hf, write_meta
from random_models import CASES, LONG_CASES, SHORT_CASES, random_model

GOLDEN = np.load(Path(__file__).parents[1] / "golden/logits.npz")
# Of the largest logit. A CPU is within 2e-5; a GPU may multiply float32 with fewer bits. A wrong
# RoPE theta or factor is 0.5 and more away, which the script that made the file checks.
PEER_TOLERANCE = 1e-3
# Of the largest logit: the same float32 sums in another order.
ORDER_TOLERANCE = 2e-5
# The native kernels count prompts of packed models in 16 bits, single tokens in 24.
COUNTED_TOLERANCE = 5e-4
META_CASES = ("llama1", "llama2", "llama3", "llama3.1", "llama3.2")
Arrays = dict[str, mx.array]


def distance(found: mx.array | np.ndarray, expected: mx.array | np.ndarray) -> float:
    """Return the largest difference, measured by the largest expected value."""
    a, b = np.asarray(found), np.asarray(expected)
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


def folder_logits(folder: Path, ids: list[int], positions: list[int] | None = None) -> np.ndarray:
    return np.asarray(mlx_llama.load(folder, dtype="float32").logits(ids, positions=positions))


# --- against peers -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHORT_CASES)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    logits = folder_logits(write_hf(tmp_path / "model", case), case.ids)
    assert logits.shape == (case.n_tokens, case.vocab_size) and logits.dtype == np.float32
    stored = logits[case.positions]
    assert distance(stored, GOLDEN[name]) < PEER_TOLERANCE
    assert stored.argmax(-1).tolist() == GOLDEN[name].argmax(-1).tolist()


@pytest.mark.parametrize("name", LONG_CASES)
def test_logits_beyond_position_8192_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    assert case.positions[0] > 8192
    logits = folder_logits(write_hf(tmp_path / "model", case), case.ids, case.positions)
    assert distance(logits, GOLDEN[name]) < PEER_TOLERANCE
    assert logits.argmax(-1).tolist() == GOLDEN[name].argmax(-1).tolist()


@pytest.mark.parametrize("name", META_CASES)
def test_metas_layout_gives_the_bits_of_hugging_faces(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    expected = folder_logits(write_hf(tmp_path / "hf", case), case.ids)
    for ranks in (1, 2, 4):
        source = write_meta(tmp_path / f"meta{ranks}", case, ranks=ranks)
        model = convert(source, tmp_path / f"model{ranks}", quantize=False)
        assert np.array_equal(folder_logits(model, case.ids), expected), ranks


@pytest.mark.parametrize("name", ["llama2", "llama3.2"])
def test_every_layout_is_quantized_to_the_same_bytes(name: str, tmp_path: Path) -> None:
    sources = [write_hf(tmp_path / "hf", CASES[name])]
    sources += [write_meta(tmp_path / f"meta{n}", CASES[name], ranks=n) for n in (1, 2, 4)]
    found = set()
    for source in sources:
        model = convert(source, tmp_path / f"{source.name}-4bit", bits=4)
        found.add((model / "model.safetensors").read_bytes())
    assert len(found) == 1


# --- models in memory --------------------------------------------------------------------------


def dense_model() -> LlamaModel:
    weights, raw = random_model(TINY)
    config = config_from_hf(raw, kind="llama2", is_tied=None)
    return build_model(config, arrays_of(weights), dtype=mx.float32)


def quantized(
    form_of: Callable[[str], QuantFormat | None], *, default: QuantFormat
) -> tuple[ModelConfig, Arrays]:
    """Pack TINY_SCALED, whose output is tied; form_of chooses by Hugging Face module."""
    weights, raw = random_model(TINY_SCALED)
    overrides: dict[str, QuantFormat | None] = {}
    arrays: Arrays = {}
    for name, array in arrays_of(weights).items():
        module = name.removesuffix(".weight")
        form = form_of(module) if array.ndim == 2 else None
        if form is None:
            arrays[name] = array
        else:
            packed = mx.quantize(array, group_size=form.group_size, bits=form.bits)
            arrays |= {f"{module}.{p}": a for p, a in zip(PARTS, packed, strict=True)}
        if array.ndim == 2 and form != default:
            overrides[module] = form
    config = config_from_hf(raw, kind="llama3.2", is_tied=None)
    return replace(config, quantization=default, overrides=overrides), arrays


PARTS = ("weight", "scales", "biases")
FOUR, EIGHT = QuantFormat(4, 64), QuantFormat(8, 32)


def mixed_form(module: str) -> QuantFormat | None:
    """Choose bits so that both joined products of a layer have parts that differ."""
    if module.endswith("k_proj"):
        return None
    return EIGHT if module.endswith(("v_proj", "up_proj", "embed_tokens")) else FOUR


def packed_model() -> LlamaModel:
    config, arrays = quantized(lambda _: FOUR, default=FOUR)
    return build_model(config, dict(arrays), dtype=mx.float32)


def mixed_model() -> LlamaModel:
    config, arrays = quantized(mixed_form, default=FOUR)
    return build_model(config, dict(arrays), dtype=mx.float32)


MODELS = {"dense": dense_model, "packed": packed_model, "mixed": mixed_model}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> LlamaModel:
    return MODELS[request.param]()


def tolerance_of(model: LlamaModel) -> float:
    """Return by how much logits may differ that are computed in other slices."""
    return ORDER_TOLERANCE if isinstance(model.blocks[0].w2, Dense) else COUNTED_TOLERANCE


def tokens() -> mx.array:
    return mx.array(TINY.ids)[None]


def unpacked(config: ModelConfig, arrays: Arrays) -> Arrays:
    """Return dense weights with the values of the packed ones."""
    dense: Arrays = {}
    for name in arrays:
        module, _, part = name.rpartition(".")
        form = config.quant_format(module)
        if part == "weight" and f"{module}.scales" in arrays and form is not None:
            dense[name] = mx.dequantize(
                *(arrays[f"{module}.{p}"] for p in PARTS),
                group_size=form.group_size,
                bits=form.bits,
            )
        elif part == "weight":
            dense[name] = arrays[name]
    return dense


@pytest.mark.parametrize("form_of", [lambda _: FOUR, lambda _: EIGHT, mixed_form])
def test_a_packed_model_gives_the_logits_of_its_unpacked_weights(
    form_of: Callable[[str], QuantFormat | None],
) -> None:
    config, arrays = quantized(form_of, default=FOUR)
    packed = build_model(config, dict(arrays), dtype=mx.float32)
    dense = build_model(
        replace(config, quantization=None, overrides={}), unpacked(config, arrays), dtype=mx.float32
    )
    assert isinstance(dense.blocks[0].wqkv, Dense)
    assert isinstance(packed.blocks[0].w2, Packed)
    assert distance(packed(tokens()), dense(tokens())) < COUNTED_TOLERANCE


def test_projections_of_one_format_are_joined_and_others_stacked() -> None:
    packed, mixed = packed_model(), mixed_model()
    for block in packed.blocks:
        assert isinstance(block.wqkv, Packed) and isinstance(block.w13, Packed)
        assert block.wqkv.weight.shape[0] == (2 + 2) * 64
    for block in mixed.blocks:
        assert isinstance(block.wqkv, Stack) and isinstance(block.w13, Stack)
        forms = [type(part).__name__ for part in block.wqkv.parts]
        assert forms == ["Packed", "Dense", "Packed"]


def parts_of(matrix: Matrix, sizes: tuple[int, ...]) -> Stack:
    """Take a joined matrix apart by rows."""
    starts = np.cumsum((0, *sizes)).tolist()
    rows = [slice(a, b) for a, b in pairwise(starts)]
    if isinstance(matrix, Dense):
        return Stack(tuple(Dense(matrix.weight[r]) for r in rows))
    assert isinstance(matrix, Packed) and matrix.biases is not None
    return Stack(
        tuple(
            Packed(matrix.weight[r], matrix.scales[r], matrix.biases[r], matrix.form) for r in rows
        )
    )


def without_joins(block: Block, config: ModelConfig) -> Block:
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return replace(
        block,
        wqkv=parts_of(block.wqkv, (q, kv, kv)),
        w13=parts_of(block.w13, (config.hidden_dim, config.hidden_dim)),
    )


@pytest.mark.parametrize("name", ["dense", "packed"])
def test_joined_projections_give_what_separate_ones_give(name: str) -> None:
    joined = MODELS[name]()
    separate = LlamaModel(
        joined.config,
        tok_embeddings=joined.tok_embeddings,
        blocks=[without_joins(block, joined.config) for block in joined.blocks],
        norm=joined.norm,
        output=joined.output,
    )
    assert distance(joined(tokens()), separate(tokens())) < ORDER_TOLERANCE
    rejoined = stack_rows(separate.blocks[0].wqkv.parts)  # pyright: ignore
    for a, b in zip(rejoined.arrays(), joined.blocks[0].wqkv.arrays(), strict=True):
        assert mx.array_equal(a, b).item()


# --- invariants --------------------------------------------------------------------------------


def test_cached_decode_equals_full_forward(model: LlamaModel) -> None:
    full = model(tokens())
    cache = KVCache(model.config, capacity=model.config.max_context)
    rows = [model(tokens()[:, :5], cache)]
    for position in range(5, TINY.n_tokens):
        assert cache.offset == position
        rows.append(model(tokens()[:, position : position + 1], cache))
    decoded = mx.concatenate(rows, axis=1)
    assert distance(decoded, full) < tolerance_of(model)
    assert mx.array_equal(decoded.argmax(-1), full.argmax(-1)).item()


@pytest.mark.parametrize("sizes", [(48,), (1, 47), (47, 1), (16, 16, 16), (7, 30, 11)])
def test_chunks_of_any_size_give_one_shots_logits(model: LlamaModel, sizes: tuple[int]) -> None:
    full = model(tokens())
    cache = KVCache(model.config, capacity=model.config.max_context)
    rows, start = [], 0
    for size in sizes:
        rows.append(model(tokens()[:, start : start + size], cache))
        start += size
    assert cache.offset == TINY.n_tokens
    assert distance(mx.concatenate(rows, axis=1), full) < tolerance_of(model)


@pytest.mark.parametrize("chunk", [1, 5, 32, 47, 48, 500])
def test_logits_do_not_depend_on_the_slices_of_prefill(
    chunk: int, tiny: mlx_llama.Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tiny.model(tokens())[0]
    monkeypatch.setattr(ops, "prefill_chunk", lambda: chunk)
    assert distance(tiny.logits(TINY.ids), expected) < ORDER_TOLERANCE
    asked = [47, 0, -2, 31, 32, 31]
    some = tiny.logits(TINY.ids, positions=asked)
    assert distance(some, expected[mx.array([47, 0, 46, 31, 32, 31])]) < ORDER_TOLERANCE


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> mlx_llama.Llama:
    return mlx_llama.load(write_hf(tmp_path_factory.mktemp("tiny") / "model"), dtype="float32")


def test_positions_select_rows_of_the_logits(model: LlamaModel) -> None:
    full = model(tokens())
    for positions in (slice(-1, None), slice(3, 9), mx.array([5, 0, 47])):
        found = model(tokens(), positions=positions)
        assert found.dtype == mx.float32
        assert distance(found, full[:, positions]) < tolerance_of(model)


def test_a_batch_gives_what_its_rows_give_alone(model: LlamaModel) -> None:
    rows = mx.stack([tokens()[0, :20], tokens()[0, 20:40]])
    together = model(rows)
    for index in range(2):
        assert distance(together[index], model(rows[index : index + 1])[0]) < ORDER_TOLERANCE


def test_later_tokens_do_not_change_earlier_logits(model: LlamaModel) -> None:
    changed = mx.concatenate([tokens()[:, :30], tokens()[:, 30:] * 0 + 7], axis=1)
    before, after = model(tokens()), model(changed)
    assert distance(after[:, :30], before[:, :30]) < ORDER_TOLERANCE
    assert distance(after[:, 30:], before[:, 30:]) > PEER_TOLERANCE


def test_logits_are_float32_whatever_the_activations_are() -> None:
    weights, raw = random_model(TINY)
    config = config_from_hf(raw, kind="llama2", is_tied=None)
    reference = build_model(config, arrays_of(weights), dtype=mx.float32)(tokens())
    # One rounding of 8 (bfloat16) or 11 (float16) bits after another, in a random network.
    for dtype, tolerance in ((mx.bfloat16, 0.15), (mx.float16, 0.02)):
        half = build_model(config, arrays_of(weights), dtype=dtype)
        assert half.norm.dtype == dtype
        found = half(tokens())
        assert found.dtype == mx.float32
        assert distance(found, reference) < tolerance


def test_a_tied_output_is_held_once() -> None:
    for build, is_tied in ((dense_model, False), (packed_model, True)):
        built = build()
        assert (built.output is built.tok_embeddings) == is_tied
        stored = sum(a.size for a in built.arrays())
        if not is_tied:
            assert stored == built.config.parameter_count
        assert len({id(a) for a in built.arrays()}) == len(built.arrays())
