"""The three questions: perplexity at equal tokens, equal wall-clock, equal memory.

And what each arm spent until it was as good as the baseline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from relora.report.arms import (
    ArmRuns,
    at_seconds,
    at_tokens,
    mean_over_seeds,
    perplexity_of,
    reached,
    spread,
)
from relora.report.read import RunFiles
from relora.report.records import (
    AtEqual,
    AtEqualMemory,
    EqualRow,
    MemoryRow,
    Spread,
    Target,
    TargetRow,
)

CountFlops = Callable[[int], float] | None  # of so many steps
Found = tuple[float, float] | None  # tokens, loss


def at_equal_tokens(arms: Sequence[ArmRuns], baseline: ArmRuns) -> AtEqual:
    """At the smallest last token count of all runs, from the last evaluation at or before it."""
    at = min(float(run.evaluations.tokens[-1]) for run in _compared(arms))
    rows = [_row(arm, [at_tokens(run, at) for run in arm.runs]) for arm in arms]
    return AtEqual(at=at, rows=_beside(rows, baseline))


def at_equal_seconds(arms: Sequence[ArmRuns], baseline: ArmRuns) -> AtEqual:
    """At the smallest last elapsed time of all runs; the loss is interpolated in time.

    Runs whose time is a mixture have none that compares; `at` is None if there are no others.
    """
    there = [run for run in _compared(arms) if not run.mixed]
    at = min((float(run.evaluations.seconds[-1]) for run in there), default=None)

    def found(run: RunFiles) -> Found:
        return None if at is None or run.mixed else at_seconds(run, at)

    rows = [_row(arm, [found(run) for run in arm.runs]) for arm in arms]
    return AtEqual(at=at, rows=_beside(rows, baseline))


def at_equal_memory(tokens: AtEqual, memory: Mapping[str, Spread], measured: bool) -> AtEqualMemory:
    """Arms by their memory, and which arm is best within the memory of each.

    Args:
        tokens: the answer at equal tokens, whose perplexities are compared.
        memory: bytes a rank by arm.
        measured: whether that is the devices' own peak, and not the training state.
    """
    there = [(row, memory[row.arm].mean) for row in tokens.rows]
    there.sort(key=lambda pair: (pair[1] is None, pair[1] or 0))
    rows = []
    for row, limit in there:
        fitting = [
            (other.perplexity.mean, other.arm)
            for other, its in there
            if None not in (limit, its) and its <= limit and other.perplexity.mean is not None  # type: ignore[operator]
        ]
        perplexity, name = min(fitting, key=lambda pair: pair[0], default=(None, None))
        rows.append(
            MemoryRow(
                arm=row.arm,
                memory=memory[row.arm],
                perplexity=row.perplexity,
                best_within=name,
                best_perplexity=perplexity,
            )
        )
    return AtEqualMemory(measured=measured, rows=rows)


def until_the_baseline(
    arms: Sequence[ArmRuns], baseline: ArmRuns, flops: Mapping[str, CountFlops]
) -> Target:
    """Tokens, time and FLOPs until the baseline's last loss is reached, by the mean over seeds."""
    means = {arm.name: mean_over_seeds(arm) for arm in arms}
    loss = float(means[baseline.name].loss[-1])
    rows = []
    for arm in arms:
        crossing, count = reached(means[arm.name], loss), flops[arm.name]
        timed = crossing is not None and not any(run.mixed for run in arm.runs)
        rows.append(
            TargetRow(
                arm=arm.name,
                reached=crossing is not None,
                seeds_that_reach_it=sum(
                    reached(run.evaluations, loss) is not None for run in arm.runs
                ),
                of=len(arm.runs),
                step=crossing.step if crossing else None,
                tokens=crossing.tokens if crossing else None,
                seconds=crossing.seconds if crossing and timed else None,
                flops=count(math.ceil(crossing.step)) if crossing and count else None,
            )
        )
    first = next(row for row in rows if row.arm == baseline.name)
    ratios = [
        {f"{key}_ratio": ratio(getattr(row, key), getattr(first, key)) for key in _SPENT}
        for row in rows
    ]
    rows = [row.model_copy(update=update) for row, update in zip(rows, ratios, strict=True)]
    return Target(loss=loss, perplexity=perplexity_of(loss), rows=rows)


_SPENT = ("tokens", "seconds", "flops")


def ratio(own: float | None, its: float | None) -> float | None:
    """One by the other, where both are known."""
    return own / its if own is not None and its else None


def _row(arm: ArmRuns, found: Sequence[Found]) -> EqualRow:
    losses = [pair[1] if pair else None for pair in found]
    return EqualRow(
        arm=arm.name,
        loss=spread(losses),
        perplexity=spread([perplexity_of(loss) for loss in losses]),
        tokens=spread([pair[0] if pair else None for pair in found]),
    )


def _beside(rows: Sequence[EqualRow], baseline: ArmRuns) -> list[EqualRow]:
    """Each row with its mean perplexity's difference from the baseline's."""
    first = next(row for row in rows if row.arm == baseline.name).perplexity.mean
    found = []
    for row in rows:
        own = row.perplexity.mean
        difference = own - first if own is not None and first is not None else None
        update = {"difference": difference, "ratio": ratio(own, first)}
        found.append(row.model_copy(update=update))
    return found


def _compared(arms: Sequence[ArmRuns]) -> list[RunFiles]:
    """Runs that say how far a comparison goes: one that gave up does not end it for the others."""
    evaluated = [run for arm in arms for run in arm.evaluated]
    return [run for run in evaluated if not run.gave_up] or evaluated
