"""Graphs of adapted layers, lean blocks and the chunked loss: the same function as the plain ones,
and what each keeps and multiplies, counted."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from relora.engine.options import MOST_IN_BUCKET, bucket_size
from relora.lean import make_lean, rms_norm, swiglu
from relora.lora.config import LoRAConfig
from relora.lora.graphs import cheaper_graph, forming_share
from relora.lora.inject import add_adapters, merge_adapters
from relora.lora.layers import AdaptedLayer, adapted_layers, constant_weights
from relora.loss import next_token_loss
from relora.rotary import rotate

WIDTH, HIDDEN, HEADS, RANK, VOCABULARY = 64, 176, 4, 16, 320
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
# The shapes of the shipped Llamas: width, hidden, heads.
SHIPPED = {"60m": (512, 1376, 8), "130m": (768, 2048, 12), "1b3": (2048, 5461, 32)}
# What is counted goes by width, hidden and heads alone: two shapes tell a formula from another.
SHAPES = [pytest.param(name, marks=[pytest.mark.slow] * (name == "1b3")) for name in SHIPPED]
IDS = torch.randint(0, VOCABULARY, (2, 48), generator=torch.Generator().manual_seed(0))


def half(on: bool = True) -> Any:
    """Autocast as in a bf16 run."""
    return torch.autocast("cpu", torch.bfloat16, enabled=on)


def make(kind: str = "llama", **changes: Any) -> Any:
    """A small model, in training."""
    config = AutoConfig.for_model(kind, **{**SMALL, "tie_word_embeddings": False, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.config.use_cache = False
    return model.train()


def adapt(model: Any, graph: str, keep: bool | None = None, store: Any = None) -> Any:
    """The model with adapters whose B is not zero, and its base weights in a dtype."""
    add_adapters(model, LoRAConfig(rank=RANK, graph=graph, keep_effective=keep))
    generator = torch.Generator().manual_seed(1)
    for _, layer in adapted_layers(model):
        layer.lora_B.data.normal_(0, 0.02, generator=generator)
        if store is not None:
            layer.weight.data = layer.weight.data.to(store)
    return model


def gradients(model: Any, ids: Tensor = IDS, bf16: bool = False) -> tuple[float, dict[str, Tensor]]:
    """The loss on token ids, and the gradient of every parameter that has one."""
    with half(bf16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def error(found: Tensor, right: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return float((found.double() - right.double()).norm() / right.double().norm().clamp_min(1e-30))


# --- one layer ------------------------------------------------------------------------------------


def one_layer(kind: str, graph: str, dtype: torch.dtype = torch.float32) -> AdaptedLayer:
    """An adapted layer 24 → 40 whose frozen weight has decayed a little since the last merge."""
    torch.manual_seed(3)
    inner: nn.Module = nn.Linear(24, 40) if kind == "linear" else Conv1D(40, 24)
    holder = nn.ModuleDict({"x": inner})
    add_adapters(holder, LoRAConfig(rank=5, alpha=7, targets=["x"], graph=graph))
    layer: Any = holder["x"]
    nn.init.normal_(layer.lora_B, 0, 0.3)
    layer.bias.data.normal_()
    layer.shrink = 0.9
    return layer.to(dtype)  # type: ignore[no-any-return]


def pass_through(layer: Any, x: Tensor, bf16: bool = False) -> list[Tensor]:
    """Output, and gradients of x, A, B and the bias for a fixed gradient of the output."""
    x = x.detach().clone().requires_grad_(True)
    with half(bf16):
        output = layer(x)
    weights = torch.linspace(-1, 2, output.numel()).view(output.shape).to(output.dtype)
    output.backward(weights)
    return [output.detach(), x.grad, layer.lora_A.grad, layer.lora_B.grad, layer.bias.grad]  # type: ignore[list-item]


@pytest.mark.parametrize("kept", [False, True], ids=["formed", "kept"])
@pytest.mark.parametrize("graph", ["low_rank", "effective"])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_each_graph_is_the_formula(kind: str, graph: str, kept: bool) -> None:
    x = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(0))
    exact: Any = one_layer(kind, "low_rank", torch.float64)
    weight = exact.matrix(exact.weight)
    wide = x.double().requires_grad_(True)
    effective = 0.9 * weight + 7 / 5 * exact.lora_B @ exact.lora_A
    output = wide @ effective.t() + exact.bias
    output.backward(torch.linspace(-1, 2, output.numel()).view(output.shape).double())
    right = [output, wide.grad, exact.lora_A.grad, exact.lora_B.grad, exact.bias.grad]
    layer: Any = one_layer(kind, graph)
    layer.keeps_effective = kept
    with constant_weights(layer) if kept else nullcontext():
        found = pass_through(layer, x)
    for mine, expected in zip(found, right, strict=True):
        assert error(mine, expected) < 1e-6


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_in_half_precision_the_effective_graph_errs_as_the_low_rank_one(kind: str) -> None:
    """Both round each product once; the one also rounds W + s·B·A, the other x W and its update."""
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(0))
    errors = {}
    for graph in ("low_rank", "effective"):
        layer: Any = one_layer(kind, graph)
        layer.weight.data = layer.weight.data.bfloat16()
        exact = copy.deepcopy(layer).double()
        exact.graph = "low_rank"
        right = pass_through(exact, x.double())
        found = pass_through(layer, x, bf16=True)
        errors[graph] = [error(a, b) for a, b in zip(found, right, strict=True)]
    for low_rank, effective in zip(errors["low_rank"], errors["effective"], strict=True):
        assert effective < max(1.6 * low_rank, 4e-3)


@pytest.mark.parametrize("graph", ["low_rank", "effective"])
def test_inputs_may_be_empty_or_lie_apart(graph: str) -> None:
    empty = pass_through(one_layer("linear", graph), torch.randn(0, 24))
    assert empty[0].shape == (0, 40)
    assert all(not gradient.any() for gradient in empty[1:])
    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
    apart = pass_through(one_layer("linear", graph), x.t())
    together = pass_through(one_layer("linear", graph), x.t().contiguous())
    for one, other in zip(apart, together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_what_is_constant_is_made_once_and_forgotten() -> None:
    layer: Any = one_layer("linear", "effective")
    layer.keeps_effective = True
    with constant_weights(layer):
        first = layer.effective(torch.float32)
        assert layer.effective(torch.float32) is first
        assert layer.factors(torch.float32)[0] is layer.factors(torch.float32)[0]
    with torch.no_grad():
        layer.lora_B.add_(1)
    assert not torch.equal(layer.effective(torch.float32), first)
    assert layer.effective(torch.float32) is not layer.effective(torch.float32)
    with pytest.raises(RuntimeError, match="stop"), constant_weights(layer):
        raise RuntimeError("stop")
    assert layer.made is None


def test_a_frozen_a_has_no_gradient_and_the_others_are_the_same() -> None:
    x = torch.randn(9, 24, generator=torch.Generator().manual_seed(0))
    layer: Any = one_layer("linear", "effective")
    right = pass_through(layer, x)
    layer = one_layer("linear", "effective")
    layer.lora_A.requires_grad_(False)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), right[0], rtol=0, atol=0)
        with half():
            layer(x + 0)  # a tensor whose changes nobody counts
    found = pass_through(layer, x)
    assert found[2] is None
    for number in (0, 1, 3, 4):
        assert torch.equal(found[number], right[number])


def only_b(model: Any, share: bool = True, keep: bool | None = True) -> Any:
    """The model with adapters whose A does not train, its base weights and A in bf16."""
    groups = [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]] if share else None
    config = LoRAConfig(
        rank=RANK, train="b", share_a=groups, graph="effective", keep_effective=keep
    )
    add_adapters(model, config)
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.lora_B, std=0.02)
        for param in (layer.weight, layer.lora_A):
            param.data = param.data.bfloat16()
    return model


@pytest.mark.parametrize("blocks", [False, True], ids=["plain blocks", "lean blocks"])
def test_layers_that_share_an_a_multiply_with_it_once(blocks: bool) -> None:
    """And compute what they would alone."""
    model = only_b(lean(make(), blocks=blocks))
    alone = copy.deepcopy(model)
    for _, layer in adapted_layers(alone):
        layer.shared_a = None
    (loss, found), (right_loss, right) = gradients(model, bf16=True), gradients(alone, bf16=True)
    assert loss == right_loss
    assert all(torch.equal(found[name], right[name]) for name in right)
    flops = []
    for each in (model, alone):
        with FlopCounterMode(display=False) as counter:
            gradients(each, bf16=True)
        flops.append(counter.get_total_flops())
    saved_products = 2 * (2 + 1)  # in each of two blocks: of q, k, v and of gate, up
    assert flops[1] - flops[0] == saved_products * 2 * IDS.numel() * WIDTH * RANK


def test_an_input_changed_in_place_is_multiplied_anew() -> None:
    model = only_b(make())
    first, second, _ = (model.model.layers[0].self_attn.get_submodule(f"{n}_proj") for n in "qkv")
    x = torch.randn(3, WIDTH)
    outputs = []
    for again in (x, x.clone()):
        if again is x:
            first(x)
            x.mul_(2)
        else:
            again.copy_(x)
        b = second.lora_B
        b.grad = None
        second(again).sum().backward()
        outputs.append(b.grad)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("shared", [False, True], ids=["own A", "shared A"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_frozen_a_keeps_r_numbers_of_an_input_and_not_the_input(name: str, shared: bool) -> None:
    width, hidden, heads = SHIPPED[name]
    ids = torch.zeros(1, 16, dtype=torch.long)

    def kept(model: Any) -> float:
        with saving(model) as sizes, half():
            model.model(input_ids=ids)
        return sum(sizes) / ids.numel()

    found = per_block(kept, lambda n: only_b(lean(shaped(SHIPPED[name], n)), shared))
    # What attention gives is no recipe's, so r numbers of it; of the other inputs nothing at all.
    assert found == 16 * width + 4 * hidden + 4 * heads + 2 * RANK
    found = per_block(kept, lambda n: only_b(shaped(SHIPPED[name], n), shared))
    right = per_block(kept, lambda n: adapt(shaped(SHIPPED[name], n), "effective"))
    # Plain blocks: x of q, k, v, and of gate and up, and of down is kept by the products alone.
    assert found < right - 4 * width + 14 * RANK


@pytest.mark.parametrize("tokens", [64, 8192])
@pytest.mark.parametrize("kept", [False, True], ids=["formed", "kept"])
@pytest.mark.parametrize("graph", ["low_rank", "effective"])
def test_products_are_as_many_as_said(graph: str, kept: bool, tokens: int) -> None:
    outputs, inputs, rank = 96, 64, 8
    with torch.device("meta"):
        holder = nn.ModuleDict({"x": nn.Linear(inputs, outputs, bias=False)})
        add_adapters(holder, LoRAConfig(rank=rank, targets=["x"], graph=graph), seed=None)
        x = torch.empty(tokens, inputs, requires_grad=True)
    layer: Any = holder["x"]
    layer.keeps_effective = kept
    with constant_weights(holder), FlopCounterMode(display=False) as counter:
        for _ in range(4):
            layer(x).sum().backward()
    factor = 6 if graph == "low_rank" else 4
    once = 4 * tokens * inputs * outputs + factor * tokens * rank * (inputs + outputs)
    formed = 2 * outputs * inputs * rank * (0 if graph == "low_rank" else 1 if kept else 8)
    assert counter.get_total_flops() == 4 * once + formed


def test_the_graph_with_fewer_products_is_taken() -> None:
    # 512 × 512: 256 tokens are as dear one way as the other.
    assert [cheaper_graph(512, 512, t) for t in (None, 257, 256, 1)] == [
        "effective", "effective", "low_rank", "low_rank"
    ]  # fmt: skip
    assert forming_share(128, 4096, 10**9) == pytest.approx(128 / 4096)
    assert forming_share(128, 4096, 1) == pytest.approx(128 / 4096 / 2)
    model = make()
    add_adapters(model, LoRAConfig(rank=RANK), tokens=4096, micro_batches=4)
    assert {(x.graph, x.keeps_effective) for _, x in adapted_layers(model)} == {
        ("effective", False)
    }
    model = make()
    add_adapters(model, LoRAConfig(rank=RANK), tokens=100, micro_batches=4)
    assert all(x.keeps_effective for _, x in adapted_layers(model))
    model = make()
    add_adapters(model, LoRAConfig(rank=RANK, dropout=0.1), tokens=4096, micro_batches=4)
    assert {x.graph for _, x in adapted_layers(model)} == {"low_rank"}


# --- blocks ---------------------------------------------------------------------------------------


def test_the_norm_and_the_gate_are_their_formulas() -> None:
    torch.manual_seed(0)
    x, gate, up = (torch.randn(5, 6, dtype=torch.float64, requires_grad=True) for _ in range(3))
    weight = torch.rand(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *args: rms_norm(*args, 1e-5), (x, weight))
    assert torch.autograd.gradcheck(swiglu, (gate, up))
    expected = weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(swiglu(gate, up), nn.functional.silu(gate) * up)


def test_queries_and_keys_are_turned_by_the_formula() -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    cos, sin = (torch.randn(2, 4, 6, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *args: rotate(*args, cos, sin), (q, k))
    for found, x in zip(rotate(q, k, cos, sin), (q, k), strict=True):
        turned = torch.cat((-x[..., 3:], x[..., :3]), -1)
        expected = x * cos[:, None] + turned * sin[:, None]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


KINDS = {  # norms, MLPs, attentions, loss
    "llama": (5, 2, 2, True),
    "mistral": (5, 2, 2, True),
    "qwen2": (5, 2, 2, True),
    "qwen3": (9, 2, 2, True),
    "mixtral": (
        5,
        0,
        2,
        False,
    ),  # experts are no modules, and their balance is trained
    "olmo2": (9, 2, 2, True),
    "gemma": (0, 0, 2, True),  # 1 + w, and another gate
    "gemma2": (0, 0, 2, False),  # logits are capped
    "granite": (5, 2, 2, False),  # logits are scaled
    "gpt2": (0, 0, 0, True),
    "gpt_neox": (0, 0, 0, True),  # turns a part of each head
    "phi": (0, 0, 2, True),  # a head with a bias
    "cohere": (0, 2, 0, False),  # turns neighbours, not halves
}


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_lean_models_compute_what_plain_ones_do(kind: str, bf16: bool) -> None:
    changes: dict[str, Any] = {}
    if kind == "mixtral":
        changes = {"num_local_experts": 4, "output_router_logits": True}
    if kind == "gpt2":
        changes = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    plain = make(kind, **changes)
    model = copy.deepcopy(plain)
    assert tuple(make_lean(model, loss_chunk=7)) == KINDS[kind]
    assert [type(m).__name__ for m in model.modules() if type(m) is not nn.Linear]
    (loss, right), (lean, found) = gradients(plain, bf16=bf16), gradients(model, bf16=bf16)
    assert lean == pytest.approx(loss, rel=2e-3 if bf16 else 1e-6)
    assert found.keys() == right.keys()
    total = sum(float(g.norm()) ** 2 for g in right.values()) ** 0.5
    apart = sum(float((found[n] - g).norm()) ** 2 for n, g in right.items()) ** 0.5
    assert apart / total < (2e-2 if bf16 else 2e-6)


@pytest.mark.parametrize("graph", ["low_rank", "effective"])
def test_adapters_of_lean_blocks_have_the_float64_gradients(graph: str) -> None:
    model = adapt(lean(make()), graph)
    exact = adapt(make(), "low_rank").double()
    (loss, found), (right_loss, right) = gradients(model), gradients(exact)
    assert loss == pytest.approx(right_loss, rel=1e-6)
    for name, gradient in right.items():
        assert error(found[name], gradient) < 3e-6, name


def lean(model: Any, **changes: Any) -> Any:
    """The model, made lean."""
    make_lean(model, **changes)
    return model


@pytest.mark.parametrize("graph", ["low_rank", "effective"])
def test_gradient_checkpointing_changes_no_bit_of_lean_blocks(graph: str) -> None:
    model = adapt(lean(make()), graph, store=torch.bfloat16)
    again = copy.deepcopy(model)
    again.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    (loss, right), (other, found) = gradients(model, bf16=True), gradients(again, bf16=True)
    assert loss == other
    assert all(torch.equal(found[name], right[name]) for name in right)


def test_a_lean_model_merges_and_is_saved_as_the_plain_one(tmp_path: Path) -> None:
    model = adapt(lean(make()), "effective").eval()
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    merge_adapters(model)
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert type(loaded).__name__ == "LlamaForCausalLM"
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=IDS).logits, logits, rtol=1e-5, atol=2e-6)


@contextmanager
def saving(model: Any) -> Iterator[list[int]]:
    """Bytes of each storage that autograd saves in the block, parameters apart."""
    seen = {p.untyped_storage()._cdata: p for p in model.parameters()}
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen[storage._cdata] = tensor
            sizes.append(storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


class Launches(TorchDispatchMode):
    """Kernels by name; what only looks at a tensor otherwise is none."""

    VIEWS = re.compile(
        r"(view|t|transpose|detach|_unsafe_view|expand|slice|select|unsqueeze_?|alias|as_strided"
        r"|permute|reshape|split|squeeze|empty_like|empty|lift_fresh)$"
    )

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.casts: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if not self.VIEWS.match(name):
            self.count[name] += 1
        if name == "_to_copy":
            self.casts[tuple(args[0].shape)] += 1
        return func(*args, **(kwargs or {}))


def per_block(measure: Callable[[Any], Any], build: Callable[[int], Any]) -> Any:
    """What the second block of a model adds."""
    one, two = (measure(build(layers)) for layers in (1, 2))
    return two - one


def shaped(shape: tuple[int, int, int], layers: int) -> Any:
    """A Llama of a shape without numbers' worth: few tokens, a small vocabulary."""
    width, hidden, heads = shape
    return make(
        hidden_size=width,
        intermediate_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        num_hidden_layers=layers,
    )


