"""What the stages of quantizing may take of memory, by the shape of Llama 3.2 1B."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_llama.config import ModelConfig, QuantFormat
from mlx_llama.options import ConvertOptions
from mlx_llama.weights import is_matrix, tensor_shapes
from mlx_llama_apps.bench.shapes import shape_named
from mlx_llama_convert import open_source
from mlx_llama_convert.plan import ConversionPlan, make_plan
from mlx_llama_convert.resources import PROGRAM_BYTES, stage_bytes
from model_folders import write_meta

ALL = {"is_surveyed": True, "is_calibrated": True, "is_compared": True}
LLAMA_1B = replace(shape_named("llama-3.2-1b"), dtype="bfloat16")


def plan_of(config: ModelConfig, options: ConvertOptions) -> ConversionPlan:
    """A plan for weights of a shape that are never read."""
    shapes = tensor_shapes(config)
    weights: Any = SimpleNamespace(
        config=config, names=lambda: [*shapes], shape=shapes.get, dtype=lambda name: config.dtype
    )
    source: Any = SimpleNamespace(weights=weights)
    forms = {name: QuantFormat(4, 64) if is_matrix(name) else None for name in shapes}
    return ConversionPlan(source, options, config, forms, ())


@pytest.mark.parametrize("method", ["gptq", "awq", "awq+gptq", "auto"])
@pytest.mark.parametrize("target", [None, 4.5])
def test_1b_is_quantized_and_certified_in_2_gb(method: str, target: float | None) -> None:
    plan = plan_of(LLAMA_1B, ConvertOptions(method=method, target_bpw=target))
    assert prod(plan.source.weights.shape("tok_embeddings.weight")) == 128256 * 2048
    # What a size will be made of is not known yet: a bit more of each weight.
    most = 2e9 if target is None else 2.05e9
    assert 1e9 < PROGRAM_BYTES + stage_bytes(plan, **ALL) < most
    assert PROGRAM_BYTES + stage_bytes(plan, **{**ALL, "is_compared": False}) < 2e9


def test_only_what_is_asked_for_counts(tmp_path: Path) -> None:
    options = ConvertOptions(method="auto")
    plan = make_plan(open_source(write_meta(tmp_path / "meta"), options), options)
    none = dict.fromkeys(ALL, False)
    alone = [stage_bytes(plan, **{**none, stage: True}) for stage in ALL]
    assert stage_bytes(plan, **none) == 0
    assert min(alone) > 0
    assert stage_bytes(plan, **ALL) == max(alone)
