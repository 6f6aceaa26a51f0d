"""How pictures look: one style for light pages and paper, one for dark pages."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.4, 1.4)), (0, (6, 1.5, 1.4, 1.5)))
MARKERS = ("o", "s", "^", "D")  # in the order of the dashes
WIDTH = 6.0  # of a picture in inches; a page shows it 720 pixels wide, a phone half of that
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

    def dash(self, arm: int) -> Any:
        """Line style of an arm: arms of one colour differ in it."""
        return DASHES[arm // len(self.arms) % len(DASHES)]

    def marker(self, arm: int) -> str:
        """Point of an arm: arms of one colour differ in it."""
        return MARKERS[arm // len(self.arms) % len(MARKERS)]

    def line(self, arm: int, **more: Any) -> dict[str, Any]:
        """How an arm's curves are drawn."""
        return {"color": self.colour(arm), "linestyle": self.dash(arm), "linewidth": 1.6, **more}

    def point(self, arm: int) -> dict[str, Any]:
        """How an arm's points are drawn."""
        return {"color": self.colour(arm), "marker": self.marker(arm), "markersize": 7}


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


def legend(
    figure: Any,
    style: Style,
    arms: Iterable[tuple[int, str]],
    points: bool = False,
    marks: Iterable[tuple[Any, str]] = (),
) -> None:
    """Arms by number and name above a figure, and what grey lines mean.

    Args:
        points: arms are points and not lines.
        marks: line style and meaning.
    """
    handles = [
        Line2D(
            *([], []),
            label=f"\u200b{name}",  # a name with _ in front would be hidden
            **({**style.point(n), "linestyle": ""} if points else style.line(n)),
        )
        for n, name in arms
    ]
    handles += [
        Line2D([], [], color=style.muted, linestyle=dash, label=meaning) for dash, meaning in marks
    ]
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, min(4, len(handles), 78 // (longest + 6)))
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(handles) / columns))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns)