@pytest.mark.parametrize("method", ["full rank", "effective"])
@pytest.mark.parametrize("residual", [None, torch.bfloat16], ids=["fp32 stream", "bf16 stream"])
@pytest.mark.parametrize("name", SHAPES)
def test_bytes_that_a_block_keeps_for_a_token(name: str, residual: Any, method: str) -> None:
    width, hidden, heads = SHIPPED[name]
    ids = torch.zeros(1, 16, dtype=torch.long)

    def build(layers: int) -> Any:
        model = lean(shaped(SHIPPED[name], layers), residual=residual)
        return model if method == "full rank" else adapt(model, method, store=torch.bfloat16)

    def kept(model: Any) -> float:
        with saving(model) as sizes, half():
            model.model(input_ids=ids)
        # Autocast's copies of full rank's weights are no activations.
        copies = 2 * sum(
            p.numel() for n, p in model.model.layers.named_parameters()
            if method == "full rank" and p.ndim == 2
        )  # fmt: skip
        return (sum(sizes) - copies) / ids.numel()

    stream = 16 if residual is None else 12
    assert per_block(kept, build) == stream * width + 4 * hidden + 4 * heads


def test_in_fp32_a_block_keeps_little_more_than_half_of_the_plain_one() -> None:
    def kept(model: Any) -> float:
        with saving(model) as sizes:
            model.model(input_ids=IDS)
        return sum(sizes)

    plain = per_block(kept, lambda layers: shaped(SHIPPED["60m"], layers))
    found = per_block(kept, lambda n: adapt(lean(shaped(SHIPPED["60m"], n)), "effective"))
    assert found <= 0.56 * plain


