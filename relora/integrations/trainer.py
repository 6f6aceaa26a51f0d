"""ReLoRA in transformers' Trainer, and in what is made of it (TRL, axolotl): one callback.

    relora.add_adapters(model, relora.LoRAConfig(rank=128))
    trainer = Trainer(model, args, train_dataset=…)
    trainer.add_callback(relora.ReLoRACallback(trainer, relora.ReLoRAConfig(cycle_steps=1000)))

The Trainer keeps its loop, its optimizer (`args.optim`) and its scheduler. The callback puts the
adapters into groups of their own, has their learning rate climb anew after each restart, and merges
right after an update, before the Trainer evaluates and saves: its checkpoints resume it, within a
cycle as on a merge.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback

from relora.engine.state import EngineState
from relora.errors import CheckpointError, ConfigError
from relora.lora.config import ADAPTER_GROUPS, GROUPS
from relora.lora.inject import parameter_groups
from relora.lora.layers import adapted_layers
from relora.record.keys import UPDATE_RATIO, ZEROED_SHARE
from relora.restart.config import ReLoRAConfig
from relora.restart.restart import RestartReport, merge_and_restart
from relora.restart.schedule import Clock


class ReLoRACallback(TrainerCallback):
    """Merges and restarts the adapters of a Trainer's model every `cycle_steps` updates.

    On one device, under DistributedDataParallel, and under DeepSpeed's ZeRO 0–3.

    Attributes:
        reports: what each restart of this process did, by the number of updates before it.
    """

    def __init__(self, trainer: Trainer, relora: ReLoRAConfig) -> None:
        """Take charge of the groups of the optimizer that the Trainer is going to make.

        Args:
            trainer: before `train()`, of a model with adapters.
            relora: as in a config file. `lr` is the adapters' rate, `args.learning_rate` without.
                No probe batch is tried here, so `tolerance` stays null.

        Raises:
            ConfigError: the model has no adapters, the Trainer shards it by FSDP, its DeepSpeed
                config makes the optimizer or the scheduler, or it has an optimizer whose groups are
                not those of `relora.parameter_groups`.
        """
        self.trainer, self.config = trainer, relora
        self.reports: dict[int, RestartReport] = {}
        self._state: EngineState | None = None
        self._clock = Clock(total=0)
        _check(trainer, relora)
        model: Any = trainer.model
        if trainer.optimizer is not None:
            if any(group.get("name") not in GROUPS for group in trainer.optimizer.param_groups):
                raise ConfigError(
                    "ReLoRACallback: the optimizer's groups do not say what is an adapter; make "
                    "it of relora.parameter_groups(model), or leave it to the Trainer"
                )
            if relora.lr is not None:
                raise ConfigError(
                    f"ReLoRACallback: lr: {relora.lr} would do nothing, as the optimizer is made "
                    "already; give its groups their rates"
                )
            return
        args = trainer.args
        chosen = trainer.optimizer_cls_and_kwargs
        kind, settings = chosen or trainer.get_optimizer_cls_and_kwargs(args, model)
        groups = parameter_groups(model, args.weight_decay)
        for group in groups:
            own = relora.lr if group["name"] in ADAPTER_GROUPS else None
            group["lr"] = own or args.learning_rate
        trainer.optimizer_cls_and_kwargs = (kind, {**settings, "params": groups})

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The optimizer is made and wrapped; what there was to resume from is loaded."""
        trainer: Any = self.trainer
        self._clock = Clock(
            total=state.max_steps,
            warmup=args.get_warmup_steps(state.max_steps),
            cycle=self.config.cycle_steps,
            rewarm=self.config.rewarm_steps,
        )
        if not self._clock.merge_steps():
            raise ConfigError(
                f"ReLoRACallback: cycle_steps: {self.config.cycle_steps} leaves no merge in "
                f"{state.max_steps} updates; take fewer, or leave the callback out for plain LoRA"
            )
        remainder = self.config.remainder if self.config.precision == "exact" else None
        if trainer.is_deepspeed_enabled:
            self._state = EngineState(trainer.model_wrapped, remainder=remainder)
        else:
            inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
            self._state = EngineState(trainer.model, inner, remainder)
        if state.global_step:
            self._resume(args, state)
        self._jag(trainer.optimizer, trainer.lr_scheduler)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """An update was applied, or skipped, and the scheduler knows."""
        scheduler: Any = self.trainer.lr_scheduler
        # Skipped updates are steps to the Trainer, not to its scheduler; the restarts follow that.
        done = scheduler.last_epoch
        if self.trainer.accelerator.optimizer_step_was_skipped or not self._clock.is_merge(done):
            return
        assert self._state is not None
        number = self._clock.merges_before(done)
        report = merge_and_restart(self._state, number, args.seed, self.config.reset)
        self.reports[done] = report
        figures = {UPDATE_RATIO: report.update_ratio, ZEROED_SHARE: report.zeroed_share}
        self.trainer.log(figures)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The Trainer has written a checkpoint; what 16-bit weights cannot hold goes with it."""
        kept = self._remainders()
        if kept:
            directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            save_file(kept, directory / _file_name(args))

    def _remainders(self) -> dict[str, Tensor]:
        """Of frozen weights in half precision, this rank's part, by name."""
        assert self._state is not None
        views = {view.name: view.remainder for view in self._state}
        return {name: part for name, part in views.items() if part is not None and part.numel()}

    def _resume(self, args: Any, state: Any) -> None:
        """Make of the weights of a checkpoint all that is made of weights."""
        assert self._state is not None
        for _, layer in adapted_layers(self._state.model):
            layer.requantise_()
        kept = self._remainders()
        if not kept:
            return
        given = args.resume_from_checkpoint
        places = [Path(args.output_dir) / f"checkpoint-{state.global_step}"]
        if isinstance(given, str) and given not in ("True", "true"):
            places.insert(0, Path(given))
        files = [place / _file_name(args) for place in places]
        found = next((file for file in files if file.is_file()), None)
        if found is None:
            raise CheckpointError(
                f"ReLoRACallback: {files[-1]}: no such file; it holds what half precision rounds "
                "away of merged weights, without which the run would not go on as it was; put the "
                "checkpoint there, or name it in args.resume_from_checkpoint"
            )
        for name, part in load_file(found).items():
            kept[name].copy_(part)

    def _jag(self, optimizer: Any, scheduler: Any) -> None:
        """Have the scheduler climb anew after each restart, for the adapters alone."""
        if not self.config.rewarm_steps:
            return
        if not isinstance(scheduler, LambdaLR):
            raise ConfigError(
                f"ReLoRACallback: rewarm_steps asks for a scheduler that follows the step alone "
                f"(a LambdaLR, as of lr_scheduler_type linear, cosine, constant, …), and not for "
                f"a {type(scheduler).__name__}; choose such a one, or set rewarm_steps to 0"
            )
        for index, group in enumerate(optimizer.param_groups):
            curve = scheduler.lr_lambdas[index]
            if group["name"] in ADAPTER_GROUPS and not hasattr(curve, "relora"):
                scheduler.lr_lambdas[index] = _jagged(self._clock, curve)
                factor = scheduler.lr_lambdas[index](scheduler.last_epoch)
                group["lr"] = scheduler.base_lrs[index] * factor


