"""Turn the chosen layers into their adapted class, and back; list them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from relora.lora.choose import find_targets
from relora.lora.config import LoRAConfig
from relora.lora.layers import LoRAConv1D, LoRALayer, LoRALinear


@cache
def adapted_class(plain: Any) -> Any:
    """The class that a layer of a class becomes: a subclass of it, with the adapted forward."""
    if plain is nn.Linear:
        return LoRALinear
    if plain is Conv1D:
        return LoRAConv1D
    kind = LoRAConv1D if issubclass(plain, Conv1D) else LoRALinear
    return type(f"LoRA{plain.__name__}", (kind, plain), {"plain": plain})


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
        kind: Any = type(layer)
        layer.__class__ = adapted_class(kind)
        assert isinstance(layer, LoRALayer)
        layer.add_lora_(config.rank, config.scale, config.dropout)
    return names


def remove_adapters(model: nn.Module) -> None:
    """Turn adapted layers back into plain ones, in place; what A and B hold is dropped."""
    for _, layer in list(adapted_layers(model)):
        del layer.lora_A, layer.lora_B
        layer.__class__ = layer.plain  # type: ignore[assignment]


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """(name, layer) of every layer with an adapter, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer):
            yield name, module
