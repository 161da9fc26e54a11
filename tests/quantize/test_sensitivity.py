"""What packing one matrix costs: against a whole model with it packed; going on; outliers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_llama.config import QuantFormat
from mlx_llama.options import ConvertOptions
from mlx_llama.weights import is_matrix
from mlx_llama_convert import SourceModel, open_source
from mlx_llama_convert.budget import open_budget, survey
from mlx_llama_quantize import sensitivity, variants
from mlx_llama_quantize.comparison import Comparison
from mlx_llama_quantize.packing import pack_matrix, unpacked
from mlx_llama_quantize.sensitivity import Sensitivity, Survey, SurveyRequest, survey_bytes
from mlx_llama_quantize.subject import Subject
from mlx_llama_quantize.texts import Text
from model_folders import TINY, TINY_SCALED, write_hf, write_meta
from random_models import Weights

TEXT = Text("words", "the thing in hello world end " * 40)
FORM, COARSE = QuantFormat(4, 64), QuantFormat(2, 64)
FORMS = (COARSE, FORM, QuantFormat(8, 32))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceModel:
    return open_source(write_meta(tmp_path_factory.mktemp("surveyed") / "meta"), ConvertOptions())


def survey_of(source: SourceModel, path: Path, *names: str) -> Survey:
    wanted = names or tuple(name for name in source.weights.names() if is_matrix(name))
    return Survey(source.weights, source.tokenizer, dict.fromkeys(wanted, FORMS), TEXT, path)


class OnePacked:
    """A source with one matrix packed and unpacked again."""

    def __init__(self, source: SourceModel, name: str, form: QuantFormat) -> None:
        self._source, self._name, self._form = source.weights, name, form
        self.config, self.names = source.weights.config, source.weights.names
        self.shape, self.dtype = source.weights.shape, source.weights.dtype

    def read(self, name: str, rows: slice | None = None) -> mx.array:
        values = self._source.read(name, rows)
        if name != self._name:
            return values
        return unpacked(pack_matrix(values, self._form, "mse"), self._form)


@pytest.mark.parametrize(
    "name",
    [
        "tok_embeddings.weight",
        "layers.0.attention.wk.weight",
        "layers.1.feed_forward.w2.weight",
        "output.weight",
    ],
)
@pytest.mark.parametrize("is_tied", [False, True])
def test_measured_is_what_comparing_whole_models_finds(
    source: SourceModel, tmp_path: Path, name: str, is_tied: bool
) -> None:
    if is_tied:
        if name == "output.weight":
            return
        source = open_source(write_hf(tmp_path / "tied", TINY_SCALED), ConvertOptions())
    asked = survey_of(source, tmp_path / "s.json", name)
    (found,) = asked.run()
    assert set(found.measured) == {COARSE, FORM}
    a, b = (
        Subject.of_weights(str(n), weights, source.tokenizer, source.files)  # pyright: ignore
        for n, weights in enumerate((source.weights, OnePacked(source, name, FORM)))
    )
    scores = Comparison(a, b, asked.windows, dtype="float32").run()
    assert found.measured[FORM] == pytest.approx(float(scores.kld.mean()), rel=1e-3)


def test_stopped_survey_goes_on_to_the_same_numbers(source: SourceModel, tmp_path: Path) -> None:
    whole = survey_of(source, tmp_path / "whole.json").run()
    seen: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done > 0.7 * total:
            raise KeyboardInterrupt

    path = tmp_path / "parts.json"
    with pytest.raises(KeyboardInterrupt):
        survey_of(source, path).run(on_progress=stop)
    total = seen[-1][1]
    seen.clear()
    again = survey_of(source, path).run(on_progress=lambda *each: seen.append(each))
    assert seen[-1][0] == seen[-1][1] < total
    assert again == whole
    seen.clear()
    assert survey_of(source, path).run(on_progress=lambda *each: seen.append(each)) == whole
    assert not seen
    path.write_text('{"measured": 3}')
    assert survey_of(source, path).run() == whole


def test_a_probe_without_error_leaves_numbers() -> None:
    """Weights of three values fit into 2 bits: the logarithm of their error ended the command."""
    exact = Sensitivity("w", {COARSE: 1e-9, FORM: 0.01}, {COARSE: 0.0, FORM: 0.02, FORMS[2]: 0.01})
    assert exact.divergence(FORMS[2]) == pytest.approx(0.005)


def test_errors_of_large_weights_are_those_of_small_ones(tmp_path: Path) -> None:
    """Squares of weights near 1e30 are infinite in float32."""
    found: list[dict[QuantFormat, float]] = []
    for number, size in enumerate((1.0, 2.0**100)):

        def scale(weights: Weights, _: object, size: float = size) -> None:
            weights["model.layers.0.mlp.down_proj.weight"] *= size

        source = open_source(write_hf(tmp_path / str(number), change=scale), ConvertOptions())
        asked = survey_of(source, tmp_path / f"{number}.json", "layers.0.feed_forward.w2.weight")
        asked._look_at("layers.0.feed_forward.w2.weight")
        found.append(asked._errors["layers.0.feed_forward.w2.weight"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_memory_stays_in_its_bound_however_many_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer, one more being packed and its variants' states; four layers more change nothing."""
    for name in ("LOGITS_BYTES", "SLICE_BYTES"):
        monkeypatch.setattr(variants, name, 1 << 19)
    monkeypatch.setattr(sensitivity, "MAX_WINDOWS", 1)
    monkeypatch.setattr(sensitivity, "CONTEXT", 128)
    peaks: list[int] = []
    for n_layers in (2, 6):
        case = replace(TINY, n_heads=4, n_kv_heads=2, dim=256, n_layers=n_layers)
        source = open_source(write_hf(tmp_path / f"{n_layers}", case), ConvertOptions())
        asked = survey_of(source, tmp_path / f"{n_layers}.json")
        assert asked.windows.ids.shape == (1, 128)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        asked.run()
        peaks.append(mx.get_peak_memory() - before)
        bound = survey_bytes(source.config)
        assert bound / 3 < peaks[-1] < bound
    layer = 4 * source.config.parameter_count / n_layers
    assert peaks[1] - peaks[0] < layer / 4


