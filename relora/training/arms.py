"""The arms of a comparison: one config, changed by overrides, trained for several seeds.

The standard arms are those of the ReLoRA paper (arXiv 2307.05695, tables 2 and 4); a YAML file can
name others:

    seeds: [0, 1, 2]
    tune: {factors: [0.5, 1, 2], seed: 1000}     # null: each arm's learning rates as they are
    arms:
      full rank: [lora=null, relora=null, warm_start=null]
      ReLoRA, no rewarm: [relora.rewarm_steps=0]
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, field_validator
from transformers import AutoConfig, AutoModelForCausalLM

from relora.config import Config
from relora.errors import ConfigError
from relora.files import write_json
from relora.lora.inject import add_adapters
from relora.model import build_meta_model, count_parameters, load_model_config
from relora.section import Section
from relora.structure import refuse_failures
from relora.yaml_config import read_yaml, validate

# What types call the inside of their MLPs, beside `intermediate_size` and what stands for it.
INNER = ("n_inner", "ffn_dim", "decoder_ffn_dim", "moe_intermediate_size", "d_inner", "dff", "d_ff")

FULL_RANK = ("lora=null", "relora=null", "warm_start=null")


class TuneConfig(Section):
    """Search each arm's learning rates on the same budget: whole runs with a seed of their own.

    First the matrices' (or adapters') at the config's lr_embeddings, then lr_embeddings at that.
    """

    # Of the rate that the arm's config has.
    factors: list[Annotated[float, Field(gt=0)]] = Field(min_length=2)
    # Of optimizer.lr_embeddings (optimizer.lr if that is null); null = it is not searched.
    lr_embeddings: list[Annotated[float, Field(gt=0)]] | None = Field([0.5, 1, 2], min_length=2)
    share_embeddings: bool = True  # one lr_embeddings for all arms, the best by their mean loss
    extend: int = Field(default=3, ge=0)  # most that a grid grows by while the best is its edge
    seed: int = Field(ge=0, lt=2**32)  # none of those that are compared

    @field_validator("factors", "lr_embeddings")
    @classmethod
    def _differ(cls, factors: list[float] | None) -> list[float] | None:
        if factors and len(set(factors)) < len(factors):
            raise ValueError("must differ from each other")
        return factors


class ArmsConfig(Section):
    """A file of arms."""

    seeds: list[int] = Field(default=[0], min_length=1)
    tune: TuneConfig | None = None
    arms: dict[str, list[str]] | None = Field(default=None, min_length=1)  # null: the standard ones


@dataclass(frozen=True)
class Arm:
    """A way to train: a name, and what it changes in the config."""

    name: str
    overrides: tuple[str, ...]

    @property
    def slug(self) -> str:
        """The name as part of a path."""
        return re.sub(r"[^a-z0-9]+", "_", self.name.lower()).strip("_")

    def run(self, directory: Path, seed: int) -> list[str]:
        """The overrides of one of its runs."""
        return [*self.overrides, f"run_dir={_quoted(directory)}", f"seed={seed}"]


def read_arms(path: Path) -> ArmsConfig:
    """The arms that a file names.

    Raises:
        ConfigError: one message with every problem.
    """
    arms = validate(ArmsConfig, read_yaml(path), str(path))
    for name in arms.arms or ():
        if re.search(r"^-|[/=\x00-\x1f]", name):
            raise ConfigError(
                f"{path}: arms: {name!r}: a name begins with no -, and has no /, = or line break"
            )
    slugs = [Arm(name, ()).slug for name in arms.arms or ()]
    for slug in slugs:
        if not slug or slugs.count(slug) > 1:
            raise ConfigError(f"{path}: arms: two names would share the directory {slug!r}")
    return arms


def check_seeds(arms: ArmsConfig) -> None:
    """Rates may not be chosen on a seed that is compared.

    Raises:
        ConfigError: they would be.
    """
    if arms.tune and arms.tune.seed in arms.seeds:
        raise ConfigError(
            f"tune.seed: {arms.tune.seed} is one of seeds; a rate chosen on a seed looks too good "
            "there, take another"
        )


def standard_arms(config: Config, directory: Path) -> list[Arm]:
    """The paper's arms of a ReLoRA config; with blocks, those and full rank by either optimizer.

    Args:
        directory: where the model of the control, full rank with as many parameters as the adapted
            model trains, may be written.

    Raises:
        ConfigError: the config has no adapters to compare with full rank.
    """
    if config.lora is None or config.relora is None:
        raise ConfigError(
            f"CONFIG: is {config.method}; the standard arms derive from a ReLoRA config. "
            "Give one, or name the arms in a file (--arms)"
        )
    start = f"spectra.start={config.clock.birth}" if config.spectra else ""
    full = tuple(filter(None, (*FULL_RANK, start)))
    lora = ("relora=null", f"lora.lr={config.adapters_lr}")
    control = [f"model.config={_quoted(write_control(config, directory))}"]
    if config.model.pretrained:
        control.append("model.pretrained=null")
    has_muon = config.optimizer.matrices == "muon"
    found = [Arm("full rank", (*full, "optimizer.matrices=adamw") if has_muon else full)]
    if has_muon:
        found.append(Arm("full rank, Muon", full))
    found.append(Arm("control", (*full, *control)))
    names = ("blocks, no restarts", "blocks") if config.lora.blocks else ("LoRA", "ReLoRA")
    for name, changes in zip(names, (lora, ()), strict=True):
        found.append(Arm(name, (*changes, "warm_start=null")))
    if config.warm_start:
        found += [Arm(f"{names[0]} + warm start", lora), Arm(f"{names[1]} + warm start", ())]
    return found


def scale_rate(arm: Arm, config: Config, factor: float) -> Arm:
    """The arm with its learning rate times a factor: the adapters' if it has any.

    Args:
        config: the arm's own.
    """
    key, rate = rate_of(config)
    return replace(arm, overrides=(*arm.overrides, f"{key}={rate * factor:.6g}"))


def with_embeddings(arm: Arm, rate: float) -> Arm:
    """The arm with this lr_embeddings, unless its own overrides name one."""
    return replace(arm, overrides=(f"optimizer.lr_embeddings={rate:.6g}", *arm.overrides))


def rate_of(config: Config) -> tuple[str, float]:
    """The learning rate that tells a method's arms apart, and the key that sets it."""
    if config.lora is None:
        return "optimizer.lr", config.optimizer.lr
    if config.relora and config.relora.lr:
        return "relora.lr", config.relora.lr
    return "lora.lr", config.adapters_lr


