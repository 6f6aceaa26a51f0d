"""Jumps of the loss: what counts as one, and the record of what the run went back from.

A run that goes back does what a killed run does: it is built anew from its newest checkpoint. What
is to be different this time stands in `rollbacks.json`, a stretch of the data that is never read
again; it is written before anything is undone, so a kill at any moment changes nothing.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from relora.engine.distributed import Ranks
from relora.errors import CheckpointError, NumericsError
from relora.files import read_text, write_json
from relora.training.config import SpikeConfig


class Rollback(NamedTuple):
    """One return to a checkpoint."""

    step: int  # of the checkpoint; 0 is the start of the run
    consumed: int  # sequences that the run had taken when it was saved
    skip_to: int  # sequences taken when the loss jumped; the run goes on from there
    spike_step: int  # whose loss it was
    loss: float
    threshold: float

    def figures(self) -> dict[str, float]:
        """For metrics.jsonl."""
        return {
            "train/spike_step": self.spike_step,
            "train/spike_loss": self.loss,
            "train/spike_threshold": self.threshold,
            "train/spike_sequences": self.skip_to - self.consumed,
        }

    def describe(self) -> str:
        """For a reader of the log."""
        return (
            f"the loss jumped to {self.loss:.4f} at step {self.spike_step}, above "
            f"{self.threshold:.4f}, {self.skip_to - self.consumed} sequences after the checkpoint "
            f"of step {self.step}"
        )


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


def read_rollbacks(run_dir: Path, ranks: Ranks) -> list[Rollback]:
    """What the run has gone back from so far, oldest first; collective.

    Raises:
        CheckpointError: the file is broken (every rank raises).
    """
    path = run_dir / "rollbacks.json"
    found: list[Rollback] = []
    with ranks.together():
        if ranks.is_main and os.path.lexists(path):
            text = read_text(path, CheckpointError)
            try:
                values = json.loads(text)
                found = [Rollback(**each) for each in values]
                if not all(isinstance(value, int | float) for values in found for value in values):
                    raise TypeError("not all values are numbers")
            except (ValueError, TypeError, RecursionError) as error:
                raise CheckpointError(
                    f"{path}: is broken ({error}); restore it, or start anew"
                ) from None
    return ranks.share(found)


def record_rollbacks(run_dir: Path, rollbacks: Sequence[Rollback], ranks: Ranks) -> None:
    """Write down what the run goes back from, the last of them now; collective.

    Raises:
        CheckpointError: it cannot be written (every rank raises).
    """
    path = run_dir / "rollbacks.json"
    with ranks.together():
        if ranks.is_main:
            try:
                write_json(path, [rollback._asdict() for rollback in rollbacks])
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be written: {error}; make room") from None
