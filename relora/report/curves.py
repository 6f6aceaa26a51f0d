"""Curves of an arm as lists of numbers: every evaluation, every logged loss, every mark."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from relora.record import keys
from relora.record.changes import eras
from relora.report.arms import ArmRuns, mean_over_seeds, perplexity_of, spread
from relora.report.read import Evaluations, RunFiles
from relora.report.records import Curve, Curves

LR_POINTS = 400  # of a learning-rate curve, beside its corners


def curves_of(arm: ArmRuns, base: ArmRuns) -> Curves:
    """Mean and spread over the arm's seeds, each seed's own curves, and what happened when."""
    compared = arm is not base and arm.evaluated and base.evaluated
    leader = arm.leader
    merges, births = (
        [float(line["step"]) for line in leader.events_with(key)]
        for key in (keys.MERGE, keys.BIRTH)
    )
    rewarm = leader.config.clock.rewarm
    starts = births + merges if rewarm else []
    return Curves(
        mean=_mean(arm),
        seeds=[_evaluated(run.evaluations) for run in arm.runs],
        training=[_training(run.log) for run in arm.runs],
        merges=_at(leader, merges),
        births=_at(leader, births),
        rewarm_from=_at(leader, starts),
        rewarm_to=_at(leader, [min(step + rewarm, leader.step) for step in starts]),
        lr=_learning_rate(leader),
        difference=_difference(arm, base) if compared else None,
    )


def place_of(run: RunFiles, steps: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, seconds) at steps, on the straight line between the lines that were logged.

    Before the first line from 0, or from what the start had cost.
    """
    log, evaluations, start = run.log, run.evaluations, run.start
    known = np.concatenate([log["step"], evaluations.step])
    order = np.argsort(known, kind="stable")

    def at_steps(logged: np.ndarray, evaluated: np.ndarray, begin: float) -> np.ndarray:
        values = np.concatenate([logged, evaluated])[order]
        there = np.isfinite(values)
        return np.interp(steps, [0.0, *known[order][there]], [begin, *values[there]])

    return (
        at_steps(log[keys.TOKENS], evaluations.tokens, start.tokens if start else 0.0),
        at_steps(log[keys.ELAPSED_S], evaluations.seconds, start.seconds if start else 0.0),
    )


def _curve(**columns: Any) -> Curve:
    """Columns as JSON takes them: what is no number becomes null."""
    return Curve(
        **{
            name: [v if math.isfinite(v) else None for v in np.asarray(values, np.float64).tolist()]
            for name, values in columns.items()
        }
    )


def _at(run: RunFiles, steps: Sequence[float], **more: Sequence[float]) -> Curve:
    tokens, seconds = place_of(run, steps)
    return _curve(step=steps, tokens=tokens, seconds=seconds, **more)


def _training(log: dict[str, np.ndarray]) -> Curve:
    return _curve(
        step=log["step"],
        tokens=log[keys.TOKENS],
        seconds=log[keys.ELAPSED_S],
        loss=log[keys.TRAIN_LOSS],
    )


def _evaluated(found: Evaluations, **more: Any) -> Curve:
    columns = {"perplexity": [perplexity_of(loss) for loss in found.loss.tolist()], **more}
    return _curve(
        step=found.step, tokens=found.tokens, seconds=found.seconds, loss=found.loss, **columns
    )


def _mean(arm: ArmRuns) -> Curve:
    if not arm.evaluated:
        return _evaluated(arm.leader.evaluations)
    mean = mean_over_seeds(arm)
    losses = np.transpose([run.evaluations.at(mean.step).loss for run in arm.furthest]).tolist()
    spreads = [spread([perplexity_of(loss) for loss in each]) for each in losses]
    return _evaluated(mean, perplexity=[s.mean for s in spreads], sd=[s.sd for s in spreads])


def _difference(arm: ArmRuns, base: ArmRuns) -> Curve:
    """Mean loss less the baseline's where both have been evaluated by then, and its spread.

    That is the standard deviation of a run of the arm less one of the baseline; with a single seed
    of either there is none.
    """
    own, its = mean_over_seeds(arm), mean_over_seeds(base)
    within = (own.tokens >= its.tokens[0]) & (own.tokens <= its.tokens[-1])
    own = own.at(own.step[within])

    def between(values: np.ndarray) -> np.ndarray:
        return np.interp(own.tokens, its.tokens, values)

    more = {}
    if min(len(arm.furthest), len(base.furthest)) > 1:
        more["sd"] = np.hypot(_deviation(arm, own), between(_deviation(base, its)))
    losses = own.loss - between(its.loss)
    return _curve(step=own.step, tokens=own.tokens, seconds=own.seconds, loss=losses, **more)


def _deviation(arm: ArmRuns, at: Evaluations) -> np.ndarray:
    """Sample standard deviation of the loss over the furthest seeds."""
    losses = [run.evaluations.at(at.step).loss for run in arm.furthest]
    return np.std(losses, axis=0, ddof=1)


def _learning_rate(run: RunFiles) -> Curve:
    """The rate of each update by the config of its time, thinned between its corners."""
    done, steps, rates = run.step, list[int](), list[float]()
    even = set(np.linspace(0, max(0, done - 1), LR_POINTS).astype(int).tolist())
    times = eras(run.config, run.changes)
    for (begin, config), (end, _) in itertools.pairwise([*times, (done, run.config)]):
        clock, wanted = config.clock, {*even, begin, end - 1}
        merges = clock.merge_steps()[: clock.merges_before(done)]
        thinned = merges[:: 1 + max(0, len(merges) - 1) // LR_POINTS]  # else between those points
        for corner in (clock.warmup, clock.birth or 0, *thinned):
            wanted |= {corner - 1, corner, corner + clock.rewarm}
        here = sorted(step for step in wanted if begin <= step < min(end, done))
        steps += here
        rates += [config.learning_rate(step) for step in here]
    return _at(run, steps, lr=rates)
