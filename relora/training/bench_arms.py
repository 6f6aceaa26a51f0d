"""The ways to train one model that `relora bench` sets beside each other."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from relora.config import Config
from relora.engine.codec import store_base_
from relora.engine.precision import dtype_of, precision_of
from relora.lora.choose import find_targets
from relora.lora.layers import LoRALinear, adapted_layers, parameter_roles
from relora.model import build_model, load_model_config
from relora.plan.estimate import full_rank_twin
from relora.training.start import equip

DESCRIPTIONS = {
    "full": "full rank as people run it: transformers' own blocks and loss",
    "full_lean": "full rank with this config's lean blocks and chunked loss",
    "published": "the paper's layer, x Wᵀ + s·(drop(x) Aᵀ) Bᵀ by plain operations, else full",
    "peft": "the peft library's layer, else full",
    "relora": "this config",
    "frozen_a": "the same with lora.train: b (as the two before, where the config has a rank)",
}


class Variant(NamedTuple):
    """A way to train the config's model."""

    config: Config
    adapters: bool
    prepare: Callable[[Any], None] = lambda model: None  # what its config does not say
    merges: bool = False  # as the config says


def variants(config: Config) -> dict[str, Variant]:
    """Those of `DESCRIPTIONS` that a config can be compared with here, by name."""
    plain = config.model.model_copy(update={"lean": False, "loss_chunk": None})
    plain = plain.model_copy(update={"half_residual": False})
    lean_full = full_rank_twin(config)
    full = lean_full.model_copy(update={"model": plain})
    found = {"full": Variant(full, False), "full_lean": Variant(lean_full, False)}
    if config.lora is None:
        return found
    has_rank = config.lora.blocks is None
    if has_rank:
        as_it_was = {"graph": "low_rank", "keep_effective": None, "base": None}
        as_it_was |= {"train": "both", "share_a": None}
        low_rank = config.lora.model_copy(update=as_it_was)
        published = config.model_copy(update={"model": plain, "lora": low_rank})
        found["published"] = Variant(published, True, _as_published)
    if has_rank and find_spec("peft"):
        found["peft"] = Variant(full, False, lambda model: _adapt_by_peft(model, config))
    found["relora"] = Variant(config, True, merges=config.relora is not None)
    if has_rank and config.lora.train == "both":
        only_b = config.lora.model_copy(update={"train": "b"})
        found["frozen_a"] = found["relora"]._replace(
            config=config.model_copy(update={"lora": only_b})
        )
    return found


def blocks_alone(config: Config, blocks: int, directory: Path) -> Config:
    """The config with so many blocks of its model and next to no vocabulary.

    Args:
        directory: where the model's JSON goes.
    """
    structure = load_model_config(config.model)
    layers = structure.num_hidden_layers
    for key, value in list(vars(structure).items()):
        if isinstance(value, list) and len(value) == layers:  # of each layer
            setattr(structure, key, (value * blocks)[:blocks])
    structure.num_hidden_layers, structure.vocab_size = blocks, 128
    path = directory / "blocks.json"
    structure.to_json_file(path, use_diff=False)
    model = config.model.model_copy(update={"config": path, "pretrained": None})
    return config.model_copy(update={"model": model})


def build_variant(variant: Variant) -> Any:
    """Its model in the middle of a cycle: B is not zero."""
    config = variant.config
    model: Any = build_model(config.model, config.seed)
    equip(model, config, variant.adapters)
    variant.prepare(model)
    roles = parameter_roles(model)
    for name, param in model.named_parameters():
        if roles[name] == "B" or "_B." in name:  # peft's
            nn.init.normal_(param, std=0.01)
    store_base_(model, precision_of(config.deepspeed.precision))
    return model.train()


class _Published(LoRALinear):
    """The layer of the paper's code: base, and update, and their sum."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + self.update(x)


def _as_published(model: Any) -> None:
    for _, layer in adapted_layers(model):
        if type(layer) is LoRALinear:
            layer.__class__ = _Published


def _adapt_by_peft(model: Any, config: Config) -> None:
    """The same adapters by the library; what they do not freeze trains, as here."""
    peft, lora = import_module("peft"), config.lora
    assert lora is not None
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        rank_pattern=lora.rank_pattern,
        alpha_pattern=lora.alpha_pattern,
        lora_dropout=lora.dropout,
        use_rslora=lora.scaling == "rslora",
        target_modules=find_targets(model, lora),
    )
    peft.inject_adapter_in_model(settings, model)
    base = dtype_of(precision_of(config.deepspeed.precision).base)
    for name, param in model.named_parameters():
        param.requires_grad_(not name.endswith(".base_layer.weight"))
        if not param.requires_grad:
            param.data = param.data.to(base)
