"""What a full context does, what it is chosen to be, and what it takes of the machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlx_llama
from mlx_llama import Llama, Message, blas, context, dequantized, memory, native, ops
from mlx_llama.cache import KVBits, KVCache
from mlx_llama.config import ModelConfig, QuantFormat
from mlx_llama.errors import ContextOverflowError, MemoryShortError, OptionError
from mlx_llama.generation import Request, generate
from mlx_llama.memory import Demand
from mlx_llama.options import ContextOptions, GenerationOptions
from mlx_llama.weights import build_model, hf_module, is_matrix, tensor_shapes

PEAK_TOLERANCE = 0.05  # of the peak, as promised
# Without the native kernels MLX allocates ahead of what it computes, by as much as threads race.
RACING_TOLERANCE = 0.09


@pytest.fixture(scope="module")
def llama(chat_model: Path) -> Llama:
    return mlx_llama.load(chat_model)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A machine whose free memory the test sets."""
    free = [10**12]
    monkeypatch.setattr(context, "memory_found", lambda: free[0])
    return free


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 8192), ({"context": "max"}, 131072), ({"context": 100}, 100)],
)
def test_default_context_is_8192_and_what_is_asked_is_given(
    llama: Llama, machine: list[int], options: dict[str, Any], expected: int
) -> None:
    assert llama.session(**options).cache.capacity == expected


def test_default_context_shrinks_to_what_fits(llama: Llama, machine: list[int]) -> None:
    machine[0] = 1_500_000
    chosen = llama.session().context
    assert 0 < chosen.capacity < 8192 and chosen.reason == "what fits into memory"
    assert chosen.plan.total <= 1_500_000
    assert chosen.demand.at(chosen.capacity + 1, machine[0]).total > 1_500_000


def test_context_that_does_not_fit_is_refused_with_those_that_would(
    llama: Llama, machine: list[int]
) -> None:
    machine[0] = 3_000_000
    with pytest.raises(MemoryShortError, match=r"at most .*\d+ with --kv-bits 16"):
        llama.session(context="max")
    machine[0] = 10
    with pytest.raises(MemoryShortError, match="smaller model"):
        llama.session(context=131072)