def test_kernels_and_casts_of_a_block() -> None:
    def counted(model: Any) -> Launches:
        with constant_weights(model):
            for launches in (Launches(), Launches()):  # the second micro-batch of a step
                model.zero_grad()
                with half(), launches:
                    loss = model(input_ids=IDS, labels=IDS).loss
                with launches:
                    loss.backward()
        return launches

    def kernels(model: Any) -> int:
        return sum(counted(model).count.values())

    def build(layers: int) -> Any:
        model = lean(make(num_hidden_layers=layers))
        return adapt(model, "effective", keep=True, store=torch.bfloat16)

    assert per_block(kernels, build) <= 126
    assert per_block(kernels, lambda n: only_b(lean(make(num_hidden_layers=n)))) <= 102
    # Where W + s·B·A is formed for each micro-batch, in both passes:
    formed = per_block(kernels, lambda n: only_b(lean(make(num_hidden_layers=n)), keep=False))
    assert formed <= 116

    def casts_of_x(model: Any) -> int:
        return counted(model).casts[2, 48, WIDTH]

    # Of what comes out of attention and MLP, their gradients, where they are added in fp32.
    assert per_block(casts_of_x, build) <= 2


# --- the loss -------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most entries of a tensor, other than the head's weight, whose last axis is the
    vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tuple(tensor.shape[-1:]) == (VOCABULARY,):
                if tuple(tensor.shape) == (WIDTH, VOCABULARY):
                    continue
                self.entries = max(self.entries, tensor.numel())
        return result


