"""`mlx-llama compare`: two models of one vocabulary over one text, in one table.

`costs` measures speed and memory of each, `table` shows what was found, `plot` draws it.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from mlx_llama.errors import CheckpointError, OptionError
from mlx_llama.options import DTYPE_NAMES
from mlx_llama.strict_json import json_text
from mlx_llama_apps import paths
from mlx_llama_apps.inference import Inference
from mlx_llama_apps.progress import remark, shown
from mlx_llama_apps.terminal import StatusLine, read_stdin

if TYPE_CHECKING:
    from mlx_llama.loading import ModelDirectory
    from mlx_llama_apps.compare.costs import Costs
    from mlx_llama_quantize.comparison import Comparison
    from mlx_llama_quantize.divergence import Divergence
    from mlx_llama_quantize.questions import Accuracy, Question
    from mlx_llama_quantize.subject import Subject

    Pair = tuple[ModelDirectory, ModelDirectory]

CONTEXT = 512  # llama-perplexity's
FEW_TOKENS = 1000


@dataclass(frozen=True, slots=True)
class Report:
    """What was found. divergence: None without a text; accuracy: None without questions."""

    a: dict[str, Any]
    b: dict[str, Any]
    costs: tuple[Costs, Costs] | None
    context: int
    divergence: Divergence | None
    accuracy: Accuracy | None


def compare(
    a: str,
    b: str,
    /,
    *,
    text: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    context: int = CONTEXT,
    questions: Path | None = None,
    plot: Path | None = None,
    dtype: str | None = None,
    no_costs: bool = False,
    as_json: Annotated[bool, Parameter(name="--json")] = False,
) -> None:
    """Compare a model with another of the same vocabulary: its teacher, or what it was made from.

    What is done is kept: after Ctrl-C the same command goes on where it stopped.

    Parameters
    ----------
    a
        the base: a model directory, the name of one in the models folder, or "bundled", the guide
        in the box
    b
        the model that is judged
    text
        a UTF-8 text that neither was trained on; - reads standard input
    context
        tokens of a window; the second half of each is scored, as llama-perplexity does
        (default: 512)
    questions
        a JSONL file of questions with choices and answer, or a pattern: adds accuracy
    plot
        an SVG, PNG or PDF file to draw the divergence into
    dtype
        dtype of both models' activations: bfloat16, float16 or float32 (default: what suits each)
    no_costs
        leave out speed and memory
    as_json
        print one JSON object
    """
    from mlx_llama_quantize.divergence import summarize

    _check(text, questions, plot, dtype, context)
    directories, subjects = _opened(a, b)
    asked = _read_questions(questions)
    with StatusLine(after_s=0.3) as status, ExitStack() as stack:
        comparison = None if text is None else _comparison(subjects, text, context, dtype, status)
        if comparison is not None:  # an earlier run's scores are kept while costs are measured, too
            stack.enter_context(comparison.told_when_stopped())
        costs = None if no_costs else _costs(directories, dtype, status)
        scores = None if comparison is None else _scores(comparison, status)
        accuracy = None if asked is None else _accuracy(directories, asked, dtype, status)
    report = Report(
        _facts(directories[0]),
        _facts(directories[1]),
        costs=costs,
        context=0 if comparison is None else comparison.windows.context,
        divergence=None if scores is None else summarize(scores),
        accuracy=accuracy,
    )
    _tell(report, scores, plot, as_json=as_json)


def _opened(a: str, b: str) -> tuple[Pair, tuple[Subject, Subject]]:
    """Open both models. Raises CheckpointError for two vocabularies."""
    from mlx_llama.loading import open_model_directory
    from mlx_llama_quantize.comparison import require_one_vocabulary
    from mlx_llama_quantize.subject import Subject

    one, other = (open_model_directory(paths.resolve_model(name)) for name in (a, b))
    subjects = (Subject.of_directory(one), Subject.of_directory(other))
    require_one_vocabulary(*subjects)
    return (one, other), subjects


def _tell(report: Report, scores: Any, plot: Path | None, *, as_json: bool) -> None:
    """Draw the scores where a plot is wanted, and print what was found."""
    from mlx_llama_apps.compare import plot as plotting
    from mlx_llama_apps.compare import table

    if plot is not None and scores is not None:
        plotting.draw(plot, scores, report)
    if as_json:
        print(json_text(asdict(report), indent=2))
    else:
        table.show(report)


def _check(
    text: str | None, questions: Path | None, plot: Path | None, dtype: str | None, context: int
) -> None:
    """Refuse what cannot work before anything is read."""
    from mlx_llama_apps.compare import plot as plotting
    from mlx_llama_quantize.windows import LEAST_CONTEXT

    if text is None and questions is None:
        raise OptionError("compare: nothing to compare on; give --text FILE, --questions or both")
    if context < LEAST_CONTEXT:
        raise OptionError(f"--context: found {context}, expected {LEAST_CONTEXT} or more")
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise OptionError(f"--dtype: found {dtype!r}, expected one of {', '.join(DTYPE_NAMES)}")
    if plot is not None:
        if text is None:
            raise OptionError("--plot: does nothing without --text; leave it out")
        plotting.check(plot)


def _read_questions(path: Path | None) -> list[Question] | None:
    from mlx_llama_quantize.questions import read_questions

    return None if path is None else read_questions(path)


def _comparison(
    subjects: tuple[Subject, Subject],
    text: str,
    context: int,
    dtype: str | None,
    status: StatusLine,
) -> Comparison:
    from mlx_llama_quantize.comparison import Comparison
    from mlx_llama_quantize.windows import cut_windows

    least = min(subject.config.max_context for subject in subjects)
    if context > least:
        raise OptionError(f"--context {context}: the models were trained for {least} positions")
    tokenizer = subjects[0].tokenizer
    ids = tokenizer.encode(_read_text(text))
    windows = cut_windows(ids, bos_id=tokenizer.bos_id, context=context)
    comparison = Comparison(
        *subjects,
        windows,
        dtype=dtype,
        states=paths.cache_folder() / "compare",
        on_note=status.remark,
    )
    if windows.dropped:
        remark(f"the last {windows.dropped} of {len(ids)} tokens fill no window: left out")
    if (n_scored := len(windows) * windows.n_scored) < FEW_TOKENS:
        remark(f"{n_scored} tokens are scored, too few to trust: give some thousand words")
    if not comparison.is_resident:
        remark("both models do not fit into memory: each is read one layer at a time")
    if comparison.done:
        remark(f"going on behind {comparison.done} of {len(windows)} windows")
    return comparison


def _read_text(text: str) -> str:
    if text == "-":
        return read_stdin()
    path = Path(text)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 text at byte {error.start}") from error


def _costs(directories: Pair, dtype: str | None, status: StatusLine) -> tuple[Costs, Costs]:
    from mlx_llama_apps.compare.costs import measure

    found = [measure(directory, dtype, status) for directory in directories]
    return found[0], found[1]


def _scores(comparison: Comparison, status: StatusLine) -> Any:
    """Score the text on the inference thread; Ctrl-C ends the wait at once."""
    with Inference(lambda: comparison) as inference:
        progress = shown(status.show, "comparing")
        return inference.call(lambda state: state.run(on_progress=progress))


def _accuracy(
    directories: Pair,
    questions: list[Question],
    dtype: str | None,
    status: StatusLine,
) -> Accuracy:
    from mlx_llama import load
    from mlx_llama_quantize.questions import answer_questions, summarize_answers

    progress = shown(status.show, "asking")
    done = 0

    def on_question() -> None:
        nonlocal done
        done += 1
        progress(done, 2 * len(questions))

    answers: list[list[bool]] = []
    for directory in directories:
        with Inference(lambda directory=directory: load(directory, dtype=dtype)) as inference:
            answers.append(
                inference.call(
                    lambda llama: answer_questions(llama, questions, on_question=on_question)
                )
            )
    return summarize_answers(*answers)


def _facts(directory: ModelDirectory) -> dict[str, Any]:
    config = directory.config
    return {
        "path": str(directory.path),
        "kind": directory.kind.value,
        "parameters": config.parameter_count,
        "bits_per_weight": round(8 * directory.weight_bytes / config.parameter_count, 4),
        "bytes": directory.weight_bytes,
    }
