"""A Llama whose weights are set by hand so that it looks things up: ... K V ... K makes it say V.

Layer 0 hears what stood before each token, by position alone: its score is a sum of cosines of the
distance less one, over the pairs that turn fast. Layer 1 looks for the token that stood behind what
is asked, by content alone: it compares codes in the pairs that turn so slowly that 8192 positions
matter little. SwiGLU carries what attention found to where the next layer, or the output, reads it.
Every norm meets rows of a known length, so that its scale undoes it. What is looked for scores 25
above all else: among 8192 tokens the others weigh less than a millionth together.

The residual stream holds sections of 16 numbers, +1 or -1: a token's code is a row of a Hadamard
matrix, so that two codes have nothing in common.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np

from mlx_llama.cache import KVCache
from mlx_llama.config import ModelConfig
from mlx_llama.model import LAST, LlamaModel
from mlx_llama.weights import build_model
from random_models import Weights

CODE = 16
KEYS, VALUES, FILLERS = range(5), range(5, 10), range(10, 16)
CONTENT, HEARD, BEFORE, FOUND, ANSWER = (slice(CODE * i, CODE * (i + 1)) for i in range(5))
ONE = 5 * CODE  # always 1
DIM, HEAD_DIM, HALF = 96, 64, 32
THETA = 500_000.0
FAST = 12  # pairs that tell neighbours apart, and repeat nowhere below 131072
SLOW = [*range(24, 32), *range(56, 64)]  # pairs that turn by 0.44 radians at most in 8192 positions
NEAR_SCORE, SAME_SCORE = 30.0, 2.7  # of one pair at the distance, of one number of a code
GATE = 4.0


def induction_model(*, max_context: int = 131072, dtype: mx.Dtype = mx.float32) -> LlamaModel:
    config = ModelConfig(
        dim=DIM,
        n_layers=2,
        n_heads=1,
        n_kv_heads=1,
        head_dim=HEAD_DIM,
        hidden_dim=CODE,
        vocab_size=CODE,
        norm_eps=1e-6,
        rope_theta=THETA,
        max_context=max_context,
        tied=False,
        kind="llama3",
    )
    arrays = {name: mx.array(array.astype(np.float32)) for name, array in _weights().items()}
    return build_model(config, arrays, dtype=dtype)


def document(n_tokens: int, needles: Mapping[int, int] | None = None) -> list[int]:
    """Return fillers with needles: by the place of the value, which of KEYS stands before it."""
    ids = np.random.RandomState(n_tokens).choice(FILLERS, n_tokens).tolist()
    for place, number in (needles or {}).items():
        # The first token has none before it and hears itself.
        assert 2 <= place < n_tokens
        ids[place - 1 : place + 1] = KEYS[number], VALUES[number]
    return ids


def read(model: LlamaModel, cache: KVCache, ids: Sequence[int], *, chunk: int) -> None:
    """Compute a text by passes of at most chunk tokens."""
    done = 0
    while done < len(ids):
        stop = min(done + min(chunk, cache.pass_limit), len(ids))
        tokens = mx.array(ids[done:stop], dtype=mx.uint32)[None]
        mx.eval(model.hidden(tokens, cache, positions=LAST), cache.arrays)
        done = stop


def ask(model: LlamaModel, cache: KVCache, numbers: Sequence[int]) -> list[int]:
    """Return the tokens that the model puts behind some of KEYS, each asked once, in one pass.

    The cache stays as it is.
    """
    keys = mx.array([[KEYS[number] for number in numbers]])
    logits = model(keys, cache.fork())[0]
    assert mx.isfinite(logits).all().item()
    return np.argmax(np.asarray(logits), axis=-1).tolist()


def _weights() -> Weights:
    """Return the weights under Hugging Face's names, float64."""
    codes, unit = _hadamard(CODE), np.eye(CODE)
    embedding = np.zeros((CODE, DIM))
    embedding[:, CONTENT], embedding[:, ONE] = codes, 1.0
    output = np.zeros((CODE, DIM))
    output[:, ANSWER] = codes
    weights = {"model.embed_tokens.weight": embedding, "lm_head.weight": output}
    weights["model.norm.weight"] = _undone(5)
    for layer, (heard, carried) in enumerate(((HEARD, BEFORE), (FOUND, ANSWER))):
        at = f"model.layers.{layer}"
        q, k = (_near, _same)[layer]()
        v, o = np.zeros((HEAD_DIM, DIM)), np.zeros((DIM, HEAD_DIM))
        v[:CODE, CONTENT], o[heard, :CODE] = unit, unit
        gate, up, down = (np.zeros(size) for size in ((CODE, DIM), (CODE, DIM), (DIM, CODE)))
        gate[:, ONE], up[:, heard] = GATE, unit
        down[carried] = unit * (1 + math.exp(-GATE)) / GATE  # silu(GATE) undone
        weights |= {
            f"{at}.input_layernorm.weight": _undone(1 + 2 * layer),
            f"{at}.self_attn.q_proj.weight": q,
            f"{at}.self_attn.k_proj.weight": k,
            f"{at}.self_attn.v_proj.weight": v,
            f"{at}.self_attn.o_proj.weight": o,
            f"{at}.post_attention_layernorm.weight": _undone(2 + 2 * layer),
            f"{at}.mlp.gate_proj.weight": gate,
            f"{at}.mlp.up_proj.weight": up,
            f"{at}.mlp.down_proj.weight": down,
        }
    return weights


def _near() -> tuple[np.ndarray, np.ndarray]:
    """Return wq and wk that look one token back: the score is a sum of cos((distance - 1) * f)."""
    q, k = np.zeros((HEAD_DIM, DIM)), np.zeros((HEAD_DIM, DIM))
    size = math.sqrt(NEAR_SCORE * math.sqrt(HEAD_DIM))
    angles = 1 / THETA ** (np.arange(FAST) / HALF)
    q[:FAST, ONE], q[HALF : HALF + FAST, ONE] = size * np.cos(angles), -size * np.sin(angles)
    k[:FAST, ONE] = size
    return q, k


def _same() -> tuple[np.ndarray, np.ndarray]:
    """Return wq and wk that compare what is asked with what stood before."""
    q, k = np.zeros((HEAD_DIM, DIM)), np.zeros((HEAD_DIM, DIM))
    size = math.sqrt(SAME_SCORE * math.sqrt(HEAD_DIM))
    q[SLOW, CONTENT] = k[SLOW, BEFORE] = size * np.eye(CODE)
    return q, k


def _undone(n_sections: int) -> np.ndarray:
    """Return the scale of a norm that meets so many full sections and the one."""
    return np.full(DIM, math.sqrt((n_sections * CODE + 1) / DIM))


def _hadamard(size: int) -> np.ndarray:
    if size == 1:
        return np.ones((1, 1))
    half = _hadamard(size // 2)
    return np.block([[half, half], [half, -half]])
