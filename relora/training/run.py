"""What a run is, where it is, how it is saved, and how its files are left."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from relora.config import Config
from relora.data.shards import TokenShards
from relora.engine.distributed import Ranks
from relora.engine.precision import LossScale
from relora.engine.state import EngineState
from relora.engine.views import MOMENTS
from relora.lora.layers import adapted_layers
from relora.record import keys
from relora.record.changes import Change
from relora.record.manifest import CheckpointState
from relora.record.metrics import Metrics
from relora.record.rollbacks import Rollback
from relora.record.rundir import installed_versions, write_run_state
from relora.record.saving import Saving

LONGEST_UNSAVED_S = 1800.0  # of training, where no interval of saves is set


@dataclass
class Progress:
    """Where a run is: its weights, in their engine, and what it counts."""

    engine: Any
    state: EngineState
    step: int = 0  # optimizer updates done
    consumed: int = 0  # sequences taken from the data
    skipped: int = 0  # updates that were not finite
    owes_merge: bool = False  # of the step it starts at
    started: float = field(default_factory=time.perf_counter)  # as if it had never stopped
    interval: list[float] = field(default_factory=list)  # seconds of each step since the last log
    losses: list[float] = field(default_factory=list)  # of the last steps, for train.spike
    beginning: str = ""  # fingerprint of the weights at step 0
    loss_scale: LossScale | None = None  # where precision needs one
    stop: Any = False  # true once this rank is asked to stop


@dataclass
class Saves:
    """A run's checkpoints: the newest, the one under way, and what goes once that is complete."""

    newest: int = -1  # step of the last one that was begun
    begun: float = field(default_factory=time.monotonic)  # when that was, or the run
    under_way: Saving | None = None
    wanted: Path | None = None  # to go on from in place of the newest, until the next save
    abandoned: list[Path] = field(default_factory=list)  # later ones than the run went on from


@dataclass(frozen=True)
class Run:
    """What a run is. Where it is, and its checkpoints, change."""

    config: Config
    ranks: Ranks
    shards: TokenShards
    metrics: Metrics
    files: dict[str, str]  # hashes of the run's own; on rank 0
    frozen: frozenset[str]  # names of the weights that adapters freeze
    rollbacks: list[Rollback]  # what it has gone back from
    progress: Progress
    saves: Saves
    changes: list[Change]  # of its settings, on its way

    @property
    def engine(self) -> Any:
        """DeepSpeed's; another one once adapters are born."""
        return self.progress.engine

    @property
    def state(self) -> EngineState:
        """What the engine holds of each parameter."""
        return self.progress.state

    @property
    def step(self) -> int:
        """Optimizer updates done."""
        return self.progress.step

    @property
    def elapsed(self) -> float:
        """Seconds in the training loop so far, over all processes of this run."""
        return time.perf_counter() - self.progress.started

    def notes(self) -> list[float]:
        """What this rank tells the others with each step: whether it is asked to stop, has written
        its part of the save under way, cannot write its figures, and (rank 0's clock alone counts)
        has trained for too long since the last save."""
        saving = self.saves.under_way
        written = saving is not None and saving.written
        full = self.metrics.problem is not None
        waits = self.config.train.save_every is None and self.ranks.is_main
        overdue = waits and time.monotonic() - self.saves.begun > LONGEST_UNSAVED_S
        return [float(bool(self.progress.stop)), float(written), float(full), float(overdue)]


def save(run: Run, background: bool) -> None:
    """A checkpoint of this step, if there is none yet; in the background only its beginning."""
    finish_save(run)
    progress, scale = run.progress, run.progress.loss_scale
    if run.saves.newest == run.step:
        return
    run.ranks.agree(run.metrics.problem)  # a checkpoint stands for figures that are on disk too
    state = CheckpointState(
        step=run.step,
        consumed=progress.consumed,
        skipped=progress.skipped,
        losses=progress.losses,
        merges=run.config.clock.merges_before(run.step),
        elapsed_s=run.elapsed,
        data=run.shards.fingerprint,
        beginning=progress.beginning,
        shrink=next((x.shrink for _, x in adapted_layers(run.engine.module)), 1.0),
        loss_scale=(scale.value, scale.calm) if scale else None,
        world_size=run.ranks.world,
        config=run.config.model_dump(mode="json"),  # for who reads the checkpoint elsewhere
        changes=run.changes,
        run_files=run.files,
        versions=installed_versions(),
        shapes={view.name: list(view.shape) for view in run.state},
        adam_steps={v.name: run.state.adam_step(v) for v in run.state if v.flat is not None},
        first_moment_only=[
            v.name for v in run.state if v.flat is not None and v.moments != MOMENTS
        ],
    )
    began = time.perf_counter()
    run.saves.under_way = Saving(run.config.run_dir, run.state, state, run.ranks)
    run.saves.newest, run.saves.begun = run.step, time.monotonic()
    if not background:
        _commit_save(run)
    run.metrics.write(run.step, {keys.SAVE_S: time.perf_counter() - began})


def finish_save(run: Run) -> None:
    """Make the checkpoint that was begun in the background one that counts, if there is any."""
    saving = run.saves.under_way
    if saving is not None:
        began = time.perf_counter()
        _commit_save(run)
        values = {keys.COMMIT_S: time.perf_counter() - began, keys.WRITE_S: saving.seconds}
        run.metrics.write(run.step, values)


def _commit_save(run: Run) -> None:
    config, saving = run.config, run.saves.under_way
    assert saving is not None
    saving.finish(config.train.keep_checkpoints, config.is_milestone, run.saves.abandoned)
    run.saves.under_way, run.saves.wanted, run.saves.abandoned = None, None, []
    note_progress(run, saving.step)


def note_progress(run: Run, step: int) -> None:
    """In run_state.json, for when nobody is left to write how it ended."""
    if run.ranks.is_main:
        with run.metrics.noting_trouble():
            write_run_state(run.config.run_dir, "running", "", step, 0)


def leave_run(run: Run, together: bool) -> None:
    """End a save that is under way, and close the run's files.

    Args:
        together: all ranks are here, so it can be completed.
    """
    if run.saves.under_way is not None and together:
        with contextlib.suppress(Exception):  # what ends the run is another error
            finish_save(run)
    if run.saves.under_way is not None:
        run.saves.under_way.drop()
    run.metrics.close()
