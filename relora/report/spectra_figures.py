"""Pictures of what updates are made of: spectra, ranks against cycles, layers × cycles, φ(i, j)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from relora.report.records import ArmSpectra, Report
from relora.report.spectra import last_of_cycles
from relora.report.style import Style, legend, panels, set_log_y

FLOOR = 1e-4  # of the largest value of a panel; what is below is rounding, and not drawn
MAPS = 8  # heat maps of one kind in a picture
LABELLED = 40  # layers that are named one by one


def draw_spectra(report: Report, style: Style) -> Any:
    """Singular values of W_end − W_start, one panel a kind of layer, all arms in each."""
    arms = report.spectra
    kinds = list(dict.fromkeys(kind for arm in arms for kind in arm.total_values))
    figure, found = panels(len(kinds), min(3, max(1, len(kinds))), height=2.1)
    for axes, kind in zip(found, kinds, strict=True):
        top = max(arm.total_values.get(kind, [0.0])[0] for arm in arms) or 1.0
        for arm in arms:
            values = np.array(arm.total_values.get(kind, []))
            share = 100 * (np.arange(len(values)) + 0.5) / max(1, len(values))
            line = style.line(report.numbers[arm.arm])
            axes.plot(share, np.maximum(values, FLOOR * top), **line)
        set_log_y(axes, FLOOR * top, 2 * top)
        axes.set_xlim(0, 100)
        axes.set_title(kind)
        axes.set_xticks([0, 50, 100], ["0%", "50%", "100%"])
    figure.supxlabel("share of singular values", fontsize=9.5)
    figure.supylabel("singular value of W − W₀", fontsize=9.5)
    legend(figure, style, _numbers(report))
    return figure


def draw_ranks(report: Report, style: Style) -> Any:
    """Effective rank of each cycle's update and of the sum, and amplification, against cycles."""
    titles = {
        "cycle_effective_rank": "effective rank\nof a cycle's update",
        "total_effective_rank": "effective rank\nof all updates",
        "amplification": "amplification\nfactor",
    }
    figure, found = panels(3, 3, height=2.1)
    seeds = [(report.numbers[arm.arm], seed) for arm in report.spectra for seed in arm.seeds]
    last = max((m.cycles for _, seed in seeds for m in seed), default=0)
    for axes, (key, title) in zip(found, titles.items(), strict=True):
        for number, seed in seeds:
            of_cycles = {m.cycles: getattr(m, key) for m in seed}  # a cycle's last one
            points = {cycle: value for cycle, value in of_cycles.items() if value is not None}
            if set(points) == {0}:  # no cycles: full rank, LoRA
                axes.axhline(points[0], **style.line(number))
            elif points:
                line = style.line(number, marker="o", markersize=3.5)
                axes.plot([*points], [*points.values()], **line)
        axes.set_title(title)
        axes.set_xlim(0.6, max(last, 1) + 0.4)
        # Room for the highest marker, above a 0 that may be far below all of them.
        axes.set_ylim(0, 1.08 * axes.dataLim.y1 if axes.lines else 1)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("cycle")
    legend(figure, style, _numbers(report))
    return figure


def draw_heat(report: Report, style: Style) -> Any:
    """Effective rank of the update, layer × cycle, for each arm with more than one cycle."""
    arms = _with_cycles(report)[:MAPS]
    layers = max(len(arm.layers.names) for arm in arms)
    height = min(9.0, max(2.0, 0.17 * layers + 0.9)) if layers <= LABELLED else 5.0
    figure, found = panels(len(arms), min(2, len(arms)), height=height)
    for axes, arm in zip(found, arms, strict=True):
        cycles = last_of_cycles(arm.layers.cycles)
        table = np.array(arm.layers.cycle_effective_rank, np.float64)[:, [*cycles.values()]]
        picture = _draw_map(axes, table, aspect="auto")
        axes.set_title(arm.arm)
        axes.set_xlabel("cycle")
        marked = _some(table.shape[1], 12)
        axes.set_xticks(marked, [str(list(cycles)[n]) for n in marked])
        names = [_short(name) for name in arm.layers.names]
        shown = _some(len(names), LABELLED if len(arms) < 3 else LABELLED // 3)
        axes.set_yticks(shown, [names[n] for n in shown], fontsize=6.5 if len(names) > 12 else 8)
        _draw_scale(figure, picture, axes, "effective rank of the cycle's update", shrink=0.9)
    return figure


def draw_similarity(report: Report, style: Style) -> Any:
    """φ(i, j), how much of one update's leading directions lies in another's; 0 to 1."""
    pairs = report.similarity[:MAPS]
    figure, found = panels(len(pairs), min(3, len(pairs)), height=2.5)
    for axes, pair in zip(found, pairs, strict=True):
        table = np.array(pair.phi)
        picture = _draw_map(axes, table, origin="lower", vmin=0, vmax=1)
        axes.set_title("\n".join(_cut(title, 22) for title in pair.of), fontsize=8)
        for set_ticks, count in zip((axes.set_yticks, axes.set_xticks), table.shape, strict=True):
            ticks = sorted({0, count // 2 - 1, count - 1})
            set_ticks(ticks, [str(tick + 1) for tick in ticks])
        axes.set_xlabel("j")
        axes.set_ylabel("i")
    _draw_scale(figure, picture, found, "φ(i, j)", shrink=0.7)
    return figure


def has_heat(report: Report) -> bool:
    """Whether some arm has cycles to show."""
    return bool(_with_cycles(report))


def _numbers(report: Report) -> dict[str, int]:
    """Of the arms that have spectra."""
    return {arm.arm: report.numbers[arm.arm] for arm in report.spectra}


def _with_cycles(report: Report) -> list[ArmSpectra]:
    return [arm for arm in report.spectra if len(last_of_cycles(arm.layers.cycles)) > 1]


def _draw_map(axes: Any, table: np.ndarray, **more: Any) -> Any:
    """A table as colours, without lines on it."""
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return axes.imshow(table, cmap="viridis", interpolation="none", **more)


def _draw_scale(figure: Any, picture: Any, axes: Any, label: str, shrink: float) -> None:
    """What the colours mean, beside the axes that show them."""
    bar = figure.colorbar(picture, ax=axes, shrink=shrink, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label(label)


def _some(count: int, most: int) -> list[int]:
    return list(range(0, count, math.ceil(count / most))) if count else []


def _short(name: str) -> str:
    """`layers.3.self_attn.q_proj` as `3 q_proj`."""
    parts = name.split(".")
    block = next((part for part in parts if part.isdigit()), "")
    return f"{block} {parts[-1]}".strip()


def _cut(title: str, width: int) -> str:
    return title if len(title) <= width else f"…{title[1 - width :]}"
