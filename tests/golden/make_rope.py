"""Make tests/golden/rope.npz: the float32 frequencies of Meta's code, (D/2,) for each model.

Needs torch, transformers and llama-models (made with 2.13, 5.23 and 0.3.0, on a CPU), which the
tests do not: `python tests/golden/make_rope.py`. The formula is written out here because the
factor of Meta's function is fixed at 8. Refuses to write where one bit differs from what Meta's
own function gives (no scaling, factor 8) or transformers (all).
"""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from random_models import llama3_scaling  # noqa: E402

# LLaMA 1 and 2, Llama 3, Code Llama. Meta's function knows factor 8 (3.1, 3.3); 3.2 has 32.
HEAD_DIMS, THETAS, FACTORS = (64, 128), (1e4, 5e5, 1e6), (1.0, 8.0, 32.0)


def by_the_formula(head_dim: int, theta: float, factor: float) -> torch.Tensor:
    """Compute the frequencies as published, in float32 tensors and Python numbers."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    if factor == 1.0:
        return frequencies
    scaled = []
    for frequency in frequencies:
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            scaled.append(frequency)
        elif wavelength > 8192 / 1:
            scaled.append(frequency / factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            scaled.append((1 - smooth) * frequency / factor + smooth * frequency)
    return torch.stack(scaled)


def by_meta(head_dim: int, theta: float, *, is_scaled: bool) -> torch.Tensor:
    """Return the frequencies behind the complex table of Meta's `precompute_freqs_cis`."""
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
    return kept["frequencies"]


def by_transformers(head_dim: int, theta: float, factor: float) -> torch.Tensor:
    scaling = {"rope_type": "default"} if factor == 1.0 else llama3_scaling(factor)
    config = LlamaConfig(
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": theta, **scaling},
    )
    if factor == 1.0:
        return LlamaRotaryEmbedding(config).inv_freq
    return ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]


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
    golden = {}
    for head_dim in HEAD_DIMS:
        for theta in THETAS:
            for factor in FACTORS:
                name = f"{head_dim}_{theta:g}_{factor:g}"
                frequencies = by_the_formula(head_dim, theta, factor)
                peers = {"transformers": by_transformers(head_dim, theta, factor)}
                if factor in (1.0, 8.0):
                    peers["Meta"] = by_meta(head_dim, theta, is_scaled=factor == 8.0)
                for peer, found in peers.items():
                    if not torch.equal(found, frequencies):
                        raise SystemExit(f"{name}: {peer} has other bits than the formula")
                golden[name] = frequencies.numpy()
    np.savez_compressed(HERE / "rope.npz", **golden)


if __name__ == "__main__":
    main()
