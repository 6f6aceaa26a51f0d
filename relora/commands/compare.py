"""`relora compare`: curves of several runs in one picture, and their figures in one table.

Everything comes from the files of the run directories, so runs may be finished, stopped or running.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relora.config import Config, differences, load_run_config
from relora.errors import CheckpointError
from relora.runtime.metrics import format_count, format_duration, read_metrics
from relora.runtime.rundir import read_run_state

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LENGTHS = ("train.steps", "train.tokens", "train.eval_sequences")
FAIR = ("data.", "batch.global_batch_size", "model.", "seed", *LENGTHS)
HARMLESS = ("data.dir", "data.num_workers", "model.gradient_checkpointing")


@dataclass(frozen=True)
class Curves:
    """What a run's files say about it."""

    name: str
    config: Config
    status: str
    lines: list[dict[str, Any]]

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """(tokens seen, value) of every line that has `key`."""
        lines = [line for line in self.lines if line.get(key) is not None]
        return [line["train/tokens"] for line in lines], [line[key] for line in lines]

    def last(self, key: str) -> float | None:
        """The latest value of `key`."""
        values = [line[key] for line in self.lines if line.get(key) is not None]
        return values[-1] if values else None

    def events(self, key: str) -> list[float]:
        """Tokens seen at every line that has `key`: merges and births."""
        per_step = self.config.tokens_per_step
        return [line["step"] * per_step for line in self.lines if key in line]


def compare(runs: Sequence[Path], to: Path) -> int:
    """Write `comparison.png` and `comparison.md` into `to`, and print the table."""
    curves = [read_run(run, name) for run, name in zip(runs, short_names(runs), strict=True)]
    to.mkdir(parents=True, exist_ok=True)
    draw(curves, to / "comparison.png")
    text = report(curves)
    (to / "comparison.md").write_text(text, encoding="utf8")
    print(text)
    print(f"written: {to / 'comparison.png'}, {to / 'comparison.md'}")
    return 0


def short_names(runs: Sequence[Path]) -> list[str]:
    """Each run's directory name, with as many of its parents as tell it from the others."""
    parts = [run.resolve().parts for run in runs]
    for depth in range(1, max(map(len, parts))):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def read_run(run_dir: Path, name: str) -> Curves:
    """Read one run directory.

    Args:
        name: what the report calls it.

    Raises:
        CheckpointError: it is none, or has not logged an evaluation yet.
    """
    for file in ("config.yaml", "metrics.jsonl"):
        if not (run_dir / file).is_file():
            raise CheckpointError(
                f"{run_dir}: is no run directory that has started: it has no {file}"
            )
    status = read_run_state(run_dir).get("status", "unknown")
    curves = Curves(name, load_run_config(run_dir), status, read_metrics(run_dir))
    if curves.last("eval/loss") is None:
        raise CheckpointError(
            f"{run_dir}: has no evaluation yet; wait for the first, or set train.eval_every"
        )
    return curves


def report(curves: Sequence[Curves]) -> str:
    """A Markdown table of the runs, and what makes their comparison unfair if anything does."""
    columns = {
        "run": lambda c: c.name,
        "method": lambda c: c.config.method,
        "status": lambda c: c.status,
        "step": lambda c: f"{c.lines[-1]['step']}/{c.config.total_steps}",
        "tokens": lambda c: format_count(c.last("train/tokens") or 0),
        "merges": lambda c: str(len(c.events("relora/merge"))),
        "validation loss": lambda c: _shown(c.last("eval/loss"), ".4f"),
        "perplexity": lambda c: _shown(c.last("eval/perplexity"), ".2f"),
        "tokens/s": lambda c: _shown(median(c, "perf/tokens_per_s"), ",.0f"),
        "ms/step": lambda c: _shown(median(c, "perf/step_ms"), ".0f"),
        "memory (GiB per rank)": lambda c: _shown(c.last("perf/memory_gib"), ".2f"),
        "time": lambda c: format_duration(c.last("time/elapsed_s") or 0),
    }
    rows = [list(columns), ["---"] * len(columns)]
    rows += [[cell(run) for cell in columns.values()] for run in curves]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    notes = "".join(f"- {note}\n" for note in unfair(curves))
    warning = f"\nNot the same in all runs:\n\n{notes}" if notes else ""
    return f"# Comparison\n\n{table}\n{warning}\n![curves](comparison.png)\n"


def unfair(curves: Sequence[Curves]) -> list[str]:
    """Differences from the first run that make curves incomparable, one line each."""
    first = curves[0]
    notes = []
    for run in curves[1:]:
        for path, old, new in differences(first.config, run.config):
            if path.startswith(FAIR) and path not in HARMLESS:
                notes.append(f"{path}: {old!r} in {first.name}, {new!r} in {run.name}")
    notes += [f"{run.name} is {run.status}" for run in curves if run.status != "finished"]
    return notes


def median(run: Curves, key: str) -> float | None:
    """Median over the run's log lines; robust against a pause of the machine."""
    values = sorted(run.series(key)[1])
    return values[len(values) // 2] if values else None


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def draw(curves: Sequence[Curves], path: Path) -> None:
    """Validation loss over tokens with the merges marked, and the learning rate below."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter

    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(9, 7), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    for run, colour in zip(curves, COLOURS * len(curves), strict=False):
        tokens, losses = run.series("eval/loss")
        label = f"{run.name} ({run.config.method}): {losses[-1]:.3f}"
        top.plot(tokens, losses, "o-", color=colour, markersize=3, linewidth=1.5, label=label)
        for number, at in enumerate(run.events("relora/merge")):
            top.axvline(
                at,
                color=colour,
                linewidth=0.8,
                linestyle=":",
                label=f"merges of {run.name}" if number == 0 else None,
            )
        for at in run.events("relora/birth"):
            top.axvline(at, color=colour, linewidth=1, linestyle="--", label="end of warm start")
        # Every step's rate: a log line every so many steps would cut the corners of the restarts.
        steps = range(run.lines[-1]["step"])
        rates = [run.config.learning_rate(step) for step in steps]
        per_step = run.config.tokens_per_step
        bottom.plot([s * per_step for s in steps], rates, color=colour, linewidth=1.2)
    top.set_ylabel("validation loss (nats per token)")
    top.set_yscale("log")
    top.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    top.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    top.legend(frameon=False)
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("tokens seen")
    bottom.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
