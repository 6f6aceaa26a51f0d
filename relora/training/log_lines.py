"""The lines a run prints: a header, then one for each log step, merge and evaluation.

They fit in `LINE_WIDTH` columns, but for paths.
"""

from __future__ import annotations

import math
import shlex
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from relora.config import Config
from relora.load import leaves
from relora.record import keys
from relora.record.changes import Change
from relora.record.console import LINE_WIDTH
from relora.restart.schedule import Clock
from relora.version import __version__
from relora.words import format_count, format_duration

if TYPE_CHECKING:
    from relora.data.shards import TokenShards
    from relora.engine.distributed import Ranks

MERGES_SHOWN = 8

# What runs are compared by, most used first. Paths, intervals and what every run has alike are not
# among it; the table's columns are the same for all methods.
COMPARED_BY = (
    "optimizer.lr",
    "optimizer.lr_embeddings",
    "lora.lr",
    "relora.lr",
    "lora.rank",
    "lora.blocks",
    "lora.alpha",
    "lora.scaling",
    "lora.dropout",
    "lora.decay",
    "relora.cycle_steps",
    "relora.rewarm_steps",
    "relora.reset.mode",
    "relora.reset.ratio",
    "relora.reset.masks",
    "relora.reset.adam_step",
    "relora.precision",
    "warm_start.steps",
    "schedule.base",
    "schedule.warmup_steps",
    "schedule.min_lr_ratio",
    "optimizer.weight_decay",
    "optimizer.grad_clip",
    "batch.global_batch_size",
    "data.sequence_length",
    "deepspeed.precision",
    "seed",
)


def hyperparameters(config: Config) -> dict[str, object]:
    """Settings for TensorBoard's HParams table, whose first columns are those that are seen."""
    values = leaves(config.model_dump(mode="json"))
    return {
        "method": config.method,
        **{path: values.get(path) for path in COMPARED_BY},
        "train.steps": config.total_steps,
    }


