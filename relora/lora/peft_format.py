"""Adapters alone, as PEFT keeps them: a directory of adapter_config.json and
adapter_model.safetensors (huggingface/peft, `LoraConfig` and `get_peft_model_state_dict`).

What is written here loads in `peft.PeftModel.from_pretrained(base, directory)`, and what PEFT wrote
loads here, of linear layers, GPT-2's Conv1D, embeddings and convolutions without groups. Several of
them can lie in memory beside one base, and take turns: see `using_adapter`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from relora.errors import CheckpointError, ConfigError
from relora.files import making, read_json
from relora.lora.config import OF_EXPERTS, LoRAConfig
from relora.lora.inject import add_adapters
from relora.lora.layers import AdaptedLayer, adapted_layers

SETTINGS, TENSORS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# What changes nothing of the function that A and B make, or is read below; any other key must be
# empty.
UNDERSTOOD = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "lora_alpha", "lora_dropout",
    "modules_to_save", "peft_type", "peft_version", "r", "rank_pattern", "revision",
    "target_modules", "task_type", "use_rslora", "exclude_modules", "layers_to_transform",
    "layers_pattern", "megatron_core", "qalora_group_size", "runtime_config",
}  # fmt: skip
# Beginnings that leave the base as it is; others (pissa, loftq, …) put a part of it into A and B.
TASKS = {"CausalLM": "CAUSAL_LM", "SequenceClassification": "SEQ_CLS"}  # by a class's last words
BEGINNINGS = ("gaussian", "orthogonal", "eva")


class AdapterWeights(NamedTuple):
    """The adapters of a model, apart from it.

    Attributes:
        factors: by layer's name, A and B as the layer has them: (r, in) and (out, r).
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
        ConfigError: see `adapter_of`; or a convolution with groups, or experts, which PEFT's
            format does not have like this.
    """
    config = getattr(model, "config", None)
    name = base or getattr(config, "_name_or_path", "") or None
    kinds = dict(adapted_layers(model))
    adapter, task = adapter_of(model), TASKS.get(type(model).__name__.rpartition("For")[2])
    with making(Path(directory), replace=True) as temporary:
        write_adapter(adapter, kinds, temporary, name, task)


def write_adapter(
    adapter: AdapterWeights,
    layers: Mapping[str, Any],
    directory: Path,
    base: str | None,
    task: str | None,
) -> None:
    """The two files of `save_adapter`, of adapters that may be in no model.

    Args:
        layers: by name, those that they are of, adapted or plain.
        directory: which exists.
        task: by which PEFT's AutoPeftModel finds the class of the base, of TASKS.
    """
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in adapter.factors.items():
        for key, tensor in zip(*_as_peft(name, layers[name], a, b), strict=True):
            tensors[PREFIX + key] = tensor.detach().cpu().contiguous()
    ranks = {name: b.shape[-1] for name, (_, b) in adapter.factors.items()}
    # α = s·r, whatever the scaling was called.
    alphas = {name: adapter.scales[name] * rank for name, rank in ranks.items()}
    rank, alpha = (max(set(x.values()), key=list(x.values()).count) for x in (ranks, alphas))
    transposed = any("Conv1D" in _plain(layer).__name__ for layer in layers.values())
    settings = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": list(ranks),
        "rank_pattern": {re.escape(name): r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(name): x for name, x in alphas.items() if x != alpha},
        "bias": "none",
        "fan_in_fan_out": transposed,
        "use_rslora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
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
    factors: dict[str, tuple[Tensor, Tensor]] = {}
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
            factors[found[1]] = (tensor, tensors[other])
        elif not re.search(r"\.lora_(embedding_)?B(\.weight)?$", name):
            others[
                re.sub(r"\.(modules_to_save\.default|modules_to_save|base_layer)\.", ".", name)
            ] = tensor
    flat = {name: (a.flatten(1), b.flatten(1)) for name, (a, b) in factors.items()}
    own = LoRAConfig(
        rank=settings["r"],
        alpha=settings["lora_alpha"],
        scaling="rslora" if settings.get("use_rslora") else "standard",
        rank_pattern=settings.get("rank_pattern") or {},
        alpha_pattern=settings.get("alpha_pattern") or {},
    )
    scales = {name: own.for_layer(name).scale for name in flat}
    return AdapterWeights(flat, scales, others, float(settings.get("lora_dropout") or 0.0))


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
            f"{path}: {key}: {value} is more than A and B, and cannot be loaded here; in PEFT "
            "merge it into its base (merge_and_unload) and load that, or train it without"
        )


def _check_fits(model: nn.Module, adapter: AdapterWeights, where: str) -> None:
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for name in adapter.factors:
        if name not in modules:
            raise ConfigError(f"{where}: the model has no layer {name}; it is of another model")
    for name in adapter.others:
        if name not in parameters:
            raise ConfigError(f"{where}: the model has no {name}; it is of another model")


def refuse_experts(layers: Iterable[str]) -> None:
    """Whether layers of these names can be written.

    Raises:
        ConfigError: one is the experts of a mixture.
    """
    for name in layers:
        if name.endswith(OF_EXPERTS):
            raise ConfigError(
                f"{name.removesuffix(OF_EXPERTS)}: adapters of experts are beyond what is written "
                "for PEFT; export the merged model (--format hf), or leave experts out of "
                "lora.targets"
            )


def _plain(layer: Any) -> type[nn.Module]:
    return layer.plain if isinstance(layer, AdaptedLayer) else type(layer)


def _as_peft(name: str, layer: Any, a: Tensor, b: Tensor) -> tuple[list[str], list[Tensor]]:
    """The names and shapes that PEFT has A and B of a layer under."""
    refuse_experts([name])
    plain = _plain(layer)
    if issubclass(plain, nn.Embedding):
        return [f"{name}.lora_embedding_A", f"{name}.lora_embedding_B"], [a, b]
    keys = [f"{name}.lora_A.weight", f"{name}.lora_B.weight"]
    if not issubclass(plain, nn.Conv1d | nn.Conv2d):
        return keys, [a, b]
    if layer.groups != 1 or set(layer.dilation) != {1} or layer.padding_mode != "zeros":
        raise ConfigError(
            f"{name}: PEFT computes convolutions with groups, dilation or a padding_mode in "
            "another way; leave it out of lora.targets"
        )
    kernel = layer.weight.shape[2:]
    inputs = a.shape[1] // math.prod(kernel)
    ones = [1] * len(kernel)
    return keys, [a.view(a.shape[0], inputs, *kernel), b.view(*b.shape, *ones)]
