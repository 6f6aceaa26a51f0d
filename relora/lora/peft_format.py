"""Adapters alone, as PEFT keeps them: a directory of adapter_config.json and
adapter_model.safetensors (huggingface/peft, `LoraConfig` and `get_peft_model_state_dict`).

What is written here loads in `peft.PeftModel.from_pretrained(base, directory)`, and what PEFT wrote
loads here, of linear layers, GPT-2's Conv1D, embeddings, convolutions without groups and weights of
experts. Several of them can lie in memory beside one base, and take turns: see `using_adapter`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from relora.errors import CheckpointError, ConfigError
from relora.files import making, read_json
from relora.lora.config import LoRAConfig
from relora.lora.experts import name_experts
from relora.lora.inject import add_adapters
from relora.lora.kinds import kind_of
from relora.lora.layers import adapted_layers
from relora.lora.peft_names import (
    NOT_HERE,
    SINCE,
    as_peft,
    from_peft,
    names_from_peft,
    peft_names,
)

SETTINGS, TENSORS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# What changes nothing of the function that A and B make, or is read below; any other key must be
# empty.
UNDERSTOOD = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "lora_alpha", "lora_dropout",
    "modules_to_save", "peft_type", "peft_version", "r", "rank_pattern", "revision",
    "target_modules", "target_parameters", "task_type", "use_rslora", "exclude_modules",
    "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size", "runtime_config",
}  # fmt: skip
# Beginnings that leave the base as it is; others (pissa, loftq, …) put a part of it into A and B.
TASKS = {"CausalLM": "CAUSAL_LM", "SequenceClassification": "SEQ_CLS"}  # by a class's last words
BEGINNINGS = ("gaussian", "orthogonal", "eva")


class AdapterWeights(NamedTuple):
    """The adapters of a model, apart from it.

    Attributes:
        factors: by layer's name, A and B as the layer has them: (r, in) and (out, r), of experts
            (E, r, in) and (E, out, r).
        scales: by layer's name, s.
        others: weights and biases that were trained in full and kept, by their own names.
        dropout: of what A reads, in training.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    scales: dict[str, float]
    others: dict[str, Tensor]
    dropout: float = 0.0


def adapter_of(model: nn.Module) -> AdapterWeights:
    """A copy of what a model's adapters are now.

    Raises:
        ConfigError: it has none, or blocks in their place, which no such format has.
    """
    layers = list(adapted_layers(model))
    if not layers:
        raise ConfigError("the model has no adapters; relora.add_adapters makes them")
    for name, layer in layers:
        if layer.has_blocks:
            raise ConfigError(
                f"{name}: blocks of W are no A and B, and adapters of PEFT's format are; export "
                "the merged model, or the difference to the beginning (--format delta)"
            )
    return AdapterWeights(
        {name: (_copy(layer.lora_A), _copy(layer.lora_B)) for name, layer in layers},
        {name: layer.scale for name, layer in layers},
        {},
        layers[0][1].lora_dropout,
    )


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def save_adapter(model: nn.Module, directory: Path | str, base: str | None = None) -> None:
    """Write a model's adapters, and nothing else of it, as a directory that PEFT loads.

    Args:
        base: what PEFT is to load the base from, if nobody tells it; the model's own name without.

    Raises:
        ConfigError: see `adapter_of`; or a convolution with groups, which PEFT's format does not
            have like this.
    """
    config = getattr(model, "config", None)
    name = base or getattr(config, "_name_or_path", "") or None
    adapter, task = adapter_of(model), TASKS.get(type(model).__name__.rpartition("For")[2])
    with making(Path(directory), replace=True) as temporary:
        write_adapter(adapter, model, temporary, name, task)


