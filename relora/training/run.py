"""A run: how it begins at a checkpoint or at step 0, changes its engine, is saved, and ends."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from relora.config import Config
from relora.data.shards import TokenShards
from relora.engine import deepspeed
from relora.engine.distributed import Ranks
from relora.engine.precision import LossScale, dtype_of, precision_of
from relora.engine.sources import Layered, Source, weights_of
from relora.engine.state import EngineState, capture
from relora.errors import DataError
from relora.lean import make_lean
from relora.lora.choose import describe_left, find_targets, linear_layers
from relora.lora.inject import add_adapters
from relora.lora.layers import adapted_layers, names_of
from relora.model import build_meta_model, build_model, make_trainable
from relora.plan.advice import idle_settings
from relora.record import keys
from relora.record.checkpoint import (
    Checkpoint,
    named_checkpoints,
    newest_sound,
    open_checkpoint,
)
from relora.record.layout import step_of
from relora.record.loaded import is_run_or_checkpoint, load_run, structure_of
from relora.record.metrics import Metrics
from relora.record.own_files import describe_files
from relora.record.rollbacks import Rollback, read_rollbacks
from relora.record.rundir import installed_versions, write_run_state
from relora.record.saving import Saving
from relora.restart.restart import shrink_
from relora.training import log_lines


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
    loss_scale: LossScale | None = None  # where precision needs one


@dataclass
class Saves:
    """A run's checkpoints: the newest, the one under way, and what goes once that is complete."""

    newest: int = -1  # step of the last one that was begun
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
    files, made_anew = describe_files(config, shards, ranks, checkpoint, step)
    metrics = Metrics(config.run_dir, ranks.is_main, resumed_at=step)
    ranks.agree(metrics.problem)
    passed_over = [f"passed over {complaint}" for complaint in complaints]
    for line in (*notes, *passed_over, *made_anew):
        metrics.say(line)
    progress = _build_progress(config, ranks, checkpoint)
    frozen, left = _adapters_share(config)
    rollbacks = read_rollbacks(config.run_dir, ranks)
    saves = Saves(step if checkpoint else -1, wanted=wanted)
    run = Run(config, ranks, shards, metrics, files, frozen, rollbacks, progress, saves)
    for line in _header(run, left) if ranks.is_main else ():
        metrics.say(line)
    if checkpoint:
        metrics.say(f"going on from step {step} ({checkpoint.directory})")
        _abandon_later_saves(run)
    _note_progress(run, step)
    return run


def _build_progress(config: Config, ranks: Ranks, checkpoint: Checkpoint | None) -> Progress:
    """The engine as it was at a checkpoint, and as far as that says; or at the start of a run."""
    step = checkpoint.step if checkpoint else 0
    progress = Progress(*_build_engine(config, ranks, step, checkpoint), step)
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
    return frozenset(names_of(name).weight for name in targets), describe_left(model, config.lora)


def _header(run: Run, left: Sequence[str]) -> Iterator[str]:
    """What is said before the first step: the run, what trains in full, what does nothing."""
    config, shards = run.config, run.shards
    yield from log_lines.header(config, run.state.count_parameters(), shards, run.ranks)
    for line in left:
        yield f"{'in full':9} {line}"
    sequences = len(shards.validation) // config.data.sequence_length
    for line in idle_settings(config, _measured_shapes(run), run.step, sequences):
        yield f"{'note':9} {line}"


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
    names = [name for name, _ in adapted_layers(module)] or list(linear_layers(module))
    return {name: tuple(run.state[names_of(name).weight].shape) for name in names}


def find_checkpoint(
    config: Config, ranks: Ranks, wanted: Path | None
) -> tuple[Checkpoint | None, list[str]]:
    """The wanted checkpoint, or the newest sound one with complaints about newer ones."""
    if wanted is not None:
        return open_checkpoint(wanted, ranks), []
    return newest_sound(config.run_dir, ranks)