@pytest.mark.parametrize(
    ("dtype", "cached", "chosen", "named"),
    [
        (mx.float32, mx.float16, (16, 16), ["32", "16", "8", "4"]),
        (mx.float32, mx.float32, (16, 16), ["16", "8", "4"]),
        (mx.float32, mx.float32, (32, 32), ["32", "16", "8", "4"]),
        (mx.bfloat16, mx.bfloat16, (16, 16), ["16", "8", "4"]),
        (mx.bfloat16, mx.bfloat16, (8, 4), ["16", "8", "4", "8:4"]),
    ],
)
def test_contexts_are_told_at_all_bits_that_can_be_had(
    llama: Llama,
    monkeypatch: pytest.MonkeyPatch,
    dtype: mx.Dtype,
    cached: mx.Dtype,
    chosen: tuple[int, int],
    named: list[str],
) -> None:
    """32 bits were left out, and so were two that differ. cached: what 16 bits are."""
    monkeypatch.setattr(
        ops, "cache_dtype", lambda _, bits: mx.float32 if 32 in (bits.keys, bits.values) else cached
    )
    config = replace(llama.config, head_dim=64)  # packed by 64; 131072 positions
    found = Demand(config, 0, KVBits(*chosen), dtype, 64).largest_contexts(30_000_000)
    assert list(found) == named
    assert config.max_context > found["4"] > found["8"] > found["16"] >= found.get("32", 1) > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"context": 200_000}, "trained for 131072"),
        ({"context": "most"}, "a whole number or max"),
        ({"context": 0}, "at least 1"),
        ({"keep": 5}, "without --on-full slide"),
        ({"kv_start": 5}, "without --kv-bits"),
        ({"kv_bits": 5}, "32, 16, 8, 4"),
        ({"kv_start": 5, "kv_bits": 32}, "without --kv-bits"),
        ({"context": 10, "kv_bits": 8, "kv_start": 9}, "nothing would ever be packed"),
        ({"context": 1, "on_full": "slide"}, "--context 1: too short to slide, give 6 at least"),
    ],
)
def test_settings_that_cannot_take_effect_are_refused(
    llama: Llama, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(OptionError, match=said):
        llama.session(**options)


def test_full_context_stops_an_answer(llama: Llama) -> None:
    steps = list(llama.stream("hello", context=40, ignore_eos=True, temperature=0))
    assert steps[-1].finish_reason == "context"
    assert steps[-1].stats is not None and steps[-1].stats.context_limit == 40


def test_prompt_that_does_not_fit_is_refused_with_both_numbers(llama: Llama) -> None:
    with pytest.raises(ContextOverflowError, match="has 50 tokens, the context holds 20"):
        llama.generate([1] * 50, context=20)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_slide_goes_on_and_tells_what_it_dropped(llama: Llama, chunk: int) -> None:
    ids = np.random.RandomState(0).randint(0, 200, 50).tolist()
    told: list[int] = []
    steps = list(
        llama.stream(
            ids, context=32, on_full="slide", max_tokens=30, ignore_eos=True, temperature=0,
            prefill_chunk=chunk, on_forget=told.append,
        )
    )  # fmt: skip
    assert steps[-1].finish_reason == "length" and steps[-1].stats is not None
    assert len([s for s in steps if s.token_id is not None]) == 30
    assert told == sorted(told) and told[-1] == steps[-1].stats.forgotten_tokens
    assert steps[-1].stats.forgotten_tokens in (50 + 29 - 32, 50 + 30 - 32)


def test_slide_keeps_the_system_prompt(llama: Llama) -> None:
    session = llama.session(context=64, on_full="slide")
    session.messages = [Message("system", "in the thing")]
    for text in ("hello", "the thing", "in the end"):
        list(session.ask(text, max_tokens=30, ignore_eos=True, temperature=0))
    system = llama.tokenizer.encode("in the thing")
    kept = session.tokens[: session.cache.keep]
    assert ",".join(map(str, system)) in ",".join(map(str, kept))
    assert session.cache.forgotten > 0 and session.cache.held <= 64
    with pytest.raises(OptionError, match="the system prompt"):
        list(llama.session(context=6, on_full="slide").ask("hello", max_tokens=30))


def test_short_answer_that_cannot_slide_takes_any_keep(llama: Llama) -> None:
    """It was refused: the context had been cut to prompt and answer, which --keep then exceeded."""
    steps = list(llama.stream("hello", on_full="slide", keep=500, max_tokens=3, ignore_eos=True))
    assert len(steps) == 3 and steps[-1].finish_reason == "length"


def test_more_kept_than_the_context_holds_is_told_at_once(llama: Llama) -> None:
    with pytest.raises(OptionError, match="--keep keeps 31 tokens, a context of 32 can keep 30"):
        llama.session(context=32, on_full="slide", keep=31)


def test_a_changed_history_is_computed_anew_where_it_was_forgotten(llama: Llama) -> None:
    session = llama.session(context=64, on_full="slide")
    for text in ("hello", "the thing", "in"):
        list(session.ask(text, max_tokens=40, ignore_eos=True, temperature=0))
    again = [Message("user", "hello"), Message("assistant", "no"), Message("user", "the end")]
    other = llama.session(context=64, on_full="slide")
    found, expected = (
        [s.token_id for s in each.stream(again, max_tokens=5, ignore_eos=True, temperature=0)]
        for each in (session, other)
    )
    assert found == expected


@dataclass(frozen=True, slots=True)
class Filled:
    """A context that is filled and measured."""

    n_tokens: int = 1024
    bits: KVBits = KVBits()
    slides: bool = False
    chunk: int = 128
    packed_from: int = 0
    changes: tuple[tuple[str, int], ...] = ()


ALL_KEYS = (("n_heads", 4), ("n_kv_heads", 4), ("head_dim", 128), ("n_layers", 4))
FILLED = {
    "short": Filled(512),
    "long": Filled(1536),
    "32 bits": Filled(1536, KVBits(32, 32)),
    "8 bits": Filled(1536, KVBits(8, 8)),
    "8:4 bits": Filled(1536, KVBits(8, 4)),
    "sliding": Filled(1024, slides=True),
    "sliding, 8 bits": Filled(1024, KVBits(8, 8), slides=True),
    "sliding, two layers": Filled(1024, slides=True, changes=(("n_layers", 2), ("n_kv_heads", 8))),
    "sliding, shorter than a chunk": Filled(256, slides=True, chunk=1024),
    "packed soon": Filled(2048, KVBits(8, 8), packed_from=16),
    "packed late": Filled(2048, KVBits(4, 4), packed_from=2000),
    "keys for every head": Filled(2048, changes=ALL_KEYS),
    "keys for every head, 4 bits": Filled(2048, KVBits(4, 4), changes=ALL_KEYS),
    "small chunks": Filled(1536, chunk=16),
    # Two of them: while the first one runs, the last layer has no cache yet.
    "large chunks": Filled(1536, chunk=768),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, mx.float32) for name in FILLED]
    + [(name, mx.bfloat16) for name, case in FILLED.items() if case.bits.keys < 32],
)
def test_predicted_peak_is_the_real_one(name: str, dtype: mx.Dtype) -> None:
    """On models of some million parameters, whose caches are most of what they take."""
    case = FILLED[name]
    config = medium_config(**dict(case.changes))
    arrays = {
        f"{hf_module(name)}.weight": (mx.random.normal(shape) * 0.02).astype(dtype)
        for name, shape in tensor_shapes(config).items()
    }
    predicted, found = peaks(case, config, arrays, dtype)
    races = ops.runs_ahead() and dtype == mx.bfloat16
    assert predicted == pytest.approx(found, rel=RACING_TOLERANCE if races else PEAK_TOLERANCE)


