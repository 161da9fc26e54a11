"""`mlx-llama bench`: how fast a model reads and writes here, in llama-bench's rows.

`asked` reads what is wanted, `cases` says what is measured, `ours` and `peers` do it, `bandwidth`
knows the machine, `rounding` what rounded activations cost, `table` shows what was found; `shapes`
and `random_model` make a model where there is none, `gguf` another engine's file of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from mlx_llama.errors import OptionError, is_ctrl_c
from mlx_llama.options import INT8, ContextOptions, LoadOptions
from mlx_llama_apps import paths
from mlx_llama_apps.bench.asked import LLAMA_CPP, CaseFlags, PeerFlags, Rival, check_model
from mlx_llama_apps.bench.scratch import work_folder
from mlx_llama_apps.flags import CacheFlags, LoadFlags, given
from mlx_llama_apps.progress import remark, shown
from mlx_llama_apps.terminal import StatusLine

if TYPE_CHECKING:
    from mlx_llama.loading import ModelDirectory
    from mlx_llama_apps.bench.cases import Case, Engine
    from mlx_llama_apps.bench.ours import OurEngine
    from mlx_llama_apps.bench.table import Report

ALL_CASES, NO_PEER = CaseFlags(), PeerFlags()


def bench(
    model: str | None = None,
    /,
    *,
    case_flags: CaseFlags = ALL_CASES,
    shape: str | None = None,
    bits: int | None = None,
    peer_flags: PeerFlags = NO_PEER,
    as_json: Annotated[bool, Parameter(name="--json")] = False,
    markdown: bool = False,
    cache_flags: CacheFlags | None = None,
    load_flags: LoadFlags | None = None,
) -> None:
    """Measure how fast a model reads prompts (pp) and generates (tg), as llama-bench does.

    Ctrl-C ends it; the tests that were done are printed, and which were not.

    Parameters
    ----------
    model
        a model directory, the name of one in the models folder, or "bundled", the guide in the box
    shape
        measure random weights in the shape of a model, such as llama-3.2-1b, in place of MODEL
    bits
        bits per weight of --shape; 16 packs nothing (default: 4)
    as_json
        print one JSON object
    markdown
        print Markdown
    """
    load_options = LoadOptions(**given(load_flags))
    cache_options = ContextOptions(**given(cache_flags))
    check_model(model, shape, bits)
    peer_flags.check()
    case_flags.check()
    if as_json and markdown:
        raise OptionError("--json and --markdown: give one of them")
    if shape is not None:
        _check_shape(shape, bits or 4, case_flags, load_options, cache_options)
    rival = peer_flags.rival()
    with _told(as_json=as_json, as_markdown=markdown) as found, ExitStack() as stack:
        status = stack.enter_context(StatusLine(after_s=0.3))
        directory = _directory(stack, model, shape, bits, status)
        cases = found.cases = case_flags.cases(directory.config.max_context)
        options = replace(cache_options, context=max(case.context for case in cases))
        report = found.report = _report(directory, shape, load_options, status)
        report.model |= {
            "kv_bits": str(options.kv_bits),
            "kv_dtype": _cache_dtype(directory, load_options, options),
            "prefill_chunk": options.prefill_chunk,
        }
        ours, peers = _engines(stack, directory, rival, load_options, options, status)
        if left_out := case_flags.left_out(directory.config.max_context):
            status.remark(left_out)
        _measure(report, [ours, *peers], cases, case_flags.repetitions, status)
        if load_options.activations == INT8:
            report.rounding = ours.cost_of_rounding(status)


def _check_shape(
    shape: str, bits: int, case_flags: CaseFlags, load: LoadOptions, options: ContextOptions
) -> None:
    """Raise OptionError for what a model of random weights could not do, before it is made."""
    from mlx_llama_apps.bench.random_model import require, with_bits
    from mlx_llama_apps.bench.shapes import shape_named

    config = with_bits(shape_named(shape), bits)
    cases = case_flags.cases(config.max_context)
    require(config, load, replace(options, context=max(case.context for case in cases)))


def _directory(
    stack: ExitStack, model: str | None, shape: str | None, bits: int | None, status: StatusLine
) -> ModelDirectory:
    """Open the model, or make one, which is gone with the stack."""
    from mlx_llama.loading import open_model_directory

    if shape is None:
        return open_model_directory(paths.resolve_model(model or ""))
    return open_model_directory(stack.enter_context(_random_model(shape, bits or 4, status)))


@dataclass(slots=True)
class _Found:
    """What is to be measured, as far as that is known, and what was."""

    cases: Sequence[Case] = ()
    report: Report | None = None

    def left(self) -> str:
        """Say which tests were done, and which were not."""
        if self.report is None:
            return "no test was done"
        done = len(self.report.rows)
        missing = [case.name for case in self.cases[done:]]
        if self.report.model["activations"] == INT8:  # they are measured last
            missing.append("what rounded activations cost")
        said = f"{done} of {len(self.cases)} tests were done"
        return f"{said}, not {', '.join(missing)}" if missing else said


@contextmanager
def _told(*, as_json: bool, as_markdown: bool) -> Iterator[_Found]:
    """Print at the end what was measured; an interrupt, or a peer that fails, costs none of it."""
    from mlx_llama_apps.bench import table

    found = _Found()
    try:
        yield found
    except BaseException as error:
        if found.report is not None and found.report.rows:
            table.show(found.report, as_json=as_json, as_markdown=as_markdown)
            remark(found.left())
        elif is_ctrl_c(error):
            remark(found.left())
        raise
    assert found.report is not None
    table.show(found.report, as_json=as_json, as_markdown=as_markdown)


@contextmanager
def _random_model(shape: str, bits: int, status: StatusLine) -> Iterator[Path]:
    """Yield a directory of random weights, which is gone afterwards."""
    from mlx_llama_apps.bench.random_model import with_bits, write_random_model
    from mlx_llama_apps.bench.shapes import shape_named

    with work_folder() as work:
        config = with_bits(shape_named(shape), bits)
        progress = shown(status.show, f"making random weights in the shape of {shape}")
        yield write_random_model(work / f"{shape.lower()}-{bits}bit", config, progress)


def _engines(
    stack: ExitStack,
    directory: ModelDirectory,
    rival: Rival | None,
    load_options: LoadOptions,
    options: ContextOptions,
    status: StatusLine,
) -> tuple[OurEngine, list[Engine]]:
    """Load the model in every engine; the stack ends them. A peer computes in our dtype."""
    from mlx_llama.dtypes import name_of
    from mlx_llama_apps.bench.ours import OurEngine
    from mlx_llama_apps.bench.peers import open_peer

    ours = OurEngine(directory.path, load_options, options, status)
    stack.callback(ours.close)
    if rival is None:
        return ours, []
    model = stack.enter_context(_peer_model(directory, rival, status))
    status.show(f"loading the model in {rival.name}")
    context = options.context
    assert isinstance(context, int)
    peer = open_peer(
        rival.name,
        rival.program,
        model,
        dtype=name_of(directory.dtype_with(load_options)),
        threads=load_options.threads,
        context=context,
    )
    stack.callback(peer.close)
    return ours, [peer]


@contextmanager
def _peer_model(directory: ModelDirectory, rival: Rival, status: StatusLine) -> Iterator[Path]:
    """Yield what the peer loads: the directory, or a GGUF file, made of it where none is given."""
    if rival.name != LLAMA_CPP:
        yield directory.path
    elif rival.file is not None:
        yield rival.file
    else:
        from mlx_llama_apps.bench.gguf import write_gguf

        with work_folder() as work:
            progress = shown(status.show, "writing the same weights as GGUF")
            yield write_gguf(directory, work / "model.gguf", progress)


def _report(
    directory: ModelDirectory, shape: str | None, options: LoadOptions, status: StatusLine
) -> Report:
    """Begin the report: the model's facts, and the machine's, whose memory is measured now."""
    import mlx_llama
    from mlx_llama.dtypes import name_of
    from mlx_llama_apps.bench.machine import machine_facts
    from mlx_llama_apps.bench.ours import NAME
    from mlx_llama_apps.bench.table import Report

    activations = directory.activations_with(options)  # refused before anything is measured
    status.show("measuring how fast memory is read")
    formats = ", ".join(f"{n} × {how}" for how, n in directory.format_counts.items())
    model = {
        "name": directory.path.name,
        "shape": shape,
        "parameters": directory.config.parameter_count,
        "matrices": formats,
        "weight_bytes": directory.weight_bytes,
        "dtype": name_of(directory.dtype_with(options)),
        "activations": activations,
    }
    return Report(model, machine_facts(options), {NAME: mlx_llama.__version__})


def _cache_dtype(directory: ModelDirectory, load: LoadOptions, options: ContextOptions) -> str:
    """Name the dtype of plain cached numbers; OptionError where the bits cannot be had."""
    from mlx_llama.cache import KVBits
    from mlx_llama.dtypes import name_of
    from mlx_llama.ops import cache_dtype

    found = cache_dtype(directory.dtype_with(load), KVBits(*options.key_value_bits))
    return name_of(found)


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