def header(
    config: Config, parameters: tuple[int, int], shards: TokenShards, ranks: Ranks
) -> list[str]:
    """What is trained, on what, where and when.

    Args:
        parameters: (trainable, total) of the phase that is about to train.
    """
    trainable, total = parameters
    batch = config.batch
    accumulation = batch.global_batch_size // (batch.micro_batch_size * ranks.world)
    length = config.data.sequence_length
    epochs = (
        config.total_steps * config.tokens_per_step / max(1, len(shards.train) // length * length)
    )
    model = config.model.config or config.model.pretrained
    rows = {
        "run": f"{config.method}, {config.run_dir} (relora {__version__})",
        "model": f"{model}: {format_count(total)} parameters, {format_count(trainable)} trainable "
        f"({trainable / total:.1%}) from here on",
        "data": f"{format_count(len(shards.train))} tokens to train on, "
        f"{format_count(len(shards.validation))} to validate on; "
        f"{format_count(config.tokens_per_step)} a step, "
        f"{format_count(config.total_steps * config.tokens_per_step)} in all ({epochs:.2f} epochs)",
        "ranks": f"{ranks.world} × {ranks.device.type}, ZeRO {config.deepspeed.zero_stage}, "
        f"{config.deepspeed.precision}; {batch.global_batch_size} sequences of {length} a step = "
        f"{ranks.world} × {batch.micro_batch_size} × {accumulation} accumulated",
        "timeline": phases_line(config.clock),
    }
    return [line for name, text in rows.items() for line in row(name, text)]


def row(name: str, text: str) -> list[str]:
    """A row of the header, in as many lines as it takes."""
    return textwrap.wrap(
        f"{name:9} {text}",
        LINE_WIDTH,
        subsequent_indent=" " * 10,
        break_long_words=False,
        break_on_hyphens=False,
    )


def change_lines(before: Config, config: Config, change: Change) -> list[str]:
    """What a run goes on with otherwise from a step on: settings, rates, merges to come."""
    step, old, new = change.step, before.rates(change.step), config.rates(change.step)
    own = "adapters" if config.clock.has_adapters(step) else "matrices"
    rates = [f"{own} {old[own]:.2e} → {new[own]:.2e}"]
    boundary = config.clock.boundary_before(step)
    if boundary is not None and step < (warm := boundary + config.clock.rewarm):
        rates[0] += f" (rewarmed at step {warm}: {config.rates(warm)[own]:.2e})"
    if (old[own], new[own]) != (old["embeddings"], new["embeddings"]):
        rates.append(f"embeddings {old['embeddings']:.2e} → {new['embeddings']:.2e}")
    done = before.clock.merges_before(step)  # a boundary at the former end is still to come
    merges = config.clock.merge_steps()[done:]
    shown = ", ".join(map(str, merges[:MERGES_SHOWN])) or "none"
    more = f", … ({len(merges)} in all)" if len(merges) > MERGES_SHOWN else ""
    return [
        *row("changed", f"from step {step} on: {change.describe()}"),
        *row("rates", f"of the step after {step}: {', '.join(rates)}"),
        *row("merges", f"to come: {shown}{more}; ends at {config.clock.total}"),
    ]


def closing_lines(run_dir: Path, step: int, values: Mapping[str, float]) -> list[str]:
    """What a finished run has come to, and what can be done with it, as it is typed."""
    done = (
        f"{step} steps, {format_count(values[keys.TOKENS])} tokens in "
        f"{format_duration(values[keys.ELAPSED_S])}; peak memory of rank 0 "
        f"{values[keys.MEMORY_GIB]:.2f} GiB"
    )
    return [*row("finished", done), *next_commands(run_dir)]


def next_commands(run_dir: Path) -> list[str]:
    """What can be done with a finished run, as it is typed."""
    run, export = shlex.quote(str(run_dir)), shlex.quote(str(run_dir / "export"))
    commands = (
        f"relora evaluate {run}",
        f"relora generate {run} --prompt TEXT",
        f"relora export {run} --to {export}",
        f"relora compare {run} ANOTHER_RUN --to report",
    )
    return [f"{'next' if n == 0 else '':9} {command}" for n, command in enumerate(commands)]


def phases_line(clock: Clock) -> str:
    """The phases of a run in one line."""
    parts = []
    if clock.birth is None:
        parts.append("full rank throughout")
    elif clock.birth:
        parts.append(f"full rank to step {clock.birth}")
    merges = clock.merge_steps()
    if merges:
        shown = ", ".join(map(str, merges[:MERGES_SHOWN]))
        more = f", … ({len(merges)} in all)" if len(merges) > MERGES_SHOWN else ""
        parts.append(f"cycles of {clock.cycle}: merges after {shown}{more}")
    elif clock.birth is not None:
        parts.append("one adapter, never merged")
    return " · ".join([*parts, f"ends at {clock.total}"])


def step_line(clock: Clock, step: int, values: Mapping[str, float]) -> str:
    """One log line: where the run is, how it does, how fast, how long still."""
    remaining = (clock.total - step) * values[keys.STEP_MS] / 1000
    return "  ".join(
        [
            f"step {step:>{len(str(clock.total))}}/{clock.total}",
            phase(clock, step),
            f"loss {values[keys.TRAIN_LOSS]:.4f}",
            f"lr {_short(values[keys.LR])}",
            f"gnorm {values[keys.GRAD_NORM]:.2f}",
            f"{format_count(values[keys.TOKENS_PER_S])} tok/s",
            f"eta {format_duration(remaining)}",
        ]
    )


def _short(value: float) -> str:
    """4.0e-4; 0."""
    if not value:
        return "0"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def phase(clock: Clock, step: int) -> str:
    """Where in the cycles a step lies."""
    if clock.birth is None:
        return "full rank"
    if step <= clock.birth and clock.birth > 0:
        return f"warm start {step}/{clock.birth}"
    place = clock.place_in_cycle(step)
    return "one cycle" if place is None else f"cycle {place[0]} {place[1]}/{clock.cycle}"


def birth_line(step: int, adapters: int, trainable: int, total: int, seconds: float) -> str:
    """The end of a warm start."""
    return (
        f"BIRTH at step {step}: {adapters} adapters, {format_count(trainable)} of "
        f"{format_count(total)} parameters train from here on ({seconds:.1f} s)"
    )


def merge_line(step: int, layers: int, values: Mapping[str, float]) -> str:
    """A merge, and what was checked about it."""
    return (
        f"MERGE {values['relora/merge']:.0f} at step {step}: {layers} layers, "
        f"|ΔW|/|W| {_short(values[keys.UPDATE_RATIO])}, "
        f"moments zeroed {values[keys.ZEROED_SHARE]:.1%}, "
        f"Δlogits {_short(values[keys.PROBE_DEVIATION])} ({values[keys.MERGE_S]:.1f} s)"
    )


def spectra_line(step: int, values: Mapping[str, float]) -> str:
    """What the weights have gained: medians over the layers."""
    parts = [f"effective rank {values['spectra/total_effective_rank']:.1f} in all"]
    if keys.CYCLE_EFFECTIVE_RANK in values:
        parts.append(f"{values['spectra/cycle_effective_rank']:.1f} this cycle")
    if keys.OVERLAP in values:
        parts.append(f"{values['spectra/overlap']:.0%} as in the last")
    return f"SPECTRA at step {step}: {', '.join(parts)} ({values['time/spectra_s']:.1f} s)"


def eval_line(step: int, values: Mapping[str, float]) -> str:
    """An evaluation."""
    error = values[keys.EVAL_ERROR]
    margin = f" ± {error:.4f}" if math.isfinite(error) else ""
    return (
        f"EVAL at step {step}: loss {values['eval/loss']:.4f}{margin}, perplexity "
        f"{values['eval/perplexity']:.2f} on {format_count(values['eval/tokens'])} tokens "
        f"({values['time/eval_s']:.1f} s)"
    )
