"""A real model says the same greedy tokens with the extension and without, and without a BLAS."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import greedy_tokens
from kernels_oracle import needs_kernels
from mlx_llama_apps import bundled
from processes import environment
from tiny_models import convert

WITHOUT = Path(__file__).parents[1] / "without_kernels"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The model in the box in 4 bits, in 8, and as it was trained, bfloat16."""
    folder = tmp_path_factory.mktemp("greedy")
    options = {"4bit": {"bits": 4}, "8bit": {"bits": 8}, "dense": {"quantize": False}}
    return [
        str(convert(bundled.checkpoint(), folder / name, **each)) for name, each in options.items()
    ]


@needs_kernels
@pytest.mark.parametrize(("blas", "multiplies"), [("off", "one thread"), ("any", "")])
def test_greedy_tokens_are_the_same_without_the_extension(
    models: list[str], blas: str, multiplies: str, home: Path
) -> None:
    names = environment(home)
    names["PYTHONPATH"] = os.pathsep.join((str(WITHOUT), names["PYTHONPATH"]))
    done = subprocess.run(
        [sys.executable, greedy_tokens.__file__, blas, *models],
        env=names, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert "mlx_llama_kernels is not installed" in found["summary"]
    assert multiplies in found["summary"]
    assert found["tokens"] == [greedy_tokens.greedy_tokens(model) for model in models]
