"""What PEFT calls the A and B of a layer, and in what shapes it has them: there and back.

It adapts modules, named in `target_modules`, and parameters, named in `target_parameters`. The
weights of experts are parameters, whose A and B of all experts are one matrix each:

    A (E, r, in)  as (E·r, in)    rows e·r … e·r + r − 1 are A[e]
    B (E, out, r) as (out, r·E)   columns e, E + e, 2E + e, … are B[e]

in and out are those of x Wᵀ, whichever way W lies. A parameter's wrapper takes the place of the
module that has it, and where two of one module are adapted, the first that the module has lies
within: its tensors begin `experts.base_layer.` and the other's `experts.`. The names of the weights
are in the settings alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from typing import Any, NamedTuple

from torch import Tensor, nn

from relora.errors import ConfigError
from relora.lora.config import OF_EXPERTS
from relora.lora.experts import WEIGHTS, Experts, TransposedExperts, name_experts
from relora.lora.layers import AdaptedLayer
from relora.lora.names import layer_of, names_of

# Modules of these names in a mixture are what PEFT takes for parts of its experts, as they were
# called in transformers 4. So there they are named by their weights.
TAKEN = {"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"}
WITHIN = ".base_layer"
# The first PEFT that has experts in the shapes above: (E, out, in) before 0.20, and (E, in, out) in
# 0.19, had in and out exchanged.
SINCE = "0.20.0"
NOT_HERE = "in PEFT merge it into its base (merge_and_unload) and load that, or train it without"


class PeftName(NamedTuple):
    """How PEFT knows a layer.

    Attributes:
        stem: what the names of its tensors begin with.
        target: what the settings call it.
        is_parameter: whether that is a parameter, and no module.
    """

    stem: str
    target: str
    is_parameter: bool


def peft_names(model: nn.Module, layers: Collection[str]) -> dict[str, PeftName]:
    """How PEFT knows the layers of these names, all that are adapted in a model."""
    name_experts(model)
    is_mixture = any(isinstance(module, Experts) for module in model.modules())
    return {name: _peft_name(name, layers, is_mixture) for name in layers}


def _peft_name(name: str, layers: Collection[str], is_mixture: bool) -> PeftName:
    if name.endswith(OF_EXPERTS):
        weight = names_of(name).weight
        owner, _, last = weight.rpartition(".")
        around = WEIGHTS[WEIGHTS.index(last) + 1 :]  # modules have them in this order
        depth = sum(f"{owner}.{other}{OF_EXPERTS}" in layers for other in around)
        return PeftName(owner + WITHIN * depth, weight, True)
    if is_mixture and name.rpartition(".")[2] in TAKEN:
        return PeftName(name, f"{name}.weight", True)
    return PeftName(name, name, False)


def names_from_peft(
    stems: Collection[str], settings: dict[str, Any], where: str
) -> dict[str, PeftName]:
    """How PEFT knows each layer that its tensors begin with the names of, by our names.

    Raises:
        ConfigError: it adapts parameters that have no adapters here, or experts in other shapes.
    """
    parameters = settings.get("target_parameters") or []
    for parameter in parameters:
        module, _, last = parameter.rpartition(".")
        if last not in WEIGHTS and not (last == "weight" and module.rpartition(".")[2] in TAKEN):
            raise ConfigError(
                f"{where}: target_parameters: {parameter} is no weight of experts, which end in "
                f"{', '.join(WEIGHTS)}; {NOT_HERE}"
            )
    found = {}
    for stem in stems:
        name = _from_peft(stem, stems, settings, where)
        found[layer_of(name.target) if name.is_parameter else name.target] = name
    version = settings.get("peft_version") or "0.17"  # which did not say so
    if any(name.endswith(OF_EXPERTS) for name in found) and _numbers(version) < _numbers(SINCE):
        raise ConfigError(
            f"{where}: experts, which PEFT {version} wrote in other shapes than since {SINCE}; "
            "there merge it into its base (merge_and_unload) and load that"
        )
    return found


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:2]]


def _from_peft(stem: str, stems: Collection[str], settings: dict[str, Any], where: str) -> PeftName:
    parameters = settings.get("target_parameters") or []
    owner = re.sub(rf"({re.escape(WITHIN)})+$", "", stem)
    if any(_ends_with(f"{owner}.weight", parameter) for parameter in parameters):
        return PeftName(stem, f"{owner}.weight", True)
    wrappers = sum(re.sub(rf"({re.escape(WITHIN)})+$", "", each) == owner for each in stems)
    modules = settings.get("target_modules") or []
    if isinstance(modules, str):
        is_module = re.fullmatch(modules, owner) is not None
    else:
        is_module = any(_ends_with(owner, module) for module in modules)
    held = [x for x in WEIGHTS if any(_ends_with(f"{owner}.{x}", name) for name in parameters)]
    if not held or (is_module and wrappers == 1):
        return PeftName(stem, stem, False)
    if len(held) != wrappers:
        raise ConfigError(
            f"{where}: {owner} has {wrappers} adapters, and target_parameters names "
            f"{', '.join(held)} of it; name those alone that are adapted"
        )
    depth = stem.count(WITHIN, len(owner))
    return PeftName(stem, f"{owner}.{held[-1 - depth]}", True)


def _ends_with(name: str, end: str) -> bool:
    return f".{name}".endswith(f".{end}")


def as_peft(name: PeftName, layer: Any, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """A and B of a layer, adapted or plain, by the names and in the shapes that PEFT has them in.

    Raises:
        ConfigError: a convolution that PEFT computes in another way, or a lone expert (1, in, out).
    """
    plain = layer.plain if isinstance(layer, AdaptedLayer) else type(layer)
    if issubclass(plain, nn.Embedding):
        return {f"{name.stem}.lora_embedding_A": a, f"{name.stem}.lora_embedding_B": b}
    if issubclass(plain, Experts):
        if issubclass(plain, TransposedExperts) and len(a) == 1:
            raise ConfigError(
                f"{name.target}: PEFT takes one expert alone for a matrix (out, in), and this is "
                "(in, out); leave it out of lora.targets, or export the merged model (--format hf)"
            )
        a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
    elif issubclass(plain, nn.Conv1d | nn.Conv2d):
        if layer.groups != 1 or set(layer.dilation) != {1} or layer.padding_mode != "zeros":
            raise ConfigError(
                f"{name.target}: PEFT computes convolutions with groups, dilation or a "
                "padding_mode in another way; leave it out of lora.targets"
            )
        kernel = layer.weight.shape[2:]
        inputs = a.shape[1] // math.prod(kernel)
        a, b = a.view(-1, inputs, *kernel), b.view(*b.shape, *[1] * len(kernel))
    return {f"{name.stem}.lora_A.weight": a, f"{name.stem}.lora_B.weight": b}


def from_peft(layer: str, a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B of a layer of this name as it has them, from PEFT's.

    Raises:
        ValueError: experts whose ranks do not add up.
    """
    if not layer.endswith(OF_EXPERTS):
        return a.flatten(1), b.flatten(1)
    if a.shape[0] % rank or b.shape[1] != a.shape[0]:
        raise ValueError(f"A {tuple(a.shape)} and B {tuple(b.shape)} are none of rank {rank}")
    b = b.view(b.shape[0], rank, -1).permute(2, 0, 1)
    return a.view(-1, rank, a.shape[1]), b.contiguous()
