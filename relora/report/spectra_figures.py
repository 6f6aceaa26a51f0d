"""Pictures of what updates are made of: spectra, ranks against cycles, layers × cycles, φ(i, j)."""

from __future__ import annotations

import math
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from relora.report.curve_figures import thin
from relora.report.records import ArmSpectra, Report
from relora.report.spectra import last_of_cycles
from relora.report.style import WIDTH, Style, legend

FLOOR = 1e-4  # of the largest value of a panel; what is below is rounding, and not drawn
MAPS = 8  # heat maps of one kind in a picture
LABELLED = 40  # layers that are named one by one


def draw_spectra(report: Report, style: Style) -> Any:
    """Singular values of W_end − W_start, one panel a kind of layer, all arms in each."""
    arms = report.spectra
    kinds = list(dict.fromkeys(kind for arm in arms for kind in arm.total_values))
    figure, panels = _grid(len(kinds), min(3, max(1, len(kinds))), height=2.1)
    for axes, kind in zip(panels, kinds, strict=True):
        top = max(arm.total_values.get(kind, [0.0])[0] for arm in arms) or 1.0
        for number, arm in _numbered(report):
            values = np.array(arm.total_values.get(kind, []))
            share = 100 * (np.arange(len(values)) + 0.5) / len(values) if len(values) else values
            points = thin(share, np.maximum(values, FLOOR * top), len(arms) * len(kinds))
            axes.plot(*points, **style.line(number))
        axes.set_yscale("log")
        axes.set_ylim(FLOOR * top, 2 * top)
        axes.set_xlim(0, 100)
        axes.set_title(kind)
        _decades(axes)
        axes.xaxis.set_major_locator(FixedLocator([0, 50, 100]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}%"))
    figure.supxlabel("share of singular values", fontsize=9.5)
    figure.supylabel("singular value of W − W₀", fontsize=9.5)
    legend(figure, style, [(n, arm.arm) for n, arm in _numbered(report)])
    return figure


def draw_ranks(report: Report, style: Style) -> Any:
    """Effective rank of each cycle's update and of the sum, and amplification, against cycles."""
    titles = {
        "cycle_effective_rank": "effective rank\nof a cycle's update",
        "total_effective_rank": "effective rank\nof all updates",
        "amplification": "amplification\nfactor",
    }
    figure, panels = _grid(3, 3, height=2.1)
    seeds = [(n, seed) for n, arm in _numbered(report) for seed in arm.seeds]
    last = max((m.cycles for _, seed in seeds for m in seed), default=0)
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for number, seed in seeds:
            found = {m.cycles: getattr(m, key) for m in seed}  # a cycle's last one
            points = {cycle: value for cycle, value in found.items() if value is not None}
            if set(points) == {0}:  # no cycles: full rank, LoRA
                axes.axhline(points[0], **style.line(number))
            elif points:
                line = style.line(number, marker="o", markersize=3.5)
                axes.plot([*points], [*points.values()], **line)
        axes.set_title(title)
        axes.set_xlim(0.6, max(last, 1) + 0.4)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("cycle")
    legend(figure, style, [(n, arm.arm) for n, arm in _numbered(report)])
    return figure


def draw_heat(report: Report, style: Style) -> Any:
    """Effective rank of the update, layer × cycle, for each arm with more than one cycle."""
    arms = _with_cycles(report)[:MAPS]
    layers = max(len(arm.layers.names) for arm in arms)
    height = min(9.0, max(2.0, 0.17 * layers + 0.9)) if layers <= LABELLED else 5.0
    figure, panels = _grid(len(arms), min(2, len(arms)), height=height)
    for axes, arm in zip(panels, arms, strict=True):
        cycles = last_of_cycles(arm.layers.cycles)
        table = np.array(arm.layers.cycle_effective_rank, np.float64)[:, [*cycles.values()]]
        picture = axes.imshow(table, aspect="auto", cmap="viridis", interpolation="none")
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.set_title(arm.arm)
        axes.set_xlabel("cycle")
        marked = _some(table.shape[1], 12)
        axes.set_xticks(marked, [str(list(cycles)[n]) for n in marked])
        names = [_short(name) for name in arm.layers.names]
        shown = _some(len(names), LABELLED if len(arms) < 3 else LABELLED // 3)
        axes.set_yticks(shown, [names[n] for n in shown], fontsize=6.5 if len(names) > 12 else 8)
        bar = figure.colorbar(picture, ax=axes, shrink=0.9, pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label("effective rank of the cycle's update")
    return figure


def draw_similarity(report: Report, style: Style) -> Any:
    """φ(i, j), how much of one update's leading directions lies in another's; 0 to 1."""
    pairs = report.similarity[:MAPS]
    figure, panels = _grid(len(pairs), min(3, len(pairs)), height=2.5)
    picture = None
    for axes, pair in zip(panels, pairs, strict=True):
        table = np.array(pair.phi)
        colours = {"vmin": 0, "vmax": 1, "cmap": "viridis"}
        picture = axes.imshow(table, origin="lower", interpolation="none", **colours)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.set_title("\n".join(_cut(title, 22) for title in pair.of), fontsize=8)
        for line, count in ((axes.xaxis, table.shape[1]), (axes.yaxis, table.shape[0])):
            line.set_major_locator(FixedLocator(sorted({0, count // 2 - 1, count - 1})))
            line.set_major_formatter(FuncFormatter(lambda value, _: f"{value + 1:.0f}"))
        axes.set_xlabel("j")
        axes.set_ylabel("i")
    bar = figure.colorbar(picture, ax=panels, shrink=0.7, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label("φ(i, j)")
    return figure


def has_heat(report: Report) -> bool:
    """Whether some arm has cycles to show."""
    return bool(_with_cycles(report))


def _numbered(report: Report) -> list[tuple[int, ArmSpectra]]:
    """Arms that have spectra, with their numbers in the report."""
    numbers = {arm.name: n for n, arm in enumerate(report.arms)}
    return [(numbers[arm.arm], arm) for arm in report.spectra]


def _with_cycles(report: Report) -> list[ArmSpectra]:
    return [arm for arm in report.spectra if len(last_of_cycles(arm.layers.cycles)) > 1]


def _grid(count: int, columns: int, height: float) -> tuple[Any, list[Any]]:
    """Panels in rows, those that are too many taken away."""
    rows = math.ceil(count / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(WIDTH, height * rows), squeeze=False, layout="constrained"
    )
    panels = list(axes.flat)
    for spare in panels[count:]:
        spare.remove()
    return figure, panels[:count]


def _decades(axes: Any) -> None:
    axes.yaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    exponents = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    axes.yaxis.set_major_locator(FixedLocator([10.0**e for e in exponents]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _some(count: int, most: int) -> list[int]:
    return list(range(0, count, math.ceil(count / most))) if count else []


def _short(name: str) -> str:
    """`layers.3.self_attn.q_proj` as `3 q_proj`."""
    parts = name.split(".")
    block = next((part for part in parts if part.isdigit()), "")
    return f"{block} {parts[-1]}".strip()


def _cut(title: str, width: int) -> str:
    return title if len(title) <= width else f"…{title[1 - width :]}"
