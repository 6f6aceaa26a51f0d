"""What the loop calls: one function for each thing that a step may bring."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from relora.data.beginning import encode_prompt
from relora.data.loader import eval_batches
from relora.data.tokenizer import load_tokenizer
from relora.engine import deepspeed
from relora.engine.distributed import memory_gib, seed_dropout
from relora.engine.evaluation import continue_greedily, evaluate_loss, loss_of, perplexity
from relora.engine.precision import precision_of
from relora.record import keys
from relora.record.rollbacks import Rollback, record_rollbacks
from relora.restart import invariants
from relora.restart.restart import RestartReport, merge_and_restart, shrink_
from relora.training import log_lines
from relora.training.kept import keep_adapters
from relora.training.run import Run, finish_save, save
from relora.training.spectra import draw_spectrum, measure
from relora.training.start import find_checkpoint, give_birth, start_run

PROBE_TOKENS = 256
SAMPLE_TOKENS = 48

Merge = Callable[..., RestartReport]


def update(
    run: Run,
    micro_batches: list[Tensor],
    rates: Mapping[str, float],
    loss: Callable[..., Any] = loss_of,
) -> deepspeed.StepResult:
    """One optimizer step, with what it means for the loss scale and for frozen weights' decay.

    Args:
        micro_batches: token ids of this rank, (rows, length) each.
        rates: learning rates, by the names of `parameter_groups`.
        loss: of the model on a micro-batch.
    """
    optimizer, progress = run.config.optimizer, run.progress
    seed_dropout(run.config.seed, progress.consumed, run.ranks.rank)
    scale = progress.loss_scale
    factor = scale.value if scale else None
    result = deepspeed.train_step(
        run.engine,
        micro_batches,
        loss,
        rates,
        optimizer.grad_clip,
        factor,
        run.notes,
    )
    if scale:
        scale.update(result.applied)
    if result.applied and run.config.decays_merged:
        shrink_(run.engine.module, 1 - rates["adapters"] * optimizer.weight_decay)
    return result


def restart_adapters(run: Run, batch: Tensor, merge: Merge = merge_and_restart) -> None:
    """Merge, reinit, reset, and check that the function and all copies are what they must be.

    Args:
        batch: token ids (rows, length), of which the first row's beginning is the probe.
        merge: does all but the checks.
    """
    config = run.config
    assert config.relora is not None
    number = config.clock.merges_before(run.step)
    if config.spectra:
        measure_weights(run, number)
    if config.relora.keep_adapters:
        keep_adapters(run, number)
    began = time.perf_counter()
    rows = batch[:1, :PROBE_TOKENS]
    before = invariants.probe(run.engine, rows)
    report = merge(run.state, number, config.seed, config.relora.reset)
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


def measure_weights(run: Run, merge: int | None) -> None:
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


def go_back(run: Run, loss: float, threshold: float) -> None:
    """Write down that the loss has jumped: the run goes back to its newest checkpoint, and past
    the data since."""
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


def log_step(run: Run, loss: float, auxiliary: float | None, lr: float, grad_norm: float) -> None:
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


def evaluate_run(run: Run) -> None:
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
    last = run.step == run.config.clock.total
    sequences: list[float] = []  # by which arms are compared pair by pair
    loss, tokens, error = evaluate_loss(run.engine, batches, run.ranks, sequences if last else None)
    values = {
        keys.EVAL_LOSS: loss,
        keys.PERPLEXITY: perplexity(loss),
        keys.EVAL_TOKENS: tokens,
        keys.EVAL_ERROR: error,
        keys.TOKENS: run.progress.consumed * run.config.data.sequence_length,
        keys.EVAL_S: time.perf_counter() - began,
        keys.ELAPSED_S: run.elapsed,
    }
    run.metrics.write(run.step, values)
    run.metrics.say(log_lines.eval_line(run.step, values))
    if run.config.train.sample_prompt is not None:
        run.metrics.text(run.step, keys.SAMPLE, _sample(run, run.config.train.sample_prompt))
    if sequences and all(map(math.isfinite, sequences)):
        run.metrics.write(run.step, {keys.SEQUENCE_LOSSES: [round(x, 6) for x in sequences]})
    if last:
        run.metrics.conclude(log_lines.hyperparameters(run.config), values)


def _sample(run: Run, prompt: str) -> str:
    """A prompt and what the model makes of it."""
    tokenizer = load_tokenizer(run.shards.tokenizer_dir)
    count = min(SAMPLE_TOKENS, run.config.data.sequence_length // 2)
    room = run.config.data.sequence_length - count  # as long as the model is trained on
    ids = torch.tensor([encode_prompt(tokenizer, prompt)[-room:]])
    ids = continue_greedily(run.engine, ids.to(run.ranks.device), count)
    return str(tokenizer.decode(ids[0]))


class Phases(NamedTuple):
    """Who does what in a run. Who watches one, or disturbs it, wraps one of these."""

    start: Callable[..., Run] = start_run  # of a process; one that goes back starts by itself
    update: Callable[[Run, list[Tensor], Mapping[str, float]], deepspeed.StepResult] = update
    birth: Callable[[Run], None] = give_birth
    restart: Callable[[Run, Tensor], None] = restart_adapters
    log: Callable[[Run, float, float | None, float, float], None] = log_step
    evaluate: Callable[[Run], None] = evaluate_run
    save: Callable[[Run, bool], None] = save
    go_back: Callable[[Run, float, float], None] = go_back


PHASES = Phases()
