"""mlx-lm as a peer: run by the interpreter that has it, as a program; imports nothing of ours.

Takes a model directory and a dtype ("" leaves the weights as they are). Says when it is ready, then
answers each test, a line of JSON, with a line of JSON.
"""

import json
import os
import random
import sys
from time import perf_counter
from typing import Any

FILLED_AT_ONCE = 1024


def main() -> None:
    """Answer until the parent ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints
    model, dtype = open_model(*sys.argv[1:3])
    import mlx_lm  # pyright: ignore[reportMissingImports]

    version = f"{getattr(mlx_lm, '__version__', '')}, {dtype}"
    print(json.dumps({"version": version}), file=answers)
    for line in sys.stdin:
        print(json.dumps(measure(model, **json.loads(line))), file=answers)


def open_model(path: str, dtype: str) -> tuple[Any, str]:
    """Load the directory; return the model and the dtype of its activations."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm import load  # pyright: ignore[reportMissingImports]

    model = load(path)[0]
    if dtype:
        model.set_dtype(getattr(mx, dtype))
    mx.eval([array for _, array in tree_flatten(model.parameters())])
    norm = dict(tree_flatten(model.parameters()))["model.norm.weight"]
    return model, str(norm.dtype).rpartition(".")[2]


def measure(model: Any, kind: str, n_tokens: int, depth: int) -> dict:
    """Run one test and return what it took."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step  # pyright: ignore[reportMissingImports]
    from mlx_lm.models.cache import make_prompt_cache  # pyright: ignore[reportMissingImports]

    cache = make_prompt_cache(model)
    fill(model, cache, depth)
    n_new, n_answer = (n_tokens, 1) if kind == "pp" else (1, n_tokens + 1)
    ids = mx.array(random.Random(0).choices(range(model.args.vocab_size), k=n_new))
    mx.eval(ids)
    mx.reset_peak_memory()
    times = [perf_counter()]
    for _ in generate_step(ids, model, max_tokens=n_answer, prompt_cache=cache):
        times.append(perf_counter())
    seconds = times[1] - times[0] if kind == "pp" else times[n_answer] - times[1]
    return {"seconds": seconds, "peak_bytes": mx.get_peak_memory()}


def fill(model: Any, cache: list, depth: int) -> None:
    """Pretend that a text of so many tokens has been read."""
    import mlx.core as mx

    args, dtype = model.args, model.model.norm.weight.dtype
    head_dim = getattr(args, "head_dim", None) or args.hidden_size // args.num_attention_heads
    heads = args.num_key_value_heads or args.num_attention_heads
    rows = mx.random.normal((2, 1, heads, min(depth, FILLED_AT_ONCE), head_dim)).astype(dtype)
    for start in range(0, depth, FILLED_AT_ONCE):
        n_tokens = min(FILLED_AT_ONCE, depth - start)
        for layer in cache:
            layer.update_and_fetch(*rows[..., :n_tokens, :])
        mx.eval([layer.state for layer in cache])


if __name__ == "__main__":
    main()
