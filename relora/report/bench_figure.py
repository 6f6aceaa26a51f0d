"""The picture of a bench: time of a step by arm, beside what arithmetic alone would make of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from relora.report.style import Style, panels
from relora.training.bench import Timing


def draw_bench(tables: Mapping[str, Sequence[Timing]], style: Style) -> Any:
    """A panel for each precision: bars of ms a step, quartiles, and a mark where the arm would be
    if its products took `full_lean`'s time each."""
    most = max(len(timings) for timings in tables.values())
    figure, axes = panels(len(tables), 1, 0.6 + 0.32 * most)
    for (precision, timings), ax in zip(tables.items(), axes, strict=True):
        places = range(len(timings))
        widths = [one.ms for one in timings]
        spreads = [one.spread_ms / 2 for one in timings]
        colours = [style.colour(place) for place in places]
        ax.barh(places, widths, xerr=spreads, color=colours, ecolor=style.fg, height=0.7)
        lean = next((one for one in timings if one.arm == "full_lean"), None)
        if lean is not None:
            allowed = [lean.ms * one.flops / lean.flops for one in timings]
            ax.plot(allowed, places, "|", color=style.fg, markersize=14)
        ax.set_yticks(places, [one.arm for one in timings])
        ax.invert_yaxis()
        ax.set_xlim(0, 1.08 * max(map(sum, zip(widths, spreads, strict=True))))
        ax.set(xlabel="ms a step; | by full_lean's FLOPs per second", title=precision)
        ax.grid(visible=False, axis="y")
    return figure
