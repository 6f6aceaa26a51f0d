"""Curves of an arm as lists of numbers: every evaluation, every logged loss, every mark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from relora.record import keys
from relora.report.arms import ArmRuns, mean_over_seeds, perplexity_of, spread
from relora.report.read import Evaluations, RunFiles
from relora.report.records import Column, Curve, Curves

LR_POINTS = 400  # of a learning-rate curve, beside its corners


def curves_of(arm: ArmRuns) -> Curves:
    """Mean and spread over the arm's seeds, each seed's own curves, and what happened when."""
    leader = arm.leader
    merges = [float(line["step"]) for line in leader.events_with(keys.MERGE)]
    births = [float(line["step"]) for line in leader.events_with(keys.BIRTH)]
    rewarm = leader.config.clock.rewarm
    starts = [step for step in (*births, *merges) if rewarm]
    return Curves(
        mean=_mean(arm),
        seeds=[_evaluated(run.evaluations) for run in arm.runs],
        training=[_training(run.log) for run in arm.runs],
        merges=_at(leader, merges),
        births=_at(leader, births),
        rewarm_from=_at(leader, starts),
        rewarm_to=_at(leader, [min(step + rewarm, float(leader.step)) for step in starts]),
        lr=_learning_rate(leader),
    )


def place_of(run: RunFiles, steps: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, seconds) at steps, on the straight line between the lines that were logged.

    Before the first line from 0, or from what the start had cost.
    """
    log, evaluations = run.log, run.evaluations
    known = np.concatenate([log["step"], evaluations.step])
    order = np.argsort(known, kind="stable")
    columns = []
    for logged, evaluated, start in (
        (log[keys.TOKENS], evaluations.tokens, run.start.tokens if run.start else 0.0),
        (log[keys.ELAPSED_S], evaluations.seconds, run.start.seconds if run.start else 0.0),
    ):
        values = np.concatenate([logged, evaluated])[order]
        there = np.isfinite(values)
        x, y = [0.0, *known[order][there]], [start, *values[there]]
        columns.append(np.interp(np.array(steps, np.float64), x, y))
    return columns[0], columns[1]


def _plain(values: Any) -> Column:
    """A column as JSON takes it: NaN becomes null, whole numbers are whole."""
    return [
        None if not math.isfinite(v) else int(v) if v.is_integer() and abs(v) < 2**53 else v
        for v in np.asarray(values, np.float64).tolist()
    ]


def _at(run: RunFiles, steps: Sequence[float], **more: Column) -> Curve:
    tokens, seconds = map(_plain, place_of(run, steps))
    return Curve(step=_plain(steps), tokens=tokens, seconds=seconds, **more)


def _training(log: dict[str, np.ndarray]) -> Curve:
    return Curve(
        step=_plain(log["step"]),
        tokens=_plain(log[keys.TOKENS]),
        seconds=_plain(log[keys.ELAPSED_S]),
        loss=_plain(log[keys.TRAIN_LOSS]),
    )


def _evaluated(found: Evaluations) -> Curve:
    return Curve(
        step=_plain(found.step),
        tokens=_plain(found.tokens),
        seconds=_plain(found.seconds),
        loss=_plain(found.loss),
        perplexity=[perplexity_of(loss) for loss in found.loss.tolist()],
    )


def _mean(arm: ArmRuns) -> Curve:
    if not arm.evaluated:
        return _evaluated(arm.leader.evaluations)
    mean = mean_over_seeds(arm)
    at = [np.searchsorted(run.evaluations.step, mean.step) for run in arm.furthest]
    losses = [run.evaluations.loss[n] for run, n in zip(arm.furthest, at, strict=True)]
    spreads = [spread([*map(perplexity_of, each)]) for each in np.transpose(losses).tolist()]
    perplexities = {"perplexity": [s.mean for s in spreads], "sd": [s.sd for s in spreads]}
    return _evaluated(mean).model_copy(update=perplexities)


def _learning_rate(run: RunFiles) -> Curve:
    """The rate of each update by the config, thinned between its corners."""
    clock, done = run.config.clock, run.step
    wanted = set(np.linspace(0, max(0, done - 1), LR_POINTS).astype(int).tolist())
    merges = clock.merge_steps()[: clock.merges_before(done)]
    thinned = merges[:: 1 + max(0, len(merges) - 1) // LR_POINTS]  # else between those points
    for corner in (clock.warmup, clock.birth or 0, *thinned):
        wanted |= {corner - 1, corner, corner + clock.rewarm}
    steps = sorted(step for step in wanted if 0 <= step < done)
    return _at(run, steps, lr=_plain([run.config.learning_rate(step) for step in steps]))
