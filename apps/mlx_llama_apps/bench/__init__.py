"""`mlx-llama bench`: how fast a model reads and writes here, in llama-bench's rows.

`cases` says what is measured, `ours` and `peers` do it, `bandwidth` knows the machine, `table`
shows what was found; `shapes` and `random_model` make a model where there is none, `gguf` another
engine's file of it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter, Token

from mlx_llama.errors import OptionError
from mlx_llama.options import ContextOptions, LoadOptions
from mlx_llama_apps import paths
from mlx_llama_apps.flags import CacheFlags, LoadFlags, given
from mlx_llama_apps.progress import remark, shown
from mlx_llama_apps.terminal import StatusLine

if TYPE_CHECKING:
    from mlx_llama.loading import ModelDirectory
    from mlx_llama_apps.bench.cases import Case, Engine
    from mlx_llama_apps.bench.table import Report

PROMPT, GENERATE, DEPTHS, REPETITIONS = 512, 128, (0, 4096), 5
BITS = (2, 3, 4, 5, 6, 8, 16)
LLAMA_CPP = "llama.cpp"


def _whole_numbers(kind: Any, tokens: Sequence[Token]) -> list[int]:
    """Read whole numbers; cyclopts itself would round 3.5."""
    del kind
    for token in tokens:
        if not token.value.isdecimal():
            raise ValueError(f"found {token.value!r}, expected a whole number")
    return [int(token.value) for token in tokens]


Depths = Annotated[list[int] | None, Parameter(consume_multiple=True, converter=_whole_numbers)]


def bench(
    model: str | None = None,
    /,
    *,
    prompt: int | None = None,
    generate: int | None = None,
    depth: Depths = None,
    repetitions: int = REPETITIONS,
    shape: str | None = None,
    bits: int | None = None,
    against: Literal["mlx-lm", "llama.cpp"] | None = None,
    peer: str | None = None,
    peer_model: Path | None = None,
    as_json: Annotated[bool, Parameter(name="--json")] = False,
    markdown: bool = False,
    cache_flags: CacheFlags | None = None,
    load_flags: LoadFlags | None = None,
) -> None:
    """Measure how fast a model reads prompts (pp) and generates (tg), as llama-bench does.

    Ctrl-C ends it; the tests that were done are printed.

    Parameters
    ----------
    model
        a model directory, or the name of one in the models folder
    prompt
        tokens of the prompt that is read; 0 leaves it out (default: 512)
    generate
        tokens that are generated; 0 leaves it out (default: 128)
    depth
        tokens that the context holds before each test; several are several tests (default: 0
        4096, as far as the model goes)
    repetitions
        of each test, after a short one that is not counted (default: 5)
    shape
        measure random weights in the shape of a model, such as llama-3.2-1b, in place of MODEL
    bits
        bits per weight of --shape; 16 packs nothing (default: 4)
    against
        another engine to measure beside this one, in turns: mlx-lm or llama.cpp
    peer
        the Python that has it, or llama-bench (default: this Python; llama-bench on PATH)
    peer_model
        the GGUF file for llama.cpp (default: the same weights are written as one)
    as_json
        print one JSON object
    markdown
        print Markdown
    """
    load_options = LoadOptions(**given(load_flags))
    cache_options = ContextOptions(**given(cache_flags))
    _check_model(model, shape, bits)
    _check_peer(against, peer, peer_model)
    _check_counts(prompt, generate, depth, repetitions)
    if as_json and markdown:
        raise OptionError("--json and --markdown: give one of them")
    rival = _rival(against, peer, peer_model)
    with ExitStack() as stack:
        status = stack.enter_context(StatusLine(after_s=0.3))
        if shape is None:
            folder = paths.resolve_model(model or "")
        else:
            folder = stack.enter_context(_random_model(shape, bits or 4, status))
        directory = _open(folder)
        cases = _cases(directory, prompt, generate, depth)
        options = replace(cache_options, context=max(case.context for case in cases))
        report = _report(directory, shape, load_options, status)
        engines = _engines(stack, directory, rival, load_options, options, status)
        try:
            _measure(report, engines, cases, repetitions, status)
        finally:  # what was done is not lost with an interrupt, or a peer that fails
            status.close()
            _tell(report, len(cases), as_json=as_json, as_markdown=markdown)


def _open(folder: Path) -> ModelDirectory:
    from mlx_llama.loading import open_model_directory

    return open_model_directory(folder)


def _tell(report: Report, n_cases: int, *, as_json: bool, as_markdown: bool) -> None:
    """Print what was measured, if anything was."""
    from mlx_llama_apps.bench import table

    if not report.rows:
        return
    if as_json:
        print(json.dumps(table.as_json(report), ensure_ascii=False, indent=2))
    else:
        table.show(report, as_markdown=as_markdown)
    if len(report.rows) < n_cases:
        remark(f"{len(report.rows)} of {n_cases} tests were done")


def _check_model(model: str | None, shape: str | None, bits: int | None) -> None:
    """Refuse what contradicts itself or could not take effect."""
    from mlx_llama_apps.bench.shapes import shape_named

    if model is None and shape is None:
        raise OptionError(
            "MODEL is missing: give a model directory, or --shape NAME for random weights"
        )
    if model is not None and shape is not None:
        raise OptionError(f"--shape {shape}: takes the place of MODEL {model}; leave one out")
    if shape is None and bits is not None:
        raise OptionError("--bits: does nothing without --shape; leave it out")
    if shape is not None:
        shape_named(shape)
    if bits is not None and bits not in BITS:
        raise OptionError(f"--bits: found {bits}, expected one of {', '.join(map(str, BITS))}")


def _check_peer(against: str | None, peer: str | None, peer_model: Path | None) -> None:
    if against is None and peer is not None:
        raise OptionError("--peer: does nothing without --against; leave it out")
    if peer_model is not None:
        if against != LLAMA_CPP:
            raise OptionError("--peer-model: does nothing without --against llama.cpp")
        if not peer_model.is_file():
            raise OptionError(f"--peer-model {peer_model}: no such file")


def _check_counts(
    prompt: int | None, generate: int | None, depth: Sequence[int] | None, repetitions: int
) -> None:
    for name, value in (("prompt", prompt), ("generate", generate)):
        if value is not None and value < 0:
            raise OptionError(f"--{name}: found {value}, expected 0 or more")
    if prompt == 0 and generate == 0:
        raise OptionError("--prompt 0 --generate 0: nothing to measure")
    if depth is not None and len(set(depth)) < len(depth):
        raise OptionError(f"--depth: {' '.join(map(str, depth))} names one twice")
    if not 1 <= repetitions <= 1000:
        raise OptionError(f"--repetitions: found {repetitions}, expected 1 to 1000")


def _cases(
    directory: ModelDirectory,
    prompt: int | None,
    generate: int | None,
    depths: Sequence[int] | None,
) -> list[Case]:
    """Return the tests; defaults go as far as the model, what is asked for is refused beyond."""
    from mlx_llama_apps.bench.cases import cases_of

    most = directory.config.max_context - 2
    n_prompt = min(PROMPT, most) if prompt is None else prompt
    n_generate = min(GENERATE, most) if generate is None else generate
    longest = max(n_prompt, n_generate)
    if depths is None:
        depths = [depth for depth in DEPTHS if depth + longest <= most] or [0]
    if (deepest := max(depths) + longest) > most:
        raise OptionError(
            f"--depth {max(depths)}: with {longest} tokens behind it that is {deepest}, and the "
            f"model was trained for {most + 2} positions, two of them to begin and end with; lower "
            "--depth, --prompt or --generate"
        )
    return cases_of(n_prompt, n_generate, depths)


@contextmanager
def _random_model(shape: str, bits: int, status: StatusLine) -> Iterator[Path]:
    """Yield a directory of random weights, which is gone afterwards."""
    from mlx_llama_apps.bench.random_model import with_bits, write_random_model
    from mlx_llama_apps.bench.shapes import shape_named

    with _work_folder() as work:
        config = with_bits(shape_named(shape), bits)
        progress = shown(status.show, f"making random weights in the shape of {shape}")
        yield write_random_model(work / f"{shape.lower()}-{bits}bit", config, progress)


@dataclass(frozen=True, slots=True)
class _Rival:
    """A peer to measure beside. file: the GGUF file that the user gave."""

    name: str
    program: str
    file: Path | None


def _rival(against: str | None, peer: str | None, peer_model: Path | None) -> _Rival | None:
    """Find the peer before anything is made for it."""
    from mlx_llama_apps.bench.peers import find_peer

    return None if against is None else _Rival(against, find_peer(against, peer), peer_model)


def _engines(
    stack: ExitStack,
    directory: ModelDirectory,
    rival: _Rival | None,
    load_options: LoadOptions,
    options: ContextOptions,
    status: StatusLine,
) -> list[Engine]:
    """Load the model in every engine; the stack ends them. The peer computes in our dtype."""
    from mlx_llama_apps.bench.ours import OurEngine
    from mlx_llama_apps.bench.peers import open_peer

    ours = OurEngine(directory.path, load_options, options, status)
    stack.callback(ours.close)
    if rival is None:
        return [ours]
    model = stack.enter_context(_peer_model(directory, rival, status))
    status.show(f"loading the model in {rival.name}")
    context = options.context
    assert isinstance(context, int)
    peer = open_peer(
        rival.name,
        rival.program,
        model,
        dtype=str(directory.dtype_with(load_options)).removeprefix("mlx.core."),
        threads=load_options.threads,
        context=context,
    )
    stack.callback(peer.close)
    return [ours, peer]


@contextmanager
def _peer_model(directory: ModelDirectory, rival: _Rival, status: StatusLine) -> Iterator[Path]:
    """Yield what the peer loads: the directory, or a GGUF file, made of it where none is given."""
    if rival.name != LLAMA_CPP:
        yield directory.path
    elif rival.file is not None:
        yield rival.file
    else:
        from mlx_llama_apps.bench.gguf import write_gguf

        with _work_folder() as work:
            progress = shown(status.show, "writing the same weights as GGUF")
            yield write_gguf(directory, work / "model.gguf", progress)


@contextmanager
def _work_folder() -> Iterator[Path]:
    """Yield a folder for files of gigabytes, which is gone afterwards."""
    home = paths.cache_folder() / "bench"
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home, ignore_cleanup_errors=True) as work:
        yield Path(work)


def _report(
    directory: ModelDirectory, shape: str | None, options: LoadOptions, status: StatusLine
) -> Report:
    """Begin the report: the model's facts, and the machine's, whose memory is measured now."""
    import mlx_llama
    from mlx_llama_apps.bench.machine import machine_facts
    from mlx_llama_apps.bench.ours import NAME
    from mlx_llama_apps.bench.table import Report

    status.show("measuring how fast memory is read")
    formats = ", ".join(f"{n} × {how}" for how, n in directory.format_counts.items())
    model = {
        "name": directory.path.name,
        "shape": shape,
        "parameters": directory.config.parameter_count,
        "matrices": formats,
        "weight_bytes": directory.weight_bytes,
        "dtype": str(directory.dtype_with(options)).removeprefix("mlx.core."),
    }
    return Report(model, machine_facts(options), {NAME: mlx_llama.__version__})


def _measure(
    report: Report,
    engines: Sequence[Engine],
    cases: Sequence[Case],
    repetitions: int,
    status: StatusLine,
) -> None:
    """Run every test in turns, so that a slow spell of the machine meets all engines."""
    from mlx_llama_apps.bench.cases import Row

    for number, case in enumerate(cases, 1):
        row = Row(case, {engine.name: [] for engine in engines})
        for repetition in range(repetitions + 1):
            for engine in engines:
                which = f"{repetition} of {repetitions}" if repetition else "warming up"
                status.show(f"{case.name} ({number} of {len(cases)}): {engine.name}, {which}")
                sample = engine.run(case if repetition else case.warm_up)
                if repetition:
                    row.samples[engine.name].append(sample)
        report.rows.append(row)
        report.engines |= {engine.name: engine.version for engine in engines}
        report.process_peaks = {engine.name: engine.process_peak() for engine in engines}
        if (read := engines[0].read_bytes(case)) is not None:
            report.read_bytes[case.name] = read
