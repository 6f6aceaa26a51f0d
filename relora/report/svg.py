"""Pictures as inline SVG that follow the page's colours, and as PNG with fixed ones.

A figure is drawn with marker colours that stand for roles. In the SVG each becomes a CSS variable,
so that one picture serves light and dark.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

from relora.files import replacing

mpl.use("Agg")

# Okabe and Ito's colours, which the colour-blind can tell apart; a second set for dark pages.
LIGHT = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#1a1a1a")
DARK = ("#4aa8e0", "#ff8a3d", "#2fc79a", "#e59cc6", "#e6c34a", "#9ad5f7", "#f0f0f0")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.4, 1.4)), (0, (6, 1.5, 1.4, 1.5)))
MARKERS = ("o", "s", "^", "D")  # in the order of the dashes
SYMBOLS = ("●", "■", "▲", "◆")  # the same as text
POINT = 2.2  # diameter of the point of an evaluation
CSS_DASHES = ("solid", "dashed", "dotted", "double")


@dataclass(frozen=True)
class Look:
    """How a picture is drawn: for which room and with which colours."""

    narrow: bool = False  # for a phone
    logarithmic: bool = True
    legend: bool = False  # in the picture itself; a page has its own
    fg: str = "#0a0b01"
    muted: str = "#0a0b02"
    grid: str = "#0a0b03"
    arms: tuple[str, ...] = tuple(f"#0a0c{n:02x}" for n in range(len(LIGHT)))

    @property
    def width(self) -> float:
        """In inches."""
        return 4.1 if self.narrow else 8.2

    def colour(self, arm: int) -> str:
        """Of an arm by its number."""
        return self.arms[arm % len(self.arms)]

    def dash(self, arm: int) -> Any:
        """Line style of an arm: arms of one colour differ in it."""
        return DASHES[arm // len(self.arms) % len(DASHES)]

    def marker(self, arm: int) -> str:
        """Point of an arm: arms of one colour differ in it."""
        return MARKERS[arm // len(self.arms) % len(MARKERS)]


PAPER = Look(legend=True, fg="#1b1f24", muted="#57606a", grid="#d8dee4", arms=LIGHT)


@contextmanager
def drawing(look: Look) -> Iterator[None]:
    """matplotlib's settings for one figure."""
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "relora",
        "text.parse_math": False,  # a run may be called $x$
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.labelsize": 9,
        "axes.labelpad": 6,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "text.color": look.fg,
        "axes.edgecolor": look.muted,
        "axes.labelcolor": look.fg,
        "axes.titlecolor": look.fg,
        "xtick.color": look.muted,
        "ytick.color": look.muted,
        "xtick.labelcolor": look.fg,
        "ytick.labelcolor": look.fg,
        "grid.color": look.grid,
        "grid.linewidth": 0.7,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "path.simplify": True,
        "path.simplify_threshold": 0.2,
    }
    with mpl.rc_context(settings):
        yield


def to_png(figure: Any, path: Path) -> None:
    """Write a figure for papers, and forget it."""
    import matplotlib.pyplot as plt

    try:
        with replacing(path, durable=False) as temporary:
            figure.savefig(temporary, dpi=200, format="png", facecolor="white")
    finally:
        plt.close(figure)


def to_svg(figure: Any, prefix: str, title: str) -> str:
    """A figure as an `<svg>` whose ids begin with `prefix`, and forget it."""
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.S)
    text = re.sub(r"\n\s*", "\n", text)
    text = re.sub(rf"(?:{_DOT}\s*){{2,}}", _dots, text)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: _id(m[1], used, prefix), text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", text)
    # Hundredths of a point are enough.
    text = re.sub(r' (?:d|x|y|transform|points)="[^"]*"', _rounded, text)
    look = Look()
    roles = {look.fg: "--fg", look.muted: "--muted", look.grid: "--grid"}
    roles |= {marker: f"--c{number}" for number, marker in enumerate(look.arms)}
    for marker, variable in roles.items():
        text = text.replace(marker, f"var({variable})")
    head = re.search(r'viewBox="[^"]*"', text)
    assert head is not None
    body = text[text.index(">") + 1 :]

    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'{head[0]} role="img" aria-label="{html.escape(title)}">{body}'
    )


def _id(name: str, used: set[str], prefix: str) -> str:
    return f' id="{prefix}-{name}"' if name in used else ""


# One of many equal round points, as matplotlib writes it; only points are translucent.
_DOT = r'<use [^>]*x="[-\d.]+" y="[-\d.]+" style="fill: #\w+; fill-opacity: [\d.]+[^"]*"/>'


def _dots(match: re.Match[str]) -> str:
    """A row of points as one path of dots, a tenth of the size."""
    style = re.search(r"fill: (#\w+); fill-opacity: ([\d.]+)", match[0])
    assert style is not None
    places = re.findall(r'x="([-\d.]+)" y="([-\d.]+)"', match[0])
    path = "".join(f"M{float(x):.1f} {float(y):.1f}h0" for x, y in places)
    return (
        f'<path d="{path}" style="fill: none; stroke: {style[1]}; stroke-opacity: {style[2]}; '
        f'stroke-width: {POINT}; stroke-linecap: round"/>\n'
    )


def _rounded(match: re.Match[str]) -> str:
    return re.sub(r"(\d+\.\d\d)\d+", r"\1", match[0])
