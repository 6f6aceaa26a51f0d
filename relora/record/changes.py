"""Settings that a run has changed on its way, and `changes.json`, which lists them.

Every checkpoint holds the list as it was by then, and the config that it was trained under: these
are what a run goes on from. The file is for who reads a run directory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from relora.config import Config
from relora.engine.distributed import Ranks
from relora.errors import CheckpointError, ConfigError
from relora.files import is_file, read_text, supplied, write_atomically, write_json
from relora.load import build_config, dump_config, leaves
from relora.record.checked import Count, JsonRecord, checked
from relora.record.layout import RunDirectory

# What `--change` may change: rate, schedule, batch, and what the clock is made of if it fits.
ASKED = (
    "batch.global_batch_size",
    "lora.lr",
    "optimizer.lr",
    "optimizer.lr_embeddings",
    "relora.cycle_steps",
    "relora.lr",
    "relora.rewarm_steps",
    "schedule.base",
    "schedule.min_lr_ratio",
    "schedule.warmup_steps",
    "warm_start.steps",
)
# The length may change without it, and moves the schedule: it is on record too.
LENGTH = ("train.steps", "train.tokens")
# Why the rest stays as it is; the first that a path begins with.
REASONS = {
    "seed": "the order of the data and every draw follow from it",
    "data.": "the run is on its way through these tokens in their order",
    "model.": "the weights so far are of this model",
    "lora.": "the adapters so far and their moments are of this kind",
    "relora.": "the restarts so far were of this kind",
    "optimizer.": "the optimizer's state so far was gathered under it",
    "deepspeed.": "what is stored so far has this precision",
}


class Change(JsonRecord):
    """Settings that are others from a step on."""

    step: Count = Field(description="a whole number ≥ 0")  # updates done under the old ones
    settings: dict[str, Annotated[tuple[Any, Any], Field(strict=False)]] = Field(
        description="[old value, new value] for each setting that may change"
    )

    @field_validator("settings")
    @classmethod
    def _may_change(cls, value: dict[str, Any]) -> dict[str, Any]:
        if not value.keys() <= {*ASKED, *LENGTH}:
            raise ValueError("another setting")
        return value

    @property
    def was_asked(self) -> bool:
        """Whether it took `--change`."""
        return any(path in ASKED for path in self.settings)

    def describe(self) -> str:
        """For a reader of the log."""
        return ", ".join(f"{path} {a} → {b}" for path, (a, b) in self.settings.items())


def read_changes(run_dir: Path) -> list[Change]:
    """What the run has changed so far, oldest first.

    Raises:
        CheckpointError: the file is there, and is not what a run writes.
    """
    path = RunDirectory(run_dir).changes
    if not os.path.lexists(path):
        return []
    text = read_text(path, CheckpointError)
    try:
        with supplied(CheckpointError, "it"):
            values = json.loads(text)
        if not isinstance(values, list):
            raise CheckpointError("it holds no list")
        return [checked(Change, each, f"number {n}") for n, each in enumerate(values, 1)]
    except CheckpointError as error:
        # The checkpoints know it too, and a run that goes on writes it anew.
        raise CheckpointError(
            f"{path}: is broken ({error}); remove it: the checkpoints know what has changed"
        ) from None


def with_settings(config: Config, values: Mapping[str, Any]) -> Config:
    """A config with other values at some paths.

    Raises:
        ConfigError: it lacks a section, or a value is none that the setting may have.
    """
    tree = config.model_dump(mode="json")
    for path, value in values.items():
        node = tree
        *sections, key = path.split(".")
        for section in sections:
            node = node[section]
            if node is None:
                raise ConfigError(f"{config.run_dir}: {path} has changed, and {section} is null")
        node[key] = value
    return build_config(tree, str(RunDirectory(config.run_dir).config), read_model=False)


def before_changes(config: Config, changes: Sequence[Change]) -> Config:
    """The config as it was before these changes, of which it has made all."""
    values: dict[str, Any] = {}
    for change in reversed(changes):
        values |= {path: was for path, (was, _) in change.settings.items()}
    return with_settings(config, values) if values else config


def eras(config: Config, changes: Sequence[Change]) -> list[tuple[int, Config]]:
    """(step, config from that step on), oldest first, of a run that has made these changes."""
    begins = [0, *(change.step for change in changes)]
    return [(step, before_changes(config, changes[n:])) for n, step in enumerate(begins)]


def change_since(trained: Mapping[str, Any], step: int, config: Config) -> Change | None:
    """What a config has otherwise than the one that a checkpoint was trained under, if anything.

    Args:
        trained: the latter, as plain values.
        step: of the checkpoint.

    Raises:
        ConfigError: the clock would not fit the steps that are done.
    """
    old, new = leaves(dict(trained)), leaves(config.model_dump(mode="json"))
    settings = {
        path: (old[path], new[path])
        for path in (*ASKED, *LENGTH)
        if path in old and path in new and old[path] != new[path]
    }
    if not settings:
        return None
    before = with_settings(config, {path: was for path, (was, _) in settings.items()})
    check_fit(before, config, step)
    change = Change(step=step, settings=settings)
    written_otherwise = not change.was_asked and before.total_steps == config.total_steps
    return None if written_otherwise else change


def check_fit(before: Config, config: Config, step: int) -> None:
    """Whether the new clock has behind it what the run has: the same birth and the same merges.

    Raises:
        ConfigError: it has not.
    """
    old, new = before.clock._replace(total=config.total_steps), config.clock
    if (
        old.has_adapters(step) == new.has_adapters(step)
        and old.merges_before(step) == new.merges_before(step)
        and old.boundary_before(step) == new.boundary_before(step)
    ):
        return
    key, was, now = "relora.cycle_steps", old.cycle, new.cycle
    if old.birth != new.birth:
        key, was, now = "warm_start.steps", old.birth, new.birth
    last = old.boundary_before(step)
    done = f"the last restart was at step {last}" if last else "there was no restart yet"
    raise ConfigError(
        f"{key}: was {was}, is now {now}: at step {step} {done}, and by the new clock it would "
        "have been another; it may change until the first restart, to what lies ahead: take "
        f"{was}, or begin another run"
    )


def record_changes(
    config: Config, so_far: Sequence[Change], new: Change | None, ranks: Ranks
) -> list[Change]:
    """All that the run has changed by now, with what it changes as it goes on, if anything.

    The run's config and changes.json become what they say. Collective.

    Raises:
        CheckpointError: they cannot be written (every rank raises).
    """
    changes = [*so_far, *([new] if new else ())]
    files = RunDirectory(config.run_dir)
    with ranks.together():
        if ranks.is_main and is_file(files.config):
            try:
                if changes or os.path.lexists(files.changes):
                    write_json(files.changes, [change.model_dump() for change in changes])
                write_atomically(files.config, dump_config(config))
            except OSError as error:
                raise CheckpointError(
                    f"{config.run_dir}: cannot be written: {error}; make room"
                ) from None
    return changes
