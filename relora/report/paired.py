"""Arms beside the baseline, sequence by sequence: all are evaluated on the same ones.

So most of what makes one loss uncertain, that some text is harder than other text, is in both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from relora.report.arms import ArmRuns, spread
from relora.report.read import RunFiles
from relora.report.records import PairedRow

TOLERATED = 0.1  # the evaluation's own error, as a share of the difference


def beside_baseline(arms: Sequence[ArmRuns], baseline: ArmRuns) -> list[PairedRow]:
    """Of the arms that have runs to compare so, which the baseline's seeds must have too."""
    rows = []
    for arm in arms:
        if arm is baseline:
            continue
        apart = [list(_apart(run, baseline)) for run in arm.runs]
        pairs = [pair for found in apart for pair in found[:1]]
        if pairs:
            errors = [float(d.std(ddof=1) / np.sqrt(len(d))) for d in pairs if len(d) > 1]
            means = [float(found[0].mean()) if found else None for found in apart]
            rows.append(
                PairedRow(
                    arm=arm.name,
                    difference=spread(means),
                    error=max(errors, default=None),
                    sequences=min(map(len, pairs)),
                )
            )
    return rows


def unsure(rows: Sequence[PairedRow], baseline: ArmRuns) -> list[str]:
    """Differences that other sequences might well have made another."""
    return [
        f"{row.arm}: the evaluation's own error ({row.error:.4f}) is more than a tenth of the "
        f"difference from {baseline.name} ({row.difference.mean:+.4f}): raise train.eval_sequences"
        for row in rows
        if row.error is not None
        and row.difference.mean is not None
        and row.error > TOLERATED * abs(row.difference.mean)
    ]


def _apart(run: RunFiles, baseline: ArmRuns) -> Iterator[np.ndarray]:
    """How far the losses of each sequence lie apart, beside the baseline's runs of one seed."""
    own = run.evaluations.by_sequence
    for other in baseline.runs:
        its = other.evaluations.by_sequence
        if own is None or its is None or other.config.seed != run.config.seed:
            continue
        same_text = run.data is not None and run.data == other.data
        length = run.config.data.sequence_length == other.config.data.sequence_length
        if same_text and length and own.shape == its.shape and np.isfinite(own - its).all():
            yield own - its
