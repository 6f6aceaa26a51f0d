"""Jumps of the loss: what counts as one, and where in the data a run goes on behind it.

A run that goes back does what a killed run does: it is built anew from its newest checkpoint. What
is to be different this time is a stretch of the data that is never read again (see
`record.rollbacks`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from relora.errors import NumericsError
from relora.record.rollbacks import Rollback
from relora.training.config import SpikeConfig


def threshold_of(losses: Sequence[float], config: SpikeConfig) -> float:
    """The loss above which a step is a jump, after steps with these losses (the newest last).

    Infinite while there are fewer than `config.window` of them.
    """
    if len(losses) < config.window:
        return math.inf
    window = losses[-config.window :]
    mean = statistics.fmean(window)
    return mean + config.sigmas * statistics.pstdev(window, mean)


def check_limit(
    rollbacks: Sequence[Rollback], config: SpikeConfig, step: int, loss: float, threshold: float
) -> None:
    """Whether the run may go back once more.

    Raises:
        NumericsError: it has done so `config.max_rollbacks` times.
    """
    if len(rollbacks) >= config.max_rollbacks:
        raise NumericsError(
            f"the loss jumped to {loss:.4f} at step {step}, above {threshold:.4f} = mean + "
            f"{config.sigmas:g} standard deviations of the last {config.window} steps, and the run "
            f"has gone back {len(rollbacks)} times already; the newest checkpoint is from before; "
            "lower the learning rate, raise train.spike.max_rollbacks, or train on through it with "
            "train.spike=null"
        )


def position_after(consumed: int, rollbacks: Sequence[Rollback]) -> int:
    """Where in the data a run goes on that has taken so many sequences: behind what it skips."""
    ends = [r.skip_to for r in rollbacks if r.consumed <= consumed < r.skip_to]
    return position_after(max(ends), rollbacks) if ends else consumed
