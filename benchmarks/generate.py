"""Measures prefill and decode tokens per second against mlx-lm's `stream_generate`.

    python benchmarks/generate.py MODEL [--peer-python PATH] [--prompt-tokens 64] [--tokens 64]

MODEL is a model directory; both engines load it and compute in the dtype that ours chooses. Each
round runs either engine in a process of its own: load, one short answer to warm up, then the
measured one: the same prompt ids, temperature 0, end-of-text tokens ignored. The prefill rate is
prompt tokens over the time to the first token, the decode rate is that of all later tokens. Rates
by CPU time are the steadier ones where other programs run.

Target: neither slower than mlx-lm. PATH is the interpreter of an environment that has mlx-lm.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from measuring import interleave, print_table, ratio, run, spread

ROUNDS, PROMPT_TOKENS, TOKENS = 5, 64, 64
WARM_UP_TOKENS = 2
COLUMNS = {
    "prefill tok/s": "prefill_per_s",
    "prefill tok/CPU s": "prefill_per_cpu_s",
    "decode tok/s": "decode_per_s",
    "decode tok/CPU s": "decode_per_cpu_s",
    "load s": "load_s",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer-python", metavar="PATH")
    parser.add_argument("--prompt-tokens", type=int, default=PROMPT_TOKENS)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--child", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        measured = measure(given.child, given)
        print(json.dumps(measured))
        return
    dtype = chosen_dtype(given.model)
    engines = {"mlx-llama": sys.executable}
    if given.peer_python:
        engines["mlx-lm"] = given.peer_python
    print(
        f"{given.model.name}, {dtype}: {given.prompt_tokens} prompt tokens, {given.tokens} decoded"
    )
    options = [f"--{n}={getattr(given, n.replace('-', '_'))}" for n in ("prompt-tokens", "tokens")]
    common = [__file__, str(given.model), *options, f"--dtype={dtype}"]
    cases = {
        name: partial(run, [python, *common, "--child", name]) for name, python in engines.items()
    }
    report(interleave(given.rounds, cases))


def report(runs: dict[str, Any]) -> None:
    """Print the table, and whether the engines agree on the tokens."""
    told = {name: [json.loads(r.output) for r in results] for name, results in runs.items()}
    rows = []
    for name, results in told.items():
        cells = [spread([r[key] for r in results]) for key in COLUMNS.values()]
        memory = [spread([r["mlx_peak"] / 1e6 for r in results], 0)]
        rows.append([name, *cells, *memory, spread([r.peak_bytes / 1e6 for r in runs[name]], 0)])
    if len(told) == 2:
        ours, peer = told.values()
        ratios = [ratio([r[k] for r in ours], [r[k] for r in peer]) for k in COLUMNS.values()]
        ratios.append(ratio([r["mlx_peak"] for r in ours], [r["mlx_peak"] for r in peer]))
        peaks = [[r.peak_bytes for r in results] for results in runs.values()]
        rows.append(["ours / peer", *ratios, ratio(peaks[0], peaks[1])])
    print_table(["engine", *COLUMNS, "MLX peak MB", "process peak MB"], rows)
    if len({tuple(r["ids"]) for results in told.values() for r in results}) > 1:
        print("the engines chose different tokens")


def chosen_dtype(model: Path) -> str:
    """Ask a child, because what loads MLX here would count as memory of the children."""
    code = (
        "import sys; from pathlib import Path; from mlx_llama import ops, loading\n"
        "d = loading.open_model_directory(Path(sys.argv[1]))\n"
        "s = d.tensors['model.norm.weight'].dtype\n"
        "t = ops.compute_dtype(s, is_quantized=d.is_quantized, asked=None)\n"
        "print(str(t).rpartition('.')[2])"
    )
    return run([sys.executable, "-P", "-c", code, str(model)]).output.strip()


def measure(engine: str, given: argparse.Namespace) -> dict[str, Any]:
    """Load, warm up, answer once; runs in the child."""
    started = perf_counter()
    stream, n_vocab = ENGINES[engine](given.model, given.dtype)
    load_s = perf_counter() - started
    source = random.Random(0)
    prompt = [source.randrange(n_vocab) for _ in range(given.prompt_tokens)]
    list(stream(prompt[:2], WARM_UP_TOKENS))
    import mlx.core as mx

    mx.reset_peak_memory()
    ids, times, cpu_times = [], [perf_counter()], [process_time()]
    for token in stream(prompt, given.tokens):
        times.append(perf_counter())
        cpu_times.append(process_time())
        ids.append(token)
    return {
        "prefill_per_s": len(prompt) / (times[1] - times[0]),
        "prefill_per_cpu_s": len(prompt) / (cpu_times[1] - cpu_times[0]),
        "decode_per_s": (len(ids) - 1) / (times[-1] - times[1]),
        "decode_per_cpu_s": (len(ids) - 1) / (cpu_times[-1] - cpu_times[1]),
        "load_s": load_s,
        "mlx_peak": mx.get_peak_memory(),
        "ids": ids,
    }


def open_ours(model: Path, dtype: str) -> tuple[Any, int]:
    """Return a function that streams token ids, and the number of ordinary tokens."""
    import mlx_llama

    llama = mlx_llama.load(model, dtype=dtype)

    def stream(prompt: Sequence[int], n_tokens: int) -> Iterator[int]:
        for step in llama.stream(prompt, max_tokens=n_tokens, temperature=0.0, ignore_eos=True):
            if step.token_id is not None:
                yield step.token_id

    return stream, llama.config.vocab_size


def open_peer(model: Path, dtype: str) -> tuple[Any, int]:
    """Do the same with mlx-lm."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm import load, stream_generate

    llama, tokenizer = load(str(model))[:2]
    llama.set_dtype(getattr(mx, dtype))
    mx.eval([array for _, array in tree_flatten(llama.parameters())])
    tokenizer.eos_token_ids = set()

    def stream(prompt: Sequence[int], n_tokens: int) -> Iterator[int]:
        for response in stream_generate(llama, tokenizer, list(prompt), max_tokens=n_tokens):
            yield response.token

    return stream, llama.args.vocab_size


ENGINES = {"mlx-llama": open_ours, "mlx-lm": open_peer}

if __name__ == "__main__":
    main()
