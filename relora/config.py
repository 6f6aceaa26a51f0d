"""The root config, composed of the sections beside the code that reads them (see `load`, `checks`).

A config file is complete and includes nothing, so that `diff` of two files is the experiment. All
problems are reported at once, each with its path, the value and what is allowed.
"""

from __future__ import annotations

import math
from pathlib import Path

from pydantic import Field

from relora.data.config import DataConfig
from relora.engine.config import BatchConfig, DeepSpeedConfig, OptimizerConfig
from relora.lora.config import ADAPTER_GROUPS, GROUPS, LoRAConfig
from relora.restart.config import ReLoRAConfig, WarmStartConfig
from relora.restart.schedule import Clock, ScheduleConfig
from relora.section import Section
from relora.structure import ModelConfig
from relora.training.config import SpectraConfig, TrainConfig


class Config(Section):
    """One run. Full rank, LoRA and ReLoRA differ by which of `lora` and `relora` are null."""

    run_dir: Path
    """Where the run writes; relative to the folder that the command is typed in."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of weights, data order, adapters and dropout."""
    deterministic: bool = False
    """Take kernels that give the same bits each time on one device; slower on GPUs."""
    model: ModelConfig
    """What is trained."""
    data: DataConfig
    """Text, tokenizer, sequences."""
    batch: BatchConfig
    """Sequences a step."""
    train: TrainConfig
    """How long, and how often what."""
    optimizer: OptimizerConfig
    """AdamW or Muon, and their rates."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning-rate curve under the restarts."""
    lora: LoRAConfig | None = None
    """Adapters; null = full rank."""
    relora: ReLoRAConfig | None = None
    """Merges and restarts; null = plain LoRA."""
    warm_start: WarmStartConfig | None = None
    """A full-rank phase before the adapters; null = adapters from the first step."""
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    """ZeRO stage and precision."""
    spectra: SpectraConfig | None = SpectraConfig()
    """Singular values of what the weights gain; null = not measured."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.batch.global_batch_size * self.data.sequence_length

    @property
    def micro_batches(self) -> int:
        """Micro-batches of an optimizer step on a single rank."""
        return self.batch.global_batch_size // self.batch.micro_batch_size

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
        """The rate of the update that follows `step` finished ones: adapters', or full rank's."""
        base = self.adapters_lr if self.clock.has_adapters(step) else self.optimizer.lr
        return base * self.clock.lr_factor(step)

    @property
    def adapters_lr(self) -> float:
        """The learning rate of adapters before the schedule's factor: the first of `relora.lr`,
        `lora.lr` and `optimizer.lr` that is set."""
        own = (self.relora and self.relora.lr) or (self.lora and self.lora.lr)
        return own or self.optimizer.lr

    def rates(self, step: int) -> dict[str, float]:
        """The same for each of `parameter_groups`, by its name.

        Restarts are the adapters' alone, unless `lr_embeddings` says `adapters`.
        """
        own, section = self.learning_rate(step), self.optimizer
        if section.lr_embeddings == "adapters":
            return dict.fromkeys(GROUPS, own)
        rates = dict.fromkeys(GROUPS, section.lr_embeddings or section.lr)
        rates["matrices"] = section.lr
        smooth = {name: rates[name] * factor for name, factor in self.clock.factors(step).items()}
        return smooth | dict.fromkeys(ADAPTER_GROUPS, own)