def _quoted(path: Path) -> str:
    """A path as the value of an override."""
    return json.dumps(str(path), ensure_ascii=False)


def write_control(config: Config, directory: Path) -> Path:
    """A JSON of the model made narrower, until all of it is as much as the adapted one trains.

    Raises:
        ConfigError: the model has parts of several widths, or none of its type can be narrower.
    """
    assert config.lora is not None
    model = build_meta_model(config.model)
    add_adapters(model, config.lora, seed=None)
    wanted, _ = count_parameters(model)
    structure = load_model_config(config.model)
    sizes: list[tuple[int, dict[str, Any]]] = []
    for changed in _narrower(structure):
        size = _size(changed)
        if size is not None:
            sizes.append((size, changed))
    if not sizes:
        raise ConfigError(
            f"model: {structure.model_type}: no narrower model with as many parameters as train "
            "with adapters can be derived; name the arms in a file (--arms)"
        )
    _, best = min(sizes, key=lambda one: abs(one[0] - wanted))
    path = directory / "control_model.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, best)
    return path


def _narrower(structure: Any) -> Iterator[dict[str, Any]]:
    """The model in every width with whole, even heads, up to its own."""
    if structure.get_text_config(decoder=True) is not structure:
        return  # its other parts have widths of their own
    values, names = structure.to_dict(), type(structure).attribute_map
    width, heads = names.get("hidden_size", "hidden_size"), _int(structure, "num_attention_heads")
    full = _int(structure, "hidden_size")
    # Those that nobody gave are of the type's own vocabulary, and none of these models needs them.
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        ids = values.get(name)
        if isinstance(ids, int) and ids >= _int(structure, "vocab_size"):
            values[name] = None
    inner = {names.get("intermediate_size", "intermediate_size"), *INNER} & values.keys()
    for narrower in range(2 * heads, full + 1, 2 * heads):  # rotary wants heads even
        changed = {**values, width: narrower}
        for name in sorted(inner):
            if isinstance(values[name], int) and values[name]:
                changed[name] = max(1, round(values[name] * narrower / full))
        if isinstance(values.get("head_dim"), int):
            changed["head_dim"] = narrower // heads
        yield changed


def _int(structure: Any, name: str) -> int:
    """A size by its common name; 1 for a model that has none."""
    value = getattr(structure, name, None)
    return value if isinstance(value, int) and value > 0 else 1


def _size(values: dict[str, Any]) -> int | None:
    """Number of parameters of a model; None where its type takes no such sizes together."""

    def build() -> int:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
        return sum(p.numel() for p in model.parameters())

    try:
        return refuse_failures(build, "control")
    except ConfigError:
        return None
