"""Build the transformer: from a config JSON with weights that depend on the seed alone, or from a
checkpoint directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import model_validator

from relora.errors import ConfigError
from relora.section import Section

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel


class ModelConfig(Section):
    """Exactly one of `config` (a transformers config JSON: from scratch) and `pretrained`.

    `pretrained` is a directory that transformers can load (an export, say), a run directory or
    one of its checkpoints: continued pretraining.
    """

    config: Path | None = None
    pretrained: Path | None = None
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _exactly_one(self) -> ModelConfig:
        if (self.config is None) == (self.pretrained is None):
            raise ValueError("give either config (a JSON file) or pretrained (a directory)")
        return self


def read_model_json(path: Path) -> dict[str, Any]:
    """The transformers config JSON at `path`, as plain values.

    Raises:
        ConfigError: no such file, no JSON, or no `model_type` in it.
    """
    if not path.is_file():
        raise ConfigError(f"model.config: {path}: no such file (looked from {Path.cwd()})")
    try:
        values = json.loads(path.read_text(encoding="utf8"))
    except ValueError as error:
        raise ConfigError(f"model.config: {path}: not valid JSON: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise ConfigError(f'model.config: {path}: needs a "model_type", such as "llama"')
    return values


def layer_kind(name: str) -> str:
    """What layers of one kind share of their names: `mlp.c_proj` is not `attn.c_proj`."""
    return ".".join(name.split(".")[-2:])


def build_model(config: ModelConfig, seed: int) -> PreTrainedModel:
    """The causal language model in fp32 on the CPU, every parameter trainable, without KV cache.

    Weights drawn from scratch come from the CPU's generator right after `torch.manual_seed(seed)`,
    so they depend on the seed alone, not on device, rank, world size or ZeRO stage.

    Raises:
        ConfigError: a `pretrained` directory lacks weights, some or all. (Those of a run are in
            its checkpoints: see `subject.merged_model`.)
    """
    import torch

    torch.manual_seed(seed)
    model = _load_pretrained(config.pretrained) if config.pretrained else _from_config(config)
    return make_trainable(model, config.gradient_checkpointing)


def make_trainable(model: PreTrainedModel, gradient_checkpointing: bool) -> PreTrainedModel:
    """The model in fp32 with every parameter trainable, without KV cache, ready for training."""
    model = model.float().requires_grad_(True)
    model.config.use_cache = False
    if gradient_checkpointing:
        # The reentrant kind would need inputs that require gradients.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def build_meta_model(config: ModelConfig) -> PreTrainedModel:
    """The model's structure alone: parameters without memory, for counting and checking."""
    import torch

    with torch.device("meta"):
        return _from_config(config)


def load_model_config(config: ModelConfig) -> PretrainedConfig:
    """The transformers config that `model` names, checked as far as no weights are needed.

    Raises:
        ConfigError: the file or directory is not one that transformers can build from.
    """
    from transformers import AutoConfig

    path = config.config
    if path is None:
        assert config.pretrained is not None
        path = find_model_directory(config.pretrained) / "config.json"
    values = read_model_json(path)
    try:
        return AutoConfig.for_model(**values)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: transformers does not know this model: {error}") from None


def find_model_directory(path: Path) -> Path:
    """The directory with `config.json` that `model.pretrained` means: itself, or a run's `model/`.

    Raises:
        ConfigError: there is none.
    """
    candidates = [path, path / "model"]
    if (path / "manifest.json").is_file():  # a checkpoint, two levels below its run
        candidates.append(path.resolve().parent.parent / "model")
    for candidate in candidates:
        if (candidate / "config.json").is_file():
            return candidate
    raise ConfigError(
        f"model.pretrained: {path}: holds no config.json; give a transformers model directory, "
        "a run directory or one of its checkpoints"
    )


def check_pretrained(path: Path) -> None:
    """Whether a transformers directory holds weights at all.

    Raises:
        ConfigError: it does not, or is no such directory.
    """
    find_model_directory(path)
    if not has_transformers_weights(path):
        raise ConfigError(
            f"model.pretrained: {path}: holds no weights (model.safetensors); give a transformers "
            "model directory with them, a run directory or one of its checkpoints"
        )


def has_transformers_weights(directory: Path) -> bool:
    """Whether transformers can load weights from `directory` (safetensors, one file or many)."""
    names = ("model.safetensors", "model.safetensors.index.json")
    return any((directory / name).is_file() for name in names)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) number of parameters, shared ones counted once, partitioned ones whole."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trainable in sizes if trainable), sum(n for n, _ in sizes)


def _load_pretrained(directory: Path) -> PreTrainedModel:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    check_pretrained(directory)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"model.pretrained: {directory}: {error}") from None
    model, report = loaded
    # transformers would draw these at random and go on.
    lacking = sorted({*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])})
    if lacking:
        raise ConfigError(f"model.pretrained: {directory}: lacks weights: {', '.join(lacking)}")
    return model


def _from_config(config: ModelConfig) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    structure = load_model_config(config)
    try:
        return AutoModelForCausalLM.from_config(structure)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"model: {error}") from None
