"""What `mlx-llama bench` prints: a table for a terminal, the same in Markdown, or JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from mlx_llama.options import PLAIN_BITS
from mlx_llama.strict_json import json_text
from mlx_llama_apps.bench.cases import Row
from mlx_llama_apps.inference import slower
from mlx_llama_apps.terminal import size, visible, write_line

if TYPE_CHECKING:
    from rich.table import Table

    from mlx_llama_apps.bench.rounding import Cost

    Cells = Sequence[Sequence[str]]

OVER = 1.02  # of the measured bandwidth: more than noise


@dataclass(slots=True)
class Report:
    """What was found. model and machine: facts by name. engines: name to version, ours first.

    read_bytes: by test, what generating a token reads. bandwidth, chip_bandwidth: bytes a second.
    process_peaks: by engine, bytes. rounding: None where activations are not rounded.
    """

    model: dict[str, Any]
    machine: dict[str, Any]
    engines: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    read_bytes: dict[str, int] = field(default_factory=dict)
    process_peaks: dict[str, int | None] = field(default_factory=dict)
    rounding: Cost | None = None

    @property
    def ours(self) -> str:
        """Name of our engine."""
        return next(iter(self.engines))

    @property
    def peer(self) -> str | None:
        """Name of the engine beside ours."""
        return next((name for name in self.engines if name != self.ours), None)

    def bytes_per_s(self, row: Row) -> float | None:
        """Return how fast a test reads weights and cache; None for prompts, which compute."""
        read = self.read_bytes.get(row.case.name)
        return None if read is None else read * row.mean(self.ours)

    def share(self, row: Row, of: str) -> float | None:
        """Return that as a share of one of the machine's bandwidths."""
        rate, most = self.bytes_per_s(row), self.machine[of]
        return None if rate is None or most is None else rate / most


def json_of(report: Report) -> dict[str, Any]:
    """Return the report as JSON holds it: bytes, seconds, tokens per second."""
    return {
        "model": report.model,
        "machine": report.machine,
        "engines": [
            {"name": name, "version": version, "process_peak_bytes": report.process_peaks.get(name)}
            for name, version in report.engines.items()
        ],
        "tests": [_test(report, row) for row in report.rows],
        "rounding": None if report.rounding is None else report.rounding.as_json(),
    }


def _test(report: Report, row: Row) -> dict[str, Any]:
    found = {
        "name": row.case.name,
        **asdict(row.case),
        "read_bytes_per_token": report.read_bytes.get(row.case.name),
        "read_bytes_per_s": report.bytes_per_s(row),
        "share_of_bandwidth": report.share(row, "bandwidth"),
        "share_of_chip": report.share(row, "chip_bandwidth"),
        "engines": {
            name: {
                "tokens_per_s": row.mean(name),
                "deviation": row.deviation(name),
                "repetitions": row.rates(name),
                "first_token_s": row.first_token_s(name),
                "peak_bytes": row.peak_bytes(name),
            }
            for name in row.samples
        },
    }
    if report.peer is not None:
        found["ratio"] = row.ratio(report.ours, report.peer)
    return found


def show(report: Report, *, as_json: bool = False, as_markdown: bool = False) -> None:
    """Print the table with what it needs to be understood, or all as JSON."""
    if as_json:
        print(json_text(json_of(report), indent=2))
        return
    header, rows = _columns(report), [_cells(report, row) for row in report.rows]
    kept = [n for n in range(len(header)) if any(row[n] for row in rows)]  # no empty columns
    cells = [[line[n] for n in kept] for line in (header, *rows)]
    if as_markdown:
        print("\n".join(_about(report)) + "\n")
        print(_markdown(cells))
        return
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    for line in _about(report):
        write_line(line, sys.stdout)
    n_speeds = 2 if report.peer is None else 4
    halves = [[line[:n_speeds] for line in cells], [[line[0], *line[n_speeds:]] for line in cells]]
    for tables in ([cells], halves):  # what is too wide becomes two
        if all(_width(each) <= console.width for each in tables):
            for each in tables:
                console.print()
                console.print(_table(each))
            return
    for row in cells[1:]:
        console.print(f"\n[bold]{row[0]}", markup=True)
        console.print(_stacked(cells[0][1:], row[1:]))


def _width(cells: Cells) -> int:
    """Return the columns of the screen that a table takes, two spaces between its own."""
    return sum(max(map(len, column)) + 2 for column in zip(*cells, strict=True)) - 2


