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
    return _at_equal(at, arms, baseline, lambda run: at_tokens(run, at))


def at_equal_seconds(arms: Sequence[ArmRuns], baseline: ArmRuns) -> AtEqual:
    """At the smallest last elapsed time of all runs; the loss is interpolated in time.

    Runs whose time is a mixture have none that compares; `at` is None if there are no others.
    """
    timed = [run for run in _compared(arms) if not run.mixed]
    at = min((float(run.evaluations.seconds[-1]) for run in timed), default=None)

    def found(run: RunFiles) -> Found:
        return None if at is None or run.mixed else at_seconds(run, at)

    return _at_equal(at, arms, baseline, found)


def at_equal_memory(tokens: AtEqual, memory: Mapping[str, Spread], measured: bool) -> AtEqualMemory:
    """Arms by their memory, and which arm is best within the memory of each.

    Args:
        tokens: the answer at equal tokens, whose perplexities are compared.
        memory: bytes a rank by arm.
        measured: whether that is the devices' own peak, and not the training state.
    """
    means = {row.arm: memory[row.arm].mean for row in tokens.rows}
    bytes_of = {arm: math.inf if mean is None else mean for arm, mean in means.items()}
    rows = []
    for row in sorted(tokens.rows, key=lambda row: bytes_of[row.arm]):
        fitting = [
            (other.perplexity.mean, other.arm)
            for other in tokens.rows
            if bytes_of[other.arm] <= bytes_of[row.arm] < math.inf
            and other.perplexity.mean is not None
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
    loss = float(mean_over_seeds(baseline).loss[-1])
    crossings = {arm.name: reached(mean_over_seeds(arm), loss) for arm in arms}

    def spent(arm: ArmRuns) -> dict[str, float | None]:
        crossing, count = crossings[arm.name], flops[arm.name]
        timed = not any(run.mixed for run in arm.runs)
        return {
            "tokens": crossing and crossing.tokens,
            "seconds": crossing.seconds if crossing and timed else None,
            "flops": count(math.ceil(crossing.step)) if crossing and count else None,
        }

    its = spent(baseline)
    rows = []
    for arm in arms:
        crossing, own = crossings[arm.name], spent(arm)
        rows.append(
            TargetRow(
                arm=arm.name,
                reached=crossing is not None,
                seeds_that_reach_it=sum(
                    reached(run.evaluations, loss) is not None for run in arm.runs
                ),
                of=len(arm.runs),
                step=crossing and crossing.step,
                **own,
                **{f"{key}_ratio": ratio(own[key], its[key]) for key in own},
            )
        )
    return Target(loss=loss, perplexity=perplexity_of(loss), rows=rows)


def ratio(own: float | None, its: float | None) -> float | None:
    """One by the other, where both are known."""
    return own / its if own is not None and its else None


def _at_equal(
    at: float | None, arms: Sequence[ArmRuns], baseline: ArmRuns, find: Callable[[RunFiles], Found]
) -> AtEqual:
    """What `find` says of each seed there, beside the baseline's mean perplexity."""
    found = {arm.name: [find(run) for run in arm.runs] for arm in arms}
    perplexities = {
        name: spread([pair and perplexity_of(pair[1]) for pair in pairs])
        for name, pairs in found.items()
    }
    its = perplexities[baseline.name].mean
    rows = []
    for name, pairs in found.items():
        own = perplexities[name]
        rows.append(
            EqualRow(
                arm=name,
                loss=spread([pair and pair[1] for pair in pairs]),
                perplexity=own,
                tokens=spread([pair and pair[0] for pair in pairs]),
                difference=None if own.mean is None or its is None else own.mean - its,
                ratio=ratio(own.mean, its),
            )
        )
    return AtEqual(at=at, rows=rows)


def _compared(arms: Sequence[ArmRuns]) -> list[RunFiles]:
    """Runs that say how far a comparison goes: one that gave up does not end it for the others."""
    evaluated = [run for arm in arms for run in arm.evaluated]
    return [run for run in evaluated if not run.gave_up] or evaluated