BIG = (("dim", 768), ("hidden_dim", 3072), ("n_heads", 12), ("head_dim", 64), ("n_layers", 2))
DEQUANTIZED = {
    "small": Filled(512),
    "8 bits": Filled(1024, KVBits(8, 8)),
    "sliding": Filled(512, slides=True),
    "whole matrices": Filled(256, changes=BIG),
    "parts": Filled(256, changes=(("dim", 1024), ("hidden_dim", 2560), ("n_layers", 2))),
    "parts, large chunks": Filled(1032, chunk=512, changes=BIG),
}


@pytest.mark.parametrize("name", DEQUANTIZED)
def test_the_plan_knows_what_is_dequantized_for_a_blas(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "kernels", lambda: None)
    monkeypatch.setattr(blas, "taken", lambda: blas.Blas("libtest.so.0", object()))
    if "parts" in name:
        monkeypatch.setattr(dequantized, "BYTES", 8 << 20)
    case, form = DEQUANTIZED[name], QuantFormat(bits=4, group_size=64)
    config = replace(medium_config(**dict(case.changes)), quantization=form)
    arrays: dict[str, mx.array] = {}
    for tensor, shape in tensor_shapes(config).items():
        module, weight = hf_module(tensor), mx.random.normal(shape) * 0.02
        packed = mx.quantize(weight, form.group_size, form.bits) if is_matrix(tensor) else [weight]
        parts = zip(("weight", "scales", "biases"), packed, strict=False)
        arrays |= {f"{module}.{part}": array for part, array in parts}
    mx.eval(arrays)
    predicted, found = peaks(case, config, arrays, mx.float32)
    assert predicted == pytest.approx(found, rel=PEAK_TOLERANCE)


def peaks(
    case: Filled, config: ModelConfig, arrays: dict[str, mx.array], dtype: mx.Dtype
) -> tuple[int, int]:
    """Fill a context; return the peak that was predicted for it and the one that was found."""
    model = build_model(config, arrays, dtype=dtype)
    weights = sum(array.nbytes for array in model.arrays())
    mx.clear_cache()
    others = mx.get_active_memory() - weights  # what other tests hold
    cache = KVCache(
        config,
        capacity=case.n_tokens,
        keep=4 * case.slides,
        slides=case.slides,
        bits=case.bits,
        packed_from=case.packed_from,
        storage=ops.cache_storage(dtype, case.bits),
    )
    n_prompt = max(2 * case.n_tokens, 2 * case.chunk) if case.slides else case.n_tokens - 4
    request = Request(
        ids=np.random.RandomState(1).randint(0, 200, n_prompt).tolist(),
        options=GenerationOptions(max_tokens=4),
        sampler=lambda logits: mx.argmax(logits, keepdims=True),  # pyright: ignore
        detokenizer=NoText(),  # pyright: ignore
        stop_ids=frozenset(),
        chunk=case.chunk,
    )
    assert len(list(generate(model, cache, request))) == 4
    demand = Demand(config, weights, case.bits, dtype, case.chunk, case.slides, case.packed_from)
    plan = demand.at(case.n_tokens, None)
    return plan.total - plan.scratch, mx.get_peak_memory() - others


class NoText:
    """A detokenizer of tokens that mean nothing."""

    def add(self, token_id: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


def medium_config(**changes: int) -> ModelConfig:
    config = ModelConfig(
        dim=256, n_layers=4, n_heads=8, n_kv_heads=4, head_dim=32, hidden_dim=768, vocab_size=2048,
        norm_eps=1e-5, rope_theta=1e4, max_context=4096, tied=True, kind="llama2",
    )  # fmt: skip
    return replace(config, **changes)


def test_memory_is_found_here() -> None:
    found = memory.memory_found()
    assert found is None or found > 10**8
    assert ContextOptions(kv_bits="8:4").key_value_bits == (8, 4)


def test_a_control_groups_limit_counts_without_what_was_read_from_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_cgroup_folders", lambda: [tmp_path, tmp_path / "none"])
    (tmp_path / "memory.max").write_text("16000\n")
    (tmp_path / "memory.current").write_text("15000\n")
    (tmp_path / "memory.stat").write_text("anon 1000\ninactive_file 13500\n")
    assert memory._cgroup_left() == 14500
    (tmp_path / "memory.limit_in_bytes").write_text("9000\n")  # the first version's names
    (tmp_path / "memory.usage_in_bytes").write_text("2000\n")
    (tmp_path / "memory.stat").write_text("total_inactive_file 500\n")
    assert memory._cgroup_left() == min(16000 - 14500, 9000 - 1500)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._cgroup_left() == 7500
