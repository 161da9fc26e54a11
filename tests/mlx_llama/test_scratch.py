"""What the native kernels hold beside MLX's arrays is what the plan of memory says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kernels_oracle import needs_kernels
from model_folders import convert, write_hf, write_meta
from processes import start

# Another process has asked for nothing before. With one thread every part is its own.
FILLED = """
import json, sys
import mlx_llama
from mlx_llama import native

kernels = native.kernels()
llama = mlx_llama.load(sys.argv[1], threads=int(sys.argv[2]))
session = llama.session(**json.loads(sys.argv[3]))
before = kernels.scratch_bytes()
ids = [i % 200 + 1 for i in range(session.context.capacity - 4)]
list(session.complete(ids, max_tokens=4, ignore_eos=True))
print(json.dumps([before, session.context.plan.scratch, kernels.scratch_bytes()]))
"""


@needs_kernels
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize(
    "options",
    [
        {"context": 200, "prefill_chunk": 64},
        {"context": 1500, "prefill_chunk": 6},  # a token's attention is shared out by rows
        {"context": 200, "prefill_chunk": 1},
        {"context": 100, "prefill_chunk": 40, "on_full": "slide"},
    ],
    ids=["chunks", "long", "tokens", "sliding"],
)
def test_scratch_is_what_was_planned(
    tmp_path: Path, bits: int | None, options: dict[str, Any]
) -> None:
    if bits is None:
        model = write_hf(tmp_path / "model")
    else:
        model = convert(write_meta(tmp_path / "meta"), tmp_path / "model", bits=bits, group_size=32)
    before, planned, found = filled(model, 1, options, tmp_path)
    assert before == 0 < found
    assert planned == found


@needs_kernels
def test_each_thread_has_scratch_of_its_own(tmp_path: Path) -> None:
    options = {"context": 200, "prefill_chunk": 64}
    model = write_hf(tmp_path / "model")
    one, three = (filled(model, n_threads, options, tmp_path) for n_threads in (1, 3))
    assert one[1] < three[1]
    assert one[2] <= three[2] <= three[1]


def filled(
    model: Path, n_threads: int, options: dict[str, Any], home: Path
) -> tuple[int, int, int]:
    """Fill a context; return the bytes held before, those planned and those held at last."""
    child = start(FILLED, model, str(n_threads), json.dumps(options), home=home)
    out, errors = child.communicate()
    assert child.returncode == 0, errors
    before, planned, found = json.loads(out)
    return before, planned, found
