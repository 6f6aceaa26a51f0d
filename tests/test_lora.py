"""Adapters: their arithmetic against the formula and against PEFT, their birth and their end."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from conftest import TINY_GPT2, TINY_LLAMA
from relora.errors import ConfigError
from relora.lora.choose import find_targets
from relora.lora.config import LoRAConfig
from relora.lora.graphs import Graph
from relora.lora.inject import add_adapters, remove_adapters
from relora.lora.layers import LoRAConv1D, LoRALinear, adapted_layers
from relora.model import ModelConfig, build_model

MODELS: dict[str, dict[str, Any]] = {
    "llama": TINY_LLAMA,
    "gpt2": TINY_GPT2,
    "gpt_neox": {"model_type": "gpt_neox", "vocab_size": 61, "hidden_size": 24,
                 "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3,
                 "max_position_embeddings": 32, "tie_word_embeddings": False},
}  # fmt: skip
PROJECTIONS = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "gpt_neox": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
}
PER_LAYER = {"llama": 7, "gpt2": 4, "gpt_neox": 4}


def make(kind: str, tmp_path: Path, **changes: Any) -> Any:
    """A tiny model of this kind."""
    path = tmp_path / f"{kind}.json"
    path.write_text(json.dumps(MODELS[kind]))
    return build_model(ModelConfig(config=path, **changes), seed=3)


def adapt(model: Any, seed: int = 0, **changes: Any) -> Any:
    """The model with adapters just born."""
    add_adapters(model, LoRAConfig(**{"rank": 3, "alpha": 6.0, **changes}), seed)
    return model


def stir_(model: nn.Module) -> None:
    """Give every B values."""
    generator = torch.Generator().manual_seed(1)
    for _, layer in adapted_layers(model):
        layer.lora_B.data.normal_(0, 0.1, generator=generator)


@pytest.fixture
def tokens() -> Tensor:
    """(3, 12) token ids."""
    return torch.randint(0, 61, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", MODELS)
def test_at_birth_no_output_changes_and_b_has_a_gradient(
    kind: str, tmp_path: Path, tokens: Tensor
) -> None:
    plain = make(kind, tmp_path)
    model = adapt(copy.deepcopy(plain))
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, plain(input_ids=tokens).logits)
    model(input_ids=tokens, labels=tokens).loss.backward()
    for name, layer in adapted_layers(model):
        assert layer.lora_A.abs().max() > 0, name
        assert not layer.lora_B.any(), name
        assert layer.lora_B.grad.norm() > 0, name
        assert layer.lora_A.grad.norm() == 0, name
        assert layer.weight.grad is None, name


@pytest.mark.parametrize("kind", MODELS)
def test_targets_are_the_projections_of_attention_and_mlp(kind: str, tmp_path: Path) -> None:
    model = make(kind, tmp_path)
    targets = find_targets(model, LoRAConfig(rank=3))
    assert {name.rpartition(".")[2] for name in targets} == PROJECTIONS[kind]
    assert len(targets) == 2 * PER_LAYER[kind]


@pytest.mark.parametrize("kind", MODELS)
def test_all_but_the_adapted_weights_goes_on_training(kind: str, tmp_path: Path) -> None:
    model = make(kind, tmp_path)
    names = {name for name, _ in model.named_parameters()}
    targets = add_adapters(model, LoRAConfig(rank=3))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {f"{target}.weight" for target in targets}
    born = {name for name, _ in model.named_parameters()} - names
    assert born == {f"{target}.lora_{x}" for target in targets for x in "AB"}


def test_targets_can_be_chosen_and_a_wrong_one_is_refused(tmp_path: Path) -> None:
    model = make("llama", tmp_path)
    chosen = find_targets(model, LoRAConfig(rank=3, targets=["q_proj", "mlp.up_proj"]))
    assert [name.rpartition(".")[2] for name in chosen] == ["q_proj", "up_proj"] * 2
    with pytest.raises(ConfigError, match="'proj' matches no linear layer"):
        find_targets(model, LoRAConfig(rank=3, targets=["proj"]))
    with pytest.raises(ConfigError, match="at most 6"):
        find_targets(model, LoRAConfig(rank=7))


def layer_pair(kind: str, dropout: float = 0.0) -> Any:
    """An adapted layer 7 → 5 in float64, with all its tensors filled."""
    base = nn.Linear(7, 5) if kind == "linear" else Conv1D(5, 7)
    base.__class__ = LoRALinear if kind == "linear" else LoRAConv1D
    base.add_lora_(3, 0.7, dropout)
    for index, tensor in enumerate(base.parameters()):
        tensor.data.normal_(generator=torch.Generator().manual_seed(index))
    return base.double()


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_forward_is_the_formula(kind: str) -> None:
    layer = layer_pair(kind)
    weight = layer.weight if kind == "linear" else layer.weight.t()
    x = torch.randn(2, 4, 7, dtype=torch.float64, requires_grad=True)
    expected = x @ weight.t() + layer.bias + 0.7 * ((x @ layer.lora_A.t()) @ layer.lora_B.t())
    torch.testing.assert_close(layer(x), expected, rtol=1e-14, atol=1e-14)
    wanted = [x, layer.lora_A, layer.lora_B, layer.bias]
    mine = torch.autograd.grad(layer(x).square().sum(), wanted)
    right = torch.autograd.grad(expected.square().sum(), wanted)
    torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_delta_is_what_the_adapter_adds_in_the_weights_own_layout(kind: str) -> None:
    layer = layer_pair(kind)
    x = torch.randn(4, 7, dtype=torch.float64)
    before = layer(x)
    args = (layer.lora_A, layer.lora_B, layer.weight.shape)
    whole = layer.delta(*args, 0, 35)
    cuts = [0, 3, 3, 10, 11, 35]  # in the middle of rows, and nothing between two
    parts = [layer.delta(*args, start, stop) for start, stop in itertools.pairwise(cuts)]
    torch.testing.assert_close(torch.cat(parts), whole)
    matrix = 0.7 * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer.matrix(whole.view(layer.weight.shape)), matrix)
    layer.weight.data += whole.view(layer.weight.shape)
    layer.lora_B.data.zero_()
    torch.testing.assert_close(layer(x), before, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_dropout_acts_on_the_adapters_input_alone(kind: str) -> None:
    layer = layer_pair(kind, dropout=0.4)
    x = torch.randn(50, 7, dtype=torch.float64)
    torch.manual_seed(0)
    dropped = F.dropout(x, 0.4)
    weight = layer.weight if kind == "linear" else layer.weight.t()
    base = x @ weight.t() + layer.bias
    torch.manual_seed(0)
    update = layer(x) - base
    expected = 0.7 * dropped @ layer.lora_A.t() @ layer.lora_B.t()
    torch.testing.assert_close(update, expected, rtol=1e-12, atol=1e-12)
    layer.eval()
    expected = base + 0.7 * x @ layer.lora_A.t() @ layer.lora_B.t()
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_scale_is_alpha_over_r_or_over_its_root() -> None:
    assert LoRAConfig(rank=16, alpha=32).scale == 2.0
    assert LoRAConfig(rank=16, alpha=32, scaling="rslora").scale == 8.0


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
@pytest.mark.parametrize("graph", get_args(Graph))
@pytest.mark.parametrize("kind", MODELS)
def test_it_is_pefts_lora(
    kind: str, scaling: str, graph: Graph, tmp_path: Path, tokens: Tensor
) -> None:
    from peft import LoraConfig, get_peft_model

    plain = make(kind, tmp_path)
    model = adapt(copy.deepcopy(plain), scaling=scaling, graph=graph)
    stir_(model)
    theirs = get_peft_model(
        plain,
        LoraConfig(
            r=3,
            lora_alpha=6.0,
            use_rslora=scaling == "rslora",
            target_modules=sorted(PROJECTIONS[kind]),
            fan_in_fan_out=kind == "gpt2",
        ),
    )
    pairs = [
        (layer, theirs.base_model.model.get_submodule(name))
        for name, layer in adapted_layers(model)
    ]
    for ours, other in pairs:
        other.lora_A["default"].weight.data.copy_(ours.lora_A.data)
        other.lora_B["default"].weight.data.copy_(ours.lora_B.data)
    # Two ways to compute one function: they differ by rounding alone, and hardly by that.
    results = [m.double()(input_ids=tokens, labels=tokens) for m in (model, theirs)]
    torch.testing.assert_close(results[0].logits, results[1].logits, rtol=1e-12, atol=1e-12)
    for result in results:
        result.loss.backward()
    for ours, other in pairs:
        for x in "AB":
            mine = getattr(ours, f"lora_{x}").grad
            right = getattr(other, f"lora_{x}")["default"].weight.grad
            torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", MODELS)
def test_gradient_checkpointing_gives_the_same_gradients(
    kind: str, tmp_path: Path, tokens: Tensor
) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapt(make(kind, tmp_path, gradient_checkpointing=checkpointing)).train()
        stir_(model)
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        flags = [getattr(module, "gradient_checkpointing", False) for module in model.modules()]
        assert any(flags) == checkpointing
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", MODELS)
def test_removing_adapters_gives_back_the_plain_model(
    kind: str, tmp_path: Path, tokens: Tensor
) -> None:
    plain = make(kind, tmp_path)
    model = adapt(copy.deepcopy(plain))
    remove_adapters(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    state, expected = model.state_dict(), plain.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, plain(input_ids=tokens).logits)
    assert not list(adapted_layers(model))
