"""Embeddings and convolutions with adapters: against the plain layer with W + ΔW, and PEFT."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import relora
from relora.errors import ConfigError
from relora.lora.config import LoRAConfig
from relora.lora.inject import add_adapters, merge_adapters, remove_adapters
from relora.lora.layers import adapted_layers, constant_weights

RANK, ALPHA = 3, 4.5


def ids(*shape: int) -> Tensor:
    """Token ids below 11."""
    return torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(2))


def real(*shape: int) -> Tensor:
    """Numbers in float64 that want a gradient."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return x.requires_grad_(True)


Case = tuple[Callable[[], nn.Module], Callable[[], Tensor]]
CASES: dict[str, Case] = {
    "linear": (lambda: nn.Linear(7, 5), lambda: real(2, 4, 7)),
    "transposed linear": (lambda: Conv1D(5, 7), lambda: real(2, 4, 7)),
    "embedding": (lambda: nn.Embedding(11, 6), lambda: ids(4, 5)),
    "embedding, padded": (lambda: nn.Embedding(11, 6, padding_idx=2), lambda: ids(4, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2), lambda: real(2, 4, 13)),
    "conv1d, strided": (lambda: nn.Conv1d(4, 6, 3, 2, 1), lambda: real(2, 4, 13)),
    "conv1d, same": (lambda: nn.Conv1d(4, 6, 4, padding="same", bias=False), lambda: real(4, 13)),
    "conv1d, depthwise": (
        lambda: nn.Conv1d(6, 6, 4, groups=6, padding=3, padding_mode="circular"),
        lambda: real(2, 6, 9),
    ),
    "conv2d": (lambda: nn.Conv2d(3, 6, (3, 2), (2, 1), (1, 0)), lambda: real(2, 3, 8, 7)),
    "conv2d, patches": (lambda: nn.Conv2d(3, 8, 4, 4), lambda: real(2, 3, 8, 8)),
    "conv2d, groups": (
        lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding="same", padding_mode="reflect"),
        lambda: real(2, 4, 8, 7),
    ),
}


def adapted(case: str, dtype: torch.dtype = torch.float64, **changes: Any) -> tuple[Any, nn.Module]:
    """(layer with filled adapters, the model of which it is `layer`)."""
    torch.manual_seed(0)
    rank = min(RANK, 4 if "depthwise" in case else 99)
    model = nn.Sequential()
    model.add_module("layer", CASES[case][0]())
    options = {"rank": rank, "alpha": ALPHA, "targets": ["layer"], **changes}
    add_adapters(model, LoRAConfig(**options))
    layer: Any = model.get_submodule("layer")
    with torch.no_grad():
        layer.lora_B.normal_(generator=torch.Generator().manual_seed(1))
    return layer.to(dtype), model


def delta_of(layer: Any) -> Tensor:
    """s·B·A as each kind documents its shapes."""
    matrix = ALPHA / layer.lora_A.shape[0] * layer.lora_B @ layer.lora_A
    if isinstance(layer, nn.Embedding | Conv1D):
        return matrix.t()
    return matrix.view(layer.weight.shape)


