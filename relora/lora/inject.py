"""Turn the chosen layers into their adapted class, and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from relora.errors import ConfigError
from relora.lora.choose import embeddings_and_heads, find_shared, find_targets
from relora.lora.config import GROUPS, UNDECAYED, LoRAConfig
from relora.lora.draws import draw_a
from relora.lora.kinds import kind_of
from relora.lora.layers import (
    AdaptedLayer,
    adapted_class,
    adapted_layers,
    parameter_roles,
)
from relora.lora.names import bias_of, names_of
from relora.lora.quantised import Kind


class _Before(NamedTuple):
    """What an adapted layer was before a merge that can be taken back."""

    kind: type[nn.Module]
    weight: Tensor  # in host memory
    a: nn.Parameter
    b: nn.Parameter
    quantised: Kind | None


def add_adapters(
    model: nn.Module,
    config: LoRAConfig,
    seed: int | None = 0,
    tokens: int | None = None,
    micro_batches: int = 1,
) -> list[str]:
    """Turn the targets into adapted layers, in place; returns their names.

    Their weights are frozen, with `bias: none` their biases too; embeddings, norms and the head go
    on training in full. B is zero, so no output changes.

    Args:
        model: any module; of one of transformers the output head is known, of others it is what
            has as many outputs as an embedding has rows.
        seed: keys the draw of A, with the layer's name; None leaves A undrawn, for whoever fills
            it with something else, or has a model without numbers.
        tokens: of a micro-batch, by which `lora.graph: auto` chooses; None for many.
        micro_batches: of a step.

    Raises:
        ConfigError: see `find_targets`; or weights are cut up among ranks already, or merged
            adapters are kept here.
    """
    empty = next((name for name, param in model.named_parameters() if not param.numel()), None)
    if empty:
        raise ConfigError(
            f"lora: {empty} has no entries here, as where DeepSpeed's ZeRO 3 cut the model up when "
            "it was made; make model and adapters first, and then what knows of ZeRO "
            "(TrainingArguments, an engine)"
        )
    if any(True for _ in _kept(model)):
        raise ConfigError(
            "add_adapters: this model has merged adapters that it keeps; call unmerge_adapters "
            "first, or merge them without keep"
        )
    names = find_targets(model, config)
    for name in names:
        _adapt(name, model.get_submodule(name), config, tokens, micro_batches)
    adapted: Any = {name: model.get_submodule(name) for name in names}
    for name, first in find_shared(model, names, config).items():
        adapted[name].shared_a = names_of(first).a
    if seed is not None:
        for name, layer in adapted.items():
            key = layer.shared_a or names_of(name).a
            with torch.no_grad():
                layer.lora_A.copy_(draw_a(layer.lora_A.shape, seed, 0, key, layer.fan_in))
    return names


def _adapt(
    name: str, layer: nn.Module, config: LoRAConfig, tokens: int | None, micro_batches: int
) -> None:
    """Turn one layer into an adapted one, whose A is not drawn yet."""
    # The object stays what it is to its parent, to hooks and to shared weights; it gains a forward
    # and two parameters.
    kind: Any = kind_of(layer)
    plain: Any = type(layer)
    layer.__class__ = adapted_class(kind, plain)
    assert isinstance(layer, AdaptedLayer)
    if config.blocks is not None:
        layer.add_blocks_(config.blocks)
    else:
        own = config.for_layer(name)
        assert own.rank is not None
        layer.add_lora_(own.rank, own.scale, own.dropout, own.train == "both")
    bias = bias_of(layer)
    if config.bias == "none" and bias is not None:
        bias.requires_grad_(False)
    keep = config.keep_effective
    if keep is None and config.base:
        keep = False  # half precision for the whole step, which it is there to avoid
    if layer.is_linear:  # others have one graph
        layer.choose_graph_(config.graph, keep, tokens, micro_batches)


def quantise_base(model: nn.Module, kind: Kind) -> None:
    """Let products read one byte an entry (`int8`, `fp8`) or half of one (`nf4`) in place of the
    weights that adapters freeze, in place.

    Those go to host memory in fp32, under their own names: merges, checkpoints and `merge_adapters`
    are as exact as without. Call it when the model has its device, its dtype and its DeepSpeed or
    DistributedDataParallel, and before `EngineState`.

    Raises:
        ConfigError: an adapted layer is no linear one; the weights are not whole here, as under
            ZeRO 3.
    """
    for name, layer in adapted_layers(model):
        if not layer.is_linear:
            raise ConfigError(
                f"{name}: weights of linear layers alone can be quantised, and it is one of "
                f"{layer.noun}; take it out of lora.targets, or lora.base: null"
            )
        if not layer.weight.numel():
            raise ConfigError(
                f"{name}: its weight is partitioned over ranks (ZeRO 3), and whole ones are "
                "quantised; take ZeRO 0, 1 or 2"
            )
    for _, layer in adapted_layers(model):
        layer.quantise_(kind)


def remove_adapters(model: nn.Module) -> None:
    """Turn adapted layers back into plain ones, in place; what A and B hold is dropped."""
    for _, layer in list(adapted_layers(model)):
        layer.unquantise_()
        layer.take_off_()


@torch.no_grad()
def merge_adapters(model: nn.Module, keep: bool = False) -> None:
    """Put d·W + s·B·A in place of every adapted W and take the adapters off, in place.

    The plain model computes what the adapted one did, up to the rounding of its weights' dtype,
    and all of it is trainable.

    Args:
        keep: the base weights, in host memory, and the adapters, for `unmerge_adapters`; the merged
            weights do not train. For inference at the plain model's cost, and back.

    Raises:
        ValueError: the weights are not whole here, as under ZeRO 3.
    """
    for name, layer in adapted_layers(model):
        if not layer.weight.numel():
            raise ValueError(
                f"{name}: its weight is partitioned over ranks (ZeRO 3); gather the model first, "
                "or merge in place with merge_and_restart"
            )
    for _, layer in list(adapted_layers(model)):
        a = layer.lora_A.to(layer.lora_B.dtype)  # where it does not train it lies as W does
        exact = layer.weight.to(a.device).float()
        if keep:
            base = layer.weight.detach().to("cpu", copy=True)
            codes = layer.quantised.kind if layer.quantised else None
            layer.before_merge = _Before(type(layer), base, layer.lora_A, layer.lora_B, codes)
        layer.unquantise_()
        layer.weight.copy_(layer.merged(exact, a, layer.lora_B))
        layer.weight.requires_grad_(not keep)
        bias = bias_of(layer)
        if bias is not None and not keep:
            bias.requires_grad_(True)
    remove_adapters(model)


@torch.no_grad()
def unmerge_adapters(model: nn.Module) -> None:
    """Take back `merge_adapters(model, keep=True)`, in place: the base weights bit for bit, and the
    same adapters, on the device where the model is now.

    Raises:
        ValueError: nothing was merged so.
    """
    layers = list(_kept(model))
    if not layers:
        raise ValueError("unmerge_adapters: nothing is kept; merge_adapters(model, keep=True) does")
    for layer in layers:
        kept, layer.before_merge = layer.before_merge, None
        layer.__class__ = kept.kind
        layer.put_on_()
        layer.lora_A, layer.lora_B = kept.a, kept.b
        for factor in (kept.a, kept.b):
            factor.data = factor.data.to(layer.weight.device)
        layer.weight.requires_grad_(False)
        if kept.quantised:
            layer.quantise_(kept.quantised)
        layer.weight.copy_(kept.weight)
        layer.requantise_()


def _kept(model: nn.Module) -> Iterator[Any]:
    """Plain layers that were adapted until a merge that can be taken back."""
    return (
        module for module in model.modules() if getattr(module, "before_merge", None) is not None
    )


def parameter_groups(
    model: nn.Module, weight_decay: float = 0.0, merged_decay: bool = False
) -> list[dict[str, object]]:
    """Trainable parameters for a torch optimizer, by what has a learning rate of its own.

    Adapters need groups of their own: under ZeRO, Adam's step count is one per group.

    Args:
        weight_decay: of all but norms and biases, which have none.
        merged_decay: weight decay is that of W + s·B·A, so of A and B only B decays.

    Returns:
        Groups with `params`, `name` (of GROUPS) and `weight_decay`, none of them empty.
    """
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
    roles = parameter_roles(model)
    tables = embeddings_and_heads(model)
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        if roles[name] == "A" and merged_decay:
            group = "undecayed adapters"
        elif roles[name] in ("A", "B"):
            group = "adapters"
        elif param.ndim < 2:
            group = "norms and biases"
        else:
            group = "embeddings" if id(param) in tables else "matrices"
        groups[group].append(param)
    return [
        {
            "params": params,
            "name": name,
            "weight_decay": 0.0 if name in UNDECAYED else weight_decay,
        }
        for name, params in groups.items()
        if params
    ]
