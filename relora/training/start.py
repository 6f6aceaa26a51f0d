"""How a run begins: at a checkpoint or at step 0, and again when its engine becomes another."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from relora.config import Config
from relora.data.shards import TokenShards
from relora.engine import deepspeed
from relora.engine.codec import store_base_
from relora.engine.distributed import Ranks
from relora.engine.precision import LossScale, dtype_of, precision_of
from relora.engine.sources import Births, FromMain, Layered, Source
from relora.engine.state import EngineState, capture
from relora.errors import DataError
from relora.lean import make_lean
from relora.lora.choose import describe_left, find_targets, projections
from relora.lora.config import OF_EXPERTS
from relora.lora.inject import add_adapters, quantise_base
from relora.lora.layers import adapted_layers
from relora.lora.names import names_of
from relora.model import build_empty_model, build_meta_model, fingerprint
from relora.plan.advice import idle_settings
from relora.record import keys
from relora.record.changes import Change, before_changes, change_since, record_changes
from relora.record.checkpoint import (
    Checkpoint,
    named_checkpoints,
    newest_sound,
    open_checkpoint,
)
from relora.record.layout import step_of
from relora.record.loaded import build_beginning, structure_of
from relora.record.metrics import Metrics
from relora.record.own_files import describe_files
from relora.record.rollbacks import read_rollbacks
from relora.restart.restart import shrink_
from relora.training import log_lines
from relora.training.compiled import compile_blocks
from relora.training.run import Progress, Run, Saves, note_progress


def start_run(
    config: Config,
    shards: TokenShards,
    ranks: Ranks,
    wanted: Path | None = None,
    notes: Sequence[str] = (),
) -> Run:
    """Build the run as it was at its newest sound checkpoint (or the wanted one), or at step 0.

    Args:
        notes: what to say first.
    """
    checkpoint, complaints = find_checkpoint(config, ranks, wanted)
    step = checkpoint.step if checkpoint else 0
    if checkpoint and checkpoint.state.data != shards.fingerprint:
        raise DataError(
            f"{shards.directory}: holds other tokens than the run in {config.run_dir} was trained "
            "on so far; put the old shards back, or start in another run_dir"
        )
    held = checkpoint.state if checkpoint else None
    new = change_since(held.config, step, config) if held and held.config else None
    changes = record_changes(config, held.changes if held else (), new, ranks)
    files, made_anew = describe_files(config, shards, ranks, checkpoint, step)
    tokens = checkpoint.state.consumed * config.data.sequence_length if checkpoint else 0
    metrics = Metrics(config.run_dir, ranks.is_main, step, tokens, bar=ranks.world == 1)
    ranks.agree(metrics.problem)
    with ranks.together():
        if ranks.is_main:
            metrics.open_trackers(config.train.log_to, log_lines.hyperparameters(config))
    passed_over = [f"passed over {complaint}" for complaint in complaints]
    for line in (*notes, *passed_over, *made_anew):
        metrics.say(line)
    progress = _build_progress(config, ranks, checkpoint)
    frozen, left = _adapters_share(config)
    rollbacks = read_rollbacks(config.run_dir, ranks)
    saves = Saves(step if checkpoint else -1, wanted=wanted)
    run = Run(config, ranks, shards, metrics, files, frozen, rollbacks, progress, saves, changes)
    for line in _header(run, left) if ranks.is_main else ():
        metrics.say(line)
    for change in changes if new is None else changes[:-1]:
        for line in log_lines.row("changed", f"from step {change.step} on: {change.describe()}"):
            metrics.say(line)
    if checkpoint:
        metrics.say(f"going on from step {step} ({checkpoint.directory})")
        _abandon_later_saves(run)
    if new:
        _tell_of_change(run, new)
    note_progress(run, step)
    return run


def _build_progress(config: Config, ranks: Ranks, checkpoint: Checkpoint | None) -> Progress:
    """The engine as it was at a checkpoint, and as far as that says; or at the start of a run."""
    step = checkpoint.step if checkpoint else 0
    if checkpoint:
        source: Source = checkpoint
        beginning = checkpoint.state.beginning
    else:
        source, beginning = _first_weights(config, ranks)
    progress = Progress(*_build_engine(config, ranks, step, source), step, beginning=beginning)
    if precision_of(config.deepspeed.precision).scales_loss:
        progress.loss_scale = LossScale(*((checkpoint and checkpoint.state.loss_scale) or ()))
    if checkpoint:
        state = checkpoint.state
        shrink_(progress.engine.module, state.shrink)
        progress.consumed, progress.skipped = state.consumed, state.skipped
        progress.started -= state.elapsed_s
        progress.losses = state.losses if config.train.spike else []
        # A boundary at what was to be the end was no merge; now it is one.
        progress.owes_merge = state.merges < config.clock.merges_before(step)
    return progress


def _adapters_share(config: Config) -> tuple[frozenset[str], list[str]]:
    """Names of the weights that adapters freeze, and in words what they leave to full rank."""
    if config.lora is None:
        return frozenset(), []
    model = build_meta_model(structure_of(config))
    targets = find_targets(model, config.lora)
    frozen = {names_of(name).weight for name in targets}
    if config.lora.bias == "none":
        frozen |= {f"{name}.bias" for name in targets}
    return frozenset(frozen), describe_left(model, config.lora)


def _header(run: Run, left: Sequence[str]) -> Iterator[str]:
    """What is said before the first step: the run, what trains in full, what does nothing."""
    config, shards = run.config, run.shards
    yield from log_lines.header(config, run.state.count_parameters(), shards, run.ranks)
    for line in left:
        yield from log_lines.row("in full", line)
    sequences = len(shards.validation) // config.data.sequence_length
    for line in idle_settings(config, _measured_shapes(run), run.step, sequences):
        yield f"{'note':9} {line}"


def _tell_of_change(run: Run, change: Change) -> None:
    """Other settings from this step on, in the log and among the figures."""
    before = before_changes(run.config, [change])
    values: dict[str, float | int | str | list[float]] = {
        keys.CHANGE: change.describe(),
        keys.LR_BEFORE: before.learning_rate(run.step),
        keys.LR_AFTER: run.config.learning_rate(run.step),
    }
    run.metrics.write(run.step, values)
    for line in log_lines.change_lines(before, run.config, change):
        run.metrics.say(line)


def _abandon_later_saves(run: Run) -> None:
    """Those after the checkpoint that the run goes on from go once there is another."""
    # Damaged ones too, but nothing that no run has made.
    later_ones = [p for p in named_checkpoints(run.config.run_dir) if step_of(p) > run.step]
    run.saves.abandoned = [p for p in later_ones if p.is_dir() and not p.is_symlink()]
    if run.saves.wanted is not None and run.saves.abandoned:
        later = ", ".join(path.name for path in run.saves.abandoned)
        run.metrics.say(
            f"going back: {later} will go once the first checkpoint from here is complete"
        )


def _measured_shapes(run: Run) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights whose spectra are measured, if any are, by layer."""
    if run.config.spectra is None:
        return {}
    module = run.engine.module
    names = [name for name, _ in adapted_layers(module)] or list(projections(module))
    shapes = {name: tuple(run.state[names_of(name).weight].shape) for name in names}
    return {n: x[1:] if n.endswith(OF_EXPERTS) else x for n, x in shapes.items()}


