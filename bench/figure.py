"""What the figures of this folder share: ink, a canvas without a display, and the way into a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from m3oe_fast.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, FAINT = "#222222", "#666666"
# Okabe and Ito's palette: told apart with every kind of colour vision, and by lightness in print.
VERMILION, BLUE, SKY, GREEN, PURPLE, ORANGE = "#D55E00", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00"
GREY = "#BBBBBB"


def canvas(command: str, width: float, height: float, **layout: float) -> Figure:
    """An empty figure of this size in inches, with matplotlib's constrained layout.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"{command} needs matplotlib: pip install 'm3oe_fast[report]'") from error
    figure = Figure(figsize=(width, height), dpi=200)
    figure.set_layout_engine("constrained", **layout)
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: str) -> None:
    """Write a figure, in the format that the file's name ends in.

    Raises:
        UserError: matplotlib knows no such format.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(target)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
