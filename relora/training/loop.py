"""The training loop: step, follow the clock, and do what the intervals say."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from relora.data.beginning import encode_prompt
from relora.data.loader import eval_batches, train_batches
from relora.data.tokenizer import load_tokenizer
from relora.engine import deepspeed
from relora.engine.distributed import memory_gib, seed_dropout
from relora.engine.evaluation import (
    continue_greedily,
    evaluate_loss,
    loss_of,
    perplexity,
)
from relora.engine.precision import precision_of
from relora.engine.signals import StopRequest
from relora.errors import NumericsError
from relora.lora.layers import adapted_layers
from relora.record import keys
from relora.record.rollbacks import Rollback, record_rollbacks
from relora.record.spectra_files import drop_measurements
from relora.restart import invariants
from relora.restart.restart import merge_and_restart, shrink_
from relora.training import log_lines
from relora.training.config import SpikeConfig
from relora.training.run import Run, find_checkpoint, finish_save, give_birth, save
from relora.training.spectra import check_start, draw_spectrum, keep_start, measure
from relora.training.spikes import check_limit, position_after, threshold_of

PROBE_TOKENS = 256
SAMPLE_TOKENS = 48


def update(
    run: Run, micro_batches: list[Tensor], lr: float, loss: Callable[..., Any] = loss_of
) -> deepspeed.StepResult:
    """One optimizer step, with what it means for the loss scale and for frozen weights' decay.

    Args:
        micro_batches: token ids of this rank, (rows, length) each.
        loss: of the model on a micro-batch.
    """
    optimizer, progress = run.config.optimizer, run.progress
    seed_dropout(run.config.seed, progress.consumed, run.ranks.rank)
    scale = progress.loss_scale
    factor = scale.value if scale else None
    result = deepspeed.train_step(run.engine, micro_batches, loss, lr, optimizer.grad_clip, factor)
    if scale:
        scale.update(result.applied)
    if result.applied and run.config.decays_merged:
        shrink_(run.engine.module, 1 - lr * optimizer.weight_decay)
    return result


Update = Callable[[Run, list[Tensor], float], deepspeed.StepResult]


def train_run(run: Run, stop: StopRequest, update: Update = update) -> bool | None:
    """Train until the end of the run, until asked to stop, or until the loss jumps.

    Args:
        update: takes one optimizer step; who watches a run, or disturbs it, wraps `update`.

    Returns:
        True if the run is finished, False if it was stopped, None if it is to go back (see
        `run.start_again`).
    """
    _begin(run)
    config, ranks, clock, progress = run.config, run.ranks, run.config.clock, run.progress
    batches = _batches(run)
    in_a_row = 0
    while run.step < clock.total:
        # One optimizer step over the global batch.
        began = time.perf_counter()
        micro_batches = [batch.to(ranks.device) for batch in next(batches)]
        lr = config.learning_rate(run.step)
        result = update(run, micro_batches, lr)
        progress.consumed += config.batch.global_batch_size
        loss, auxiliary, stops = _exchange(run, result, bool(stop))
        progress.interval.append(time.perf_counter() - began)
        saved = None if run.saves.under_way else run.saves.newest
        stop.note(run.step, saved, progress.interval[-1])

        # An update that was not finite happened on no rank: data moves on, the clock does not.
        in_a_row = 0 if result.applied else in_a_row + 1
        if not result.applied:
            _note_skipped(run, in_a_row)
            if stops:
                _save_early(run)
                return False
            continue
        progress.step += 1
        if config.train.spike and _has_jumped(run, loss, config.train.spike):
            return None
        run.metrics.bar(run.step, clock.total, f"loss {loss:.4f}")

        _follow_clock(run, micro_batches[0])

        # What the intervals say.
        last = run.step == clock.total
        halt = stops or run.step == config.train.stop_after
        if last or due(run.step, config.train.log_every):
            _log(run, loss, auxiliary, lr, result.grad_norm)
        if last or due(run.step, config.train.eval_every):
            _evaluate(run)
            halt = halt or ranks.any(bool(stop))  # it may have taken long
        if last or halt or due(run.step, config.train.save_every) or config.is_milestone(run.step):
            save(run, config.train.background_save and not (last or halt))
        if halt and not last:
            return False
    return True


def _begin(run: Run) -> None:
    """What is due at the step that a run begins or goes on at."""
    if run.ranks.is_main:
        drop_measurements(run.config.run_dir, run.step)
    if run.progress.owes_merge:
        length = run.config.data.sequence_length
        tokens = torch.from_numpy(run.shards.train[:length].astype("int64"))
        _restart(run, tokens[None].to(run.ranks.device))
        run.progress.owes_merge = False
    start = run.config.spectra_start
    if run.step == start:
        keep_start(run)
    elif start is not None and start < run.step < run.config.clock.total:
        check_start(run)


def _follow_clock(run: Run, batch: Tensor) -> None:
    """What the clock says is due after this step, but for what has an interval of its own."""
    clock = run.config.clock
    if clock.is_birth(run.step):
        give_birth(run)
    if run.step == run.config.spectra_start:
        keep_start(run)
    if clock.is_merge(run.step):
        _restart(run, batch)
    elif run.config.measures_spectra(run.step):
        _measure(run, None)


def _exchange(
    run: Run, result: deepspeed.StepResult, stop: bool
) -> tuple[float, float | None, bool]:
    """The one message of a step: the mean losses, and whether some rank was asked to stop.

    In passing, a background save that every rank has written is completed, and a rank that cannot
    write its figures ends the run.
    """
    saving = run.saves.under_way
    written = saving is not None and saving.written
    full = run.metrics.problem is not None
    world, extra = run.ranks.world, result.auxiliary
    loss, auxiliary, stops, writers, troubles = run.ranks.sum(
        [result.loss / world, (extra or 0.0) / world, float(stop), float(written), float(full)]
    )
    if troubles:
        run.ranks.agree(run.metrics.problem)
    if writers == run.ranks.world:
        finish_save(run)
    return loss, None if extra is None else auxiliary, stops > 0


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
        )
        while position_after(run.progress.consumed, run.rollbacks) == run.progress.consumed:
            yield next(stretch)


def due(step: int, every: int | None) -> bool:
    """Whether something that happens every so many steps happens after this one."""
    return every is not None and step % every == 0


def _restart(run: Run, batch: Tensor) -> None:
    """Merge, reinit, reset, and check that the function and all copies are what they must be."""
    config = run.config
    assert config.relora is not None
    number = config.clock.merges_before(run.step)
    if config.spectra:
        _measure(run, number)
    began = time.perf_counter()
    rows = batch[:1, :PROBE_TOKENS]
    before = invariants.probe(run.engine, rows)
    layers = config.clock.restarting(run.step, [n for n, _ in adapted_layers(run.engine.module)])
    report = merge_and_restart(run.state, number, config.seed, config.relora.reset, layers)
    after = invariants.probe(run.engine, rows)
    tolerance = config.relora.tolerance or precision_of(config.deepspeed.precision).tolerance
    deviation = invariants.check_function(before, after, tolerance, number)
    invariants.check_copies(run.state, number)
    values = {
        keys.MERGE: number,
        keys.UPDATE_RATIO: report.update_ratio,
        keys.ROUNDING_LOSS: report.rounding_loss,
        keys.ZEROED_SHARE: report.zeroed_share,
        keys.PROBE_DEVIATION: deviation,
        keys.MERGE_S: time.perf_counter() - began,
    }
    run.metrics.write(run.step, values)
    run.metrics.say(log_lines.merge_line(run.step, report.layers, values))


def _measure(run: Run, merge: int | None) -> None:
    """What the weights did; `merge` is the number of the merge that follows, if one does."""
    began = time.perf_counter()
    values = measure(run, merge)
    if run.ranks.is_main:
        run.metrics.figure(
            run.step, keys.SINGULAR_VALUES, draw_spectrum(run.config.run_dir, run.step)
        )
    values[keys.SPECTRA_S] = time.perf_counter() - began
    run.metrics.write(run.step, values)
    run.metrics.say(log_lines.spectra_line(run.step, values))


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


def _save_early(run: Run) -> None:
    """The checkpoint of a run that stops while its updates are skipped.

    If this step has one already, or is none yet, a resume takes the same data and skips it again.
    """
    if run.step > 0:
        save(run, background=False)


def _has_jumped(run: Run, loss: float, spike: SpikeConfig) -> bool:
    """Whether this step's loss is a jump; if so, what the run goes back from is on disk."""
    clock, done = run.config.clock, run.step - 1
    boundary = clock.boundary_before(done)
    warm = done < clock.warmup or (boundary is not None and done - boundary < clock.rewarm)
    threshold = math.inf if warm else threshold_of(run.progress.losses, spike)
    if not loss > threshold:
        if math.isfinite(loss):
            run.progress.losses = [*run.progress.losses, loss][-spike.window :]
        return False
    check_limit(run.rollbacks, spike, run.step, loss, threshold)
    finish_save(run)
    checkpoint, _ = find_checkpoint(run.config, run.ranks, run.saves.wanted)
    step, consumed = (checkpoint.step, checkpoint.state.consumed) if checkpoint else (0, 0)
    new = Rollback(
        step=step,
        consumed=consumed,
        skip_to=run.progress.consumed,
        spike_step=run.step,
        loss=loss,
        threshold=threshold,
    )
    record_rollbacks(run.config.run_dir, [*run.rollbacks, new], run.ranks)
    run.metrics.say(f"{new.describe()}; going back to step {step}")
    return True


