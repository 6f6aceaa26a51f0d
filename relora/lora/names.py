"""Names of layers and of their parameters, and which a layer has."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from relora.lora.config import OF_EXPERTS


class Names(NamedTuple):
    """Full names of an adapted layer's parameters."""

    weight: str
    a: str
    b: str


def names_of(layer: str) -> Names:
    """Names of the parameters of the adapted layer that has this name in its model."""
    owned = layer.endswith(OF_EXPERTS)
    weight = layer.removesuffix(OF_EXPERTS) if owned else f"{layer}.weight"
    return Names(weight, f"{layer}.lora_A", f"{layer}.lora_B")


def layer_of(weight: str) -> str:
    """Name of the layer that has, or could have, a parameter of this name as its weight."""
    owner, _, last = weight.rpartition(".")
    return owner if last == "weight" else weight + OF_EXPERTS


def bias_of(layer: Any) -> nn.Parameter | None:
    """A layer's bias, if it has one."""
    return getattr(layer, "bias", None)
