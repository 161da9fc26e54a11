"""The picture of `mlx-llama compare`: how the divergence is spread, and where in the text it is."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_llama.errors import OptionError

if TYPE_CHECKING:
    from mlx_llama_apps.compare import Report
    from mlx_llama_quantize.divergence import TokenScores

SUFFIXES = (".svg", ".png", ".pdf")
LEAST = 1e-8  # nats; what is less is drawn as that
N_SPANS = 200  # of the text, at most, each one mean


def check(path: Path) -> None:
    """Raise OptionError for a file that could not be drawn into."""
    if path.suffix.lower() not in SUFFIXES:
        raise OptionError(f"--plot {path}: expected a name that ends in {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise OptionError(f"--plot {path}: there is no folder {path.parent}; make it first")
    if importlib.util.find_spec("matplotlib") is None:
        raise OptionError("--plot: needs matplotlib: pip install 'mlx-llama[plot]'")


def draw(path: Path, scores: TokenScores, report: Report) -> None:
    """Write the picture, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    names = [Path(each["path"]).name for each in (report.a, report.b)]
    figure.suptitle(f"{names[1]} against {names[0]}", parse_math=False)
    spread, along = figure.subplots(2)
    _draw_spread(spread, scores.kld)
    _draw_along(along, scores.kld)
    beside = path.with_name(f"{path.stem}.partial{path.suffix}")
    try:
        figure.savefig(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _draw_spread(axes: Any, kld: np.ndarray) -> None:
    shown = np.maximum(kld, LEAST)
    bins = np.geomspace(LEAST, max(shown.max(), 10 * LEAST), 60)
    axes.hist(shown, bins=bins, color="tab:blue", alpha=0.7)
    for share, style in ((0.5, "-"), (0.99, "--")):
        value = max(float(np.quantile(kld, share)), LEAST)
        label = f"{'median' if share == 0.5 else '99 %'}: {value:.2g}"
        axes.axvline(value, color="black", linestyle=style, label=label)
    mean = max(float(kld.mean()), LEAST)
    axes.axvline(mean, color="tab:red", label=f"mean: {mean:.2g}")
    axes.set(xscale="log", xlabel="KL divergence of a token's prediction, nats", ylabel="tokens")
    axes.legend()


def _draw_along(axes: Any, kld: np.ndarray) -> None:
    spans = np.array_split(kld, min(N_SPANS, len(kld)))
    places = np.cumsum([len(span) for span in spans]) - np.array([len(s) for s in spans]) / 2
    axes.plot(places, [span.mean() for span in spans], color="tab:blue", label="mean of a span")
    axes.plot(places, [span.max() for span in spans], ".", color="tab:red", label="largest in it")
    axes.set(xlabel="scored tokens of the text", ylabel="KL divergence, nats", ylim=(0, None))
    axes.legend()