@pytest.mark.parametrize("chunk", [1, 7, 10**6])
@pytest.mark.parametrize("head", ["plain", "tied", "biased"])
def test_a_chunked_loss_is_the_whole_one(head: str, chunk: int) -> None:
    def build() -> Any:
        model = make(tie_word_embeddings=head == "tied")
        if head == "biased":
            model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, VOCABULARY))
        return model

    plain, model = build(), build()
    assert make_lean(model, blocks=False, loss_chunk=chunk).loss
    labels = IDS.clone()
    labels[0, 5:9] = -100
    found = []
    for one in (plain, model):
        loss = one(input_ids=IDS, labels=labels).loss
        (2.5 * loss).backward()
        found.append(
            (loss.item(), {n: p.grad for n, p in one.named_parameters() if p.requires_grad})
        )
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    for name, right in found[0][1].items():
        assert error(found[1][1][name], right) < 2e-6, name
    with torch.no_grad():
        assert model(input_ids=IDS, labels=labels).loss.item() == pytest.approx(found[0][0], 1e-6)
        assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)


def test_no_more_logits_than_a_chunk_are_ever_there() -> None:
    model = lean(make(), loss_chunk=8)
    with Largest() as largest:
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert 0 < largest.entries <= 8 * VOCABULARY


def test_a_loss_of_no_targets_is_not_a_number_as_in_torch() -> None:
    states = torch.randn(3, 4, requires_grad=True)
    head = nn.Linear(4, 5)
    loss = next_token_loss(states, torch.full((3,), -100), head, list(head.parameters()), 2)
    assert torch.isnan(loss)


def test_buckets_are_as_large_as_what_trains() -> None:
    assert bucket_size(1_850_000) == 1_850_000
    assert bucket_size(10**9) == MOST_IN_BUCKET
    assert bucket_size(0) == 1
