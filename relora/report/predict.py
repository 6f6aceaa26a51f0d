"""What the planner says about an arm, beside what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from relora.config import Config
from relora.errors import UserError
from relora.load import OF_SPEED, build_config
from relora.lora.choose import describe_left
from relora.model import build_meta_model
from relora.plan.estimate import bytes_per_step, memory_by_part, peak_memory, training_flops
from relora.plan.shape import shape_of
from relora.record.changes import eras
from relora.record.layout import RunDirectory
from relora.record.loaded import structure_of
from relora.record.saving import checkpoint_bytes
from relora.report.questions import CountFlops
from relora.report.read import RunFiles
from relora.report.records import Predicted


class Prediction(NamedTuple):
    """What follows from config, model and number of ranks alone, or why that cannot be told."""

    figures: Predicted = Predicted()
    left: tuple[str, ...] = ()  # what trains in full without adapters, and why
    flops: CountFlops = None
    complaint: str | None = None


def predict(run: RunFiles) -> Prediction:
    """Ask the planner about a run; its own copy of the model's structure is taken."""
    config = run.config.model_copy(update={"run_dir": run.path})
    try:
        config = _as_of_main(config.model_copy(update={"model": structure_of(config)}), run)
        lora = config.lora
        shape = shape_of(config)
        sizes = shape.sizes(lora)
        adapter = sum(size for size, _ in sizes[len(shape.parameters) :])
        trainable = sum(size for size, trained in sizes if trained)
        frozen = sum(size for size, trained in sizes if not trained)
        figures = Predicted(
            memory=peak_memory(config, run.world),
            memory_by_part=memory_by_part(config, run.world),
            bytes_per_step=bytes_per_step(config, run.world, lora is not None),
            checkpoint_bytes=checkpoint_bytes(
                trainable, frozen, shape.of_one_moment(config, lora is not None)
            ),
            trainable=trainable,
            parameters=sum(size for size, _ in shape.parameters),
            adapter=adapter or None,
        )
        times, before = eras(config, run.changes), 0.0
        _flops_of(times, 0)  # what cannot be counted is known here
        if (start := run.start) is not None:
            source = start.config.model_copy(update={"model": config.model})
            before = _flops_of(eras(source, start.changes), start.step)
        left = describe_left(build_meta_model(config.model), lora) if lora is not None else []
    except (UserError, ValueError) as error:
        return Prediction(complaint=str(error))
    return Prediction(figures, tuple(left), lambda steps: before + _flops_of(times, steps))


def _flops_of(times: Sequence[tuple[int, Config]], steps: int) -> float:
    """FLOPs of the first `steps` updates, each by the config of its time (see `eras`)."""
    ends = [*(begin for begin, _ in times[1:]), steps]
    return sum(
        training_flops(config, min(end, steps)) - training_flops(config, min(begin, steps))
        for (begin, config), end in zip(times, ends, strict=True)
    )


def _as_of_main(config: Config, run: RunFiles) -> Config:
    """The config with the settings of the run's longest stretch, whose speed is shown."""
    settings = run.environment.get("settings")
    if not isinstance(settings, dict):  # of a run from before they were kept
        return config
    values = config.model_dump(mode="json")
    for path, value in settings.items():
        if path in OF_SPEED:
            section, _, key = path.rpartition(".")
            if section:
                values[section] = {**(values[section] or {}), key: value}
            else:
                values[key] = value
    return build_config(values, f"{RunDirectory(run.path).environment}: settings", read_model=False)