@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients_are_those_of_the_plain_layer_with_the_sum(case: str) -> None:
    layer, _ = adapted(case)
    layer.shrink = 0.9  # what weight decay has left of W
    plain, x = CASES[case][0]().double(), CASES[case][1]()
    held = {"weight": 0.9 * layer.weight + delta_of(layer)}
    wanted = [layer.lora_A, layer.lora_B] + [x] * x.requires_grad
    if getattr(layer, "bias", None) is not None:
        held["bias"] = layer.bias
        wanted.append(layer.bias)
    expected, found = torch.func.functional_call(plain, held, (x,)), layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    if layer.__dict__.get("padding_idx", None) is None:  # its row gets no gradient from torch
        mine = torch.autograd.grad(found.square().sum(), wanted)
        right = torch.autograd.grad(expected.square().sum(), wanted)
        torch.testing.assert_close(mine, right, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", CASES)
def test_any_part_of_delta_is_that_part_of_the_flattened_weight(case: str) -> None:
    layer, _ = adapted(case)
    whole, count = delta_of(layer).flatten(), layer.weight.numel()
    cuts = [0, 3, 3, 10, 11, count - 1, count]  # in the middle of rows, and nothing between two
    arguments = layer.lora_A, layer.lora_B, layer.weight.shape
    parts = [layer.delta(*arguments, *cut) for cut in itertools.pairwise(cuts)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)
    matrix = layer.matrix(layer.weight)
    assert matrix.shape == (layer.lora_B.shape[0], layer.lora_A.shape[1])
    assert torch.equal(layer.stored(matrix, layer.weight.shape), layer.weight)


@pytest.mark.parametrize("case", CASES)
def test_a_merge_into_the_plain_layer_changes_no_output(case: str) -> None:
    layer, model = adapted(case)
    layer.shrink = 0.9
    plain, x = CASES[case][0](), CASES[case][1]()
    before = layer(x)
    merge_adapters(model)
    assert type(layer) is type(plain)
    assert list(layer.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(layer(x), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", [case for case in CASES if "transposed" not in case])
def test_at_birth_and_after_removal_the_output_is_the_plain_layers_bit_for_bit(case: str) -> None:
    layer, model = adapted(case, torch.float32)
    x = CASES[case][1]()
    x = x if not x.requires_grad else x.detach().float()
    layer.lora_B.data.zero_()
    found = layer(x)
    remove_adapters(model)
    assert torch.equal(found, layer(x))


@pytest.mark.parametrize("case", CASES)
def test_merging_on_and_on_trains_what_the_sums_of_updates_say(case: str) -> None:
    layer, model = adapted(case, torch.float32)
    x = CASES[case][1]()
    x = x if not x.requires_grad else x.detach().float()
    optimizer = torch.optim.AdamW(relora.parameter_groups(model), lr=0.05)
    state = relora.EngineState(model, optimizer)
    exact = layer.weight.detach().double()
    for merge in (1, 2, 3):
        for _ in range(3):
            optimizer.zero_grad()
            model(x).sin().sum().backward()
            optimizer.step()
        exact += delta_of(layer).detach().double()
        before = layer(x)
        report = relora.merge_and_restart(state, merge)
        assert report.layers == 1
        assert report.update_ratio > 1e-3
        torch.testing.assert_close(layer.weight.double(), exact, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-4)
        assert not layer.lora_B.any()


@pytest.mark.parametrize("case", [case for case in CASES if "linear" not in case])
def test_dropout_is_that_of_the_adapters_input(case: str) -> None:
    layer, _ = adapted(case, dropout=0.4)
    x = CASES[case][1]()
    with torch.no_grad():
        torch.manual_seed(0)
        found = layer(x)
        layer.lora_dropout = 0.0
        base, full = F.embedding(x, layer.weight) if "emb" in case else None, layer(x)
        if base is not None:  # each token's update as a whole, or nothing of it
            kept = ((found - base).abs().amax(-1, keepdim=True) > 0).double()
            assert 0.2 < kept.mean() < 0.95
            expected = base + kept * (full - base) / 0.6
        else:
            torch.manual_seed(0)
            dropped, plain = F.dropout(x, 0.4), CASES[case][0]().double()
            state = {"weight": delta_of(layer)}
            if layer.bias is not None:
                state["bias"] = torch.zeros_like(layer.bias)
            update = torch.func.functional_call(plain, state, (dropped,))
            unchanged = torch.func.functional_call(plain, state, (x,))
            expected = full - unchanged + update
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
        layer.lora_dropout = 0.4
        layer.eval()
        torch.testing.assert_close(layer(x), full)


@pytest.mark.parametrize("case", ["embedding", "conv1d, strided", "conv2d", "conv2d, patches"])
@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_it_is_pefts_layer(case: str, scaling: str) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    layer, model = adapted(case, scaling=scaling)
    theirs = copy.deepcopy(model)
    remove_adapters(theirs)
    settings = LoraConfig(
        r=RANK, lora_alpha=ALPHA, use_rslora=scaling == "rslora", target_modules=["layer"]
    )
    inject_adapter_in_model(settings, theirs)
    other: Any = theirs.get_submodule("layer")
    with torch.no_grad():
        if case == "embedding":
            other.lora_embedding_A["default"].data = layer.lora_A.clone()
            other.lora_embedding_B["default"].data = layer.lora_B.clone()
        else:
            for x in "AB":
                weight = getattr(other, f"lora_{x}")["default"].weight
                weight.data = getattr(layer, f"lora_{x}").detach().clone().view(weight.shape)
        x = CASES[case][1]()
        torch.testing.assert_close(layer(x), other(x), rtol=1e-12, atol=1e-12)


def test_half_precision_keeps_what_blocks_add_up_in_fp32() -> None:
    layer, _ = adapted("embedding", torch.float32)
    x, plain = CASES["embedding"][1](), nn.Embedding(11, 6)
    layer.weight.data = layer.weight.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == plain(x).dtype == torch.float32
    assert layer(x).dtype == torch.bfloat16


class Gated(nn.Module):
    """An embedding, a convolution and a linear layer, with a head that may be the embedding's."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.words, self.mix = nn.Embedding(11, 6), nn.Conv1d(6, 6, 3, padding=1)
        self.up, self.head = nn.Linear(6, 9), nn.Linear(6, 11, bias=False)
        if tied:
            self.head.weight = self.words.weight


def refusal(model: nn.Module, **options: Any) -> str:
    """The message of a config that is refused."""
    with pytest.raises(ConfigError) as caught:
        add_adapters(model, LoRAConfig(**{"rank": 2, **options}))
    return str(caught.value)


def test_only_named_embeddings_and_convolutions_get_adapters() -> None:
    assert add_adapters(Gated(tied=False), LoRAConfig(rank=2)) == ["up"]
    named = LoRAConfig(rank=2, targets=["up", "words", "mix"])
    model = Gated(tied=False)
    assert add_adapters(model, named) == ["words", "mix", "up"]
    trained = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert trained == 2 * ((11 + 6) + (6 * 3 + 6) + (6 + 9))
    assert not any(layer.weight.requires_grad for _, layer in adapted_layers(model))


def test_a_768_square_at_rank_16_trains_24576_of_589824() -> None:
    model = nn.Sequential(nn.Linear(768, 768, bias=False))
    add_adapters(model, LoRAConfig(rank=16, targets=["0"]))
    counts = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert sum(counts.values()) == 24_576
    assert model.get_parameter("0.weight").numel() == 589_824


def test_what_an_embedding_or_a_convolution_cannot_have_is_refused_with_the_reason() -> None:
    shared = refusal(Gated(tied=True), targets=["words"])
    assert "shared with another module" in shared
    message = refusal(nn.ModuleDict({"e": nn.Embedding(9, 4, max_norm=1.0)}), targets=["e"])
    assert "max_norm" in message
    normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3))
    assert "made of other parameters" in refusal(nn.ModuleDict({"c": normed}), targets=["c"])
    for option in ({"graph": "effective"}, {"base": "nf4"}, {"rank": None, "blocks": 2}):
        message = refusal(Gated(tied=False), targets=["up", "words"], **option)
        assert f"lora.{[*option][-1]}" in message
        assert "words is one of nn.Embedding" in message
    assert "at most 6" in refusal(Gated(tied=False), targets=["words"], rank=7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_unmerging_gives_back_base_and_adapters_bit_for_bit(case: str, dtype: torch.dtype) -> None:
    layer, model = adapted(case, dtype)
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.float(), layer.lora_B.float()
    layer.shrink = 0.9
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kind, factors = type(layer), (layer.lora_A, layer.lora_B)
    for _ in range(3):  # and again, with nothing that adds up
        merge_adapters(model, keep=True)
        assert type(layer) is type(CASES[case][0]())
        assert not torch.equal(layer.weight, before["layer.weight"])
        with pytest.raises(ConfigError, match="unmerge_adapters first"):
            add_adapters(model, LoRAConfig(rank=2, targets=["layer"]))
        relora.unmerge_adapters(model)
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert type(layer) is kind
        assert layer.shrink == 0.9
        assert (layer.lora_A, layer.lora_B) == factors  # what an optimizer holds
        assert not layer.weight.requires_grad
    with pytest.raises(ValueError, match="nothing is kept"):
        relora.unmerge_adapters(model)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_unmerging_a_quantised_base_gives_back_its_exact_values_and_codes(kind: Any) -> None:
    layer, model = adapted("linear", torch.bfloat16, base=kind)
    relora.quantise_base(model, kind)
    with torch.no_grad():
        layer.weight.add_(1e-4)  # finer than the dtype it had
        layer.requantise_()
    exact, codes = layer.weight.detach().clone(), layer.quantised.checksum()
    merge_adapters(model, keep=True)
    assert layer.weight.dtype == torch.bfloat16
    relora.unmerge_adapters(model)
    assert layer.weight.dtype == torch.float32
    assert torch.equal(layer.weight, exact)
    assert layer.quantised.checksum() == codes


def test_rank_and_alpha_by_pattern_are_pefts() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    patterns: dict[str, Any] = {
        "rank_pattern": {"words": 5, "blocks.1.up": 4, "^blocks.*down": 2, "up": 3},
        "alpha_pattern": {r"blocks\.\d\.up": 16.0, "words": 1.0},
    }
    block = lambda: nn.ModuleDict({"up": nn.Linear(6, 9), "down": nn.Linear(9, 6)})  # noqa: E731
    plain = nn.ModuleDict({"words": nn.Embedding(11, 6), "up": nn.Linear(6, 7)})
    plain["blocks"] = nn.ModuleList([block(), block()])
    targets, rslora = ["words", "up", "down"], {"scaling": "rslora"}
    for options in ({}, rslora):
        ours, theirs = copy.deepcopy(plain), copy.deepcopy(plain)
        add_adapters(ours, LoRAConfig(rank=1, alpha=8, targets=targets, **patterns, **options))
        settings = LoraConfig(
            r=1, lora_alpha=8, target_modules=targets, use_rslora=bool(options), **patterns
        )
        inject_adapter_in_model(settings, theirs)
        found = {n: (x.lora_A.shape[0], x.scale) for n, x in adapted_layers(ours)}
        assert found == {
            name: (module.r["default"], module.scaling["default"])
            for name, module in theirs.named_modules()
            if hasattr(module, "scaling")
        }
        assert {rank for rank, _ in found.values()} == {5, 4, 3, 2}


def test_a_pattern_that_does_nothing_or_asks_too_much_is_refused() -> None:
    model = Gated(tied=False)
    for key in ("rank_pattern", "alpha_pattern"):
        message = refusal(model, **{key: {"down": 2}})
        assert f"lora.{key}: 'down' matches no adapted layer" in message
        assert message.endswith("end in: up")
        with pytest.raises(ValueError, match="no regular expression"):
            LoRAConfig(rank=2, **{key: {"(": 2}})
        with pytest.raises(ValueError, match="would do nothing with blocks"):
            LoRAConfig(blocks=2, **{key: {"up": 2}})
        with pytest.raises(ValueError, match="greater than"):
            LoRAConfig(rank=2, **{key: {"up": 0}})
    assert "lora.rank_pattern: 7" in refusal(model, rank_pattern={"up": 7})


@pytest.mark.parametrize("train", ["both", "b"])
@pytest.mark.parametrize("case", [case for case in CASES if "linear" not in case])
def test_a_compiler_makes_one_graph_for_all_that_decay_leaves(case: str, train: str) -> None:
    torch._dynamo.reset()
    layer, model = adapted(case, torch.float32, train=train)
    layer.compiled, graphs = torch.float32, []
    x = CASES[case][1]()
    x = x if not x.requires_grad else x.detach().float()

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: layer(x), backend=backend)
    for shrink in (0.9, 0.8, 0.7):
        layer.shrink = shrink
        with constant_weights(model):
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1


def test_an_embedding_is_moved_as_far_as_a_linear_layer_of_its_width() -> None:
    moved = {}
    for case, plain in {"look-up": nn.Embedding(500, 64), "linear": nn.Linear(64, 64)}.items():
        model = nn.ModuleDict({"layer": plain})
        add_adapters(model, LoRAConfig(rank=16, targets=["layer"]))
        layer: Any = model["layer"]
        b = torch.randn_like(layer.lora_B).sign()  # Adam's first update
        moved[case] = float((b @ layer.lora_A).square().mean().sqrt())
    assert moved["look-up"] == pytest.approx(moved["linear"], rel=0.1)
