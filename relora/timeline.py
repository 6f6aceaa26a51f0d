"""A run's timeline: its phases, and its learning rate drawn for the terminal and as a picture."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

from relora.config import Config
from relora.files import replacing

CURVE_WIDTH, CURVE_HEIGHT = 80, 8
MAX_CYCLES = 12  # more cycles than this are cut out of the middle of the timeline
BARS = " ▁▂▃▄▅▆▇█"
COLOURS = {"full": "#8c8c8c", "warm": "#8c8c8c", "cycle": "#4477aa", "LoRA": "#4477aa"}


class Phase(NamedTuple):
    """Updates start + 1 … stop, between two events of the clock."""

    name: str
    start: int
    stop: int
    ends_in: str


def phases(config: Config) -> list[Phase]:
    """The run cut at every birth and merge."""
    clock = config.clock
    if clock.birth is None:
        return [Phase("full rank", 0, clock.total, "end")]
    cut = []
    if clock.birth > 0:
        cut.append(Phase("warm start", 0, clock.birth, "adapters are born"))
    starts = [clock.birth, *clock.merge_steps()]
    name = "cycle" if clock.cycle else "LoRA"
    for number, (start, stop) in enumerate(zip(starts, [*starts[1:], clock.total], strict=True), 1):
        ends_in = "end" if stop == clock.total else f"merge {number}"
        cut.append(Phase(f"{name} {number}" if clock.cycle else name, start, stop, ends_in))
    return cut


def timeline(config: Config) -> list[str]:
    """The phases as a table."""
    from relora.runtime.metrics import format_count

    lines = ["timeline             steps                 tokens    peak LR   then"]
    cut = phases(config)
    left_out = len(cut) - MAX_CYCLES
    for number, phase in enumerate(cut):
        if left_out > 1 and MAX_CYCLES - 3 <= number < len(cut) - 3:
            if number == MAX_CYCLES - 3:
                lines.append(f"  … {left_out} more cycles …")
            continue
        peak = max(config.learning_rate(step) for step in range(phase.start, phase.stop))
        tokens = format_count(phase.stop * config.tokens_per_step)
        lines.append(
            f"  {phase.name:<12} {phase.start:>9,} – {phase.stop:<9,} {tokens:>12} {peak:>10.2e}   "
            f"{phase.ends_in}"
        )
    return lines


def curve(config: Config) -> list[str]:
    """The learning rate as a bar chart; a column with a restart in it shows its lowest rate."""
    clock = config.clock
    columns = min(CURVE_WIDTH, clock.total)
    edges = [round(n * clock.total / columns) for n in range(columns + 1)]
    marks = dict.fromkeys(clock.merge_steps(), "▲") | ({clock.birth: "△"} if clock.birth else {})
    bars, under = [], ""
    for start, stop in itertools.pairwise(edges):
        rates = [config.learning_rate(step) for step in range(start, stop)]
        events = [marks[step] for step in range(start, stop) if step in marks]
        bars.append(min(rates) if events else max(rates))
        under += events[-1] if events else "─"
    # No column shows the highest rate if every peak shares one with a restart.
    peak = max(config.learning_rate(step) for step in range(clock.total))
    lines = [f"learning rate, {columns} columns of {clock.total / columns:,.4g} steps"]
    for row in reversed(range(CURVE_HEIGHT)):
        eighths = [max(0, min(8, round(8 * (r / peak * CURVE_HEIGHT - row)))) for r in bars]
        label = f"{peak:.1e}" if row == CURVE_HEIGHT - 1 else ""
        lines.append(f"{label:>11} │" + "".join(BARS[n] for n in eighths).rstrip())
    lines.append(f"{'0':>11} └{under}")
    if marks:
        lines.append(" " * 13 + ("△ adapters are born   " if clock.birth else "") + "▲ merge")
    return lines


def draw(config: Config, path: Path) -> None:
    """The learning rate with phases, birth and merges, as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    clock = config.clock
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    above = axes.get_xaxis_transform()  # y in heights of the picture
    # Each restart is drawn to its bottom, however many steps there are.
    kept = set(range(0, clock.total, max(1, clock.total // 4000)))
    for phase in phases(config):
        kept |= {phase.start, phase.stop - 1, min(phase.start + clock.rewarm, clock.total - 1)}
        colour = COLOURS[phase.name.split()[0]]
        number = int(phase.name.split()[-1]) if phase.name[-1].isdigit() else 0
        axes.axvspan(phase.start, phase.stop, color=colour, alpha=0.08 + 0.06 * (number % 2), lw=0)
        if phase.stop - phase.start > clock.total / 20:  # wide enough for its name
            middle = (phase.start + phase.stop) / 2
            axes.text(middle, 1.01, phase.name, ha="center", fontsize=7, transform=above)
    steps = sorted(kept)
    rates = [config.learning_rate(step) for step in steps]
    axes.plot(steps, rates, color="#222222", lw=1.2, label="learning rate")
    if clock.birth:
        axes.plot(
            clock.birth,
            0,
            "^",
            color="#222222",
            mfc="white",
            clip_on=False,
            label="adapters are born",
        )
    merges = clock.merge_steps()
    if merges:
        below = [0] * len(merges)
        axes.plot(merges, below, "^", color="#222222", clip_on=False, label=f"{len(merges)} merges")
    axes.set(xlabel="step", ylabel="learning rate", xlim=(0, clock.total), ylim=(0, None))
    axes.set_title(f"{config.run_dir}: {config.method}", fontsize=10, pad=16)
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    with replacing(path, durable=False) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)