def test_between_and_beyond_the_probes() -> None:
    errors = {COARSE: 0.1, QuantFormat(3, 64): 0.03, FORM: 0.008, QuantFormat(8, 64): 3e-5}
    found = Sensitivity("m", {COARSE: 1.0, FORM: 0.08}, errors)
    assert found.divergence(COARSE) == 1.0
    assert found.divergence(QuantFormat(3, 64)) == pytest.approx(0.3)
    assert found.divergence(QuantFormat(8, 64)) == pytest.approx(3e-4)


@pytest.mark.parametrize("seed", [100, 1, 2])
def test_planted_outliers_get_more_bits(tmp_path: Path, seed: int) -> None:
    """A large column in each group, whose inputs are small: the same model, but hard to pack."""

    def change(weights: dict[str, np.ndarray], config: dict[str, object]) -> None:
        layer = "model.layers.1"
        weights[f"{layer}.post_attention_layernorm.weight"][::32] /= 50
        for matrix in ("gate_proj", "up_proj"):
            weights[f"{layer}.mlp.{matrix}.weight"][:, ::32] *= 50

    options = ConvertOptions(target_bpw=5.5, group_size=64, method="auto")
    bits: list[list[int]] = []
    for number, changed in enumerate((None, change)):
        folder = write_hf(tmp_path / f"{number}", replace(TINY, seed=seed), change=changed)
        source = open_source(folder, options)
        plan = survey(open_budget(source, options), SurveyRequest(TEXT, tmp_path / "surveys"))
        assert plan.bits_per_weight <= 5.5
        forms = (plan.forms[f"layers.1.feed_forward.{part}.weight"] for part in ("w1", "w3"))
        bits.append([form.bits for form in forms if form])
    plain, planted = bits
    assert min(planted) > max(plain)


@pytest.mark.parametrize("target", [3.6, 4.5, 5.25, 7.0, 8.9])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_planned_is_never_over_budget(
    source: SourceModel, tmp_path: Path, target: float, dtype: str
) -> None:
    options = ConvertOptions(target_bpw=target, dtype=dtype, override=["layers.0.*.wq=8"])
    folder = tmp_path / "surveys"
    plan = survey(open_budget(source, options), SurveyRequest(TEXT, folder))
    assert 0.9 * target < plan.bits_per_weight <= target
    assert plan.forms["layers.0.attention.wq.weight"] == QuantFormat(8, 64)
