"""Activations in 8 bits: where the kernels round, who asks them to, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import mlx.core as mx
import numpy as np
import pytest

import mlx_llama
from kernels_oracle import INSTRUCTIONS
from mlx_llama import Llama, native, ops
from mlx_llama.config import QuantFormat
from mlx_llama.errors import CheckpointError, OptionError
from tiny_models import write_model

FORM = QuantFormat(4, 64)
needs_kernels = pytest.mark.skipif(native.kernels() is None, reason="no native kernels")
needs_rounding = pytest.mark.skipif(
    not native.takes_bytes(FORM), reason="no kernels here round activations"
)
IDS = [1, *range(20, 60)]


@pytest.fixture(autouse=True)
def _floats_again() -> Iterator[None]:
    yield
    ops.use_activations("float32")


@pytest.fixture
def packed_model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "packed", bits=4, quantize=True)


def product(form: QuantFormat, n_rows: int) -> mx.array:
    random = np.random.default_rng(form.bits)
    x = mx.array(random.normal(size=(n_rows, 128)).astype(np.float32))
    words = mx.array(random.integers(0, 2**32, (32, 4 * form.bits), dtype=np.uint32))
    scales = mx.ones((32, 128 // form.group_size))
    found = ops.quantized_linear(x, words, scales, -scales, form)
    mx.eval(found)
    return found


@needs_kernels
@pytest.mark.parametrize("bits", native.BITS)
@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_rounding_happens_for_the_formats_that_are_said_to_take_it(name: str, bits: int) -> None:
    kernels, form = native.kernels(), QuantFormat(bits, 64)
    assert kernels is not None
    before = kernels.instructions()
    if not kernels.use_instructions(name):
        pytest.skip(f"this processor has no {name}")
    try:
        is_rounded = False
        for n_rows in (1, 40):
            ops.use_activations("float32")
            exact = product(form, n_rows)
            ops.use_activations("int8")
            is_rounded |= not mx.array_equal(exact, product(form, n_rows)).item()
        assert is_rounded == native.takes_bytes(form)
    finally:
        kernels.use_instructions(before)


def last_logits(llama: Llama, *, is_answer: bool) -> np.ndarray:
    """Return the scores behind a prompt, or behind a token that follows it by itself."""
    if not is_answer:
        return np.array(llama.logits(IDS, positions=[-1]))
    session = llama.session(context=64)
    assert [*session.complete(IDS, max_tokens=1, temperature=0.0)]
    hidden = llama.model.hidden(mx.array([[7]]), session.cache)
    return np.array(llama.model.logits(hidden[0]))


@needs_rounding
@pytest.mark.parametrize("is_answer", [True, False])
def test_each_model_takes_activations_as_it_was_loaded(packed_model: Path, is_answer: bool) -> None:
    exact = last_logits(mlx_llama.load(packed_model), is_answer=is_answer)
    rounding = mlx_llama.load(packed_model, activations="int8")
    rounded = last_logits(rounding, is_answer=is_answer)
    differs = np.abs(rounded - exact).max()
    assert 0 < differs <= 0.05 * np.abs(exact).max()
    for asked in (None, "float32"):
        plain = mlx_llama.load(packed_model, activations=asked)
        for _ in range(2):  # in turns
            assert (last_logits(rounding, is_answer=is_answer) == rounded).all()
            assert (last_logits(plain, is_answer=is_answer) == exact).all()


@needs_rounding
def test_answers_in_turns_are_those_of_each_alone(packed_model: Path) -> None:
    """The next token of one is under way while the other computes."""
    models = [mlx_llama.load(packed_model, activations=a) for a in ("int8", "float32")]
    options = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True, "logprobs": 3}
    alone = [[s.logprob for s in m.stream(IDS, **options)] for m in models]
    assert alone[0] != alone[1]
    both = zip(*(m.stream(IDS, **options) for m in models), strict=True)
    assert [[s.logprob for s in steps] for steps in zip(*both, strict=True)] == alone


@needs_rounding
def test_what_is_under_way_is_finished_as_it_was_begun() -> None:
    weight = mx.random.normal((1024, 1024), key=mx.random.key(1)) / 32
    packed = mx.quantize(weight, group_size=64, bits=4)

    def products() -> mx.array:
        x = mx.random.normal((256, 1024), key=mx.random.key(2))
        for _ in range(40):
            x = ops.quantized_linear(x, *packed, FORM)
        return x

    mx.eval(exact := products())
    mx.async_eval(under_way := products())
    ops.use_activations("int8")
    assert mx.array_equal(under_way, exact).item()
    assert not mx.array_equal(products(), exact).item()


@pytest.fixture
def avx2() -> Iterator[None]:
    """Instructions that round for a single token, too."""
    kernels = native.kernels()
    assert kernels is not None
    before = kernels.instructions()
    if not kernels.use_instructions("avx2"):
        pytest.skip("this processor has no avx2")
    yield
    kernels.use_instructions(before)


@needs_rounding
@pytest.mark.parametrize("n_tokens", [40, 1])
def test_unevaluated_passes_of_two_models_share_nothing(
    packed_model: Path, n_tokens: int, avx2: None
) -> None:
    """Products were rounded or not as the model asked that was last when they were computed."""
    model = mlx_llama.load(packed_model).model
    models = (model, model.with_activations("int8"))
    ids = mx.array([IDS[:n_tokens]])
    alone = []
    for each in models:
        mx.eval(logits := each(ids))
        alone.append(logits)
    assert not mx.array_equal(*alone).item()
    together = [each(ids) for each in models]
    mx.eval(together)
    for found, expected in zip(together, alone, strict=True):
        assert mx.array_equal(found, expected).item()


@needs_rounding
def test_threads_take_activations_each_as_it_asked() -> None:
    words = mx.array(np.random.default_rng(0).integers(0, 2**32, (32, 16), dtype=np.uint32))
    x, scales = mx.random.normal((40, 128), key=mx.random.key(0)), mx.ones((32, 2))
    mx.eval(words, x, scales)

    def of(asked: str) -> np.ndarray:
        ops.use_activations(asked)
        met.wait(timeout=20)  # until the other thread has asked, too
        return np.array(ops.quantized_linear(x, words, scales, -scales, FORM))

    met = Barrier(1)
    alone = [of(asked) for asked in ("int8", "float32")]
    assert (alone[0] != alone[1]).any()
    met = Barrier(2)
    with ThreadPoolExecutor(2) as threads:
        both = list(threads.map(of, ("int8", "float32")))
    for found, expected in zip(both, alone, strict=True):
        np.testing.assert_array_equal(found, expected)


@needs_rounding
def test_a_pass_through_one_block_takes_the_activations_of_its_model(packed_model: Path) -> None:
    """As walks and certificates compute, after a model that rounds has."""
    model = mlx_llama.load(packed_model).model
    h = mx.random.normal((1, 40, model.config.dim), key=mx.random.key(1))
    exact, rounding = model.through(model.blocks[0], h), model.with_activations("int8")
    mx.eval(exact)
    rounded = rounding.through(model.blocks[0], h)
    mx.eval(rounded)
    assert not mx.array_equal(rounded, exact).item()
    assert mx.array_equal(model.through(model.blocks[0], h), exact).item()


@needs_rounding
def test_loading_changes_no_products(packed_model: Path, base_model: Path) -> None:
    exact = product(FORM, 40)
    mlx_llama.load(packed_model, activations="int8")
    with pytest.raises(OptionError, match=r"^--activations int8: .* no packed matrix; leave it"):
        mlx_llama.load(base_model, activations="int8")
    assert mx.array_equal(product(FORM, 40), exact).item()


@needs_kernels
def test_instructions_that_nothing_is_known_of_round_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.kernels(), "instructions", lambda: "newer")
    assert not any(native.takes_bytes(QuantFormat(bits, 64)) for bits in native.BITS)


@needs_kernels
def test_instructions_that_do_not_round_are_named() -> None:
    kernels = native.kernels()
    assert kernels is not None
    before = kernels.instructions()
    kernels.use_instructions("baseline")
    try:
        with pytest.raises(
            OptionError, match=r"kernels \(baseline\) do it for none .*\(4 bits, group 64\)"
        ):
            ops.choose_activations({FORM}, asked="int8")
        assert ops.choose_activations({FORM}, asked="float32") == "float32"
    finally:
        kernels.use_instructions(before)


@needs_kernels
def test_formats_that_the_kernels_leave_to_mlx_are_refused() -> None:
    with pytest.raises(OptionError, match=r"\(4 bits, group 32, mxfp4\).*; leave it out"):
        ops.choose_activations({QuantFormat(4, 32, "mxfp4")}, asked="int8")


@pytest.mark.parametrize("asked", ["int8", "float32"])
def test_without_kernels_there_is_no_choice(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "kernels", lambda: None)
    monkeypatch.setattr(native, "missing_reason", lambda: "mlx_llama_kernels is not installed")
    with pytest.raises(
        OptionError, match=rf"^--activations {asked}: .*kernels have a choice, and .*not installed$"
    ):
        ops.choose_activations({FORM}, asked=asked)
    assert ops.choose_activations({FORM}, asked=None) == "float32"


def test_on_a_gpu_there_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "backend", lambda: "metal")
    with pytest.raises(OptionError, match=r"int8: .*, and the model runs on metal$"):
        ops.choose_activations({FORM}, asked="int8")


def test_an_unknown_one_is_answered_with_the_known_ones(packed_model: Path) -> None:
    with pytest.raises(OptionError, match="--activations: found 'int4', expected one of float32, "):
        mlx_llama.load(packed_model, activations="int4")


@needs_rounding
def test_a_saved_cache_of_other_activations_is_computed_anew(
    packed_model: Path, tmp_path: Path
) -> None:
    """As with another dtype: its keys and values are not those that this model computes."""
    llama = mlx_llama.load(packed_model, activations="int8")
    session = llama.session(context=64)
    assert [*session.complete(IDS, max_tokens=2, temperature=0.0)]
    session.save_cache(tmp_path / "cache")
    llama.session(context=64).load_cache(tmp_path / "cache")
    other = mlx_llama.load(packed_model).session(context=64)
    with pytest.raises(CheckpointError, match="dtype float32, activations int8, here float32;"):
        other.load_cache(tmp_path / "cache")