def write_adapter(
    adapter: AdapterWeights, model: nn.Module, directory: Path, base: str | None, task: str | None
) -> None:
    """The two files of `save_adapter`, of adapters that may be in no model.

    Args:
        model: what they are of, with adapters or without.
        directory: which exists.
        task: by which PEFT's AutoPeftModel finds the class of the base, of TASKS.
    """
    names = peft_names(model, adapter.factors)
    layers = {name: model.get_submodule(name) for name in names}
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in adapter.factors.items():
        for key, tensor in as_peft(names[name], layers[name], a, b).items():
            tensors[PREFIX + key] = tensor.detach().cpu().contiguous()
    ranks = {names[name].target: b.shape[-1] for name, (_, b) in adapter.factors.items()}
    # α = s·r, whatever the scaling was called.
    alphas = {x.target: adapter.scales[name] * ranks[x.target] for name, x in names.items()}
    rank, alpha = (max(set(x.values()), key=list(x.values()).count) for x in (ranks, alphas))
    parameters = [x.target for x in names.values() if x.is_parameter]
    settings = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if parameters else adapter.dropout,  # of parameters PEFT has none
        "target_modules": [x.target for x in names.values() if not x.is_parameter],
        "rank_pattern": {re.escape(name): r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(name): x for name, x in alphas.items() if x != alpha},
        "bias": "none",
        "fan_in_fan_out": any(isinstance(layer, Conv1D) for layer in layers.values()),
        "use_rslora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    if parameters:
        settings |= {"target_parameters": parameters, "peft_version": SINCE}
    save_file(tensors, directory / TENSORS, metadata={"format": "pt"})
    (directory / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf8")


def read_adapter(directory: Path | str) -> AdapterWeights:
    """What a directory of PEFT holds, for `load_adapter` and `using_adapter`.

    Raises:
        CheckpointError: a file is missing or damaged.
        ConfigError: it is of a kind that is not known here, such as DoRA.
    """
    directory = Path(directory)
    settings = read_json(directory / SETTINGS, CheckpointError)
    _check(settings, directory / SETTINGS)
    path = directory / TENSORS
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors has many
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            raise ConfigError(f"{path}: {key} is no tensor of PEFT's LoRA, which begin {PREFIX}")
        name = key.removeprefix(PREFIX)
        found = re.fullmatch(r"(.*)\.lora_(embedding_)?A(\.weight)?", name)
        if found:
            other = key.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
            if other not in tensors:
                raise CheckpointError(f"{path}: {key} has no {other} beside it")
            pairs[found[1]] = (tensor, tensors[other])
        elif not re.search(r"\.lora_(embedding_)?B(\.weight)?$", name):
            others[
                re.sub(r"\.(modules_to_save\.default|modules_to_save|base_layer)\.", ".", name)
            ] = tensor
    own = LoRAConfig(
        rank=settings["r"],
        alpha=settings["lora_alpha"],
        scaling="rslora" if settings.get("use_rslora") else "standard",
        rank_pattern=settings.get("rank_pattern") or {},
        alpha_pattern=settings.get("alpha_pattern") or {},
    )
    factors, scales = {}, {}
    for name, known in names_from_peft(pairs, settings, str(directory / SETTINGS)).items():
        size = own.for_layer(known.target)
        assert size.rank is not None
        try:
            factors[name] = from_peft(name, *pairs[known.stem], size.rank)
        except ValueError as error:
            raise CheckpointError(f"{path}: {known.stem}: {error}") from None
        scales[name] = size.scale
    return AdapterWeights(factors, scales, others, float(settings.get("lora_dropout") or 0.0))


def load_adapter(model: nn.Module, directory: Path | str) -> None:
    """Give a plain model the adapters that a directory holds, in place; they train from there.

    Raises:
        ConfigError, CheckpointError: see `read_adapter`; or the model has other layers.
    """
    adapter = read_adapter(directory)
    _check_fits(model, adapter, str(directory))
    ranks = {name: b.shape[-1] for name, (_, b) in adapter.factors.items()}
    alphas = {name: adapter.scales[name] * rank for name, rank in ranks.items()}
    config = LoRAConfig(
        rank=max(ranks.values()),
        dropout=adapter.dropout,
        targets=list(ranks),
        rank_pattern={re.escape(name): rank for name, rank in ranks.items()},
        alpha_pattern={re.escape(name): alpha for name, alpha in alphas.items()},
    )
    add_adapters(model, config, seed=None)
    _put(model, adapter, copied=True)
    with torch.no_grad():
        for name, value in adapter.others.items():
            model.get_parameter(name).copy_(value)


@contextmanager
def using_adapter(model: nn.Module, adapter: AdapterWeights) -> Iterator[nn.Module]:
    """Within it a model has these adapters in place of its own; nothing of the base is copied.

    For calls with one adapter or another, of whatever ranks, on one base in memory:

        model = …; relora.load_adapter(model, "first")
        second = relora.read_adapter("second")
        with relora.using_adapter(model, second):
            model(ids)

    Raises:
        ConfigError: they are of other layers than the model's own.
    """
    own = dict(adapted_layers(model))
    if own.keys() != adapter.factors.keys() or adapter.others:
        odd = sorted(own.keys() ^ adapter.factors.keys()) or sorted(adapter.others)
        raise ConfigError(
            f"using_adapter: {odd[0]} is not adapted in both; adapters that take turns are of the "
            "same layers, and keep no weights of others"
        )
    before = {name: (x.lora_A.data, x.lora_B.data, x.scale) for name, x in own.items()}
    _put(model, adapter, copied=False)
    try:
        yield model
    finally:
        for name, (a, b, scale) in before.items():
            own[name].lora_A.data, own[name].lora_B.data, own[name].scale = a, b, scale


def _put(model: nn.Module, adapter: AdapterWeights, copied: bool) -> None:
    for name, layer in adapted_layers(model):
        a, b = adapter.factors[name]
        layer.scale = adapter.scales[name]
        for own, value in ((layer.lora_A, a), (layer.lora_B, b)):
            moved = value.to(own.device, own.dtype)
            if copied:
                own.data.copy_(moved)
            else:
                own.data = moved


def _check(settings: dict[str, Any], path: Path) -> None:
    """Whether the adapters compute s·B·A·x and nothing else."""
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise ConfigError(f"{path}: peft_type is {kind}, and LORA is what can be loaded here")
    odd = {key: value for key, value in settings.items() if key not in UNDERSTOOD and value}
    if settings.get("bias", "none") != "none":
        odd["bias"] = settings["bias"]
    beginning = settings.get("init_lora_weights", True)
    if isinstance(beginning, str) and beginning not in BEGINNINGS:
        odd["init_lora_weights"] = beginning
    if odd:
        key, value = next(iter(odd.items()))
        raise ConfigError(
            f"{path}: {key}: {value} is more than A and B, and cannot be loaded here; {NOT_HERE}"
        )


def _check_fits(model: nn.Module, adapter: AdapterWeights, where: str) -> None:
    name_experts(model)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for name, (a, b) in adapter.factors.items():
        layer: Any = modules.get(name)
        if layer is None:
            raise ConfigError(f"{where}: the model has no layer {name}; it is of another model")
        kind = kind_of(layer)
        if kind is None:
            raise ConfigError(
                f"{where}: {name} is a {type(layer).__name__}, which has no adapters here; "
                f"{NOT_HERE}"
            )
        shape = kind.matrix(layer.weight).shape if layer.weight.numel() else None  # as by ZeRO 3
        if shape not in (None, (*b.shape[:-1], a.shape[-1])):
            raise ConfigError(
                f"{where}: A {tuple(a.shape)} and B {tuple(b.shape)} of {name} are of no matrix "
                f"{tuple(shape)}, which the model has; it is of another model"
            )
    for name in adapter.others:
        if name not in parameters:
            raise ConfigError(f"{where}: the model has no {name}; it is of another model")
