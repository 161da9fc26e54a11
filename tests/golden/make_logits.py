"""Make tests/golden/logits.npz: what transformers computes for the random models of the tests.

Needs torch and transformers (made with 2.13 and 5.23), which the tests do not:
`python tests/golden/make_logits.py`. Logits are those of LlamaForCausalLM in float32.
Refuses to write where a test could not tell right from wrong: an argmax within the tolerance, or a
RoPE theta or factor whose change would not show.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from random_models import CASES, Case, random_model  # noqa: E402

TOLERANCE = 1e-3  # of the tests
CLEAR = 20 * TOLERANCE  # what a wrong RoPE must change at least


def logits(case: Case) -> np.ndarray:
    """Return the logits of the stored positions, (P, V) float32."""
    weights, raw = random_model(case)
    model = LlamaForCausalLM._from_config(
        LlamaConfig.from_dict(raw), attn_implementation="sdpa", dtype=torch.float32
    ).eval()
    state = {name: torch.from_numpy(array) for name, array in weights.items()}
    found = model.load_state_dict(state, strict=False)
    assert not found.unexpected_keys, found
    assert set(found.missing_keys) == ({"lm_head.weight"} if case.is_tied else set()), found
    model.tie_weights()
    with torch.no_grad():
        hidden = model.model(torch.tensor([case.ids])).last_hidden_state[0, case.positions]
        return model.lm_head(hidden).numpy()


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def check(name: str, case: Case, golden: np.ndarray) -> None:
    ordered = np.sort(golden, axis=-1)
    margin = float((ordered[:, -1] - ordered[:, -2]).min() / np.abs(golden).max())
    variants = {"theta": replace(case, rope_theta=case.rope_theta * 1.5)}
    # A few tokens of a context of 8192 cannot show a scaling that is made for 131072.
    is_visible = case.scaling and (
        case.n_tokens > 1000 or case.scaling.get("original_max_position_embeddings", 0) < 8192
    )
    if case.scaling and is_visible:
        other = 32.0 if case.scaling["factor"] == 8.0 else 8.0
        variants["factor"] = replace(case, scaling={**case.scaling, "factor": other})
        variants["no scaling"] = replace(case, scaling=None)
    effects = {what: distance(logits(variant), golden) for what, variant in variants.items()}
    shown = ", ".join(f"{what} {effect:.3f}" for what, effect in effects.items())
    distinct = len(set(golden.argmax(-1).tolist()))
    print(f"{name}: margin {margin:.4f}, {distinct} of {len(golden)} argmax; changed by {shown}")
    if not (margin > TOLERANCE and distinct > 5 and min(effects.values()) > CLEAR):
        raise SystemExit(f"{name}: says too little; take another seed")


def main() -> None:
    torch.set_num_threads(2)
    golden = {}
    for name, case in CASES.items():
        golden[name] = logits(case)
        check(name, case, golden[name])
    np.savez_compressed(HERE / "logits.npz", **golden)


if __name__ == "__main__":
    main()