def find_checkpoint(
    config: Config, ranks: Ranks, wanted: Path | None
) -> tuple[Checkpoint | None, list[str]]:
    """The wanted checkpoint, or the newest sound one with complaints about newer ones."""
    if wanted is not None:
        return open_checkpoint(wanted, ranks), []
    return newest_sound(config.run_dir, ranks)


def _build_engine(
    config: Config, ranks: Ranks, step: int, source: Source
) -> tuple[Any, EngineState]:
    """The model as it is after `step` updates, in an engine, with what `source` holds.

    Adapters that it lacks are born.
    """
    model = build_empty_model(structure_of(config))
    equip(model, config, config.clock.has_adapters(step), drawn=False)
    if isinstance(source, Checkpoint):
        source.check_fits(model)
    source = Layered(source, Births(model, config.seed))
    store_base_(model, precision_of(config.deepspeed.precision))
    engine = deepspeed.build_engine(
        model,
        config.deepspeed,
        config.optimizer,
        config.batch.micro_batch_size,
        ranks,
        merged_decay=config.decays_merged,
    )
    if config.train.compile:
        formats = precision_of(config.deepspeed.precision)
        compile_blocks(engine.module, dtype_of(formats.autocast or formats.trained))
    if config.lora and config.lora.base:  # the codes wait for `restore_`
        quantise_base(model, config.lora.base)
    rounded = config.relora is not None and config.relora.precision == "rounded"
    remainder = config.relora.remainder if config.relora else "host"
    state = EngineState(engine, remainder=None if rounded else remainder)
    state.restore_(source)
    return engine, state


def equip(model: Any, config: Config, adapters: bool, drawn: bool = True) -> None:
    """Give a plain model the blocks, the loss and the adapters of its config, in place.

    Args:
        drawn: A gets its first values.
    """
    settings, formats = config.model, precision_of(config.deepspeed.precision)
    make_lean(model, settings.lean, settings.loss_chunk, formats.residual(settings.half_residual))
    if adapters:
        assert config.lora is not None
        tokens = config.batch.micro_batch_size * config.data.sequence_length
        seed = config.seed if drawn else None
        add_adapters(model, config.lora, seed, tokens, config.micro_batches)


def _first_weights(config: Config, ranks: Ranks) -> tuple[Source, str]:
    """Those at step 0, and their fingerprint: see `build_beginning`.

    Rank 0 alone builds them: no other needs a model in host memory, and another run, which may be
    at work, is opened once.
    """
    model = None
    with ranks.together():
        if ranks.is_main:
            model = build_beginning(config.model, config.seed)
    beginning = ranks.share(fingerprint(model) if model else "")
    torch.manual_seed(config.seed)  # on every rank, whether it has drawn or not
    return FromMain(model, ranks), beginning


def give_birth(run: Run) -> None:
    """End the warm start: the same weights and moments in a new engine, with adapters beside."""
    began = time.perf_counter()
    source = capture(run.state, lambda name: name not in run.frozen, run.ranks)
    run.state.release_()
    deepspeed.destroy(run.engine)
    progress = run.progress
    progress.engine, progress.state = _build_engine(run.config, run.ranks, run.step, source)
    trainable, total = run.state.count_parameters()
    seconds = time.perf_counter() - began
    run.metrics.write(run.step, {keys.BIRTH: 1, keys.BIRTH_S: seconds})
    run.metrics.say(log_lines.birth_line(run.step, len(run.frozen), trainable, total, seconds))


def start_again(run: Run) -> Run:
    """The run as its files say, as after a kill; without a checkpoint that is its beginning."""
    run.metrics.close()
    run.state.release_()
    deepspeed.destroy(run.engine)
    return start_run(run.config, run.shards, run.ranks, run.saves.wanted)
