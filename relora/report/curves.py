"""Curves of an arm as lists of numbers: every evaluation, every logged loss, every mark."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from relora.report.arms import Arm, mean_over_seeds, perplexity_of, spread
from relora.report.read import RunFiles

LR_POINTS = 400  # of a learning-rate curve, beside its corners


def curves_of(arm: Arm) -> dict[str, Any]:
    """Mean and spread over the arm's seeds, each seed's own curves, and what happened when."""
    return {
        "mean": _mean(arm),
        "seeds": [_seed(run) for run in arm.runs],
        "marks": _marks(arm.leader),
        "lr": _learning_rate(arm.leader),
    }


def plain_list(values: Any) -> list[float | None]:
    """A column as JSON takes it: NaN becomes null, whole numbers are whole."""
    return [
        None if not math.isfinite(v) else int(v) if v.is_integer() and abs(v) < 2**53 else v
        for v in np.asarray(values, np.float64).tolist()
    ]


def _seed(run: RunFiles) -> dict[str, Any]:
    evaluations, log = run.evaluations, run.log
    return {
        "seed": run.config.seed,
        "step": plain_list(evaluations.step),
        "tokens": plain_list(evaluations.tokens),
        "seconds": plain_list(evaluations.seconds),
        "loss": plain_list(evaluations.loss),
        "perplexity": [perplexity_of(loss) for loss in evaluations.loss.tolist()],
        "training": {
            "step": plain_list(log["step"]),
            "tokens": plain_list(log["train/tokens"]),
            "seconds": plain_list(log["time/elapsed_s"]),
            "loss": plain_list(log["train/loss"]),
        },
    }


def _mean(arm: Arm) -> dict[str, Any]:
    """Over the furthest seeds, at steps that all have; perplexities are averaged, not losses."""
    if not arm.evaluated:
        return {
            "n": 0,
            **{k: [] for k in ("step", "tokens", "seconds", "loss", "perplexity", "sd")},
        }
    mean = mean_over_seeds(arm)
    tables = [
        dict(zip(run.evaluations.step.tolist(), run.evaluations.loss.tolist(), strict=True))
        for run in arm.furthest
    ]
    spreads = [
        spread([perplexity_of(t[step]) for t in tables if step in t]) for step in mean.step.tolist()
    ]
    return {
        "n": len(tables),
        "step": plain_list(mean.step),
        "tokens": plain_list(mean.tokens),
        "seconds": plain_list(mean.seconds),
        "loss": plain_list(mean.loss),
        "perplexity": [each["mean"] for each in spreads],
        "sd": [each["sd"] for each in spreads],
    }


def _marks(run: RunFiles) -> dict[str, list[dict[str, float | None]]]:
    """Merges, the birth of adapters, and stretches in which the learning rate warms up again."""
    merges = [float(line["step"]) for line in run.events_with("relora/merge")]
    births = [float(line["step"]) for line in run.events_with("relora/birth")]
    rewarm = run.config.clock.rewarm
    starts = [step for step in (*births, *merges) if rewarm]
    ends = [min(step + rewarm, float(run.step)) for step in starts]
    return {
        "merges": _places(run, merges),
        "births": _places(run, births),
        "rewarm_from": _places(run, starts),
        "rewarm_to": _places(run, ends),
    }


def _places(run: RunFiles, steps: list[float]) -> list[dict[str, float | None]]:
    tokens, seconds = place(run, np.array(steps, np.float64))
    rows = zip(plain_list(steps), plain_list(tokens), plain_list(seconds), strict=True)
    return [{"step": step, "tokens": t, "seconds": s} for step, t, s in rows]


def place(run: RunFiles, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, seconds) at steps, on the straight line between the lines that were logged.

    Before the first line from 0, or from what the start had cost.
    """
    log, evaluations = run.log, run.evaluations
    known = np.concatenate([log["step"], evaluations.step])
    order = np.argsort(known, kind="stable")
    columns = []
    for logged, evaluated, start in (
        (log["train/tokens"], evaluations.tokens, run.start.tokens if run.start else 0.0),
        (log["time/elapsed_s"], evaluations.seconds, run.start.seconds if run.start else 0.0),
    ):
        values = np.concatenate([logged, evaluated])[order]
        there = np.isfinite(values)
        x, y = [0.0, *known[order][there]], [start, *values[there]]
        columns.append(np.interp(steps, x, y) if len(steps) else np.zeros(0))
    return columns[0], columns[1]


def _learning_rate(run: RunFiles) -> dict[str, list[float | None]]:
    """The rate of each update by the config, thinned between its corners."""
    clock, done = run.config.clock, run.step
    wanted = set(np.linspace(0, max(0, done - 1), LR_POINTS).astype(int).tolist())
    merges = clock.merge_steps()[: clock.merges_before(done)]
    merges = merges[
        :: 1 + max(0, len(merges) - 1) // LR_POINTS
    ]  # more would lie between two of those points
    for corner in (clock.warmup, clock.birth or 0, *merges):
        wanted |= {corner - 1, corner, corner + clock.rewarm}
    steps = sorted(step for step in wanted if 0 <= step < done)
    tokens, seconds = place(run, np.array(steps, np.float64))
    return {
        "step": plain_list(steps),
        "tokens": plain_list(tokens),
        "seconds": plain_list(seconds),
        "lr": plain_list([run.config.learning_rate(step) for step in steps]),
    }
