"""The picture of `mlx-llama compare`: how the divergence is spread, and where in the text it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mlx_llama.errors import OptionError

if TYPE_CHECKING:
    from mlx_llama_apps.compare import Report
    from mlx_llama_quantize.divergence import TokenScores

SUFFIXES = (".svg", ".png", ".pdf")


def check(path: Path) -> None:
    """Raise OptionError for a file that could not be drawn into."""
    if path.suffix.lower() not in SUFFIXES:
        raise OptionError(f"--plot {path}: expected a name that ends in {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise OptionError(f"--plot {path}: there is no folder {path.parent}; make it first")
    from mlx_llama_quantize.plots import can_draw

    if not can_draw():
        raise OptionError("--plot: needs matplotlib: pip install 'mlx-llama[plot]'")


def draw(path: Path, scores: TokenScores, report: Report) -> None:
    """Write the picture, whole or not at all."""
    from mlx_llama_quantize.plots import draw_divergence

    names = [Path(each["path"]).name for each in (report.a, report.b)]
    draw_divergence(path, scores, f"{names[1]} against {names[0]}")
