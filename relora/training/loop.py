"""The training loop: step, follow the clock, and do what the intervals say."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from relora.data.loader import train_batches
from relora.engine.signals import StopRequest
from relora.errors import NumericsError
from relora.record import keys
from relora.record.spectra_files import drop_measurements
from relora.training.config import SpikeConfig
from relora.training.kept import drop_later_cycles, keep_adapters
from relora.training.phases import PHASES, Phases, measure_weights
from relora.training.run import Run, finish_save
from relora.training.spectra import check_start, keep_start
from relora.training.spikes import check_limit, position_after, threshold_of


def train_run(run: Run, stop: StopRequest, phases: Phases = PHASES) -> bool | None:
    """Train until the end of the run, until asked to stop, or until the loss jumps.

    Args:
        phases: what is done when; who watches a run, or disturbs it, wraps one of them.

    Returns:
        True if the run is finished, False if it was stopped, None if it is to go back (see
        `start.start_again`).
    """
    _begin(run, phases)
    config, ranks, clock, progress = run.config, run.ranks, run.config.clock, run.progress
    progress.stop = stop
    batches = _batches(run)
    in_a_row = 0
    while run.step < clock.total:
        # One optimizer step over the global batch.
        began = time.perf_counter()
        micro_batches = next(batches)
        lr = config.learning_rate(run.step)
        result = phases.update(run, micro_batches, config.rates(run.step))
        progress.consumed += config.batch.global_batch_size
        loss, (stops, overdue) = result.loss, _heed(run, result.notes)
        progress.interval.append(time.perf_counter() - began)
        saved = None if run.saves.under_way else run.saves.newest
        stop.note(run.step, saved, progress.interval[-1])

        # An update that was not finite happened on no rank: data moves on, the clock does not.
        in_a_row = 0 if result.applied else in_a_row + 1
        if not result.applied:
            _note_skipped(run, in_a_row)
            if stops:
                _save_early(run, phases)
                return False
            continue
        progress.step += 1
        if config.train.spike and _has_jumped(run, phases, loss, config.train.spike):
            return None
        run.metrics.step(run.step, clock.total, f"loss {loss:.4f}")

        _follow_clock(run, phases, micro_batches[0])

        # What the intervals say.
        last = run.step == clock.total
        halt = stops or run.step == config.train.stop_after
        if last or run.step == 1 or due(run.step, config.train.log_every):
            phases.log(run, loss, result.auxiliary, lr, result.grad_norm)
        if last or due(run.step, config.train.eval_every):
            phases.evaluate(run)
            halt = halt or ranks.any(bool(stop))  # it may have taken long
        overdue = overdue or due(run.step, config.train.save_every)
        if last or halt or overdue or config.is_milestone(run.step):
            phases.save(run, config.train.background_save and not (last or halt))
        if halt and not last:
            return False
    return True


def _begin(run: Run, phases: Phases) -> None:
    """What is due at the step that a run begins or goes on at."""
    relora, clock = run.config.relora, run.config.clock
    if run.ranks.is_main:
        drop_measurements(run.config.run_dir, run.step)
        if relora and relora.keep_adapters and run.step < clock.total:
            drop_later_cycles(run.config.run_dir, clock.merges_before(run.step))
    if run.progress.owes_merge:
        length = run.config.data.sequence_length
        tokens = torch.from_numpy(run.shards.train[:length].astype("int64"))
        phases.restart(run, tokens[None].to(run.ranks.device))
        run.progress.owes_merge = False
    start = run.config.spectra_start
    if run.step == start:
        keep_start(run)
    elif start is not None and start < run.step < clock.total:
        check_start(run)


def _follow_clock(run: Run, phases: Phases, batch: Tensor) -> None:
    """What the clock says is due after this step, but for what has an interval of its own."""
    clock = run.config.clock
    if clock.is_birth(run.step):
        phases.birth(run)
    if run.step == run.config.spectra_start:
        keep_start(run)
    if clock.is_merge(run.step):
        phases.restart(run, batch)
    elif run.config.measures_spectra(run.step):
        measure_weights(run, None)
    relora = run.config.relora
    if run.step == clock.total and relora and relora.keep_adapters and clock.has_adapters(run.step):
        keep_adapters(run, clock.merges_before(run.step) + 1)


def _heed(run: Run, notes: Sequence[float]) -> tuple[bool, bool]:
    """What the ranks told each other with a step; returns whether some rank was asked to stop, and
    whether a checkpoint is overdue by rank 0's clock.

    A background save that every rank has written is completed, and a rank that cannot write its
    figures ends the run.
    """
    stops, writers, troubles, overdue = notes
    if troubles:
        run.ranks.agree(run.metrics.problem)
    if writers == run.ranks.world:
        finish_save(run)
    return stops > 0, overdue > 0


def _batches(run: Run) -> Iterator[list[Tensor]]:
    """This rank's micro-batches, step after step, without what the run skips for good."""
    config, ranks = run.config, run.ranks
    while True:
        _pass_over(run)
        stretch = train_batches(
            run.shards.train,
            sequence_length=config.data.sequence_length,
            global_batch=config.batch.global_batch_size,
            micro_batch=config.batch.micro_batch_size,
            rank=ranks.rank,
            world=ranks.world,
            seed=config.seed,
            consumed=run.progress.consumed,
            num_workers=config.data.num_workers,
            device=ranks.device,
        )
        while position_after(run.progress.consumed, run.rollbacks) == run.progress.consumed:
            yield next(stretch)


def due(step: int, every: int | None) -> bool:
    """Whether something that happens every so many steps happens after this one."""
    return every is not None and step % every == 0


def _note_skipped(run: Run, in_a_row: int) -> None:
    run.progress.skipped += 1
    limit = run.config.train.max_skipped
    run.metrics.say(
        f"the update after step {run.step} was not finite: skipped ({in_a_row} in a row)"
    )
    run.metrics.write(run.step, {keys.SKIPPED: run.progress.skipped})
    if in_a_row >= limit:
        raise NumericsError(
            f"{limit} updates in a row were not finite (loss or gradient) after step {run.step}; "
            "the newest checkpoint is from before; lower the learning rate, or raise "
            "train.max_skipped"
        )


def _save_early(run: Run, phases: Phases) -> None:
    """The checkpoint of a run that stops while its updates are skipped.

    If this step has one already, or is none yet, a resume takes the same data and skips it again.
    """
    if run.step > 0:
        phases.save(run, False)


def _has_jumped(run: Run, phases: Phases, loss: float, spike: SpikeConfig) -> bool:
    """Whether this step's loss is a jump; if so, what the run goes back from is on disk."""
    warming = run.config.clock.is_warming(run.step - 1)
    threshold = math.inf if warming else threshold_of(run.progress.losses, spike)
    if not loss > threshold:
        if math.isfinite(loss):
            run.progress.losses = [*run.progress.losses, loss][-spike.window :]
        return False
    check_limit(run.rollbacks, spike, run.step, loss, threshold)
    phases.go_back(run, loss, threshold)
    return True


def _pass_over(run: Run) -> None:
    """Move behind the data that the run skips here, and say so."""
    place = position_after(run.progress.consumed, run.rollbacks)
    for number, rollback in enumerate(run.rollbacks, 1):
        if run.progress.consumed <= rollback.consumed < place:
            run.metrics.write(run.step, {keys.ROLLBACK_COUNT: number, **rollback.figures()})
            run.metrics.say(f"rollback {number}: {rollback.describe()}; its data is skipped")
    run.progress.consumed = place
