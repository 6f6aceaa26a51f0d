"""Choose the layers that get adapters, turn them into their adapted class, list them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from relora.errors import ConfigError
from relora.lora.config import LoRAConfig
from relora.lora.layers import LoRAConv1D, LoRALayer, LoRALinear

ADAPTED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: LoRALinear, Conv1D: LoRAConv1D}
PLAIN: dict[type[nn.Module], type[nn.Module]] = {LoRALinear: nn.Linear, LoRAConv1D: Conv1D}


def find_targets(model: PreTrainedModel, config: LoRAConfig) -> list[str]:
    """Names of the layers that get adapters, in the model's order.

    Default: every linear layer but the output head, which is all projections of the attention and
    MLP blocks of Llama, GPT-2, GPT-NeoX and their like.

    Raises:
        ConfigError: a target that matches no layer, one that is no linear layer, or a rank beyond
            a layer's smaller dimension.
    """
    linear = linear_layers(model)
    wanted = config.targets
    if wanted is None:
        chosen = list(linear)
    else:
        chosen = [name for name in linear if any(_ends_with(name, target) for target in wanted)]
        for target in wanted:
            if not any(_ends_with(name, target) for name in linear):
                known = sorted({name.rpartition(".")[2] for name in linear})
                raise ConfigError(
                    f"lora.targets: {target!r} matches no linear layer of this model; "
                    f"it has: {', '.join(known)}"
                )
    for name in chosen:
        smaller = min(linear[name].weight.shape)
        if config.rank > smaller:
            raise ConfigError(
                f"lora.rank: {config.rank} is beyond the smaller dimension of {name} "
                f"{tuple(linear[name].weight.shape)}; take at most {smaller}"
            )
    return chosen


def linear_layers(model: PreTrainedModel) -> dict[str, Any]:
    """Every linear layer but the output head, adapted or not, by name, in the model's order."""
    head, kinds = model.get_output_embeddings(), (*ADAPTED, *PLAIN)
    return {name: m for name, m in model.named_modules() if type(m) in kinds and m is not head}


def add_adapters(model: PreTrainedModel, config: LoRAConfig) -> list[str]:
    """Turn the targets into adapted layers, in place; returns their names.

    Their weights are frozen; biases, embeddings, norms and the head go on training in full.
    A is left uninitialised: `restart.reinit` draws it, at birth as after every merge.
    """
    names = find_targets(model, config)
    for name in names:
        layer = model.get_submodule(name)
        # The object stays what it is to its parent, to hooks and to shared weights; it gains a
        # forward and two parameters.
        layer.__class__ = ADAPTED[type(layer)]
        assert isinstance(layer, LoRALayer)
        layer.add_lora_(config.rank, config.scale, config.dropout)
    return names


def remove_adapters(model: nn.Module) -> None:
    """Turn adapted layers back into plain ones, in place; what A and B hold is dropped."""
    for _, layer in list(adapted_layers(model)):
        del layer.lora_A, layer.lora_B
        layer.__class__ = PLAIN[type(layer)]  # type: ignore[assignment]


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """(name, layer) of every layer with an adapter, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer):
            yield name, module


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
