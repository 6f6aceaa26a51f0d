"""What the planner says about an arm, beside what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from relora.config import Config
from relora.errors import UserError
from relora.load import OF_SPEED, build_config
from relora.lora.config import LoRAConfig
from relora.model import ModelConfig
from relora.report.read import RunFiles


@dataclass(frozen=True)
class Prediction:
    """Figures that follow from config, model and number of ranks alone; None = cannot be told."""

    memory: float | None = None  # most bytes on a rank's device at once
    memory_by_part: dict[str, float] | None = None  # bytes a rank; parts do not peak together
    bytes_per_step: float | None = None  # sent by a rank in a step of the run's last phase
    checkpoint_bytes: float | None = None
    trainable: int | None = None  # parameters, in the last phase
    parameters: int | None = None
    left: tuple[str, ...] = ()  # what trains in full without adapters, and why
    flops: Callable[[int], float] | None = field(default=None, compare=False)
    complaint: str | None = None


def predict(run: RunFiles) -> Prediction:
    """Ask the planner about a run; its own copy of the model's structure is taken."""
    from relora.lora.choose import describe_left
    from relora.model import build_meta_model
    from relora.plan.estimate import bytes_per_step, memory_by_part, peak_memory, training_flops
    from relora.record.loaded import structure_of
    from relora.record.saving import checkpoint_bytes

    config = run.config.model_copy(update={"run_dir": run.path})
    adapters = config.lora is not None
    try:
        config = _as_of_main(config.model_copy(update={"model": structure_of(config)}), run)
        plain, _ = _count(config.model, None)
        trainable, frozen = _count(config.model, config.lora)
        memory = peak_memory(config, run.world)
        parts = memory_by_part(config, run.world)
        sent = bytes_per_step(config, run.world, adapters)
        before = 0.0
        if run.start is not None:
            source = run.start.config.model_copy(update={"model": config.model})
            before = training_flops(source, run.start.step)
        training_flops(config, 0)
        left: tuple[str, ...] = ()
        if config.lora is not None:
            left = tuple(describe_left(build_meta_model(config.model), config.lora))
    except (UserError, ValueError) as error:
        return Prediction(complaint=str(error))
    return Prediction(
        memory=memory,
        memory_by_part=parts,
        bytes_per_step=sent,
        checkpoint_bytes=float(checkpoint_bytes(trainable, frozen)),
        trainable=trainable,
        parameters=plain,
        left=left,
        flops=lambda steps: before + training_flops(config, steps),
    )


def _as_of_main(config: Config, run: RunFiles) -> Config:
    """The config with the settings of the run's longest stretch, whose speed is shown."""
    settings = run.environment.get("settings")
    if not isinstance(settings, dict):  # of a run from before they were kept
        return config
    values = config.model_dump(mode="json")
    for path, value in settings.items():
        if path in OF_SPEED:
            section, _, key = path.partition(".")
            values[section] = {**(values[section] or {}), key: value}
    return build_config(values, f"{run.path / 'environment.json'}: settings", read_model=False)


def _count(model: ModelConfig, lora: LoRAConfig | None) -> tuple[int, int]:
    """(trainable, frozen) numbers of parameters."""
    from relora.lora.inject import add_adapters
    from relora.model import build_meta_model, count_parameters

    built = build_meta_model(model)
    if lora is not None:
        add_adapters(built, lora, seed=None)
    trainable, total = count_parameters(built)
    return trainable, total - trainable