def _check(trainer: Trainer, relora: ReLoRAConfig) -> None:
    """What the model, the Trainer and the settings must be, before anything is made."""
    model: Any = trainer.model
    if not any(adapted_layers(model)):
        raise ConfigError(
            "ReLoRACallback: the model has no adapters; call relora.add_adapters(model, "
            "relora.LoRAConfig(rank=…)) before the Trainer is made"
        )
    if trainer.is_fsdp_enabled:
        raise ConfigError(
            "ReLoRACallback: FSDP cuts weights where merges do not reach them; take DDP, or "
            "DeepSpeed (args.deepspeed), whose ZeRO 3 shards as much"
        )
    if trainer.is_deepspeed_enabled:
        made: Any = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
        sections = [name for name in ("optimizer", "scheduler") if name in made]
        if sections:
            raise ConfigError(
                f"ReLoRACallback: the DeepSpeed config has a section of its own for the "
                f"{' and the '.join(sections)}, which knows no adapters; leave it out, and the "
                "Trainer makes both: of optim, learning_rate, lr_scheduler_type, warmup_steps"
            )
    if relora.tolerance is not None:
        raise ConfigError(
            f"ReLoRACallback: tolerance: {relora.tolerance} would do nothing; no probe batch "
            "is tried here, so leave it out"
        )
    if relora.rewarm_steps >= relora.cycle_steps:
        raise ConfigError(
            f"ReLoRACallback: rewarm_steps: {relora.rewarm_steps} must be below cycle_steps "
            f"{relora.cycle_steps}, or the learning rate never arrives"
        )


def _jagged(clock: Clock, curve: Callable[[int], float]) -> Callable[[int], float]:
    """A plain function, of which a scheduler saves nothing."""

    def factor(step: int) -> float:
        return clock.jagged(curve, step)

    factor.relora = True  # type: ignore[attr-defined]
    return factor


def _file_name(args: Any) -> str:
    return f"merge_remainder_{args.process_index:05d}.safetensors"
