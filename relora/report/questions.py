"""The three questions: perplexity at equal tokens, equal wall-clock, equal peak memory.

And what each arm spent until it was as good as the baseline. Everything is a plain dict of figures,
which `report.json` holds and every page is made from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from relora.report.arms import (
    Arm,
    Spread,
    loss_at_seconds,
    loss_at_tokens,
    mean_over_seeds,
    perplexity_of,
    reached,
    spread,
    tokens_at_seconds,
)
from relora.report.read import RunFiles

Flops = Callable[[int], float] | None


def at_equal_tokens(arms: Sequence[Arm], baseline: Arm) -> dict[str, Any]:
    """At the smallest last token count of all runs, from the last evaluation at or before it."""
    at = min(float(run.evaluations.tokens[-1]) for run in _compared(arms))
    rows = []
    for arm in arms:
        found = [loss_at_tokens(run, at) for run in arm.runs]
        row = _row(arm, [pair[1] if pair else None for pair in found])
        rows.append({**row, "tokens": spread([pair[0] if pair else None for pair in found])})
    return {"at": at, "rows": _beside(rows, baseline)}


def at_equal_seconds(arms: Sequence[Arm], baseline: Arm) -> dict[str, Any]:
    """At the smallest last elapsed time of all runs; the loss is interpolated in time.

    Runs whose time is a mixture have none that compares; `at` is None if there are no others.
    """
    there = [run for run in _compared(arms) if not run.mixed]
    at = min((float(run.evaluations.seconds[-1]) for run in there), default=None)
    rows = []
    for arm in arms:
        row = _row(arm, _where_timed(arm, at, loss_at_seconds))
        tokens = _where_timed(arm, at, tokens_at_seconds)
        rows.append({**row, "tokens": spread(tokens)})
    return {"at": at, "rows": _beside(rows, baseline)}


def _where_timed(
    arm: Arm, at: float | None, value: Callable[[RunFiles, float], float | None]
) -> list[float | None]:
    """A figure of each run at a time, for those whose time is of one kind."""
    return [None if at is None or run.mixed else value(run, at) for run in arm.runs]


def at_equal_memory(
    arms: Sequence[Arm], tokens: dict[str, Any], memory: dict[str, Spread]
) -> dict[str, Any]:
    """Arms by their peak memory, and which arm is best within the memory of each.

    Args:
        tokens: the answer at equal tokens, whose perplexities are compared.
        memory: peak GiB a rank by arm.
    """
    rows = [
        {"arm": row["arm"], "memory_gib": memory[row["arm"]], "perplexity": row["perplexity"]}
        for row in tokens["rows"]
    ]
    rows.sort(key=lambda row: (row["memory_gib"]["mean"] is None, row["memory_gib"]["mean"] or 0))
    for row in rows:
        limit = row["memory_gib"]["mean"]
        fitting = [
            other
            for other in rows
            if limit is not None
            and other["memory_gib"]["mean"] is not None
            and other["memory_gib"]["mean"] <= limit
            and other["perplexity"]["mean"] is not None
        ]
        best = min(fitting, key=lambda other: other["perplexity"]["mean"], default=None)
        row["best_within"] = best and best["arm"]
        row["best_perplexity"] = best and best["perplexity"]["mean"]
    return {"at_tokens": tokens["at"], "rows": rows}


def until_the_baseline(
    arms: Sequence[Arm], baseline: Arm, flops: dict[str, Flops]
) -> dict[str, Any]:
    """Tokens, time and FLOPs until the baseline's last loss is reached, by the mean over seeds."""
    means = {arm.name: mean_over_seeds(arm) for arm in arms}
    loss = float(means[baseline.name].loss[-1])
    rows: list[dict[str, Any]] = []
    for arm in arms:
        crossing: dict[str, Any] | None = reached(means[arm.name], loss)
        count = flops[arm.name]
        if crossing and any(run.mixed for run in arm.runs):
            crossing = {**crossing, "seconds": None}
        rows.append(
            {
                "arm": arm.name,
                "reached": crossing is not None,
                "seeds_that_reach_it": sum(
                    reached(run.evaluations, loss) is not None for run in arm.runs
                ),
                "of": len(arm.runs),
                **(crossing or dict.fromkeys(("step", "tokens", "seconds"))),
                "flops": count(math.ceil(crossing["step"])) if crossing and count else None,
            }
        )
    first = next(row for row in rows if row["arm"] == baseline.name)
    for row in rows:
        for key in ("tokens", "seconds", "flops"):
            own, its = row[key], first[key]
            row[f"{key}_ratio"] = own / its if own is not None and its else None
    return {"loss": loss, "perplexity": perplexity_of(loss), "rows": rows}


def last(values: Any) -> float | None:
    """The last of a column, or None."""
    return float(values[-1]) if len(values) else None


def _row(arm: Arm, losses: Sequence[float | None]) -> dict[str, Any]:
    return {
        "arm": arm.name,
        "loss": spread(losses),
        "perplexity": spread([perplexity_of(loss) for loss in losses]),
    }


def _beside(rows: list[dict[str, Any]], baseline: Arm) -> list[dict[str, Any]]:
    """Each row with its mean perplexity's difference from the baseline's."""
    first = next(row for row in rows if row["arm"] == baseline.name)["perplexity"]["mean"]
    for row in rows:
        own = row["perplexity"]["mean"]
        known = own is not None and first is not None
        row["difference"] = own - first if known else None
        row["ratio"] = own / first if known else None
    return rows


def _compared(arms: Sequence[Arm]) -> list[RunFiles]:
    """Runs that say how far a comparison goes: one that gave up does not end it for the others."""
    evaluated = [run for arm in arms for run in arm.evaluated]
    return [run for run in evaluated if not run.gave_up] or evaluated
