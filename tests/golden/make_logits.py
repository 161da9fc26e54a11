"""Make tests/golden/logits.npz and rope.npz: what peers compute for the random models of the tests.

Needs torch, transformers and llama-models (made with 2.13, 5.23 and 0.3.0), which the tests do
not: `python tests/golden/make_logits.py`. Logits are those of transformers' LlamaForCausalLM in
float32; frequencies of Meta's `precompute_freqs_cis` are taken from the function itself, those of
factor 32, which Meta's code cannot give, from transformers.
Refuses to write where a test could not tell right from wrong: an argmax within the tolerance, or a
RoPE theta or factor whose change would not show.
"""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from random_models import CASES, Case, llama3_scaling, random_model  # noqa: E402

TOLERANCE = 1e-3  # of the tests
CLEAR = 20 * TOLERANCE  # what a wrong RoPE must change at least
HEAD_DIMS, THETAS = (64, 128), (1e4, 5e5, 1e6)


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


def metas_frequencies(head_dim: int, theta: float, *, is_scaled: bool) -> np.ndarray:
    """Return the frequencies behind Meta's complex table: (D/2,) float32.

    At position 1 the angle is the frequency itself.
    """
    kept = {}
    outer = torch.outer

    def catch(positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
        kept["frequencies"] = frequencies
        return outer(positions, frequencies)

    torch.outer = catch
    try:
        precompute_freqs_cis(head_dim, 4, theta, is_scaled)
    finally:
        torch.outer = outer
    return kept["frequencies"].numpy()


def transformers_frequencies(head_dim: int, theta: float, factor: float) -> np.ndarray:
    config = LlamaConfig(
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": theta, **llama3_scaling(factor)},
    )
    return ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0].numpy()


def _import_meta() -> types.FunctionType:
    """Import Meta's function; fairscale, which its module needs, has no part in it."""
    for name in ("fairscale", "fairscale.nn", "fairscale.nn.model_parallel"):
        sys.modules.setdefault(name, types.ModuleType(name))
    parallel = sys.modules["fairscale.nn.model_parallel"]
    for name in ("initialize", "layers", "mappings"):
        module = types.ModuleType(f"fairscale.nn.model_parallel.{name}")
        module.__getattr__ = lambda _: None  # pyright: ignore
        sys.modules[module.__name__] = module
        setattr(parallel, name, module)
    from llama_models.llama3.model import precompute_freqs_cis

    return precompute_freqs_cis


precompute_freqs_cis = _import_meta()


def main() -> None:
    torch.set_num_threads(2)
    golden = {}
    for name, case in CASES.items():
        golden[name] = logits(case)
        check(name, case, golden[name])
    np.savez_compressed(HERE / "logits.npz", **golden)
    rope = {}
    for head_dim in HEAD_DIMS:
        for theta in THETAS:
            at = f"{head_dim}_{theta:g}"
            rope[f"{at}_1"] = metas_frequencies(head_dim, theta, is_scaled=False)
            rope[f"{at}_8"] = metas_frequencies(head_dim, theta, is_scaled=True)
            rope[f"{at}_32"] = transformers_frequencies(head_dim, theta, 32.0)
    np.savez_compressed(HERE / "rope.npz", **rope)


if __name__ == "__main__":
    main()
