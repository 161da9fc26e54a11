"""Measures caches at depth against mlx-lm's, and prefills of 131072 tokens.

    python benchmarks/context.py depths MODEL [--peer-python PATH] [--contexts 1024 8192 ...]
    python benchmarks/context.py prefill MODEL ONE_LAYER_MODEL

`depths`: each cache is filled directly with random keys and values, all but the end of a context;
then a slice of prompt is prefilled and tokens are decoded. Both engines work on the same weights in
the same dtype. Each round runs every cache in a process of its own. Peak memory is MLX's count from
the filled cache on, less the weights.

`prefill`: a whole prompt of 131072 tokens, through a small rotating cache on MODEL and through the
full cache on ONE_LAYER_MODEL, a line for every 8192 tokens. The last layer attends for the newest
token of a slice alone, so that one layer takes little else than what the cache costs: a copy of it
in every slice would be most of the time, and twice the memory.

Targets, at the same bits: never more memory than mlx-lm, never slower in decode; prefill with a
packed cache at most 1.15 times as long as with a plain one; 8 bits below 60 % of the plain peak at
32K. PATH is the interpreter of an environment that has mlx-lm.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from measuring import Run, interleave, print_table, ratio, run, spread

ROUNDS = 3
CONTEXTS = (1024, 8192, 32768, 131072)
CHUNK, TOKENS, WARM_UP_TOKENS = 128, 16, 2
ROTATING = "rotating"
CASES = ("16 bits", "8 bits", "4 bits", ROTATING)
CAPACITY = 1024  # of the rotating cache
KEEP = 4
FILLED_AT_ONCE = 1024
PEER = "mlx-lm "
QUIET_WAIT_S = 2  # of so many runs each
PIECE = 8192
COLUMNS = {
    "prefill tok/s": "prefill_per_s",
    "tok/CPU s": "prefill_per_cpu_s",
    "decode tok/s": "decode_per_s",
    "decode tok/CPU s": "decode_per_cpu_s",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    depths = commands.add_parser("depths")
    depths.add_argument("model", type=Path)
    depths.add_argument("--peer-python", metavar="PATH")
    depths.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    depths.add_argument("--dtype", default="float32")
    depths.add_argument("--rounds", type=int, default=ROUNDS)
    depths.add_argument("--child", help=argparse.SUPPRESS)
    depths.set_defaults(action=measure_depths)
    prefill = commands.add_parser("prefill")
    prefill.add_argument("model", type=Path)
    prefill.add_argument("one_layer_model", type=Path)
    prefill.add_argument("--tokens", type=int, default=CONTEXTS[-1])
    prefill.add_argument("--child", choices=PREFILLS, help=argparse.SUPPRESS)
    prefill.set_defaults(action=measure_prefills)
    given = parser.parse_args()
    given.action(given)


# --- at depth ------------------------------------------------------------------------------------


def measure_depths(given: argparse.Namespace) -> None:
    """Print one table for each context; or, in a child, measure one cache."""
    if given.child:
        print(json.dumps(measure_cache(given.child, given)))
        return
    cases = dict.fromkeys(CASES, sys.executable)
    if given.peer_python:
        cases |= {PEER + name: given.peer_python for name in CASES if name != ROTATING}
    for context in given.contexts:
        print(f"\n{given.model.name}, {given.dtype}, {CHUNK} + {TOKENS} tokens up to {context}")
        command = [__file__, "depths", str(given.model), f"--dtype={given.dtype}"]
        command += ["--contexts", str(context), "--child"]
        runs = {name: partial(run, [python, *command, name]) for name, python in cases.items()}
        report_depth(interleave(given.rounds, runs, quiet_wait_s=QUIET_WAIT_S))


def report_depth(runs: dict[str, list[Run]]) -> None:
    """Print what each cache did, then our caches against those that they are measured by."""
    told = {name: [json.loads(run.output) for run in results] for name, results in runs.items()}
    keys = [*COLUMNS.values(), "peak"]
    values = {
        name: {key: [result[key] for result in results] for key in keys}
        for name, results in told.items()
    }
    rows = []
    for name, of in values.items():
        digits = [0 if min(of[key]) >= 100 else 2 for key in COLUMNS.values()]
        cells = [spread(of[key], n) for key, n in zip(COLUMNS.values(), digits, strict=True)]
        rows.append([name, *cells, spread([peak / 1e6 for peak in of["peak"]], 1)])
    pairs = [(name, PEER + name) for name in CASES if PEER + name in values]
    pairs += [(name, CASES[0]) for name in CASES[1:]]
    for name, base in pairs:
        ratios = [ratio(values[name][key], values[base][key]) for key in keys]
        rows.append([f"{name} / {base}", *ratios])
    print_table(["cache", *COLUMNS, "peak MB"], rows)


def measure_cache(case: str, given: argparse.Namespace) -> dict[str, float]:
    """Fill a cache, warm up, answer once; runs in the child."""
    import mlx.core as mx

    (context,) = given.contexts
    engine = OpenPeer if case.startswith(PEER) else OpenOurs
    opened = engine(given.model, given.dtype, case.removeprefix(PEER), context)
    mx.clear_cache()
    weights = mx.get_active_memory()
    source = random.Random(0)
    # The engines compute one step more than they are asked for.
    ids = [source.randrange(opened.n_vocab) for _ in range(context - TOKENS - 1)]
    list(opened.stream(ids[:CHUNK], 0, WARM_UP_TOKENS))
    opened.fill(ids[:-CHUNK])
    mx.clear_cache()
    mx.reset_peak_memory()
    times, cpu_times = [perf_counter()], [process_time()]
    for _ in opened.stream(ids, len(ids) - CHUNK, TOKENS + 1):
        times.append(perf_counter())
        cpu_times.append(process_time())
    return {
        "prefill_per_s": CHUNK / (times[1] - times[0]),
        "prefill_per_cpu_s": CHUNK / (cpu_times[1] - cpu_times[0]),
        "decode_per_s": TOKENS / (times[-1] - times[1]),
        "decode_per_cpu_s": TOKENS / (cpu_times[-1] - cpu_times[1]),
        "peak": mx.get_peak_memory() - weights,
    }


class OpenOurs:
    """A session whose cache is filled by hand."""

    def __init__(self, model: Path, dtype: str, case: str, context: int) -> None:
        import mlx_llama

        self.llama = mlx_llama.load(model, dtype=dtype)
        self.n_vocab = self.llama.config.vocab_size
        self.options: dict[str, Any] = {"context": context, "prefill_chunk": CHUNK}
        if case == ROTATING:
            self.options |= {"on_full": "slide", "context": min(context, CAPACITY), "keep": KEEP}
        else:
            self.options["kv_bits"] = int(case.partition(" ")[0])
        self.session = self.llama.session(**self.options)

    def fill(self, ids: Sequence[int]) -> None:
        """Pretend that these ids have been prefilled."""
        import mlx.core as mx

        config = self.llama.config
        self.session = self.llama.session(**self.options)
        cache = self.session.cache
        if cache.slides:
            cache.keep_first(KEEP)
        cache.reserve(len(ids) + CHUNK + TOKENS)  # as if the whole prompt had been given
        while cache.offset < len(ids):
            n_tokens = min(FILLED_AT_ONCE, len(ids) - cache.offset)
            cache.begin(n_tokens)
            for layer in range(config.n_layers):
                shape = (2, 1, config.n_kv_heads, n_tokens, config.head_dim)
                cache.append(layer, *mx.random.normal(shape).astype(self.llama.dtype))
            cache.advance(n_tokens)
            mx.eval(cache.arrays)
        self.session.tokens = list(ids)

    def stream(self, ids: Sequence[int], n_cached: int, n_tokens: int) -> Iterator[int]:
        """Yield the tokens that follow ids, of which the first n_cached are cached."""
        assert len(self.session.tokens) == n_cached
        for step in self.session.complete(
            ids, max_tokens=n_tokens, temperature=0.0, ignore_eos=True
        ):
            if step.token_id is not None:
                yield step.token_id


class OpenPeer:
    """mlx-lm's model, its caches and its `generate_step`."""

    def __init__(self, model: Path, dtype: str, case: str, context: int) -> None:
        import mlx.core as mx
        from mlx.utils import tree_flatten
        from mlx_lm import load

        self.dtype = getattr(mx, dtype)
        self.model, *_ = load(str(model))
        self.model.set_dtype(self.dtype)
        mx.eval([array for _, array in tree_flatten(self.model.parameters())])
        self.n_vocab = self.model.args.vocab_size
        self.bits, self.context = int(case.partition(" ")[0]), context
        self.caches = self.new_caches()

    def new_caches(self) -> list[Any]:
        """Make the empty caches of all layers."""
        from mlx_lm.models.cache import KVCache, QuantizedKVCache

        plain = self.bits == 16
        return [
            KVCache() if plain else QuantizedKVCache(group_size=64, bits=self.bits)
            for _ in self.model.layers
        ]

    def fill(self, ids: Sequence[int]) -> None:
        """Pretend that these ids have been prefilled."""
        import mlx.core as mx

        args = self.model.args
        self.caches = self.new_caches()
        for cache in self.caches:
            # Filled whole and trimmed, so that what follows need not grow and copy.
            while cache.offset < self.context:
                n_tokens = min(FILLED_AT_ONCE, self.context - cache.offset)
                shape = (2, 1, args.num_key_value_heads, n_tokens, args.head_dim)
                cache.update_and_fetch(*mx.random.normal(shape).astype(self.dtype))
                mx.eval(cache.state[:2])
            cache.trim(self.context - len(ids))

    def stream(self, ids: Sequence[int], n_cached: int, n_tokens: int) -> Iterator[int]:
        """Yield the tokens that follow ids, of which the first n_cached are cached."""
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        prompt = mx.array(ids[n_cached:], dtype=mx.uint32)
        steps = generate_step(
            prompt,
            self.model,
            prompt_cache=self.caches,
            max_tokens=n_tokens,
            prefill_step_size=CHUNK,
        )
        for token, _ in steps:
            yield token


