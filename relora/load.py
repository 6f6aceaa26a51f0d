"""Read, check and write a run's config, and compare two of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from relora.checks import cross_checks
from relora.config import Config
from relora.errors import ConfigError
from relora.files import exists, is_file
from relora.hub import fetch, is_hub_name
from relora.locate import find_config, look_beside, shipped_directory
from relora.lora.config import NAMES_OF_PEFT
from relora.record.layout import MODEL_JSON, RunDirectory
from relora.yaml_config import apply_override, examine, read_yaml, report, without

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
# Files of a model on the hub that are wanted: no pickle, no code.
_OF_MODEL = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")
# What transformers and PEFT call settings of ours.
_OTHER_NAMES = {
    "train.max_steps": "train.steps",
    "optimizer.learning_rate": "optimizer.lr",
    "optimizer.max_grad_norm": "optimizer.grad_clip",
    **{f"lora.{theirs}": f"lora.{ours}" for theirs, ours in NAMES_OF_PEFT.items()},
}


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a config, apply `a.b=c` overrides, validate all of it.

    Args:
        path: a YAML file, a run directory (its config, and itself as `run_dir`), or the name of a
            config that comes with relora, such as `llama_60m_relora`.

    Raises:
        ConfigError: one message with every problem.
    """
    file = find_config(Path(path))
    values = read_yaml(file)
    of_run = file == RunDirectory(Path(path)).config
    if of_run:
        values["run_dir"] = str(path)
    _rename(values)
    for override in overrides:
        key, equals, value = override.partition("=")
        apply_override(values, f"{_OTHER_NAMES.get(key.strip(), key)}{equals}{value}")
    begun = _values_of_run(values.get("run_dir"))
    for folder in (file.parent, shipped_directory()):
        look_beside(values, folder, begun)
    if of_run:
        _take_own_model(values.get("model"), RunDirectory(file.parent))
    else:
        _fetch_pretrained(values.get("model"))
    return build_config(values, str(path), read_model=not of_run)


def load_run_config(run_dir: Path) -> Config:
    """The config of a run directory, which may have come here from elsewhere.

    So the model's file need not be where the config says; the run has its own copy in `model/`.
    """
    path = RunDirectory(run_dir).config
    return build_config(read_yaml(path), str(path), read_model=False)


def build_config(values: dict[str, Any], where: str, read_model: bool = True) -> Config:
    """Validate a tree of plain values; `where` names it in messages."""
    _rename(values)
    problems = list(_take_out_foreign(values))
    config, wrong = examine(Config, values)
    problems += [mistake.text for mistake in wrong]
    # Keys that are wrong in themselves left out, what others say together may be wrong too.
    whole = any(len(one.path) == 1 and isinstance(values.get(one.path[0]), dict) for one in wrong)
    sound = config if whole else config or examine(Config, without(values, wrong))[0]
    if sound is not None:
        known = [f"{'.'.join(map(str, mistake.path))}: " for mistake in wrong]
        told = cross_checks(sound, read_model)
        problems += [one for one in told if not one.startswith(tuple(known))]
    if problems:
        raise report(where, problems)
    assert config is not None
    return config


def _values_of_run(run_dir: Any) -> dict[str, Any] | None:
    """What the config of a run says that is there already; None if none is, or it is damaged."""
    file = RunDirectory(Path(run_dir)).config if isinstance(run_dir, str) else None
    if file is None or not is_file(file):
        return None
    with suppress(ConfigError):  # whoever reads the run says what is wrong with it
        return read_yaml(file)
    return None


def _take_own_model(model: Any, run: RunDirectory) -> None:
    """A run's copy of its model's file in place of one that has gone since."""
    given = model.get("config") if isinstance(model, dict) else None
    if isinstance(given, str) and not exists(Path(given)) and is_file(run.model / MODEL_JSON):
        model["config"] = str(run.model / MODEL_JSON)


def _fetch_pretrained(model: Any) -> None:
    """The folder of weights that are named as on the hub, `org/name`, in place of their name."""
    name = model.get("pretrained") if isinstance(model, dict) else None
    if not isinstance(name, str) or name.count("/") != 1 or not is_hub_name(name):
        return
    if not exists(Path(name).parent):  # else it is a path with a mistake in it
        model["pretrained"] = str(fetch(name, _OF_MODEL, ConfigError, "model.pretrained"))


def _rename(values: dict[str, Any]) -> None:
    """Call settings by their names here, in place, where those are not given as well."""
    for path, ours in _OTHER_NAMES.items():
        (section, other), name = path.split("."), ours.partition(".")[2]
        node = values.get(section)
        if isinstance(node, dict) and other in node and node.get(name) is None:
            node[name] = node.pop(other)


def _take_out_foreign(values: dict[str, Any]) -> Iterator[str]:
    """Take settings of other tools out of a tree; says what to write in their place."""
    for path, ours in _OTHER_NAMES.items():
        section, other = path.split(".")
        node = values.get(section)
        if isinstance(node, dict) and node.pop(other, None) is not None:
            yield f"{path}: is {ours} here, which is given too; remove one"
    train = values.get("train")
    if isinstance(train, dict) and train.pop("epochs", None) is not None:
        yield (
            "train.epochs: a length is train.steps or train.tokens; how many steps make an epoch "
            "is what `relora plan` says once `relora prepare` has counted the corpus"
        )


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
