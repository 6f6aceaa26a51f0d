"""The root config: compose the sections, load YAML and overrides, check what crosses sections.

A config file is complete and includes nothing, so that `diff` of two files is the experiment. All
problems are reported at once, each with its path, the value and what is allowed.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError

from relora.checks import cross_checks
from relora.data.config import DataConfig
from relora.errors import ConfigError
from relora.lora.config import LoRAConfig
from relora.model import ModelConfig
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

MAX_CONFIG_BYTES = 1_000_000

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


# What pydantic wants, in other words than its own.
_TYPES = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "list_type": "a list, such as [a, b]",
    "tuple_type": "a list, such as [a, b]",
    "dict_type": "a mapping",
}


# All that PyYAML's own constructors let through: a date of month 13, `!!int ''`, 10⁴ brackets.
_MALFORMED = (
    yaml.YAMLError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    RecursionError,
)


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice (YAML keeps the last one, silently) and aliases.

    A few lines of aliases of aliases stand for more values than memory holds.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.YAMLError(
                f"line {event.start_mark.line + 1}: *{event.anchor}: aliases are not read; write "
                "the value out"
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if not isinstance(key, str):
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: a key must be a name")
            if key in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: {key} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file, apply `a.b=c` overrides, validate all of it.

    Raises:
        ConfigError: one message with every problem.
    """
    values = _read_yaml(path)
    for override in overrides:
        _apply(values, override)
    return build_config(values, str(path))


def load_run_config(run_dir: Path) -> Config:
    """The config of a run directory, which may have come here from elsewhere.

    So the model's file need not be where the config says; the run has its own copy in `model/`.
    """
    path = run_dir / "config.yaml"
    return build_config(_read_yaml(path), str(path), read_model=False)


def build_config(values: dict[str, Any], where: str, read_model: bool = True) -> Config:
    """Validate a tree of plain values; `where` names it in messages."""
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise _report(where, [_explain(e) for e in error.errors(include_url=False)]) from None
    problems = list(cross_checks(config, read_model))
    if problems:
        raise _report(where, problems)
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


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file (looked from {Path.cwd()})")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: {path.stat().st_size} bytes is no config file")
    try:
        values = yaml.load(path.read_text(encoding="utf8"), _Loader)
    except _MALFORMED as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a config file is a mapping of sections, such as `model:`")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r}: write it as section.key=value")
    try:
        value = yaml.load(text, _Loader)
    except _MALFORMED as error:
        problem = getattr(error, "problem", None) or error
        raise ConfigError(
            f"override {override!r}: the value is not valid YAML: {problem}"
        ) from None
    node = values
    for depth, key in enumerate(keys[:-1], 1):
        if node.get(key) is None:
            node[key] = {}
        if not isinstance(node[key], dict):
            where = ".".join(keys[:depth])
            raise ConfigError(
                f"override {override!r}: {where} is {_shown(node[key])}, which has no keys; "
                f"override {where} as a whole"
            )
        node = node[key]
    node[keys[-1]] = value


def _explain(error: Any) -> str:
    """One of pydantic's errors as path, value and what is allowed, in the words of YAML."""
    loc, kind = error["loc"], error["type"]
    path = ".".join(str(part) for part in loc)
    if kind == "extra_forbidden":
        allowed = _allowed_keys(loc[:-1])
        close = difflib.get_close_matches(str(loc[-1]), allowed, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"{path}: unknown key; {hint}allowed here: {', '.join(allowed)}"
    if kind == "missing":
        if isinstance(loc[-1], int):
            return f"{path.rpartition('.')[0]}: has no value number {loc[-1] + 1}"
        return f"{path}: is missing"
    if kind in ("model_type", "model_attributes_type"):
        message = f"must be a section with the keys {', '.join(_allowed_keys(loc))}"
    elif kind in ("too_short", "too_long"):
        bound = "min_length" if kind == "too_short" else "max_length"
        word = "at least" if kind == "too_short" else "at most"
        message = f"must have {word} {error['ctx'][bound]} of them"
    elif kind in _TYPES:
        message = f"must be {_TYPES[kind]}"
    else:
        message = error["msg"].removeprefix("Value error, ")
        message = message.replace("Input should be", "must be").replace(
            "input should be", "must be"
        )
        message = message[:1].lower() + message[1:]
    value = error["input"]
    return (
        f"{path}: {message}" if isinstance(value, dict) else f"{path}: {_shown(value)}: {message}"
    )


def _shown(value: Any) -> str:
    """A value as YAML spells it, near enough."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


def _allowed_keys(path: Sequence[Any]) -> list[str]:
    section: Any = Config
    for part in path:
        annotation = section.model_fields[part].annotation
        kinds = [annotation, *get_args(annotation)]
        section = next(k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel))
    return list(section.model_fields)


def _report(where: str, problems: list[str]) -> ConfigError:
    if len(problems) == 1:
        return ConfigError(f"{where}: {problems[0]}")
    return ConfigError("\n  ".join([f"{where}: {len(problems)} problems", *problems]))


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of sections as {dotted path: value}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= leaves(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