def _build_engine(
    config: Config, ranks: Ranks, step: int, source: Source | None
) -> tuple[Any, EngineState]:
    """The model as it is after `step` updates, in an engine, with what `source` holds.

    Weights the source lacks are as at the start of the run; adapters it lacks are born.
    """
    if source is None:
        model = _first_model(config, ranks)
    else:  # its structure is enough, and the run directory has that
        model = build_model(structure_of(config), config.seed)
    batch, formats = config.batch, precision_of(config.deepspeed.precision)
    half = dtype_of(formats.autocast) if formats.autocast and config.model.half_residual else None
    make_lean(model, config.model.lean, config.model.loss_chunk, half)
    if config.clock.has_adapters(step):
        assert config.lora is not None
        tokens = batch.micro_batch_size * config.data.sequence_length
        micro_batches = batch.global_batch_size // (batch.micro_batch_size * ranks.world)
        add_adapters(model, config.lora, config.seed, tokens, micro_batches)
    if isinstance(source, Checkpoint):
        source.check_fits(model)
    start = weights_of(model)
    for _, layer in adapted_layers(model):
        if not formats.is_deepspeeds:  # which casts by itself, from fp32
            layer.weight.data = layer.weight.data.to(dtype_of(formats.base))
    engine = deepspeed.build_engine(
        model,
        config.deepspeed,
        config.optimizer,
        config.batch.micro_batch_size,
        ranks,
        merged_decay=config.decays_merged,
    )
    rounded = config.relora is not None and config.relora.precision == "rounded"
    remainder = config.relora.remainder if config.relora else "host"
    state = EngineState(engine, remainder=None if rounded else remainder)
    state.restore_(start if source is None else Layered(source, start))
    return engine, state


def _first_model(config: Config, ranks: Ranks) -> Any:
    """The model at step 0: from scratch, from a transformers directory, or from another run."""
    pretrained = config.model.pretrained
    if pretrained is None or not is_run_or_checkpoint(pretrained):
        return build_model(config.model, config.seed)
    # Rank 0 chooses: the other run may be at work, and all must start from one checkpoint.
    opened = None
    with ranks.together():
        if ranks.is_main:
            opened = load_run(pretrained)
    directory = ranks.share(opened and opened.checkpoint.directory)
    with ranks.together():
        opened = opened or load_run(directory)
    model = opened.merged_model()
    return make_trainable(model, config.model.gradient_checkpointing)


def give_birth(run: Run) -> None:
    """End the warm start: the same weights and moments in a new engine, with adapters beside."""
    began = time.perf_counter()
    source = capture(run.state, lambda name: name not in run.frozen)
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


def save(run: Run, background: bool) -> None:
    """A checkpoint of this step, if there is none yet; in the background only its beginning."""
    finish_save(run)
    progress, scale = run.progress, run.progress.loss_scale
    if run.saves.newest == run.step:
        return
    run.ranks.agree(run.metrics.problem)  # a checkpoint stands for figures that are on disk too
    state = {
        "step": run.step,
        "consumed": progress.consumed,
        "skipped": progress.skipped,
        "losses": progress.losses,
        "merges": run.config.clock.merges_before(run.step),
        "elapsed_s": run.elapsed,
        "data": run.shards.fingerprint,
        "shrink": next((x.shrink for _, x in adapted_layers(run.engine.module)), 1.0),
        "loss_scale": scale and [scale.value, scale.calm],
        "world_size": run.ranks.world,
        "config": run.config.model_dump(mode="json"),  # for who reads the checkpoint elsewhere
        "run_files": run.files,
        "versions": installed_versions(),
    }
    began = time.perf_counter()
    run.saves.under_way = Saving(run.config.run_dir, run.state, state, run.ranks)
    run.saves.newest = run.step
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
    _note_progress(run, saving.step)


def _note_progress(run: Run, step: int) -> None:
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
