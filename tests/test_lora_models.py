"""Adapters on models of each shape that people fine-tune: what they go to, and what they change."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import relora
from relora.lora.config import LoRAConfig
from relora.lora.experts import LoRAExperts
from relora.lora.inject import add_adapters, merge_adapters
from relora.lora.kinds import kind_of
from relora.lora.layers import LoRAConv1D, LoRALinear, adapted_layers
from relora.lora.names import names_of
from tiny_models import tiny_values

SWIGLU = {"gate_proj", "up_proj", "down_proj"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
# Default targets by the last parts of their names, and how many a layer has.
DEFAULTS: dict[str, tuple[set[str], int]] = {
    "llama": (ATTENTION | SWIGLU, 7),
    "gpt2": ({"c_attn", "c_proj", "c_fc"}, 4),
    "gpt_neox": ({"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}, 4),
    "qwen3": (ATTENTION | SWIGLU, 7),
    "mixtral": (ATTENTION | {"gate_up_proj_of_experts", "down_proj_of_experts"}, 6),
    "roberta": ({"query", "key", "value", "dense"}, 6),
    "vit": (ATTENTION | {"fc1", "fc2"}, 6),
}
# Embeddings and convolutions to name beside them.
BY_NAME = {
    "llama": "embed_tokens",
    "gpt2": "wpe",
    "gpt_neox": "embed_in",
    "qwen3": "embed_tokens",
    "mixtral": "embed_tokens",
    "roberta": "word_embeddings",
    "vit": "patch_embeddings.projection",
}


def build(kind: str) -> nn.Module:
    """A tiny model of this type, a classifier where that is what people train, in float64."""
    import transformers

    values: dict[str, Any] = tiny_values(kind)
    values.pop("model_type")
    made: Any = transformers.AutoModelForCausalLM
    if kind == "roberta":
        made = transformers.AutoModelForSequenceClassification
    if kind == "vit":
        made = transformers.AutoModelForImageClassification
        values.update(image_size=16, patch_size=4, num_channels=3)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **values)
    model = made.from_config(config)
    if kind == "mixtral":
        model.set_experts_implementation("eager")  # the grouped kernel knows no float64
    return model.double().eval()


def outputs(kind: str, model: nn.Module) -> Tensor:
    """Logits of one batch."""
    generator = torch.Generator().manual_seed(1)
    if kind == "vit":
        return model(torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64)).logits
    return model(input_ids=torch.randint(5, 300, (2, 12), generator=generator)).logits


def everything(kind: str, model: nn.Module) -> list[str]:
    """The default targets and what is to be named beside them."""
    plain = copy.deepcopy(model)
    return [*add_adapters(plain, LoRAConfig(rank=2)), BY_NAME[kind]]


@pytest.mark.parametrize("kind", DEFAULTS)
def test_default_targets_are_the_projections_and_no_head(kind: str) -> None:
    model = build(kind)
    names = add_adapters(model, LoRAConfig(rank=2))
    last, count = DEFAULTS[kind]
    assert {name.rpartition(".")[2] for name in names} == last
    assert len(names) == 2 * count
    kinds = {kind_of(layer) for _, layer in adapted_layers(model)}
    assert kinds <= {LoRALinear, LoRAConv1D, LoRAExperts}
    assert not any("classifier" in name or "head" in name for name in names)


@pytest.mark.parametrize("kind", DEFAULTS)
def test_injection_and_merges_change_no_output(kind: str) -> None:
    model = build(kind)
    before = outputs(kind, model)
    names = add_adapters(model, LoRAConfig(rank=2, targets=everything(kind, model)))
    assert sum(name.endswith(BY_NAME[kind]) for name in names) == 1
    model.double()
    if kind == "gpt2":  # whose layers compute addmm, where the adapted ones multiply and add
        torch.testing.assert_close(outputs(kind, model), before, rtol=1e-12, atol=1e-12)
    else:
        assert torch.equal(outputs(kind, model), before)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            layer.lora_B.normal_(0, 0.1, generator=generator)
    moved = outputs(kind, model)
    assert (moved - before).abs().max() > 1e-3 * before.abs().max()
    restarted = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(relora.parameter_groups(restarted), lr=0.0)
    state = relora.EngineState(restarted, optimizer)
    assert relora.merge_and_restart(state, 1).layers == len(names)
    outputs(kind, restarted).sum().backward()
    optimizer.step()
    merge_adapters(model, keep=True)
    for merged in (restarted, model):
        found = outputs(kind, merged)
        assert float((found - moved).abs().max() / moved.abs().max()) < 1e-5
    relora.unmerge_adapters(model)
    assert torch.equal(outputs(kind, model), moved)


@pytest.mark.parametrize("kind", DEFAULTS)
def test_at_full_rank_adapters_reach_any_update(kind: str) -> None:
    model = build(kind)
    targets = everything(kind, model)
    plain = copy.deepcopy(model)
    names = add_adapters(plain, LoRAConfig(rank=1, targets=targets))
    full = {
        re.escape(name): min(layer.matrix(layer.weight).shape[-2:])
        for name, layer in adapted_layers(plain)
    }
    options: Any = {"rank": 1, "targets": targets, "rank_pattern": full}
    assert add_adapters(model, LoRAConfig(**options)) == names
    model.double()
    wanted = {}
    with torch.no_grad():
        for name, layer in adapted_layers(model):
            start = layer.weight.clone()
            wanted[name] = torch.randn_like(start)
            update = layer.matrix(wanted[name] - start)
            rows, columns = update.shape[-2:]
            eye = torch.eye(min(rows, columns), dtype=torch.float64)
            layer.lora_A.copy_(eye if columns <= rows else update)
            layer.lora_B.copy_(update if columns <= rows else eye)
            layer.lora_B.div_(layer.scale)
    merge_adapters(model)
    for name, weight in wanted.items():
        found = model.get_parameter(names_of(name).weight)
        torch.testing.assert_close(found, weight, rtol=1e-5, atol=1e-5)
