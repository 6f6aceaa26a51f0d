"""Pictures of the three questions: perplexity over tokens, over time, and beside memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from relora.report.records import Column, Curve, Curves, Report
from relora.report.style import INCHES, Style, legend, panels, set_log_y
from relora.words import format_bytes, format_count

MOST_MARKS = 200  # marks of an arm; more would hide its curve
SMOOTHED = 50  # the running mean is over this share of a curve: one fiftieth
EARLY = 0.1  # of the tokens: what is larger only before then does not set the axis
UNITS = ((86400 * 3, "days", 86400.0), (7200, "hours", 3600.0), (180, "minutes", 60.0))


def draw_curves(report: Report, style: Style, axis: str) -> Any:
    """Validation perplexity over `tokens` or `seconds` with merges and rewarms; the rate below."""
    figure, (top, bottom) = plt.subplots(
        *(2, 1), figsize=(INCHES, 4.6), sharex=True, height_ratios=(3.2, 1), layout="constrained"
    )
    arms = [arm for arm in report.arms if arm.evaluated]
    unit, scale = _axis(axis, [arm.curves.mean for arm in arms])
    marked: dict[tuple[Any, ...], str] = {}  # colour of each mark: that of the first who has it
    heights = []
    for arm in arms:
        number, curves, mean = report.numbers[arm.name], arm.curves, arm.curves.mean
        colour = style.colour(number)
        x, y = _along(mean, axis, scale), _column(mean.perplexity)
        for seed in curves.seeds:
            heights.append(_column(seed.perplexity))
            point = {"color": colour, "markersize": 2.2, "alpha": 0.55, "markeredgewidth": 0}
            top.plot(_along(seed, axis, scale), heights[-1], "o", **point)
        if len(curves.seeds) > 1:
            sd = _column(mean.sd)
            top.fill_between(x, y - sd, y + sd, color=colour, alpha=0.18, linewidth=0)
        top.plot(x, y, **style.line(number))
        rates = _column(curves.lr.lr)
        bottom.plot(_along(curves.lr, axis, scale), rates, **style.line(number, linewidth=1.1))
        for mark in _marks(curves, axis, scale):
            marked.setdefault(mark, colour)
    for (dash, *place), colour in marked.items():
        for axes in (top, bottom):
            if dash:
                line = {"linewidth": 0.8, "linestyle": dash, "alpha": 0.75, "zorder": 1}
                axes.axvline(*place, color=colour, **line)
            else:
                axes.axvspan(*place, color=colour, alpha=0.1, linewidth=0)
    top.set_ylabel("validation perplexity")
    _set_y(top, heights)
    bottom.set_ylabel("learning rate")
    bottom.set_ylim(bottom=0)
    bottom.yaxis.set_major_locator(MaxNLocator(3))
    bottom.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}" if value else "0")
    _set_x(bottom, unit)
    figure.align_ylabels()
    drawn = {dash for dash, *_ in marked}
    marks = [mark for mark in ((":", "merge"), ("--", "adapters born")) if mark[0] in drawn]
    legend(figure, style, {arm.name: report.numbers[arm.name] for arm in arms}, marks=marks)
    return figure


def has_difference(report: Report) -> bool:
    """Whether there is anything beside the baseline."""
    return any(_differences(report))


def draw_difference(report: Report, style: Style) -> Any:
    """Validation loss less the baseline's over tokens; below the line an arm is better."""
    figure, (axes,) = panels(1, 1, height=3.0)
    axes.axhline(0, color=style.muted, linewidth=1)
    drawn = _differences(report)
    end = max(float(np.max(_column(curve.tokens))) for curve in drawn.values())
    heights = [0.0]
    for name, curve in drawn.items():
        number, x, y = report.numbers[name], _column(curve.tokens), _column(curve.loss)
        sd = _column(curve.sd) if curve.sd else np.zeros_like(y)
        axes.fill_between(x, y - sd, y + sd, color=style.colour(number), alpha=0.18, linewidth=0)
        axes.plot(x, y, **style.line(number, marker="o", markersize=2.2))
        late = x >= EARLY * end
        heights += [*(y - sd)[late], *(y + sd)[late]]
    low, high = min(heights), max(heights)
    room = max(0.08 * (high - low), 1e-6)
    axes.set_ylim(low - room, high + room)
    axes.set_ylabel("validation loss less\nthe baseline's (nats per token)")
    _set_x(axes, "tokens")
    legend(figure, style, {name: report.numbers[name] for name in drawn})
    return figure


