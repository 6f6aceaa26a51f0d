"""A run's timeline: its phases, and its learning rate drawn for the terminal and as a picture."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

from relora.config import Config
from relora.files import replacing
from relora.restart.schedule import Clock
from relora.words import format_count, format_table

CURVE_WIDTH, CURVE_HEIGHT = 80, 8
MAX_CYCLES = 12  # more cycles than this are cut out of the middle of the timeline
MAX_DRAWN = 400  # phases of a picture; more of them are narrower than its dots
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
    return [phase_at(config.clock, number) for number in range(count_phases(config.clock))]


def count_phases(clock: Clock) -> int:
    """How many phases a run has; they may be too many to list."""
    return len(clock.merge_steps()) + 1 + (1 if clock.birth else 0)


def phase_at(clock: Clock, number: int) -> Phase:
    """One phase of a run, counted from 0."""
    if clock.birth is None:
        return Phase("full rank", 0, clock.total, "end")
    if clock.birth > 0 and number == 0:
        return Phase("warm start", 0, clock.birth, "adapters are born")
    if clock.cycle is None:
        return Phase("LoRA", clock.birth, clock.total, "end")
    cycle = number if clock.birth else number + 1
    stop = clock.birth + cycle * clock.cycle
    ends_in = "end" if stop >= clock.total else f"merge {cycle}"
    return Phase(f"cycle {cycle}", stop - clock.cycle, min(stop, clock.total), ends_in)


def timeline(config: Config) -> list[str]:
    """The phases as a table."""
    rows = [["timeline", "steps", "tokens", "peak LR", "then"]]
    count = count_phases(config.clock)
    left_out = count - MAX_CYCLES
    for number in range(count) if left_out <= 1 else _outer(count, MAX_CYCLES):
        if left_out > 1 and number == count - 3:
            rows.append([f"  … {left_out:,} more cycles …", "", "", "", ""])
        phase = phase_at(config.clock, number)
        peak = _rates(config, phase.start, phase.stop)[1]
        tokens = format_count(phase.stop * config.tokens_per_step)
        steps = f"{phase.start:>9,} – {phase.stop:<9,}"
        rows.append([f"  {phase.name}", steps, tokens, f"{peak:.2e}", phase.ends_in])
    return format_table(rows, "<<>><")


def curve(config: Config) -> list[str]:
    """The learning rate as a bar chart; a column with a restart in it shows its lowest rate."""
    clock = config.clock
    columns = min(CURVE_WIDTH, clock.total)
    edges = [round(n * clock.total / columns) for n in range(columns + 1)]
    bars, under = [], ""
    for start, stop in itertools.pairwise(edges):
        event = _event(clock, start, stop)
        bars.append(_rates(config, start, stop)[0 if event else 1])
        under += event or "─"
    # No column shows the highest rate if every peak shares one with a restart.
    peak = _rates(config, 0, clock.total)[1]
    lines = [f"learning rate, {columns} columns of {clock.total / columns:,.4g} steps"]
    for row in reversed(range(CURVE_HEIGHT)):
        eighths = [max(0, min(8, round(8 * (r / peak * CURVE_HEIGHT - row)))) for r in bars]
        label = f"{peak:.1e}" if row == CURVE_HEIGHT - 1 else ""
        lines.append(f"{label:>11} │" + "".join(BARS[n] for n in eighths).rstrip())
    lines.append(f"{'0':>11} └{under}")
    if clock.birth or clock.merge_steps():
        lines.append(" " * 13 + ("△ adapters are born   " if clock.birth else "") + "▲ merge")
    return lines


def _outer(count: int, shown: int) -> list[int]:
    """Of the numbers below `count` the first and the last three: `shown` in all."""
    return [*range(shown - 3), *range(count - 3, count)]


def _rates(config: Config, start: int, stop: int) -> tuple[float, float]:
    """(lowest, highest) learning rate of updates start + 1 … stop."""
    rates = [config.learning_rate(step) for step in config.clock.turns(start, stop)]
    return min(rates), max(rates)


def _event(clock: Clock, start: int, stop: int) -> str:
    """The mark of the last event at steps start … stop − 1."""
    if clock.merges_before(stop - 1) > clock.merges_before(start - 1):
        return "▲"
    return "△" if clock.birth and start <= clock.birth < stop else ""


def draw_timeline(config: Config, path: Path) -> None:
    """The learning rate with phases, birth and merges, as a PNG."""
    from matplotlib.figure import Figure  # a plan without a picture does without it

    clock = config.clock
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    above = axes.get_xaxis_transform()  # y in heights of the picture
    # Each restart is drawn to its bottom, however many steps there are.
    spacing = max(1, clock.total // 4000)
    kept = set(range(0, clock.total, spacing))
    count = count_phases(clock)
    if count > MAX_DRAWN:  # they run into each other: a band between lowest and highest rate
        for start in range(0, clock.total, spacing):
            kept |= set(clock.turns(start, min(start + spacing, clock.total)))
    for number in range(count) if count <= MAX_DRAWN else _outer(count, MAX_CYCLES):
        phase = phase_at(clock, number)
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
        shown = merges[:: 1 + (len(merges) - 1) // MAX_DRAWN]
        below, label = [0] * len(shown), f"{len(merges):,} merges"
        axes.plot(shown, below, "^", color="#222222", clip_on=False, label=label)
    axes.set(xlabel="step", ylabel="learning rate", xlim=(0, clock.total), ylim=(0, None))
    axes.set_title(f"{config.run_dir}: {config.method}", fontsize=10, pad=16)
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    with replacing(path, durable=False) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