def _pass_over(run: Run) -> None:
    """Move behind the data that the run skips here, and say so."""
    place = position_after(run.progress.consumed, run.rollbacks)
    for number, rollback in enumerate(run.rollbacks, 1):
        if run.progress.consumed <= rollback.consumed < place:
            run.metrics.write(run.step, {keys.ROLLBACK_COUNT: number, **rollback.figures()})
            run.metrics.say(f"rollback {number}: {rollback.describe()}; its data is skipped")
    run.progress.consumed = place


def _log(run: Run, loss: float, auxiliary: float | None, lr: float, grad_norm: float) -> None:
    """The figures of this step, and the speed since the last log."""
    config = run.config
    seconds = sum(run.progress.interval) / len(run.progress.interval)
    run.progress.interval.clear()
    values = {
        keys.TRAIN_LOSS: loss,
        keys.LR: lr,
        keys.GRAD_NORM: grad_norm,
        keys.TOKENS: run.progress.consumed * config.data.sequence_length,
        keys.SKIPPED: run.progress.skipped,
        keys.TOKENS_PER_S: config.tokens_per_step / seconds,
        keys.STEP_MS: seconds * 1000,
        keys.MEMORY_GIB: memory_gib(run.ranks.device),
        keys.ELAPSED_S: run.elapsed,
    }
    if auxiliary is not None:
        values[keys.AUXILIARY_LOSS] = auxiliary
    if run.progress.loss_scale:
        values[keys.LOSS_SCALE] = run.progress.loss_scale.value
    cycle = config.clock.place_in_cycle(run.step)
    if cycle is not None:
        values[keys.CYCLE] = cycle[0]
    run.metrics.write(run.step, values)
    run.metrics.say(log_lines.step_line(config.clock, run.step, values))


