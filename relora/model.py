"""Build the transformer: from a config JSON with weights that depend on the seed alone, or from a
checkpoint directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import model_validator

from relora.errors import ConfigError
from relora.section import Section
from relora.structure import (
    check_pretrained,
    find_model_directory,
    one_line,
    read_structure,
    refuse_failures,
)

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
    if config.config is not None:
        return read_structure(config.config)
    assert config.pretrained is not None
    path = find_model_directory(config.pretrained) / "config.json"
    return read_structure(path, "model.pretrained")


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) number of parameters, shared ones counted once, partitioned ones whole."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trainable in sizes if trainable), sum(n for n, _ in sizes)


def _load_pretrained(directory: Path) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    check_pretrained(directory)
    structure = load_model_config(ModelConfig(pretrained=directory))
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            config=structure,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # what transformers raises at other people's files may be anything
        raise ConfigError(f"model.pretrained: {directory}: {one_line(error)}") from error
    model, report = loaded
    # transformers would draw these at random and go on.
    lacking = sorted({*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])})
    if lacking:
        raise ConfigError(f"model.pretrained: {directory}: lacks weights: {', '.join(lacking)}")
    return model


def _from_config(config: ModelConfig) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    structure = load_model_config(config)
    where = f"model: {config.config or config.pretrained}"
    return refuse_failures(lambda: AutoModelForCausalLM.from_config(structure), where)