def _stacked(names: Sequence[str], values: Sequence[str]) -> Table:
    """Return a row's values under each other."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 0))
    for name, value in zip(names, values, strict=True):
        if value:
            table.add_row(f"  {name}", value)
    return table


def _table(cells: Cells) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for n, name in enumerate(cells[0]):
        table.add_column(name, justify="left" if n == 0 else "right", no_wrap=True)
    for row in cells[1:]:
        table.add_row(*row)
    return table


def _about(report: Report) -> Iterator[str]:
    """Yield what was measured, on what, and the peaks of the processes."""
    model, machine = report.model, report.machine
    yield visible(
        f"{model['name']}: {model['parameters'] / 1e6:,.1f} M parameters, {model['matrices']}, "
        f"{size(model['weight_bytes'])}"
    )
    hint = "" if machine["missing_kernels"] is None else f"; {slower(machine['blas'])}"
    runs = f"{machine['backend']}, {model['dtype']}; {machine['kernels']}{hint}"
    if model["kv_bits"] not in PLAIN_BITS:
        theirs = "" if report.peer is None else f" ({report.peer}'s is not packed)"
        runs += f"; the cache in {model['kv_bits']} bits{theirs}"
    else:
        is_other = report.peer == "mlx-lm" and model["kv_dtype"] != model["dtype"]
        theirs = f" (mlx-lm's in {model['dtype']})" if is_other else ""
        runs += f"; the cache in {model['kv_dtype']}{theirs}"
    if model["prefill_chunk"] is not None:
        runs += f"; prompts in slices of {model['prefill_chunk']}"
    yield f"runs on {runs}; {machine['processors']} processors"
    if machine["bandwidth"] is not None:
        known = ""
        if machine["chip_bandwidth"] is not None:
            known = f", {machine['chip']} by specification {_rate(machine['chip_bandwidth'])}"
        yield f"memory reads {_rate(machine['bandwidth'])}, as measured{known}"
    engines = []
    for name, version in report.engines.items():
        peak = report.process_peaks.get(name)
        engines.append(f"{name} {version}" + (f" (process: {size(peak)})" if peak else ""))
    yield visible(f"{', '.join(engines)}")
    if report.rounding is not None:
        yield _cost(report.rounding, is_random=model["shape"] is not None)
    if any((report.share(row, "bandwidth") or 0) > OVER for row in report.rows):
        yield "more than memory gives: a part of what is read comes from the processor's caches"


def _cost(cost: Cost, *, is_random: bool) -> str:
    """Say what rounded activations cost."""
    kld, same = cost.divergence.kld.mean, cost.divergence.same_top
    doubt = "; of random weights, which says little of others" if is_random else ""
    return (
        f"activations in 8 bits: mean KL divergence {kld.value:.1e} ± {kld.error:.0e} "
        f"from float32, same likeliest token at {same.value:.1%} ± {same.error:.1%} of "
        f"{cost.divergence.n_tokens} positions ({cost.text}){doubt}"
    )


def _columns(report: Report) -> list[str]:
    peer = [] if report.peer is None else [report.peer, "ratio", f"{report.peer} peak"]
    return [
        "test", "tokens/s", *peer, "first token", "peak", "read/token", "GB/s", "of memory",
        "of chip",
    ]  # fmt: skip


def _cells(report: Report, row: Row) -> list[str]:
    ours, peer = report.ours, report.peer
    beside = []
    if peer is not None:
        ratio = f"{row.ratio(ours, peer):.2f}x"
        beside = [_mean(row, peer), ratio, _size(row.peak_bytes(peer))]
    first, rate = row.first_token_s(ours), report.bytes_per_s(row)
    return [
        row.case.name,
        _mean(row, ours),
        *beside,
        "" if first is None else f"{first:.3f} s",
        _size(row.peak_bytes(ours)),
        _size(report.read_bytes.get(row.case.name)),
        "" if rate is None else f"{rate / 1e9:.1f}",
        *(
            "" if (share := report.share(row, of)) is None else f"{share:.0%}"
            for of in ("bandwidth", "chip_bandwidth")
        ),
    ]


def _mean(row: Row, engine: str) -> str:
    mean = row.mean(engine)
    digits = 0 if mean >= 1000 else 1 if mean >= 100 else 2
    deviation = row.deviation(engine)
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def _size(nbytes: int | None) -> str:
    return "" if nbytes is None else size(nbytes)


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.1f} GB/s"


def _markdown(cells: Cells) -> str:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        [
            text.ljust(width) if n == 0 else text.rjust(width)
            for n, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in cells
    ]
    lines.insert(1, ["-" * w if n == 0 else "-" * (w - 1) + ":" for n, w in enumerate(widths)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
