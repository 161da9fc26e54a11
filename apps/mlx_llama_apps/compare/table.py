"""The table of `mlx-llama compare`: the two models side by side, then B against A."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_llama_apps.terminal import size, visible

if TYPE_CHECKING:
    from rich.table import Table

    from mlx_llama_apps.compare import Report
    from mlx_llama_quantize.divergence import Distribution, Divergence, Estimate

    Rows = Sequence[tuple[str, ...]]

MEDIAN = "0.5"
WIDE = 80  # columns
NAME_WIDTH = 25  # of the longest name, so that the sections stand in one line


def show(report: Report) -> None:
    """Print the table; sections as llama-perplexity names them."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    for title, rows in _sections(report):
        if title:
            console.print(f"\n{title}", style="bold")
        console.print(_table(rows, is_wide=console.width >= WIDE))


def _sections(report: Report) -> Iterator[tuple[str, Rows]]:
    yield "", [*_models(report)]
    if (found := report.divergence) is not None:
        title = f"Perplexity statistics ({found.n_tokens} tokens, windows of {report.context})"
        yield title, [*_perplexity(found)]
        yield "KL divergence of B from A", [*_distribution("KLD", found.kld, 1, "")]
        yield "Probability of the right token, B minus A", [*_probability(found)]
    if (found := report.accuracy) is not None:
        interval = f"{found.low:+.1%} to {found.high:+.1%}"
        rows = [("B minus A", f"{found.difference:+.1%}"), ("95 % interval", interval)]
        yield f"{found.n_questions} question{'s' if found.n_questions > 1 else ''}", rows


def _table(rows: Rows, *, is_wide: bool) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(min_width=NAME_WIDTH if is_wide else None, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _models(report: Report) -> Iterator[tuple[str, ...]]:
    a, b = report.a, report.b
    yield "", f"A: {visible(Path(a['path']).name)}", f"B: {visible(Path(b['path']).name)}"
    yield "kind", a["kind"], b["kind"]
    yield "parameters", *(f"{x['parameters'] / 1e6:,.1f} M" for x in (a, b))
    yield "bits per weight", *(f"{x['bits_per_weight']:.2f}" for x in (a, b))
    yield "size", *(size(x["bytes"]) for x in (a, b))
    if report.costs is not None:
        rows = (
            ("load", "load_s", lambda x: f"{x:.2f} s"),
            ("prompt", "prompt_tokens_per_s", lambda x: f"{x:.1f} tokens/s"),
            ("answer", "answer_tokens_per_s", lambda x: f"{x:.1f} tokens/s"),
            ("peak memory", "peak_bytes", size),
        )
        for name, field, say in rows:
            found = [getattr(cost, field) for cost in report.costs]
            yield name, *("does not fit" if x is None else say(x) for x in found)
    if report.divergence is not None:
        yield "perplexity", *(_pm(x) for x in (report.divergence.ppl_a, report.divergence.ppl_b))
    if report.accuracy is not None:
        yield "right answers", *(f"{x:.1%}" for x in (report.accuracy.a, report.accuracy.b))


def _perplexity(found: Divergence) -> Iterator[tuple[str, str]]:
    yield "Mean PPL(B)", _pm(found.ppl_b)
    yield "Mean PPL(A)", _pm(found.ppl_a)
    yield "Cor(ln PPL(B), ln PPL(A))", f"{found.correlation:.2%}"
    yield "Mean ln(PPL(B)/PPL(A))", _pm(found.log_ratio)
    yield "Mean PPL(B)/PPL(A)", _pm(found.ratio)
    yield "Mean PPL(B)-PPL(A)", _pm(found.difference)


def _probability(found: Divergence) -> Iterator[tuple[str, str]]:
    yield from _distribution("Δp", found.dp, 100, " %")
    yield "RMS Δp", _pm(found.rms_dp, 100, " %")
    yield "Same top token", _pm(found.same_top, 100, " %")


def _distribution(
    name: str, found: Distribution, scale: float, unit: str
) -> Iterator[tuple[str, str]]:
    yield f"Mean {name}", _pm(found.mean, scale, unit)
    yield f"Maximum {name}", f"{scale * found.maximum:.6f}{unit}"
    for share, value in found.quantiles.items():
        what = "Median" if share == MEDIAN else f"{100 * float(share):.1f} %"
        yield f"{what} {name}", f"{scale * value:.6f}{unit}"
    yield f"Minimum {name}", f"{scale * found.minimum:.6f}{unit}"


def _pm(estimate: Estimate, scale: float = 1, unit: str = "") -> str:
    return f"{scale * estimate.value:.6f} ± {scale * estimate.error:.6f}{unit}"
