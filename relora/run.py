"""A run, from its newest checkpoint to its end: build the engine, step, follow the clock."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from relora import __version__, console
from relora.config import Config
from relora.data.loader import eval_batches, train_batches
from relora.data.shards import TokenShards
from relora.errors import DataError, NumericsError
from relora.lora.inject import adapted_layers, add_adapters, find_targets
from relora.model import build_meta_model, build_model, count_parameters, make_trainable
from relora.restart import invariants
from relora.restart.merge import init_adapters_, restart_
from relora.runtime import zero
from relora.runtime.checkpoint import newest_sound, save
from relora.runtime.distributed import Ranks, memory_gib, seed_dropout
from relora.runtime.evaluation import evaluate_loss, loss_of, perplexity
from relora.runtime.metrics import Metrics
from relora.runtime.places import Layered, Places, Source, capture, weights_of
from relora.runtime.rundir import write_run_state
from relora.runtime.signals import StopRequest
from relora.subject import is_subject, merged_model, open_subject, structure_of

PROBE_TOKENS = 256


@dataclass
class Run:
    """What a run holds while it goes: what it is, its engine, and how far it is."""

    config: Config
    ranks: Ranks
    shards: TokenShards
    metrics: Metrics
    engine: Any
    places: Places
    step: int = 0  # optimizer updates done
    consumed: int = 0  # sequences taken from the data
    skipped: int = 0  # updates that were not finite
    saved_at: int = -1  # step of the newest checkpoint
    started: float = 0.0  # perf_counter at step 0, as if the run had never stopped
    interval: list[float] = field(default_factory=list)  # seconds of each step since the last log

    @property
    def elapsed(self) -> float:
        """Seconds in the training loop so far, over all processes of this run."""
        return time.perf_counter() - self.started


def start_run(config: Config, shards: TokenShards, ranks: Ranks) -> Run:
    """Build the run as it was at its newest sound checkpoint, or at step 0."""
    checkpoint, complaints = newest_sound(config.run_dir, ranks)
    step = checkpoint.step if checkpoint else 0
    if checkpoint and checkpoint.state["data"] != shards.fingerprint:
        raise DataError(
            f"{shards.directory}: holds other tokens than the run in {config.run_dir} was trained "
            "on so far; put the old shards back, or start in another run_dir"
        )
    metrics = Metrics(config.run_dir, ranks.is_main, resumed_at=step)
    for complaint in complaints:
        metrics.say(f"passed over {complaint}")
    engine, places = _build_engine(config, ranks, step, checkpoint)
    run = Run(config, ranks, shards, metrics, engine, places, step, started=time.perf_counter())
    for line in console.header(config, count_parameters(engine.module), shards, ranks):
        metrics.say(line)
    if checkpoint:
        run.consumed = checkpoint.state["consumed"]
        run.skipped = checkpoint.state["skipped"]
        run.started -= checkpoint.state["elapsed_s"]
        run.saved_at = step
        metrics.say(f"going on from step {step} ({checkpoint.directory})")
        if checkpoint.state["merges"] < config.clock.merges_before(step):
            # A boundary at what was to be the end was no merge; now it is one.
            tokens = torch.from_numpy(shards.train[: config.data.sequence_length].astype("int64"))
            _restart(run, tokens[None].to(ranks.device))
    if ranks.is_main:
        write_run_state(config.run_dir, "running", "", step, 0)
    return run


def _build_engine(
    config: Config, ranks: Ranks, step: int, source: Source | None
) -> tuple[Any, Places]:
    """The model as it is after `step` updates, in an engine, with what `source` holds.

    Weights the source lacks are as at the start of the run; adapters it lacks are born.
    """
    if source is None:
        model = _first_model(config)
    else:  # its structure is enough, and the run directory has that
        model = build_model(structure_of(config), config.seed)
    if config.clock.has_adapters(step):
        assert config.lora is not None
        add_adapters(model, config.lora)
        init_adapters_(model, config.seed)
    start = weights_of(model)
    if config.deepspeed.precision == "bf16":
        for _, layer in adapted_layers(model):
            layer.weight.data = layer.weight.data.to(torch.bfloat16)
    engine = zero.build_engine(
        model, config.deepspeed, config.optimizer, config.batch.micro_batch_size, ranks
    )
    exact = config.relora is None or config.relora.precision == "exact"
    places = Places(engine, exact)
    places.restore_(start if source is None else Layered(source, start))
    return engine, places


def _first_model(config: Config) -> Any:
    """The model at step 0: from scratch, from a transformers directory, or from another run."""
    pretrained = config.model.pretrained
    if pretrained is None or not is_subject(pretrained):
        return build_model(config.model, config.seed)
    model = merged_model(open_subject(pretrained))
    return make_trainable(model, config.model.gradient_checkpointing)


def train_run(run: Run, stop: StopRequest) -> bool:
    """Train until the end of the run or until asked to stop; True if the run is finished."""
    config, ranks, clock = run.config, run.ranks, run.config.clock
    batches = train_batches(
        run.shards.train,
        sequence_length=config.data.sequence_length,
        global_batch=config.batch.global_batch_size,
        micro_batch=config.batch.micro_batch_size,
        rank=ranks.rank,
        world=ranks.world,
        seed=config.seed,
        consumed=run.consumed,
        num_workers=config.data.num_workers,
    )
    in_a_row = 0
    while run.step < clock.total:
        # One optimizer step over the global batch.
        began = time.perf_counter()
        micro_batches = [batch.to(ranks.device) for batch in next(batches)]
        seed_dropout(config.seed, run.consumed, ranks.rank)
        lr = config.learning_rate(run.step)
        result = zero.train_step(run.engine, micro_batches, loss_of, lr, config.optimizer.grad_clip)
        run.consumed += config.batch.global_batch_size
        loss, stops = ranks.sum([result.loss / ranks.world, float(bool(stop))])
        run.interval.append(time.perf_counter() - began)

        # An update that was not finite happened on no rank: data moves on, the clock does not.
        in_a_row = 0 if result.applied else in_a_row + 1
        if not result.applied:
            _note_skipped(run, in_a_row)
            continue
        run.step += 1
        run.metrics.bar(run.step, clock.total, f"loss {loss:.4f}")

        # What the clock says.
        if clock.is_birth(run.step):
            _give_birth(run)
        if clock.is_merge(run.step):
            _restart(run, micro_batches[0])

        # What the intervals say.
        last = run.step == clock.total
        halt = stops > 0 or run.step == config.train.stop_after
        if last or due(run.step, config.train.log_every):
            _log(run, loss, lr, result.grad_norm)
        if last or due(run.step, config.train.eval_every):
            _evaluate(run)
            halt = halt or ranks.any(bool(stop))  # it may have taken long
        if last or halt or due(run.step, config.train.save_every):
            _save(run)
        if halt and not last:
            return False
    return True


def due(step: int, every: int | None) -> bool:
    """Whether something that happens every so many steps happens after this one."""
    return every is not None and step % every == 0


def _give_birth(run: Run) -> None:
    """End the warm start: the same weights and moments in a new engine, with adapters beside."""
    began = time.perf_counter()
    frozen = _frozen_names(run.config)
    state = capture(run.places, lambda name: name not in frozen)
    run.places.release_()
    zero.destroy(run.engine)
    run.engine, run.places = _build_engine(run.config, run.ranks, run.step, state)
    trainable, total = count_parameters(run.engine.module)
    seconds = time.perf_counter() - began
    run.metrics.write(run.step, {"relora/birth": 1, "time/birth_s": seconds})
    run.metrics.say(console.birth_line(run.step, len(frozen), trainable, total, seconds))


def _frozen_names(config: Config) -> set[str]:
    """Names of the weights that adapters freeze."""
    assert config.lora is not None
    targets = find_targets(build_meta_model(structure_of(config)), config.lora)
    return {f"{target}.weight" for target in targets}


def _restart(run: Run, batch: Tensor) -> None:
    """Merge, reinit, reset, and check that the function and all copies are what they must be."""
    config = run.config
    assert config.relora is not None
    began = time.perf_counter()
    number = config.clock.merges_before(run.step)
    rows = batch[:1, :PROBE_TOKENS]
    before = invariants.probe(run.engine, rows)
    report = restart_(run.engine.module, run.places, config.relora, config.seed, number)
    after = invariants.probe(run.engine, rows)
    tolerance = config.relora.tolerance or invariants.TOLERANCE[config.deepspeed.precision]
    deviation = invariants.check_function(before, after, tolerance, number)
    invariants.check_copies(run.places, number)
    values = {
        "relora/merge": number,
        "relora/update_ratio": report.update_ratio,
        "relora/zeroed_share": report.zeroed_share,
        "relora/probe_deviation": deviation,
        "time/merge_s": time.perf_counter() - began,
    }
    run.metrics.write(run.step, values)
    run.metrics.say(console.merge_line(run.step, report.layers, values))


def _note_skipped(run: Run, in_a_row: int) -> None:
    run.skipped += 1
    limit = run.config.train.max_skipped
    run.metrics.say(
        f"the update after step {run.step} was not finite: skipped ({in_a_row} in a row)"
    )
    run.metrics.write(run.step, {"train/skipped": run.skipped})
    if in_a_row >= limit:
        raise NumericsError(
            f"{limit} updates in a row were not finite (loss or gradient) after step {run.step}; "
            "the newest checkpoint is from before; lower the learning rate, or raise "
            "train.max_skipped"
        )


def _log(run: Run, loss: float, lr: float, grad_norm: float) -> None:
    """The figures of this step, and the speed since the last log."""
    config = run.config
    seconds = sum(run.interval) / len(run.interval)
    run.interval.clear()
    values = {
        "train/loss": loss,
        "train/lr": lr,
        "train/grad_norm": grad_norm,
        "train/tokens": run.consumed * config.data.sequence_length,
        "train/skipped": run.skipped,
        "perf/tokens_per_s": config.tokens_per_step / seconds,
        "perf/step_ms": seconds * 1000,
        "perf/memory_gib": memory_gib(run.ranks.device),
        "time/elapsed_s": run.elapsed,
    }
    cycle = config.clock.place_in_cycle(run.step)
    if cycle is not None:
        values["relora/cycle"] = cycle[0]
    run.metrics.write(run.step, values)
    run.metrics.say(console.step_line(config.clock, run.step, values))


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
        "eval/loss": loss,
        "eval/perplexity": perplexity(loss),
        "eval/tokens": tokens,
        "train/tokens": run.consumed * run.config.data.sequence_length,
        "time/eval_s": time.perf_counter() - began,
        "time/elapsed_s": run.elapsed,
    }
    run.metrics.write(run.step, values)
    run.metrics.say(console.eval_line(run.step, values))


def _save(run: Run) -> None:
    """A checkpoint of this step, if there is none yet."""
    if run.saved_at == run.step:
        return
    state = {
        "step": run.step,
        "consumed": run.consumed,
        "skipped": run.skipped,
        "merges": run.config.clock.merges_before(run.step),
        "elapsed_s": run.elapsed,
        "data": run.shards.fingerprint,
        "world_size": run.ranks.world,
        "relora": __version__,
    }
    began = time.perf_counter()
    save(run.config.run_dir, run.places, state, run.ranks, run.config.train.keep_checkpoints)
    run.saved_at = run.step
    run.metrics.write(run.step, {"time/save_s": time.perf_counter() - began})
    if run.ranks.is_main:
        write_run_state(run.config.run_dir, "running", "", run.step, 0)
