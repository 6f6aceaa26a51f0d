"""Pictures of the three questions: perplexity over tokens, over time, and beside peak memory.

Each takes the report's dict and a `Look`, and returns a matplotlib figure. What is thinned for
drawing stays whole in the report: of each stretch of a long curve the lowest and the highest point
are drawn, so that no spike is lost.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from relora.report.svg import POINT, Look
from relora.words import format_count

DRAWN = 240  # stretches of a curve, each with its lowest and its highest point
SHARED = 2000  # stretches of all curves of a picture together, where there are many
FEWEST = 30
MARKED = 200  # marks of an arm; more would hide its curve
SMOOTHED = 50  # the running mean is over this share of a curve: one fiftieth
UNITS = ((86400 * 3, "days", 86400.0), (7200, "hours", 3600.0), (180, "minutes", 60.0))


def draw_curves(report: dict[str, Any], look: Look, axis: str) -> Any:
    """Validation perplexity over `tokens` or `seconds` with merges and rewarms; the rate below."""
    figure, (top, bottom) = _two_panels(look)
    arms = [(n, arm) for n, arm in enumerate(report["arms"]) if arm["evaluated"]]
    unit, scale = _axis(axis, [arm["curves"]["mean"][axis] for _, arm in arms])
    marked: set[tuple[object, ...]] = set()
    many = sum(len(arm["curves"]["seeds"]) for _, arm in arms)
    shown: list[tuple[float, float]] = []
    for number, arm in arms:
        colour, curves = look.colour(number), arm["curves"]
        mean, several = curves["mean"], len(curves["seeds"]) > 1
        x, y = _column(mean[axis]) / scale, _column(mean["perplexity"])
        for seed in curves["seeds"]:
            points = thin(_column(seed[axis]) / scale, _column(seed["perplexity"]), many)
            top.plot(*points, "o", color=colour, markersize=POINT, alpha=0.55, markeredgewidth=0)
            shown += zip(*points, strict=True)
        if several:
            sd = _column(mean["sd"])
            top.fill_between(x, y - sd, y + sd, color=colour, alpha=0.18, linewidth=0)
        top.plot(*thin(x, y, many), color=colour, linestyle=look.dash(number), linewidth=1.6)
        _mark((top, bottom), curves["marks"], axis, scale, colour, marked)
        rates = curves["lr"]
        bottom.plot(
            _column(rates[axis]) / scale,
            _column(rates["lr"]),
            color=colour,
            linestyle=look.dash(number),
            linewidth=1.1,
        )
    top.set_ylabel("validation perplexity")
    _set_y(top, shown, look.logarithmic)
    _finish_rates(bottom, unit)
    _legend(figure, report, look, marks=True)
    return figure


def draw_training(report: dict[str, Any], look: Look, axis: str = "tokens") -> Any:
    """Every logged training loss, pale, and its running mean."""
    figure, axes = plt.subplots(
        figsize=(look.width, 3.3 if not look.narrow else 3.0), layout="constrained"
    )
    arms = list(enumerate(report["arms"]))
    unit, scale = _axis(axis, [s["training"][axis] for _, a in arms for s in a["curves"]["seeds"]])
    many = sum(len(arm["curves"]["seeds"]) for _, arm in arms)
    shown: list[tuple[float, float]] = []
    for number, arm in arms:
        for seed in arm["curves"]["seeds"]:
            x, y = (_column(seed["training"][key]) for key in (axis, "loss"))
            there = np.isfinite(x) & np.isfinite(y)
            x, y = x[there] / scale, y[there]
            raw = thin(x, y, many)
            axes.plot(*raw, color=look.colour(number), linewidth=0.7, alpha=0.35)
            smooth = thin(x, running_mean(y), many)
            axes.plot(
                *smooth, color=look.colour(number), linestyle=look.dash(number), linewidth=1.6
            )
            shown += zip(*raw, strict=True)
    axes.set_ylabel("training loss (nats per token)")
    axes.set_xlabel(unit)
    _set_y(axes, shown, look.logarithmic)
    _format_x(axes, unit)
    _legend(figure, report, look)
    return figure


def draw_memory(report: dict[str, Any], look: Look) -> Any:
    """Perplexity at equal tokens beside peak memory; the line is the best that fits."""
    figure, axes = plt.subplots(
        figsize=(look.width, 3.3 if not look.narrow else 3.0), layout="constrained"
    )
    numbers = {arm["name"]: n for n, arm in enumerate(report["arms"])}
    predicted = {a["name"]: a["predicted"]["memory_gib"] for a in report["arms"] if a["on_gpu"]}
    rows = report["questions"]["memory"]["rows"]
    best: list[tuple[float, float]] = []
    for row in rows:
        memory, perplexity = row["memory_gib"], row["perplexity"]
        if memory["mean"] is None or perplexity["mean"] is None:
            continue
        colour, marker = look.colour(numbers[row["arm"]]), look.marker(numbers[row["arm"]])
        axes.errorbar(
            memory["mean"],
            perplexity["mean"],
            xerr=memory["sd"],
            yerr=perplexity["sd"],
            fmt=marker,
            color=colour,
            markersize=7,
            capsize=3,
            zorder=3,
        )
        if predicted.get(row["arm"]) is not None:
            there = [memory["mean"], predicted[row["arm"]]]
            axes.plot(there, [perplexity["mean"]] * 2, color=colour, linewidth=0.8, alpha=0.7)
            axes.plot(
                there[1], perplexity["mean"], marker, markersize=7, color=colour, fillstyle="none"
            )
        best.append((memory["mean"], row["best_perplexity"]))
    if len(best) > 1:
        axes.step(*zip(*best, strict=True), where="post", color=look.muted, linewidth=1, zorder=1)
    axes.margins(0.12, 0.18)
    axes.set_xlabel("peak memory (GiB per rank)")
    axes.set_ylabel("validation perplexity at equal tokens")
    axes.xaxis.set_major_locator(MaxNLocator(5 if look.narrow else 8))
    _legend(figure, report, look, points=True)
    return figure


def thin(x: np.ndarray, y: np.ndarray, curves: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest point of each of `DRAWN` stretches, and the last point.

    Args:
        curves: how many share the picture, and its room.
    """
    stretches = max(FEWEST, min(DRAWN, SHARED // curves))
    if len(x) <= 2 * stretches:
        return x, y
    kept = {0, len(x) - 1}
    edges = np.linspace(0, len(x), stretches + 1).astype(int)
    filled = np.nan_to_num(y, nan=float(np.nanmedian(y)) if np.isfinite(y).any() else 0.0)
    for start, stop in itertools.pairwise(edges):
        kept |= {start + int(filled[start:stop].argmin()), start + int(filled[start:stop].argmax())}
    order = np.array(sorted(kept))
    return x[order], y[order]


def running_mean(values: np.ndarray) -> np.ndarray:
    """Centred mean over one `SMOOTHED`-th of the curve; over less at both ends, never shifted."""
    half = max(1, len(values) // SMOOTHED) // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    reach = np.minimum(np.minimum(at, len(values) - 1 - at), half)
    return (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)


def _column(values: Sequence[float | None]) -> np.ndarray:
    return np.array(values, np.float64)


def _two_panels(look: Look) -> Any:
    size = (look.width, 4.9 if not look.narrow else 4.3)
    return plt.subplots(
        2, 1, figsize=size, sharex=True, height_ratios=(3.2, 1), layout="constrained"
    )


def _axis(axis: str, columns: Sequence[Sequence[float | None]]) -> tuple[str, float]:
    """Label of the x-axis, and what its numbers are divided by."""
    if axis == "tokens":
        return "tokens seen", 1.0
    longest = max((v for column in columns for v in column if v is not None), default=0.0)
    for limit, name, scale in UNITS:
        if longest >= limit:
            return f"wall-clock ({name})", scale
    return "wall-clock (seconds)", 1.0


def _format_x(axes: Any, unit: str) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(5))
    if unit.startswith("tokens"):
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    axes.set_xlim(left=0)


def _mark(
    panels: Sequence[Any],
    marks: dict[str, Any],
    axis: str,
    scale: float,
    colour: str,
    marked: set[tuple[object, ...]],
) -> None:
    """Merges dotted, births dashed, over both panels; rewarms shaded.

    Args:
        marked: what other arms have marked, which is not marked again.
    """
    found: list[tuple[str, tuple[float, ...]]] = []
    for key, style in (("merges", ":"), ("births", "--")):
        found += [(style, (mark[axis] / scale,)) for mark in marks[key]]
    ends = zip(marks["rewarm_from"], marks["rewarm_to"], strict=True)
    found += [("", (start[axis] / scale, stop[axis] / scale)) for start, stop in ends]
    for style, place in found if len(found) <= MARKED else ():
        if (style, *place) in marked:
            continue
        marked.add((style, *place))
        for axes in panels:
            if style:
                axes.axvline(
                    *place, color=colour, linewidth=0.8, linestyle=style, alpha=0.75, zorder=1
                )
            else:
                axes.axvspan(*place, color=colour, alpha=0.1, linewidth=0)


def _finish_rates(bottom: Any, unit: str) -> None:
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel(unit)
    bottom.set_ylim(bottom=0)
    bottom.yaxis.set_major_locator(MaxNLocator(3))
    bottom.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.2g}" if v else "0"))
    _format_x(bottom, unit)
    bottom.figure.align_ylabels()


def _set_y(axes: Any, shown: Sequence[tuple[float, float]], logarithmic: bool) -> None:
    """All points on a log axis; on a linear one those behind the first fifth, with room."""
    points = [(x, y) for x, y in shown if math.isfinite(x) and math.isfinite(y)]
    if not points:
        return
    if logarithmic:
        low, high = min(y for _, y in points), max(y for _, y in points)
        if low <= 0:
            return
        room = max((high / low) ** 0.04, 1.002)
        axes.set_yscale("log")
        axes.set_ylim(low / room, high * room)
        ticks = log_ticks(low / room, high * room)
        axes.yaxis.set_major_locator(FixedLocator(ticks))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.5g}"))
        return
    end = max(x for x, _ in points)
    late = [y for x, y in points if x >= 0.2 * end] or [y for _, y in points]
    room = 0.06 * (max(late) - min(late)) or 0.01 * abs(late[0]) or 1.0
    axes.set_ylim(min(late) - room, max(late) + room)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.5g}"))


