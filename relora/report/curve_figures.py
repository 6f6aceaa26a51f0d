"""Pictures of the three questions: perplexity over tokens, over time, and beside memory.

What is thinned for drawing stays whole in the report: of each stretch of a long curve the lowest
and the highest point are drawn, so that no spike is lost.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from relora.report.records import Column, Curve, Curves, Report
from relora.report.style import WIDTH, Style, legend
from relora.words import format_bytes, format_count

DRAWN = 240  # stretches of a curve, each with its lowest and its highest point
SHARED = 2000  # stretches of all curves of a picture together, where there are many
FEWEST = 30
MOST_MARKS = 200  # marks of an arm; more would hide its curve
SMOOTHED = 50  # the running mean is over this share of a curve: one fiftieth
UNITS = ((86400 * 3, "days", 86400.0), (7200, "hours", 3600.0), (180, "minutes", 60.0))


def draw_curves(report: Report, style: Style, axis: str) -> Any:
    """Validation perplexity over `tokens` or `seconds` with merges and rewarms; the rate below."""
    figure, (top, bottom) = plt.subplots(
        *(2, 1), figsize=(WIDTH, 4.6), sharex=True, height_ratios=(3.2, 1), layout="constrained"
    )
    arms = [(n, arm) for n, arm in enumerate(report.arms) if arm.evaluated]
    unit, scale = _axis(axis, [arm.curves.mean for _, arm in arms])
    marked: set[tuple[object, ...]] = set()
    many = sum(len(arm.curves.seeds) for _, arm in arms)
    heights: list[float] = []
    for number, arm in arms:
        colour, curves, mean = style.colour(number), arm.curves, arm.curves.mean
        x, y = _along(mean, axis, scale), _column(mean.perplexity)
        for seed in curves.seeds:
            points = thin(_along(seed, axis, scale), _column(seed.perplexity), many)
            top.plot(*points, "o", color=colour, markersize=2.2, alpha=0.55, markeredgewidth=0)
            heights += points[1].tolist()
        if len(curves.seeds) > 1:
            sd = _column(mean.sd)
            top.fill_between(x, y - sd, y + sd, color=colour, alpha=0.18, linewidth=0)
        top.plot(*thin(x, y, many), **style.line(number))
        _mark((top, bottom), curves, axis, scale, colour, marked)
        rates = _column(curves.lr.lr)
        bottom.plot(_along(curves.lr, axis, scale), rates, **style.line(number, linewidth=1.1))
    top.set_ylabel("validation perplexity")
    _set_log(top, heights)
    bottom.set_ylabel("learning rate")
    bottom.set_ylim(bottom=0)
    bottom.yaxis.set_major_locator(MaxNLocator(3))
    bottom.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.2g}" if v else "0"))
    _set_x(bottom, unit)
    figure.align_ylabels()
    marks = [(":", "merge")] if any(arm.curves.merges.step for _, arm in arms) else []
    marks += [("--", "adapters born")] if any(arm.curves.births.step for _, arm in arms) else []
    legend(figure, style, [(n, arm.name) for n, arm in arms], marks=marks)
    return figure


def draw_training(report: Report, style: Style) -> Any:
    """Every logged training loss, pale, and its running mean."""
    figure, axes = plt.subplots(figsize=(WIDTH, 3.0), layout="constrained")
    seeds = [(n, each) for n, arm in enumerate(report.arms) for each in arm.curves.training]
    unit, scale = _axis("tokens", [training for _, training in seeds])
    heights: list[float] = []
    for number, training in seeds:
        x, y = _along(training, "tokens", scale), _column(training.loss)
        there = np.isfinite(x) & np.isfinite(y)
        raw = thin(x[there], y[there], len(seeds))
        axes.plot(*raw, color=style.colour(number), linewidth=0.7, alpha=0.35)
        axes.plot(*thin(x[there], running_mean(y[there]), len(seeds)), **style.line(number))
        heights += raw[1].tolist()
    axes.set_ylabel("training loss (nats per token)")
    _set_log(axes, heights)
    _set_x(axes, unit)
    legend(figure, style, [(n, arm.name) for n, arm in enumerate(report.arms)])
    return figure


def draw_memory(report: Report, style: Style) -> Any:
    """Perplexity at equal tokens beside memory; the line is the best that fits."""
    figure, axes = plt.subplots(figsize=(WIDTH, 3.0), layout="constrained")
    answer, numbers = report.questions.memory, {a.name: n for n, a in enumerate(report.arms)}
    best: list[tuple[float, float]] = []
    for row in answer.rows:
        memory, perplexity = row.memory.mean, row.perplexity.mean
        if memory is None or perplexity is None or row.best_perplexity is None:
            continue
        number = numbers[row.arm]
        spreads: Any = {"xerr": row.memory.sd, "yerr": row.perplexity.sd}
        axes.errorbar(memory, perplexity, **spreads, **style.point(number), capsize=3, zorder=3)
        predicted = report.arms[number].predicted.memory
        if answer.measured and predicted is not None:
            colour = style.colour(number)
            axes.plot([memory, predicted], [perplexity] * 2, color=colour, linewidth=0.8, alpha=0.7)
            axes.plot(predicted, perplexity, **style.point(number), fillstyle="none")
        best.append((memory, row.best_perplexity))
    if len(best) > 1:
        axes.step(*zip(*best, strict=True), where="post", color=style.muted, linewidth=1, zorder=1)
    axes.margins(0.12, 0.18)
    what = "peak memory of the GPU" if answer.measured else "training state"
    axes.set_xlabel(f"{what}, per rank")
    axes.set_ylabel("perplexity at equal tokens")
    axes.xaxis.set_major_locator(MaxNLocator(8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value)))
    legend(figure, style, [(numbers[row.arm], row.arm) for row in answer.rows], points=True)
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


def log_ticks(low: float, high: float) -> list[float]:
    """Three to eight round numbers on a log axis."""
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [s * 10.0**e for e in exponents for s in steps if low <= s * 10.0**e <= high]
        if len(ticks) >= 4:
            return ticks if len(ticks) <= 8 else ticks[:: math.ceil(len(ticks) / 8)]
    return [tick for tick in MaxNLocator(6).tick_values(low, high) if low <= tick <= high]


def _column(values: Column) -> np.ndarray:
    return np.array(values, np.float64)


def _along(curve: Curve, axis: str, scale: float) -> np.ndarray:
    return _column(getattr(curve, axis)) / scale


def _axis(axis: str, curves: Sequence[Curve]) -> tuple[str, float]:
    """Label of the x-axis, and what its numbers are divided by."""
    if axis == "tokens":
        return "tokens", 1.0
    longest = max((v for curve in curves for v in curve.seconds if v is not None), default=0.0)
    for limit, name, scale in UNITS:
        if longest >= limit:
            return f"wall-clock ({name})", scale
    return "wall-clock (seconds)", 1.0


def _set_x(axes: Any, unit: str) -> None:
    axes.set_xlabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    if unit == "tokens":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    axes.set_xlim(left=0)


def _set_log(axes: Any, heights: Sequence[float]) -> None:
    """A log axis with room for all heights, if they are positive."""
    heights = [y for y in heights if math.isfinite(y)]
    if not heights or min(heights) <= 0:
        return
    room = max((max(heights) / min(heights)) ** 0.04, 1.002)
    low, high = min(heights) / room, max(heights) * room
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(FixedLocator(log_ticks(low, high)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.5g}"))


def _mark(
    panels: Sequence[Any],
    curves: Curves,
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
    for style, curve in ((":", curves.merges), ("--", curves.births)):
        found += [(style, (x,)) for x in _along(curve, axis, scale)]
    ends = [_along(curve, axis, scale) for curve in (curves.rewarm_from, curves.rewarm_to)]
    found += [("", pair) for pair in zip(*ends, strict=True)]
    for style, place in found if len(found) <= MOST_MARKS else ():
        if (style, *place) in marked:
            continue
        marked.add((style, *place))
        for axes in panels:
            if style:
                line = {"linewidth": 0.8, "linestyle": style, "alpha": 0.75, "zorder": 1}
                axes.axvline(*place, color=colour, **line)
            else:
                axes.axvspan(*place, color=colour, alpha=0.1, linewidth=0)