# --- whole prompts -------------------------------------------------------------------------------


def measure_prefills(given: argparse.Namespace) -> None:
    """Print a table for each prefill; or, in a child, one JSON line of marks."""
    if given.child:
        model, options = PREFILLS[given.child]
        print(json.dumps(prefill(getattr(given, model), given.tokens, options)))
        return
    command = [sys.executable, __file__, "prefill", str(given.model), str(given.one_layer_model)]
    for name, (model, _) in PREFILLS.items():
        finished = run([*command, f"--tokens={given.tokens}", f"--child={name}"])
        print(f"\n{getattr(given, model).name}, float32, {name} cache, {given.tokens} tokens")
        print(f"\nprocessors taken by other programs: {finished.others:.2f}\n")
        report_prefill(json.loads(finished.output))


def report_prefill(marks: list[dict[str, float]]) -> None:
    """Print what every piece of the prompt took."""
    rows = []
    for before, mark in pairwise(marks):
        n_tokens = mark["tokens"] - before["tokens"]
        rates = [n_tokens / (mark[key] - before[key]) for key in ("s", "cpu_s")]
        sizes = [mark["cache"], mark["peak"] - mark["cache"]]
        cells = [f"{mark['tokens']:.0f}", *(f"{rate:.0f}" for rate in rates)]
        rows.append([*cells, *(f"{size / 1e6:.1f}" for size in sizes)])
    print_table(["tokens", "tok/s", "tok/CPU s", "cache MB", "peak beyond it MB"], rows)


