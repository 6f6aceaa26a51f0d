"""Which weights get adapters, which go on training in full, and why.

By default an adapter goes to what computes x Wᵀ + b by its own forward pass and to the weights of
experts, and to an embedding or a convolution where it is named. Everything here follows from the
model's structure alone, so that planning, training, resuming and exporting choose alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from relora.errors import ConfigError
from relora.lora.config import OF_EXPERTS, LoRAConfig, pattern_matches
from relora.lora.experts import Experts, name_experts
from relora.lora.kinds import kind_of, linear_kind_of
from relora.lora.layers import AdaptedLayer, parameter_roles
from relora.lora.names import layer_of
from relora.lora.probe import read_directly

# Layers too small for the rank are left alone up to this share of all linear weights: gates and
# routers are far below it. Beyond it the rank is the mistake, and not the layer.
INCIDENTAL = 0.05
NAMED = 3  # so many layers are named where one reason holds for many


class Left(NamedTuple):
    """Weights that train in full, beside embeddings, norms, biases and the head."""

    why: str
    names: list[str]
    entries: int


def projections(model: nn.Module) -> dict[str, Any]:
    """Every projection that can take an adapter or has one, linear layers and weights of experts,
    by name, in the model's order."""
    return _able(model, None)


def _able(model: nn.Module, config: LoRAConfig | None) -> dict[str, Any]:
    """Every layer that can take an adapter; by default, or where a config names targets too."""
    named = config is not None and config.targets is not None
    return {
        name: layer
        for name, layer in _of_a_kind(model)
        if (named or _is_projection(layer))
        and _obstacle(model, name, layer) is None
        and (named or config is None or _lacks(layer, config) is None)
    }


def _is_projection(layer: nn.Module) -> bool:
    return linear_kind_of(layer) is not None or isinstance(layer, Experts)