def _differences(report: Report) -> dict[str, Curve]:
    found = {arm.name: arm.curves.difference for arm in report.arms}
    return {name: curve for name, curve in found.items() if curve is not None and curve.step}


def draw_training(report: Report, style: Style) -> Any:
    """Every logged training loss, pale, and its running mean."""
    figure, (axes,) = panels(1, 1, height=3.0)
    seeds = [(n, each) for n, arm in enumerate(report.arms) for each in arm.curves.training]
    unit, scale = _axis("tokens", [training for _, training in seeds])
    heights = []
    for number, training in seeds:
        x, y = _along(training, "tokens", scale), _column(training.loss)
        there = np.isfinite(x) & np.isfinite(y)
        heights.append(y[there])
        axes.plot(x[there], y[there], color=style.colour(number), linewidth=0.7, alpha=0.35)
        axes.plot(x[there], running_mean(y[there]), **style.line(number))
    axes.set_ylabel("training loss (nats per token)")
    _set_y(axes, heights)
    _set_x(axes, unit)
    legend(figure, style, report.numbers)
    return figure


def draw_memory(report: Report, style: Style) -> Any:
    """Perplexity at equal tokens beside memory; the line is the best that fits."""
    figure, (axes,) = panels(1, 1, height=3.0)
    answer = report.questions.memory
    best: list[tuple[float, float]] = []
    for row in answer.rows:
        memory, perplexity = row.memory.mean, row.perplexity.mean
        if memory is None or perplexity is None or row.best_perplexity is None:
            continue
        number = report.numbers[row.arm]
        spreads: Any = {"xerr": row.memory.sd, "yerr": row.perplexity.sd}
        axes.errorbar(memory, perplexity, **spreads, **style.point(number), capsize=3, zorder=3)
        predicted = report.arms[number].predicted.memory
        if answer.measured and predicted is not None:
            colour = style.colour(number)
            axes.plot([memory, predicted], [perplexity] * 2, color=colour, linewidth=0.8, alpha=0.7)
            axes.plot(predicted, perplexity, **style.point(number, fillstyle="none"))
        best.append((memory, row.best_perplexity))
    if len(best) > 1:
        axes.step(*zip(*best, strict=True), where="post", color=style.muted, linewidth=1, zorder=1)
    axes.margins(0.12, 0.18)
    what = "peak memory of the GPU" if answer.measured else "training state"
    axes.set_xlabel(f"{what}, per rank")
    axes.set_ylabel("perplexity at equal tokens")
    axes.xaxis.set_major_locator(MaxNLocator(8))
    axes.xaxis.set_major_formatter(lambda value, _: format_bytes(value))
    legend(figure, style, {row.arm: report.numbers[row.arm] for row in answer.rows}, points=True)
    return figure


def running_mean(values: np.ndarray) -> np.ndarray:
    """Centred mean over one `SMOOTHED`-th of the curve; over less at both ends, never shifted."""
    half = max(1, len(values) // SMOOTHED) // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    reach = np.minimum(np.minimum(at, len(values) - 1 - at), half)
    return (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)


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
        axes.xaxis.set_major_formatter(lambda value, _: format_count(value))
    axes.set_xlim(left=0)


def _set_y(axes: Any, columns: Sequence[np.ndarray]) -> None:
    """A log axis with room for all values, if they are positive."""
    values = np.concatenate(columns)
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0:
        low, high = values.min(), values.max()
        room = max((high / low) ** 0.04, 1.002)
        set_log_y(axes, low / room, high * room)


def _marks(curves: Curves, axis: str, scale: float) -> list[tuple[Any, ...]]:
    """Merges dotted, births dashed, and rewarms from where to where with no dash."""
    marks: list[tuple[Any, ...]] = []
    for dash, curve in ((":", curves.merges), ("--", curves.births)):
        marks += [(dash, x) for x in _along(curve, axis, scale)]
    ends = [_along(curve, axis, scale) for curve in (curves.rewarm_from, curves.rewarm_to)]
    marks += [("", *pair) for pair in zip(*ends, strict=True)]
    return marks if len(marks) <= MOST_MARKS else []
