"""Pictures of what updates are made of: spectra, ranks against cycles, layers × cycles, φ(i, j)."""

from __future__ import annotations

import math
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from relora.report.figures import thin
from relora.report.spectra import last_of_cycles
from relora.report.svg import Look

FLOOR = 1e-4  # of the largest value of a panel; what is below is rounding, and not drawn
MAPS = 8  # heat maps of one kind in a picture
LABELLED = 40  # layers that are named one by one


def draw_spectra(report: dict[str, Any], look: Look) -> Any:
    """Singular values of W_end − W_start, one panel a kind of layer, all arms in each."""
    arms = report["spectra"]["arms"]
    kinds = list(dict.fromkeys(kind for arm in arms for kind in arm["total_values"]))
    columns = min(2 if look.narrow else 4, max(1, len(kinds)))
    figure, panels = _grid(look, len(kinds), columns, height=2.1 if look.narrow else 2.3)
    for axes, kind in zip(panels, kinds, strict=False):
        tops = [arm["total_values"].get(kind, [0.0])[0] for arm in arms]
        floor = FLOOR * (max(tops) or 1.0)
        for arm in arms:
            values = np.array(arm["total_values"].get(kind, []))
            if not len(values):
                continue
            number = _number(report, arm["arm"])
            share = 100 * (np.arange(len(values)) + 0.5) / len(values)
            x, y = thin(share, np.maximum(values, floor), len(arms) * len(kinds))
            axes.plot(x, y, color=look.colour(number), linestyle=look.dash(number), linewidth=1.5)
        axes.set_yscale("log")
        axes.set_ylim(floor, 2 * (max(tops) or 1.0))
        axes.set_xlim(0, 100)
        axes.set_title(kind)
        _decades(axes)
        axes.xaxis.set_major_locator(FixedLocator([0, 50, 100]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}%"))
    figure.supxlabel("share of singular values", fontsize=9)
    figure.supylabel("singular value of W − W₀", fontsize=9)
    legend(figure, report, look)
    return figure


def draw_ranks(report: dict[str, Any], look: Look) -> Any:
    """Effective rank of each cycle's update and of the sum, and amplification, against cycles."""
    titles = {
        "cycle_effective_rank": "effective rank of a cycle's update",
        "total_effective_rank": "effective rank of all updates",
        "amplification": "amplification factor",
    }
    columns = 1 if look.narrow else 3
    figure, panels = _grid(look, 3, columns, height=2.0 if look.narrow else 2.7)
    arms = report["spectra"]["arms"]
    last = max(
        (m["cycles"] for arm in arms for seed in arm["seeds"] for m in seed["measurements"]),
        default=0,
    )
    for axes, (figure_name, title) in zip(panels, titles.items(), strict=True):
        for arm in arms:
            number = _number(report, arm["arm"])
            style = {"color": look.colour(number), "linestyle": look.dash(number), "linewidth": 1.4}
            for seed in arm["seeds"]:
                points = {
                    m["cycles"]: m[figure_name]  # the last one of a cycle
                    for m in seed["measurements"]
                    if m[figure_name] is not None
                }
                if set(points) == {0}:  # no cycles: full rank, LoRA
                    axes.axhline(points[0], **style)
                elif points:
                    axes.plot([*points], [*points.values()], marker="o", markersize=3.5, **style)
        axes.set_title(title)
        axes.set_xlim(0.6, max(last, 1) + 0.4)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("cycle")
    legend(figure, report, look)
    return figure


def draw_heat(report: dict[str, Any], look: Look) -> Any:
    """Effective rank of the update, layer × cycle, for each arm with more than one measurement."""
    arms = _with_cycles(report)[:MAPS]
    columns = 1 if look.narrow else min(2, len(arms))
    layers = max(len(arm["layers"]["names"]) for arm in arms)
    height = min(9.0, max(2.0, 0.17 * layers + 0.9)) if layers <= LABELLED else 5.0
    figure, panels = _grid(look, len(arms), columns, height=height)
    for axes, arm in zip(panels, arms, strict=True):
        cycles = last_of_cycles(arm["layers"]["cycles"])
        table = np.array(arm["layers"]["cycle_effective_rank"], np.float64)[:, [*cycles.values()]]
        picture = axes.imshow(table, aspect="auto", cmap="viridis", interpolation="none")
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.set_title(arm["arm"])
        axes.set_xlabel("cycle")
        marked = _some(table.shape[1], 12)
        axes.set_xticks(marked, [str(list(cycles)[n]) for n in marked])
        names = [_short(name) for name in arm["layers"]["names"]]
        shown = _some(len(names), LABELLED if len(arms) < 3 else LABELLED // 3)
        axes.set_yticks(shown, [names[n] for n in shown], fontsize=6.5 if len(names) > 12 else 8)
        bar = figure.colorbar(picture, ax=axes, shrink=0.9, pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label("effective rank of the cycle's update")
    return figure


def draw_similarity(report: dict[str, Any], look: Look) -> Any:
    """φ(i, j), how much of one update's leading directions lies in another's; 0 to 1."""
    pairs = report["spectra"]["similarity"][:MAPS]
    columns = min(2 if look.narrow else 4, len(pairs))
    figure, panels = _grid(look, len(pairs), columns, height=2.3 if look.narrow else 2.5)
    picture = None
    for axes, pair in zip(panels, pairs, strict=True):
        table = np.array(pair["phi"])
        picture = axes.imshow(
            table, vmin=0, vmax=1, cmap="viridis", origin="lower", interpolation="none"
        )
        axes.grid(False)
        axes.spines[:].set_visible(False)
        one, other = (_cut(title, 22) for title in pair["of"])
        axes.set_title(f"{one}\n{other}", fontsize=7.5 if look.narrow else 8)
        for line, count in ((axes.xaxis, table.shape[1]), (axes.yaxis, table.shape[0])):
            line.set_major_locator(FixedLocator(sorted({0, count // 2 - 1, count - 1})))
            line.set_major_formatter(FuncFormatter(lambda value, _: f"{value + 1:.0f}"))
        axes.set_xlabel("j")
        axes.set_ylabel("i")
    bar = figure.colorbar(picture, ax=panels, shrink=0.7, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label("φ(i, j)")
    return figure


def has_heat(report: dict[str, Any]) -> bool:
    """Whether some arm has cycles to show."""
    return bool(_with_cycles(report))


def legend(figure: Any, report: dict[str, Any], look: Look) -> None:
    """The arms that have spectra; a page has a legend of its own."""
    if not look.legend:
        return
    names = [arm["arm"] for arm in report["spectra"]["arms"]]
    handles = [
        Line2D([], [], color=look.colour(n), linestyle=look.dash(n), label=f"\u200b{name}")
        for name, n in ((name, _number(report, name)) for name in names)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(4, len(handles)))


def _grid(look: Look, count: int, columns: int, height: float) -> tuple[Any, list[Any]]:
    """Panels in rows, those that are too many taken away."""
    rows = math.ceil(count / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(look.width, height * rows), squeeze=False, layout="constrained"
    )
    panels = list(axes.flat)
    for spare in panels[count:]:
        spare.remove()
    return figure, panels[:count]


def _number(report: dict[str, Any], name: str) -> int:
    return next(n for n, arm in enumerate(report["arms"]) if arm["name"] == name)


def _with_cycles(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        arm for arm in report["spectra"]["arms"] if len(last_of_cycles(arm["layers"]["cycles"])) > 1
    ]


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
