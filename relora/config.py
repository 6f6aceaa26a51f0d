"""The root config: compose the sections, load YAML and overrides, check what crosses sections.

A config file is complete and includes nothing, so that `diff` of two files is the experiment. All
problems are reported at once, each with its path, the value and what is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from relora.checks import cross_checks
from relora.data.config import DataConfig
from relora.errors import ConfigError
from relora.lora.config import LoRAConfig
from relora.model import ModelConfig
from relora.reading import apply_override, read_yaml, report, validate
from relora.restart.config import ReLoRAConfig, WarmStartConfig
from relora.restart.schedule import Clock, ScheduleConfig
from relora.runtime.config import (
    BatchConfig,
    DeepSpeedConfig,
    OptimizerConfig,
    SpectraConfig,
    TrainConfig,
)
from relora.section import Section

# What a continued run may change: lengths, intervals, and what belongs to the machine.
MAY_CHANGE = (
    "run_dir",
    "train.",
    "data.dir",
    "data.num_workers",
    "batch.micro_batch_size",
    "model.gradient_checkpointing",
    "deepspeed.zero_stage",
    "deepspeed.offload_optimizer",
    "deepspeed.timeout_minutes",
    "relora.remainder",
    "spectra",
)
# Those of them that change how long a step takes.
OF_SPEED = (
    "batch.micro_batch_size",
    "data.num_workers",
    "deepspeed.zero_stage",
    "deepspeed.offload_optimizer",
    "model.gradient_checkpointing",
    "relora.remainder",
)
# Paths: compared by what they hold, and not by how they are written.
PATHS = (
    "model.config",
    "model.pretrained",
    "data.source.files",
    "data.source.saved",
    "data.tokenizer.path",
)


class Config(Section):
    """One run. Full rank, LoRA and ReLoRA differ by which of `lora` and `relora` are null."""

    run_dir: Path
    seed: int = Field(default=0, ge=0, lt=2**32)
    model: ModelConfig
    data: DataConfig
    batch: BatchConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    lora: LoRAConfig | None = None
    relora: ReLoRAConfig | None = None
    warm_start: WarmStartConfig | None = None
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    spectra: SpectraConfig | None = SpectraConfig()

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.batch.global_batch_size * self.data.sequence_length

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run; a length in tokens is rounded up to whole steps."""
        if self.train.steps is not None:
            return self.train.steps
        return math.ceil((self.train.tokens or 0) / self.tokens_per_step)

    @property
    def clock(self) -> Clock:
        """The run's one clock."""
        return Clock(
            total=self.total_steps,
            warmup=self.schedule.warmup_steps,
            base=self.schedule.base,
            min_ratio=self.schedule.min_lr_ratio,
            birth=None if self.lora is None else self.warm_start.steps if self.warm_start else 0,
            cycle=self.relora.cycle_steps if self.relora else None,
            rewarm=self.relora.rewarm_steps if self.relora else 0,
        )

    @property
    def method(self) -> str:
        """`full rank`, `LoRA` or `ReLoRA`."""
        return "full rank" if self.lora is None else "LoRA" if self.relora is None else "ReLoRA"

    @property
    def decays_merged(self) -> bool:
        """Whether weight decay is that of W + s·B·A."""
        return self.lora is not None and self.lora.decay == "merged"

    def is_milestone(self, step: int) -> bool:
        """Whether the checkpoint of a step is written in any case, and stays for ever."""
        every = self.train.keep_every
        return self.clock.is_merge(step) if every == "cycle" else bool(every and step % every == 0)

    @property
    def spectra_start(self) -> int | None:
        """The step whose weights cumulative updates are counted from; None if none are measured."""
        if self.spectra is None:
            return None
        return self.clock.birth or self.spectra.start or 0

    def measures_spectra(self, step: int) -> bool:
        """Whether updates are measured once `step` updates are done."""
        if self.spectra is None or step <= (self.spectra_start or 0):
            return False
        every = self.spectra.every
        return (
            step == self.clock.total
            or self.clock.is_merge(step)
            or (every is not None and step % every == 0)
        )

    def learning_rate(self, step: int) -> float:
        """The learning rate of the update that follows `step` finished ones."""
        base = self.optimizer.lr
        if self.clock.has_adapters(step):
            assert self.lora is not None
            base = (self.relora and self.relora.lr) or self.lora.lr or base
        return base * self.clock.lr_factor(step)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file, apply `a.b=c` overrides, validate all of it.

    Raises:
        ConfigError: one message with every problem.
    """
    values = read_yaml(path)
    for override in overrides:
        apply_override(values, override)
    return build_config(values, str(path))


def load_run_config(run_dir: Path) -> Config:
    """The config of a run directory, which may have come here from elsewhere.

    So the model's file need not be where the config says; the run has its own copy in `model/`.
    """
    path = run_dir / "config.yaml"
    return build_config(read_yaml(path), str(path), read_model=False)


def build_config(values: dict[str, Any], where: str, read_model: bool = True) -> Config:
    """Validate a tree of plain values; `where` names it in messages."""
    config = validate(Config, values, where)
    problems = list(cross_checks(config, read_model))
    if problems:
        raise report(where, problems)
    return config


def dump_config(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal one."""
    plain = config.model_dump(mode="json")
    return yaml.safe_dump(plain, sort_keys=False, default_flow_style=False, allow_unicode=True)


def differences(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """(path, old value, new value) of every leaf in which two configs differ."""
    a, b = leaves(old.model_dump(mode="json")), leaves(new.model_dump(mode="json"))
    return [(k, a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]


def check_world(config: Config, world: int) -> None:
    """Whether the global batch divides over `world` ranks.

    Raises:
        ConfigError: with the numbers and the nearest batches that work.
    """
    batch = config.batch
    per_forward = batch.micro_batch_size * world
    if batch.global_batch_size % per_forward:
        down = batch.global_batch_size // per_forward * per_forward
        fits = [n for n in (down, down + per_forward) if n]
        raise ConfigError(
            f"batch.global_batch_size: {batch.global_batch_size} is not a multiple of "
            f"micro_batch_size {batch.micro_batch_size} × {world} "
            f"{'rank' if world == 1 else 'ranks'} = {per_forward}; "
            f"take {' or '.join(map(str, fits))}, or another micro_batch_size"
        )


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of sections as {dotted path: value}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= leaves(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