def _evaluate(run: Run) -> None:
    """Loss on the validation split."""
    began = time.perf_counter()
    batches = eval_batches(
        run.shards.validation,
        sequence_length=run.config.data.sequence_length,
        micro_batch=run.config.batch.micro_batch_size,
        rank=run.ranks.rank,
        world=run.ranks.world,
        max_sequences=run.config.train.eval_sequences,
    )
    loss, tokens = evaluate_loss(run.engine, batches, run.ranks)
    values = {
        keys.EVAL_LOSS: loss,
        keys.PERPLEXITY: perplexity(loss),
        keys.EVAL_TOKENS: tokens,
        keys.TOKENS: run.progress.consumed * run.config.data.sequence_length,
        keys.EVAL_S: time.perf_counter() - began,
        keys.ELAPSED_S: run.elapsed,
    }
    run.metrics.write(run.step, values)
    run.metrics.say(log_lines.eval_line(run.step, values))
    if run.config.train.sample_prompt is not None:
        run.metrics.text(run.step, keys.SAMPLE, _sample(run, run.config.train.sample_prompt))
    if run.step == run.config.clock.total:
        run.metrics.conclude(log_lines.hyperparameters(run.config), values)


def _sample(run: Run, prompt: str) -> str:
    """A prompt and what the model makes of it."""
    tokenizer = load_tokenizer(run.shards.tokenizer_dir)
    count = min(SAMPLE_TOKENS, run.config.data.sequence_length // 2)
    room = run.config.data.sequence_length - count  # as long as the model is trained on
    ids = torch.tensor([encode_prompt(tokenizer, prompt)[-room:]])
    ids = continue_greedily(run.engine, ids.to(run.ranks.device), count)
    return str(tokenizer.decode(ids[0]))
