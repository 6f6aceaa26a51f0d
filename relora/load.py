"""Read, check and write a run's config, and compare two of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from relora.checks import cross_checks
from relora.config import Config
from relora.errors import ConfigError
from relora.record.layout import RunDirectory
from relora.yaml_config import apply_override, read_yaml, report, validate

# What a continued run may change: lengths, intervals, and what belongs to the machine.
MAY_CHANGE = (
    "run_dir",
    "train.",
    "deterministic",
    "data.dir",
    "data.num_workers",
    "batch.micro_batch_size",
    "model.gradient_checkpointing",
    "deepspeed.zero_stage",
    "deepspeed.offload_optimizer",
    "deepspeed.timeout_minutes",
    "lora.base",
    "relora.remainder",
    "spectra",
)
# Those of them that change how long a step takes.
OF_SPEED = (
    "deterministic",
    "batch.micro_batch_size",
    "data.num_workers",
    "deepspeed.zero_stage",
    "deepspeed.offload_optimizer",
    "model.gradient_checkpointing",
    "lora.base",
    "relora.remainder",
    "train.compile",
)
# Paths: compared by what they hold, and not by how they are written.
PATHS = (
    "model.config",
    "model.pretrained",
    "data.source.files",
    "data.source.saved",
    "data.tokenizer.path",
)


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a config file, apply `a.b=c` overrides, validate all of it.

    Raises:
        ConfigError: one message with every problem.
    """
    values = read_yaml(Path(path))
    for override in overrides:
        apply_override(values, override)
    return build_config(values, str(path))


def load_run_config(run_dir: Path) -> Config:
    """The config of a run directory, which may have come here from elsewhere.

    So the model's file need not be where the config says; the run has its own copy in `model/`.
    """
    path = RunDirectory(run_dir).config
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