def log_ticks(low: float, high: float) -> list[float]:
    """Three to eight round numbers on a log axis."""
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [s * 10.0**e for e in exponents for s in steps if low <= s * 10.0**e <= high]
        if len(ticks) >= 4:
            return ticks if len(ticks) <= 8 else ticks[:: math.ceil(len(ticks) / 8)]
    return [tick for tick in MaxNLocator(6).tick_values(low, high) if low <= tick <= high]


def _legend(
    figure: Any, report: dict[str, Any], look: Look, marks: bool = False, points: bool = False
) -> None:
    """Arms, and what dotted and dashed lines mean; a page has a legend of its own."""
    if not look.legend:
        return
    handles = []
    for n, arm in enumerate(report["arms"]):
        style: dict[str, Any] = {"linestyle": look.dash(n)}
        if points:
            style = {"linestyle": "", "marker": look.marker(n)}
        handles.append(Line2D([], [], color=look.colour(n), label=f"\u200b{arm['name']}", **style))
    if marks and any(arm["curves"]["marks"]["merges"] for arm in report["arms"]):
        handles.append(Line2D([], [], color=look.muted, linestyle=":", label="merges"))
        if any(arm["curves"]["marks"]["births"] for arm in report["arms"]):
            handles.append(Line2D([], [], color=look.muted, linestyle="--", label="adapters born"))
    figure.legend(handles=handles, loc="outside upper center", ncols=min(4, len(handles)))
