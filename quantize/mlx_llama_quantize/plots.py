"""Pictures of what was measured; the one place that knows matplotlib, which is optional."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_llama.config import QuantFormat
from mlx_llama_quantize.divergence import TokenScores

LEAST = 1e-8  # nats; what is less is drawn as that
MOST = 1e4  # nats; what is more, or infinite
N_SPANS = 200  # of the text, at most, each one mean


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def drawn(draw: Callable[[], None]) -> bool:
    """Draw what goes with a result, if matplotlib is there and can; whether it did."""
    if not can_draw():
        return False
    try:
        draw()
    except (ArithmeticError, RuntimeError, ValueError):
        return False
    return True


def draw_divergence(path: Path, scores: TokenScores, title: str) -> None:
    """Draw how the divergence is spread, and where in the text it is."""
    figure, (spread, along) = _figure(title, 2)
    _draw_spread(spread, scores.kld)
    _draw_along(along, scores.kld)
    _save(figure, path)


def draw_certificate(
    path: Path, scores: TokenScores | None, errors: Mapping[str, float], title: str
) -> None:
    """Draw the same, and the relative error of the weights by layer."""
    figure, axes = _figure(title, 1 if scores is None else 3)
    _draw_errors(axes[0], errors)
    if scores is not None:
        _draw_spread(axes[1], scores.kld)
        _draw_along(axes[2], scores.kld)
    _save(figure, path)


def draw_sensitivities(
    path: Path, costs: Mapping[str, tuple[float, QuantFormat | None]], title: str
) -> None:
    """Draw what packing each matrix costs by name, nats in 2 bits, coloured by the bits it got."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(8, 1.5 + 0.16 * len(costs)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, parse_math=False)
    axes: Any = figure.subplots()
    bits = [0 if form is None else form.bits for _, form in costs.values()]
    colours = {each: colormaps["viridis"](each / 8) for each in sorted(set(bits))}
    values = _shown([nats for nats, _ in costs.values()])
    places = range(len(costs))
    axes.barh(places, values, color=[colours[each] for each in bits])
    axes.set_yticks(places, [*costs], fontsize=6)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="KL divergence with this matrix alone in 2 bits, nats")
    axes.legend(handles=[Patch(color=colours[b], label=f"{b} bits chosen") for b in colours])
    _save(figure, path)


def _figure(title: str, n_axes: int) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3 * n_axes), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, parse_math=False)
    return figure, list(np.atleast_1d(figure.subplots(n_axes)))


def _shown(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return what an axis has a place for: in place of what is no number nothing, of more the most.

    An axis of logarithms has none for 0 or less either.
    """
    return np.clip(np.nan_to_num(np.asarray(values, np.float64)), LEAST, MOST)


def _save(figure: Any, path: Path) -> None:
    """Write the picture, whole or not at all; the same picture gives the same bytes."""
    from matplotlib import rc_context

    beside = path.with_name(f"{path.stem}.partial{path.suffix}")
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
    try:
        with rc_context({"svg.hashsalt": "mlx-llama"}):
            figure.savefig(beside, metadata=metadata)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _draw_errors(axes: Any, errors: Mapping[str, float]) -> None:
    places = range(len(errors))
    axes.bar(places, 100 * _shown([*errors.values()]), color="tab:blue", alpha=0.7)
    names = [name.removeprefix("layer ") for name in errors]
    axes.set_xticks(places, names, rotation=90 if len(names) > 20 else 30, fontsize=8)
    axes.set(xlabel="layer", ylabel="error of the weights, %")


def _draw_spread(axes: Any, kld: np.ndarray) -> None:
    kld = _shown(kld)
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
    spans = np.array_split(_shown(kld), min(N_SPANS, len(kld)))
    places = np.cumsum([len(span) for span in spans]) - np.array([len(s) for s in spans]) / 2
    axes.plot(places, [span.mean() for span in spans], color="tab:blue", label="mean of a span")
    axes.plot(places, [span.max() for span in spans], ".", color="tab:red", label="largest in it")
    axes.set(xlabel="scored tokens of the text", ylabel="KL divergence, nats", ylim=(0, None))
    axes.legend()
