"""Which weights get adapters, which go on training in full, and why.

An adapter can go to what computes x Wᵀ + b by its own forward pass. Everything here follows from
the model's structure alone, so that planning, training, resuming and exporting choose alike.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from relora.errors import ConfigError
from relora.lora.config import LoRAConfig
from relora.lora.layers import AdaptedLayer, kind_of, names_of, parameter_roles

# Layers too small for the rank are left alone up to this share of all linear weights: gates and
# routers are far below it. Beyond it the rank is the mistake, and not the layer.
INCIDENTAL = 0.05
NAMED = 3  # so many layers are named where one reason holds for many


class Left(NamedTuple):
    """Weights that train in full, beside embeddings, norms, biases and the head."""

    why: str
    names: list[str]
    entries: int


def linear_layers(model: nn.Module) -> dict[str, Any]:
    """Every layer that can take an adapter, adapted or not, by name, in the model's order."""
    return {name: layer for name, layer in _linear(model) if _obstacle(model, name, layer) is None}


def find_targets(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Names of the layers that get adapters, in the model's order.

    Default: every linear layer but the output head, which is all projections of the attention and
    MLP blocks of Llama, GPT-2, GPT-NeoX and their like; what is too small for the rank and of no
    weight (a gate of one output) is left alone, see `left_in_full`.

    Raises:
        ConfigError: a target that matches no layer, or one that cannot take an adapter; a rank
            beyond a layer's smaller dimension; no layer at all.
    """
    linear = linear_layers(model)
    if config.targets is None:
        small = _too_small(linear, config)
        chosen = [name for name in linear if name not in small]
    else:
        chosen = [n for n in linear if any(_ends_with(n, target) for target in config.targets)]
        for target in config.targets:
            if not any(_ends_with(name, target) for name in linear):
                raise ConfigError(f"lora.targets: {target!r} {_why_no_target(model, target)}")
    if not chosen:
        raise ConfigError(
            f"lora: no layer of this {_called(model)} can take an adapter, so all of it "
            f"would train in full ({'; '.join(describe_left(model, config)) or 'no linear layer'}"
            "); set lora: null and relora: null, or take another model"
        )
    for name in chosen:
        smaller = min(_matrix_of(linear[name]).shape)
        if config.rank is None and not _fits(linear[name], config):
            raise ConfigError(
                f"lora.blocks: {name} {tuple(linear[name].weight.shape)} is {_uncut(config)}; take "
                "a number that divides the dimensions of all layers, or name lora.targets"
            )
        if config.rank is not None and config.rank > smaller:
            raise ConfigError(
                f"lora.rank: {config.rank} is beyond the smaller dimension of {name} "
                f"{tuple(linear[name].weight.shape)}; take at most {smaller}"
            )
    find_shared(model, chosen, config)
    return chosen


def find_shared(model: nn.Module, targets: Sequence[str], config: LoRAConfig) -> dict[str, str]:
    """For each layer that shares its A, the first of those that it shares it with.

    Args:
        targets: names of the layers that get adapters, or have them, in the model's order.

    Raises:
        ConfigError: a name in `share_a` that no such layer has; layers with other inputs.
    """
    inputs = {name: _matrix_of(model.get_submodule(name)).shape[1] for name in targets}
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
    linear = linear_layers(model)
    if config.targets is None:
        chosen = linear.keys() - _too_small(linear, config).keys()
    else:
        chosen = {n for n in linear if any(_ends_with(n, target) for target in config.targets)}
    layers, roles = dict(_linear(model)), parameter_roles(model)
    usual = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    usual |= {id(head.weight) for head in _heads(model) if isinstance(head.weight, Tensor)}
    found: dict[str, list[tuple[str, int]]] = {}
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        if parameter.ndim < 2 or id(parameter) in usual or roles[name] in ("A", "B"):
            continue
        is_weight = name == names_of(owner).weight
        if is_weight and owner in chosen:
            continue
        if is_weight and owner in layers:
            why = _obstacle(model, owner, layers[owner])
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


def _linear(model: nn.Module) -> list[tuple[str, Any]]:
    """(name, layer) of everything whose class has an adapted kind, but the output head."""
    heads = _heads(model)
    return [
        (name, layer)
        for name, layer in model.named_modules()
        if kind_of(layer) is not None and not any(layer is head for head in heads)
    ]


def _heads(model: nn.Module) -> list[Any]:
    """Output heads: as transformers says, else layers with as many outputs as an embedding rows."""
    if isinstance(model, PreTrainedModel):
        head = model.get_output_embeddings()
        return [] if getattr(head, "weight", None) is None else [head]
    rows = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}
    layers = [m for m in model.modules() if kind_of(m) is not None]
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
    """Why a linear layer can take no adapter at all; None if it can."""
    kind = kind_of(layer)
    if not isinstance(layer, AdaptedLayer) and not (kind and kind.fits(layer)):
        return f"a {type(layer).__name__}, which does not compute x Wᵀ + b"
    owner, _, last = name.rpartition(".")
    parent: Any = type(model.get_submodule(owner))
    if last in _read_directly(parent):
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


@functools.cache
def _read_directly(owner: Any) -> frozenset[str]:
    """Names of the layers whose weight a module's own code computes with.

    There an adapter would be passed by: `F.linear(x, self.out_proj.weight)` in
    nn.MultiheadAttention, `self.dt_proj.weight @ x` in Mamba.
    """
    found: set[str] = set()
    for kind in owner.__mro__:
        if kind in (nn.Module, PreTrainedModel) or not issubclass(kind, nn.Module):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
        except (OSError, TypeError, SyntaxError):  # made at run time
            continue
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef) and function.name not in _SETTING_UP:
                found |= _weights_computed_with(function)
    return frozenset(found)


_SETTING_UP = ("__init__", "_init_weights", "init_weights", "reset_parameters", "extra_repr")


def _weights_computed_with(function: ast.FunctionDef) -> set[str]:
    """x of every `self.x.weight` that is more than looked at for its dtype, device or shape."""
    parents = {child: node for node in ast.walk(function) for child in ast.iter_child_nodes(node)}
    found = set()
    for node in ast.walk(function):
        if not isinstance(node, ast.Attribute) or node.attr != "weight":
            continue
        layer, parent = node.value, parents.get(node)
        if not isinstance(layer, ast.Attribute) or not isinstance(layer.value, ast.Name):
            continue
        asked = isinstance(parent, ast.Attribute) and parent.attr in ("dtype", "device", "shape")
        tested = isinstance(parent, ast.Call) and ast.unparse(parent.func) in (
            "isinstance",
            "hasattr",
        )
        if layer.value.id == "self" and not asked and not tested:
            found.add(layer.attr)
    return found


def _fits(layer: Any, config: LoRAConfig) -> bool:
    """Whether a layer can take adapters of the size that is asked for."""
    shape = _matrix_of(layer).shape
    if config.rank is not None:
        return min(shape) >= config.rank
    return all(size % (config.blocks or 1) == 0 for size in shape)


def _uncut(config: LoRAConfig) -> str:
    return f"not cut into {config.blocks} bands of equal rows and columns"


def _too_small(linear: dict[str, Any], config: LoRAConfig) -> dict[str, Any]:
    """Layers that cannot take adapters of a size, if they are of no weight together; else none."""
    small = {name: layer for name, layer in linear.items() if not _fits(layer, config)}
    total = sum(layer.weight.numel() for layer in linear.values())
    if sum(layer.weight.numel() for layer in small.values()) > INCIDENTAL * total:
        return {}
    return small


def _why_no_target(model: nn.Module, target: str) -> str:
    for name, layer in _linear(model):
        if _ends_with(name, target):
            return f"({name}) can take no adapter: {_obstacle(model, name, layer)}"
    known = sorted({name.rpartition(".")[2] for name in linear_layers(model)})
    return f"matches no linear layer of this model; it has: {', '.join(known)}"


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
