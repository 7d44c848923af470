"""One look for every figure: colours that the colour-blind can tell apart, plain text, no global state.

Figures are made without pyplot, so nothing opens a window and the settings of a program that imports
the package stay as they are. matplotlib is loaded by the first figure only.
"""

from __future__ import annotations

import importlib.util
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3oe_fast.atomic import replacing
from m3oe_fast.errors import ConfigError, UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Blue, vermilion, green, pink, sky, orange of the Okabe-Ito palette."""
GREY = "#B5B5B5"
INK = "#222222"
LINES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D")
DPI = 130
_NAME = 24  # characters of a name in a figure
# DejaVu Sans comes with matplotlib; names in other scripts need one of these.
_SCRIPTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Microsoft YaHei", "PingFang SC")


@dataclass(frozen=True)
class Pair:
    """A (domain, task) pair by name.

    Attributes:
        domain, task: as in the schema.
    """

    domain: str
    task: str

    @property
    def key(self) -> str:
        """As in metrics.json, "<domain>/<task>"."""
        return f"{self.domain}/{self.task}"


@dataclass(frozen=True)
class Drawn:
    """A figure and what it shows, or why there is none.

    Attributes:
        name: stem of the file.
        title: heading in the report.
        caption: what one sees; without a figure, the reason.
        figure: None where it could not be drawn.
    """

    name: str
    title: str
    caption: str
    figure: Figure | None = None


def check_installed(what: str = "the report", packages: Sequence[str] = ("matplotlib", "sklearn")) -> None:
    """Raise ConfigError, with the command that mends it, where a package that ``what`` needs is missing."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"{what} needs {package}, which is missing: pip install 'm3oe_fast[report]'")


@contextmanager
def look() -> Iterator[None]:
    """The settings every figure is drawn and written with."""
    import matplotlib
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    settings = {
        "font.family": ["DejaVu Sans", *(name for name in _SCRIPTS if name in installed)],
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titleweight": "normal",
        "axes.edgecolor": "#666666",
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#E6E6E6",
        "grid.linewidth": 0.8,
        "xtick.color": "#444444",
        "ytick.color": "#444444",
        "lines.linewidth": 1.5,
        "lines.markersize": 4,
        "legend.frameon": False,
        "figure.dpi": DPI,
        # A domain may be called $x_1: names are text, never formulas.
        "text.parse_math": False,
    }
    with matplotlib.rc_context(settings):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches whose parts make room for each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06, hspace=0.06)
    return figure


def save(figure: Figure, path: Path) -> bool:
    """Replace the PNG at ``path`` in one piece.

    Returns:
        Whether every sign could be drawn; False if a name is in a script that no installed font has.

    Raises:
        UserError: the folder cannot be written or the disk is full.
    """
    image = io.BytesIO()
    with look(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        # The first layout is made with the tick labels of the axes' first size; a second one fits.
        figure.draw_without_rendering()
        figure.savefig(image, format="png", dpi=DPI, metadata={"Software": None})
    try:
        with replacing(path) as stream:
            stream.write(image.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return not any("missing from font" in str(warning.message) for warning in told)


def short(name: str, most: int = _NAME) -> str:
    """A name on one line of at most ``most`` characters."""
    line = re.sub(r"[\s\x00-\x1f\x7f]+", " ", name).strip() or "(empty)"
    return line if len(line) <= most else line[: most - 1] + "…"


def colours_of(domains: Sequence[str], tasks: Sequence[str]) -> dict[Pair, dict[str, Any]]:
    """How the line of every pair looks: colour by domain and dashes by task; one domain: colour by task."""
    looks = {}
    for d, domain in enumerate(domains):
        for t, task in enumerate(tasks):
            own = t if len(domains) == 1 else d
            looks[Pair(domain, task)] = {
                "color": COLOURS[own % len(COLOURS)],
                "linestyle": "-" if len(domains) == 1 else LINES[t % len(LINES)],
                "marker": MARKERS[t % len(MARKERS)],
            }
    return looks


def tell_apart(domains: Sequence[str], tasks: Sequence[str]) -> bool:
    """Whether every pair can have a look of its own."""
    if len(domains) == 1:
        return len(tasks) <= len(COLOURS)
    return len(domains) <= len(COLOURS) and len(tasks) <= len(LINES) and len(domains) * len(tasks) <= 12


def legend_below(figure: Figure, handles: Sequence[Any], labels: Sequence[str], columns: int = 5) -> None:
    """A legend under all axes, where it covers nothing."""
    # A legend leaves out labels that begin with an underscore.
    shown = [label if not label.startswith("_") else "\u200b" + label for label in labels]
    if handles:
        figure.legend(handles, shown, loc="outside lower center", ncols=min(columns, len(handles)))


def whole_steps(axes: Axes, most: int = 6) -> None:
    """At most about so many ticks of the x axis, at whole numbers only, with thousands separated."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=most, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def blank(axes: Axes, text: str) -> None:
    """Say in the middle of empty axes why they are empty."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", wrap=True, transform=axes.transAxes, color=INK)
