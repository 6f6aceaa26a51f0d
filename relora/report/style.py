"""How pictures look: one style for light pages and paper, one for dark pages."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.4, 1.4)), (0, (6, 1.5, 1.4, 1.5)))
MARKERS = ("o", "s", "^", "D")  # in the order of the dashes
INCHES = 6.0  # of a picture across; a page shows it 720 pixels wide, a phone half of that
DPI = 240  # twice what a page shows


@dataclass(frozen=True)
class Style:
    """Colours of a picture: Okabe and Ito's, which the colour-blind can tell apart."""

    fg: str
    muted: str
    grid: str
    ground: str
    arms: tuple[str, ...]

    def colour(self, arm: int) -> str:
        """Of an arm by its number."""
        return self.arms[arm % len(self.arms)]

    def line(self, arm: int, **more: Any) -> dict[str, Any]:
        """How an arm's curves are drawn: arms of one colour differ in their dashes."""
        dash = DASHES[arm // len(self.arms) % len(DASHES)]
        return {"color": self.colour(arm), "linestyle": dash, "linewidth": 1.6, **more}

    def point(self, arm: int, **more: Any) -> dict[str, Any]:
        """How an arm's points are drawn: arms of one colour differ in their shape."""
        marker = MARKERS[arm // len(self.arms) % len(MARKERS)]
        return {"color": self.colour(arm), "marker": marker, "markersize": 7, **more}


LIGHT = Style(
    *("#1b1f24", "#57606a", "#d8dee4", "#ffffff"),
    arms=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#1a1a1a"),
)
DARK = Style(
    *("#e6edf3", "#9aa5b1", "#2d353e", "#0f1318"),
    arms=("#4aa8e0", "#ff8a3d", "#2fc79a", "#e59cc6", "#e6c34a", "#9ad5f7", "#f0f0f0"),
)


def to_png(draw: Callable[[], Any], style: Style) -> bytes:
    """A figure in a style, as a PNG of twice the size it is shown at, and forget it."""
    settings: Any = {
        "text.parse_math": False,  # a run may be called $x$
        "font.family": "DejaVu Sans",
        **dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize"), 9.5),
        **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 9),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor"), style.ground),
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), style.fg),
        **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), style.fg),
        **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), style.muted),
        "axes.labelpad": 6,
        "grid.color": style.grid,
        "grid.linewidth": 0.7,
        **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    }
    file = io.BytesIO()
    with mpl.rc_context(settings):
        figure = draw()
        figure.savefig(file, dpi=DPI, format="png")
    plt.close(figure)
    return file.getvalue()


def panels(count: int, columns: int, height: float) -> tuple[Any, list[Any]]:
    """A figure of so many axes in rows, each so many inches high."""
    rows = max(1, math.ceil(count / columns))
    size = (INCHES, height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for spare in axes.flat[count:]:
        spare.remove()
    return figure, list(axes.flat[:count])


def set_log_y(axes: Any, low: float, high: float) -> None:
    """A log axis from `low` to `high` with a few round numbers on it."""
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.set_yticks(log_ticks(low, high))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.5g}")
    axes.minorticks_off()


def log_ticks(low: float, high: float) -> list[float]:
    """Three to eight round numbers on a log axis."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [s * 10.0**e for e in exponents for s in steps if low <= s * 10.0**e <= high]
        if len(ticks) >= 4:
            return ticks if len(ticks) <= 8 else ticks[:: math.ceil(len(ticks) / 8)]
    return [tick for tick in MaxNLocator(6).tick_values(low, high) if low <= tick <= high]


def legend(
    figure: Any,
    style: Style,
    numbers: Mapping[str, int],
    points: bool = False,
    marks: Iterable[tuple[Any, str]] = (),
) -> None:
    """Arms above a figure, and what grey lines mean.

    Args:
        numbers: of the arms that the figure shows, by name.
        points: arms are points and not lines.
        marks: line style and meaning.
    """
    handles = [
        Line2D(
            *([], []),
            label=f"\u200b{name}",  # a name with _ in front would be hidden
            **(style.point(n, linestyle="") if points else style.line(n)),
        )
        for name, n in numbers.items()
    ]
    handles += [
        Line2D([], [], color=style.muted, linestyle=dash, label=meaning) for dash, meaning in marks
    ]
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, min(4, len(handles), 78 // (longest + 6)))
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(handles) / columns))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns)