class Marks:
    """What had been used when so many tokens were done; peak memory without the weights."""

    def __init__(self) -> None:
        import mlx.core as mx

        mx.clear_cache()
        self.weights = mx.get_active_memory()
        self.found: list[dict[str, float]] = []
        self.add(0, 0)

    def add(self, n_tokens: int, cache_bytes: int) -> None:
        """Note what has been used so far."""
        import mlx.core as mx

        self.found.append(
            {
                "tokens": n_tokens,
                "s": perf_counter(),
                "cpu_s": process_time(),
                "cache": cache_bytes,
                "peak": mx.get_peak_memory() - self.weights,
            }
        )
        mx.reset_peak_memory()


def prefill(model: Path, n_tokens: int, options: dict[str, Any]) -> list[dict[str, float]]:
    """Answer a prompt with one token, as any session does."""
    import mlx_llama

    llama = mlx_llama.load(model, dtype="float32")
    session = llama.session(prefill_chunk=CHUNK, **options)
    marks = Marks()

    def on_prefill(done: int, total: int) -> None:
        if done % PIECE == 0 or done == total:
            marks.add(done, session.cache.nbytes)

    source = random.Random(0)
    # The last position is the answer's.
    ids = [source.randrange(llama.config.vocab_size) for _ in range(n_tokens - 1)]
    list(session.complete(ids, on_prefill=on_prefill, max_tokens=1, temperature=0.0))
    return marks.found


PREFILLS: dict[str, tuple[str, dict[str, Any]]] = {
    "rotating": ("model", {"context": CAPACITY, "on_full": "slide", "keep": KEEP}),
    "full": ("one_layer_model", {"context": "max"}),
}

if __name__ == "__main__":
    main()