def find_targets(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Names of the layers that get adapters, in the model's order.

    Default: every linear layer but the output head, and the weights of experts, which is all
    projections of the attention and MLP blocks of Llama, GPT-2, GPT-NeoX, Mixtral and their like;
    what is too small for the rank and of no weight (a gate of one output) is left alone, see
    `left_in_full`. Embeddings and convolutions are taken where they are named.

    Raises:
        ConfigError: a target that matches no layer, or one that cannot take an adapter; a rank
            beyond a layer's smaller dimension; a pattern that matches no layer; what embeddings
            and convolutions do not have; no layer at all.
    """
    able = _able(model, config)
    if config.targets is None:
        small = _too_small(able, config)
        chosen = [name for name in able if name not in small]
    else:
        chosen = [n for n in able if any(_ends_with(n, target) for target in config.targets)]
        for target in config.targets:
            if not any(_ends_with(name, target) for name in able):
                raise ConfigError(f"lora.targets: {target!r} {_why_no_target(model, target)}")
    if not chosen:
        raise ConfigError(
            f"lora: no layer of this {_called(model)} can take an adapter, so all of it "
            f"would train in full ({'; '.join(describe_left(model, config)) or 'no linear layer'}"
            "); set lora: null and relora: null, or take another model"
        )
    for name in chosen:
        if linear_kind_of(able[name]) is None:
            _check_other(name, able[name], config)
        _check_size(name, able[name], config)
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, key):
            if not any(pattern_matches(pattern, name) for name in chosen):
                raise ConfigError(
                    f"lora.{key}: {pattern!r} matches no adapted layer; their names end in: "
                    f"{', '.join(sorted({name.rpartition('.')[2] for name in chosen}))}"
                )
    find_shared(model, chosen, config)
    return chosen


def _check_size(name: str, layer: Any, config: LoRAConfig) -> None:
    rank, smaller = config.for_layer(name).rank, min(_matrix_of(layer).shape[-2:])
    if rank is None and not _fits(name, layer, config):
        raise ConfigError(
            f"lora.blocks: {name} {tuple(layer.weight.shape)} is {_uncut(config)}; take "
            "a number that divides the dimensions of all layers, or name lora.targets"
        )
    if rank is not None and rank > smaller:
        key = "rank" if rank == config.rank else "rank_pattern"
        raise ConfigError(
            f"lora.{key}: {rank} is beyond the smaller dimension of {name} "
            f"{tuple(layer.weight.shape)}; take at most {smaller}"
        )


def _check_other(name: str, layer: Any, config: LoRAConfig) -> None:
    lacked = _lacks(layer, config)
    if lacked:
        key, usual = lacked
        kind: Any = kind_of(layer)
        raise ConfigError(
            f"lora.{key}: {getattr(config, key)} is of linear layers alone, and {name} is one "
            f"of {kind.noun}; take {usual}, or {name} out of lora.targets"
        )


def _lacks(layer: Any, config: LoRAConfig) -> tuple[str, str] | None:
    """A key whose setting only linear layers know, if this is none; and what it usually is."""
    if linear_kind_of(layer) is not None:
        return None
    experts = isinstance(layer, Experts)
    for key, wanted, usual in (
        ("blocks", config.blocks is not None, "a rank"),
        ("graph", config.graph == "effective" and not experts, "auto"),
        ("base", config.base is not None, "null"),
        ("dropout", config.dropout > 0 and experts, "0"),
    ):
        if wanted:
            return key, usual
    return None


def find_shared(model: nn.Module, targets: Sequence[str], config: LoRAConfig) -> dict[str, str]:
    """For each layer that shares its A, the first of those that it shares it with.

    Args:
        targets: names of the layers that get adapters, or have them, in the model's order.

    Raises:
        ConfigError: a name in `share_a` that no such layer has; layers with other inputs.
    """
    inputs = {name: _matrix_of(model.get_submodule(name)).shape[-1] for name in targets}
    found: dict[str, str] = {}
    for group in config.share_a or ():
        for last in group:
            if not any(name.rpartition(".")[2] == last for name in inputs):
                raise ConfigError(
                    f"lora.share_a: {last!r} is the last part of no adapted layer's name; there "
                    f"are: {', '.join(sorted({name.rpartition('.')[2] for name in inputs}))}"
                )
        first: dict[str, str] = {}
        for name, size in inputs.items():
            owner, _, last = name.rpartition(".")
            if last not in group:
                continue
            found[name] = first.setdefault(owner, name)
            if size != inputs[found[name]]:
                raise ConfigError(
                    f"lora.share_a: {name} has {size} inputs and {found[name]} "
                    f"{inputs[found[name]]}, so they cannot have the same A; take one of them out"
                )
    return found


def left_in_full(model: nn.Module, config: LoRAConfig) -> list[Left]:
    """Matrices that train in full although they are no embedding and no head, by reason.

    Args:
        model: with or without its adapters.
    """
    able = _able(model, config)
    if config.targets is None:
        chosen = able.keys() - _too_small(able, config).keys()
    else:
        chosen = {n for n in able if any(_ends_with(n, target) for target in config.targets)}
    layers = {name: x for name, x in _of_a_kind(model) if _is_projection(x)}
    roles = parameter_roles(model)
    usual = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    usual |= {id(head.weight) for head in _heads(model) if isinstance(head.weight, Tensor)}
    found: dict[str, list[tuple[str, int]]] = {}
    for name, parameter in model.named_parameters():
        owner = layer_of(name)
        if parameter.ndim < 2 or id(parameter) in usual or roles[name] in ("A", "B"):
            continue
        if owner in chosen:
            continue
        if owner in layers:
            why = _obstacle(model, owner, layers[owner])
            if config.targets is None:
                lacked = _lacks(layers[owner], config)
                why = why or (lacked and f"weights of experts have no lora.{lacked[0]}")
            if why is None and config.targets is not None:
                why = "not among lora.targets"
            why = why or (f"smaller than rank {config.rank}" if config.rank else _uncut(config))
        elif parameter.ndim > 2:
            why = f"{parameter.ndim}-dimensional, such as experts in one tensor or convolutions"
        else:
            why = "not the weight of a linear layer"
        found.setdefault(why, []).append((name, parameter.numel()))
    return [
        Left(why, [name for name, _ in rows], sum(n for _, n in rows))
        for why, rows in found.items()
    ]


def describe_left(model: nn.Module, config: LoRAConfig) -> list[str]:
    """One line for each reason why weights train in full, with their share of all parameters."""
    roles = parameter_roles(model)
    total = sum(p.numel() for n, p in model.named_parameters() if roles[n] not in ("A", "B"))
    lines = []
    for why, names, entries in left_in_full(model, config):
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        share = f"{entries / total:.1%}" if entries >= 0.001 * total else "under 0.1%"
        lines.append(
            f"{share} of the model trains in full without adapters: {', '.join(names[:NAMED])}"
            f"{more} ({why})"
        )
    return lines


def _of_a_kind(model: nn.Module) -> list[tuple[str, Any]]:
    """(name, layer) of everything whose class has an adapted kind, but the output head."""
    name_experts(model)
    heads = _heads(model)
    return [
        (name, layer)
        for name, layer in model.named_modules()
        if kind_of(layer) is not None and not any(layer is head for head in heads)
    ]


def _heads(model: nn.Module) -> list[Any]:
    """Output heads: as transformers says, or, as of classifiers, the linear layers outside its base
    model; else layers with as many outputs as an embedding rows."""
    if isinstance(model, PreTrainedModel):
        head = model.get_output_embeddings()
        if head is None:
            inside = {id(module) for module in model.base_model.modules()}
            outside = (m for m in model.modules() if id(m) not in inside)
            return [module for module in outside if linear_kind_of(module) is not None]
        return [] if getattr(head, "weight", None) is None else [head]
    rows = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}
    layers = [m for m in model.modules() if linear_kind_of(m) is not None]
    return [layer for layer in layers if _matrix_of(layer).shape[0] in rows]


def embeddings_and_heads(model: nn.Module) -> set[int]:
    """By id, the weights of embeddings and output heads: a row of theirs is a token or a place."""
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    return {id(layer.weight) for layer in (*tables, *_heads(model))}


def _matrix_of(layer: Any) -> Tensor:
    kind = kind_of(layer)
    assert kind is not None
    return kind.matrix(layer.weight)


def _called(model: nn.Module) -> str:
    return str(
        model.config.model_type if isinstance(model, PreTrainedModel) else type(model).__name__
    )


def _obstacle(model: nn.Module, name: str, layer: Any) -> str | None:
    """Why a layer of some kind can take no adapter at all; None if it can."""
    kind = kind_of(layer)
    assert kind is not None
    if not isinstance(layer, AdaptedLayer) and not kind.fits(layer):
        return f"a {type(layer).__name__}, which does not compute {kind.computes}"
    if not isinstance(layer, Experts) and "weight" not in layer._parameters:
        return "its weight is made of other parameters"
    owner, _, last = name.rpartition(".")
    parent: Any = type(model.get_submodule(owner))
    if last in read_directly(parent):
        return f"its weight is read by {parent.__name__} itself"
    if _uses(model)[id(layer.weight)] > 1:
        return "its weight is shared with another module"
    return None


def _uses(model: nn.Module) -> Counter[int]:
    """How many modules hold each parameter."""
    return Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
    )


def _fits(name: str, layer: Any, config: LoRAConfig) -> bool:
    """Whether a layer can take adapters of the size that is asked for."""
    shape, rank = _matrix_of(layer).shape[-2:], config.for_layer(name).rank
    if rank is not None:
        return min(shape) >= rank
    return all(size % (config.blocks or 1) == 0 for size in shape)


def _uncut(config: LoRAConfig) -> str:
    return f"not cut into {config.blocks} bands of equal rows and columns"


def _too_small(linear: dict[str, Any], config: LoRAConfig) -> dict[str, Any]:
    """Layers that cannot take adapters of a size, if they are of no weight together; else none."""
    small = {name: layer for name, layer in linear.items() if not _fits(name, layer, config)}
    total = sum(layer.weight.numel() for layer in linear.values())
    if sum(layer.weight.numel() for layer in small.values()) > INCIDENTAL * total:
        return {}
    return small


def _why_no_target(model: nn.Module, target: str) -> str:
    for name, layer in _of_a_kind(model):
        if _ends_with(name, target):
            return f"({name}) can take no adapter: {_obstacle(model, name, layer)}"
    if any(_ends_with(n, target) for n, m in model.named_modules() if m in _heads(model)):
        return "is the output head, which trains in full"
    known = sorted({name.rpartition(".")[2] for name in projections(model)})
    known = [name.removesuffix(OF_EXPERTS) for name in known]
    return f"matches no linear layer of this model; it has: {', '.join(known)}"


def _ends_with(name: str, target: str) -> bool:
    return f".{name.removesuffix(OF_EXPERTS)}".endswith(f".{target.removesuffix(OF_EXPERTS)}")
