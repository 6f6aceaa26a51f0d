"""`rollbacks.json`: the stretches of the data that a run went back from, and never reads again.

It is written before anything is undone, so a kill at any moment changes nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field

from relora.engine.distributed import Ranks
from relora.errors import CheckpointError
from relora.files import read_text, supplied, write_json
from relora.record import keys
from relora.record.checked import Count, JsonRecord, checked
from relora.record.layout import RunDirectory

_Loss = Annotated[float, Field(strict=True, allow_inf_nan=True, description="a number")]


class Rollback(JsonRecord):
    """One return to a checkpoint."""

    model_config = ConfigDict(extra="forbid")

    step: Count  # of the checkpoint; 0 is the start of the run
    consumed: Count  # sequences that the run had taken when it was saved
    skip_to: Count  # sequences taken when the loss jumped; the run goes on from there
    spike_step: Count  # whose loss it was
    loss: _Loss
    threshold: _Loss

    def figures(self) -> dict[str, float]:
        """For metrics.jsonl."""
        return {
            keys.SPIKE_STEP: self.spike_step,
            keys.SPIKE_LOSS: self.loss,
            keys.SPIKE_THRESHOLD: self.threshold,
            keys.SPIKE_SEQUENCES: self.skip_to - self.consumed,
        }

    def describe(self) -> str:
        """For a reader of the log."""
        return (
            f"the loss jumped to {self.loss:.4f} at step {self.spike_step}, above "
            f"{self.threshold:.4f}, {self.skip_to - self.consumed} sequences after the checkpoint "
            f"of step {self.step}"
        )


def read_rollbacks(run_dir: Path, ranks: Ranks) -> list[Rollback]:
    """What the run has gone back from so far, oldest first; collective.

    Raises:
        CheckpointError: the file is broken (every rank raises).
    """
    path = RunDirectory(run_dir).rollbacks
    found: list[Rollback] = []
    with ranks.together():
        if ranks.is_main and os.path.lexists(path):
            text = read_text(path, CheckpointError)
            try:
                with supplied(CheckpointError, "it"):
                    values = json.loads(text)
                if not isinstance(values, list):
                    raise CheckpointError("it holds no list")
                for number, each in enumerate(values, 1):
                    found.append(checked(Rollback, each, f"number {number}"))
            except CheckpointError as error:
                raise CheckpointError(
                    f"{path}: is broken ({error}); restore it, or start anew"
                ) from None
    return ranks.share(found)


def record_rollbacks(run_dir: Path, rollbacks: Sequence[Rollback], ranks: Ranks) -> None:
    """Write down what the run goes back from, the last of them now; collective.

    Raises:
        CheckpointError: it cannot be written (every rank raises).
    """
    path = RunDirectory(run_dir).rollbacks
    with ranks.together():
        if ranks.is_main:
            try:
                write_json(path, [rollback.model_dump() for rollback in rollbacks])
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be written: {error}; make room") from None
