"""Adapters on the weights of experts: against plain models of transformers with W + ΔW."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import relora
from ranks import Outcomes, Scenario, run_ranks
from relora.errors import ConfigError
from relora.lora.choose import describe_left, find_targets
from relora.lora.config import LoRAConfig
from relora.lora.draws import draw_a
from relora.lora.inject import add_adapters, merge_adapters, unmerge_adapters
from relora.lora.layers import adapted_layers, constant_weights
from relora.model import ModelConfig, build_model
from relora.plan.dryrun import dry_run
from relora.plan.estimate import merge_flops
from relora.plan.shape import shape_of
from relora.training.compiled import compile_blocks
from runs import checkpoint, differing, tensors, train
from test_any_model import full_rank_config
from test_layer_ranks import CYCLE, LR, STEPS, Snapshot, held
from tiny_models import EXPERTS, VOCABULARY, tiny_values

RANK, ALPHA = 2, 4.0
EPS = 1e-4  # of Adam: an expert's gradient may be little more than rounding, which it divides by
# Weights (E, out, in) beside a router; the same with two kinds of blocks; (E, in, out) with biases.
KINDS = ["mixtral", "qwen3_moe", "gpt_oss"]
WAYS = ["eager", "batched_mm", "grouped_mm"]


def plain(kind: str, way: str = "eager") -> Any:
    """A tiny model; the same numbers each time."""
    torch.manual_seed(0)
    values = tiny_values(kind)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(values.pop("model_type"), **values)
    )
    model.set_experts_implementation(way)
    return model


def adapted(kind: str, way: str = "eager", **options: Any) -> Any:
    """With adapters on whatever has them by default, filled."""
    model = plain(kind, way)
    add_adapters(model, LoRAConfig(**{"rank": RANK, "alpha": ALPHA, **options}))
    for number, (_, layer) in enumerate(adapted_layers(model)):
        nn.init.normal_(layer.lora_B, std=0.1, generator=torch.Generator().manual_seed(number))
    return model


def experts_of(model: nn.Module) -> dict[str, Any]:
    """Adapted layers of experts by the name of their weight."""
    return {
        name.removesuffix("_of_experts"): layer
        for name, layer in adapted_layers(model)
        if name.endswith("_of_experts")
    }


def delta(kind: str, layer: Any) -> Tensor:
    """s·B[e]·A[e] of each expert as it lies in the weight, in float64."""
    pairs = zip(layer.lora_B.double(), layer.lora_A.double(), strict=True)
    matrices = [layer.scale * b @ a for b, a in pairs]
    return torch.stack([m.t() if kind == "gpt_oss" else m for m in matrices])


def tokens(seed: int = 0) -> Tensor:
    """(4, 12)"""
    return torch.randint(0, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_experts_compute_the_plain_model_with_the_sums(kind: str, way: str) -> None:
    """Outputs, and the gradients of A and B by the chain rule from those of the plain weights."""
    model, whole = adapted(kind, way), plain(kind, way)
    layers = experts_of(model)
    assert len(layers) == 4  # of both blocks, in and out
    with torch.no_grad():
        for name, layer in adapted_layers(model):
            weight = (
                name.removesuffix("_of_experts") if name.endswith("experts") else f"{name}.weight"
            )
            added = (
                delta(kind, layer)
                if weight in layers
                else layer.scale * (layer.lora_B.double() @ layer.lora_A.double())
            )
            whole.get_parameter(weight).add_(added)
    one, other = (m(tokens(), labels=tokens()) for m in (model, whole))
    torch.testing.assert_close(one.logits, other.logits, rtol=1e-4, atol=1e-5)
    one.loss.backward()
    other.loss.backward()
    for name, layer in layers.items():
        gradient = whole.get_parameter(name).grad
        gradient = layer.scale * (gradient.mT if kind == "gpt_oss" else gradient)
        a, b = layer.lora_A, layer.lora_B
        torch.testing.assert_close(b.grad, gradient @ a.mT, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(a.grad, b.mT @ gradient, rtol=1e-3, atol=1e-6)
        assert layer.weight.grad is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_at_birth_experts_compute_the_same_bit_for_bit(kind: str, way: str) -> None:
    model = plain(kind, way)
    before, names = model(tokens()).logits, dict(model.named_parameters()).keys()
    add_adapters(model, LoRAConfig(rank=RANK))
    assert torch.equal(model(tokens()).logits, before)
    assert names <= dict(model.named_parameters()).keys()
    relora.remove_adapters(model)
    assert dict(model.named_parameters()).keys() == names
    assert {type(m) for m in model.modules() if hasattr(m, "_apply_gate")} == {
        type(m) for m in plain(kind).modules() if hasattr(m, "_apply_gate")
    }
    assert model.state_dict().keys() == plain(kind).state_dict().keys()


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_of_experts_changes_no_output_and_can_be_taken_back(kind: str) -> None:
    model = adapted(kind)
    for layer in experts_of(model).values():
        layer.shrink = 0.9
    start = {name: param.detach().clone() for name, param in model.named_parameters()}
    output = model(tokens()).logits
    merge_adapters(model, keep=True)
    torch.testing.assert_close(model(tokens()).logits, output, rtol=1e-4, atol=1e-5)
    assert model.state_dict().keys() == plain(kind).state_dict().keys()
    unmerge_adapters(model)
    assert all(torch.equal(param, start[name]) for name, param in model.named_parameters())
    assert torch.equal(model(tokens()).logits, output)
    twin = copy.deepcopy(model)  # whose experts read their own weights
    with torch.no_grad():
        next(iter(experts_of(model).values())).weight.zero_()
    assert torch.equal(twin(tokens()).logits, output)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_any_part_of_the_update_of_experts_is_that_part_of_the_weight(kind: str) -> None:
    layer = next(iter(experts_of(adapted(kind)).values()))
    whole = delta(kind, layer).float().flatten()
    size = whole.numel()
    cuts = [0, 1, size // EXPERTS - 1, size // EXPERTS, size // 2 + 7, size - 1, size]
    for start, stop in itertools.combinations(cuts, 2):
        part = layer.delta(layer.lora_A, layer.lora_B, layer.weight.shape, start, stop)
        torch.testing.assert_close(part, whole[start:stop], rtol=1e-5, atol=1e-6)


def test_at_full_rank_experts_reach_any_update() -> None:
    """B·A = any matrix, by its singular value decomposition."""
    model = adapted("mixtral", rank=32, alpha=32.0)
    wanted = plain("mixtral")
    with torch.no_grad():
        for name, layer in experts_of(model).items():
            torch.nn.init.normal_(wanted.get_parameter(name))
            change = (wanted.get_parameter(name) - layer.weight).double()
            u, s, vh = torch.linalg.svd(change, full_matrices=False)
            layer.lora_B.copy_(u * s[:, None])
            layer.lora_A.copy_(vh)
        for _, layer in adapted_layers(model):
            if layer.lora_A.dim() == 2:
                layer.lora_B.zero_()
    torch.testing.assert_close(
        model(tokens()).logits, wanted(tokens()).logits, rtol=1e-3, atol=1e-4
    )


# --- which, and how many --------------------------------------------------------------------------


def test_experts_have_adapters_by_default_and_by_name_with_ranks_of_their_own() -> None:
    model = plain("mixtral")
    every = find_targets(model, LoRAConfig(rank=RANK))
    experts = [name for name in every if "experts" in name]
    assert len(experts) == 4
    assert describe_left(model, LoRAConfig(rank=RANK))[0].count("gate.weight")  # routers alone
    assert find_targets(model, LoRAConfig(rank=RANK, targets=["down_proj"])) == experts[1::2]
    config = LoRAConfig(rank=RANK, rank_pattern={"down_proj": 5}, alpha_pattern={"gate_up_proj": 7})
    add_adapters(model, config)
    for name, layer in experts_of(model).items():
        count, outputs, inputs = layer.weight.shape
        rank = 5 if "down" in name else RANK
        assert layer.lora_A.shape == (count, rank, inputs)
        assert layer.lora_B.shape == (count, outputs, rank)
        assert layer.scale == (32 / 5 if "down" in name else 7 / RANK)


def test_what_experts_cannot_have_is_refused_where_named_and_else_they_train_in_full() -> None:
    model = plain("mixtral")
    for options, key in (
        ({"rank": 2, "dropout": 0.1}, "dropout"),
        ({"rank": 2, "base": "int8"}, "base"),
        ({"blocks": 4}, "blocks"),
    ):
        with pytest.raises(ConfigError, match=rf"lora.{key}: .* weights of experts; take"):
            find_targets(model, LoRAConfig(**options, targets=["down_proj"]))
        assert not any("experts" in name for name in find_targets(model, LoRAConfig(**options)))
        lines = describe_left(model, LoRAConfig(**options))
        assert any(f"weights of experts have no lora.{key}" in line for line in lines)
    add_adapters(model, LoRAConfig(rank=RANK))
    with pytest.raises(ConfigError, match=r"linear layers alone can be quantised.*experts"):
        relora.quantise_base(model, "int8")


def test_adapters_of_experts_take_turns_on_one_base() -> None:
    first, second = adapted("mixtral"), adapted("mixtral")
    for _, layer in adapted_layers(second):
        nn.init.normal_(layer.lora_B)
    output = first(tokens()).logits
    with relora.using_adapter(first, relora.adapter_of(second)):
        assert torch.equal(first(tokens()).logits, second(tokens()).logits)
    assert torch.equal(first(tokens()).logits, output)


def test_the_plan_counts_the_adapters_of_experts(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps(tiny_values("mixtral")))
    config = full_rank_config(path)
    lora = LoRAConfig(rank=RANK, rank_pattern={"down_proj": 3})
    config = config.model_copy(update={"lora": lora})
    model = plain("mixtral")
    add_adapters(model, lora)
    wanted = sorted((p.numel(), p.requires_grad) for p in model.parameters())
    assert sorted(shape_of(config).sizes(lora)) == wanted
    flops = sum(
        (2 * layer.lora_A.shape[-2] + 1) * layer.weight.numel()
        for _, layer in adapted_layers(model)
    )
    assert merge_flops(config) == flops


def test_the_plan_knows_what_forming_the_weights_of_experts_takes(tmp_path: Path) -> None:
    """By hand: their bytes once, and B·A and both its gradients once a micro-batch; no weight's own
    gradient is saved."""
    path = tmp_path / "model.json"
    path.write_text(json.dumps(tiny_values("mixtral")))
    config = full_rank_config(path)
    lora = LoRAConfig(rank=RANK, targets=["gate_up_proj", "down_proj"])
    config = config.model_copy(update={"lora": lora})
    full, found = dry_run(config, False), dry_run(config, True)
    entries = 2 * EXPERTS * (64 * 2 * 32 + 32 * 64)
    assert found.activations - full.activations == 4 * entries
    tokens = config.batch.micro_batch_size * config.data.sequence_length
    more = found.forward + found.backward - full.forward - full.backward
    assert more == pytest.approx(3 * 2 * RANK * entries / tokens)


# --- on ranks -------------------------------------------------------------------------------------


def begin(kind: str, stage: int, base: torch.dtype) -> tuple[Any, relora.EngineState]:
    """An engine with adapters by default, whose experts multiply in groups."""
    import deepspeed

    model = plain(kind, "grouped_mm")
    relora.add_adapters(model, relora.LoRAConfig(rank=RANK, alpha=ALPHA))
    for _, layer in relora.adapted_layers(model):
        layer.weight.data = layer.weight.data.to(base)
    optimizer = torch.optim.AdamW(relora.parameter_groups(model), lr=LR, eps=EPS)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 0.0,  # else it is 1
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage},
            "torch_autocast": {"enabled": base is torch.bfloat16, "dtype": "bfloat16"},
        },
        dist_init_required=False,
    )
    return engine, relora.EngineState(engine)


def go_on(engine: Any, state: Any, ranks: Any, first: int, last: int) -> None:
    """Updates first + 1 … last, with a merge after each cycle."""
    for step in range(first, last):
        x = tokens(step)[ranks.rank :: ranks.world]
        engine.backward(engine(x, labels=x).loss)
        engine.step()
        if (step + 1) % CYCLE == 0 and step + 1 < STEPS:
            reset = relora.ResetConfig(mode="zero")
            report = relora.merge_and_restart(state, (step + 1) // CYCLE, 0, reset)
            assert report.rounding_loss == 0


def train_experts(ranks: Any, kind: str, stage: int) -> dict[str, Any]:
    """A whole run, and one that goes on in another engine from the merge after update 6."""
    engine, state = begin(kind, stage, torch.float32)
    go_on(engine, state, ranks, 0, 2 * CYCLE)
    snapshot = Snapshot(state)
    go_on(engine, state, ranks, 2 * CYCLE, STEPS)
    whole = held(state)
    engine.destroy()
    engine, state = begin(kind, stage, torch.float32)
    state.restore_(snapshot)
    go_on(engine, state, ranks, 2 * CYCLE, STEPS)
    resumed = held(state)
    engine.destroy()
    return {"values": whole, "same": [n for n in whole if torch.equal(whole[n], resumed[n])]}


def merge_into_bf16(ranks: Any, kind: str, stage: int) -> float:
    """The largest relative error of ten merged cycles in a bf16 base, beside sums in float64."""
    engine, state = begin(kind, stage, torch.bfloat16)
    layers = experts_of(engine.module)
    exact = {name: held(state)[name].double() for name in layers}
    for merge in range(1, 11):
        x = tokens(merge)[ranks.rank :: ranks.world]
        engine.backward(engine(x, labels=x).loss)
        engine.step()
        values = held(state)
        for name in layers:
            a, b = (values[f"{name}_of_experts.lora_{x}"].double() for x in "AB")
            change = ALPHA / RANK * torch.einsum("eor,eri->eoi", b, a)
            exact[name] += change.mT if kind == "gpt_oss" else change
        relora.merge_and_restart(state, merge)
    values = held(state)
    engine.destroy()
    errors = [(values[n].double() - exact[n]).norm() / exact[n].norm() for n in layers]
    return float(max(errors))


def reference(kind: str) -> dict[str, Tensor]:
    """The same in float64, in plain PyTorch: eager experts of a plain model with W + s·B·A."""
    model = plain(kind).double()
    shapes = {
        n: [tuple(x.lora_A.shape), tuple(x.lora_B.shape)] for n, x in adapted_layers(adapted(kind))
    }
    weight_of = {
        n: n.removesuffix("_of_experts") if "experts" in n else f"{n}.weight" for n in shapes
    }
    base = {n: model.get_parameter(w).detach().clone() for n, w in weight_of.items()}

    def draw(name: str, merge: int) -> Tensor:
        shape = torch.Size(shapes[name][0])
        return draw_a(shape, 0, merge, f"{name}.lora_A").double()

    def added(name: str) -> Tensor:
        change = ALPHA / RANK * torch.matmul(b[name], a[name])
        return change.mT if kind == "gpt_oss" and "experts" in name else change

    a = {name: draw(name, 0).requires_grad_(True) for name in shapes}
    b = {n: torch.zeros(size).double().requires_grad_(True) for n, (_, size) in shapes.items()}
    others = {n: p for n, p in model.named_parameters() if n not in weight_of.values()}
    adam = torch.optim.AdamW(
        [*a.values(), *b.values(), *others.values()], LR, weight_decay=0.0, eps=EPS
    )
    for step in range(STEPS):
        x = tokens(step)
        weights = {weight_of[name]: base[name] + added(name) for name in shapes}
        adam.zero_grad()
        torch.func.functional_call(model, weights, (x,), {"labels": x}).loss.backward()
        adam.step()
        if (step + 1) % CYCLE == 0 and step + 1 < STEPS:
            for name in shapes:
                base[name] += added(name).detach()
                a[name].data = draw(name, (step + 1) // CYCLE)
                b[name].data.zero_()
                for factor in (a[name], b[name]):
                    for key in ("exp_avg", "exp_avg_sq"):
                        adam.state[factor][key].zero_()
    found = {weight_of[name]: base[name] for name in shapes}
    for letter, factors in (("A", a), ("B", b)):
        found |= {f"{name}.lora_{letter}": x.detach() for name, x in factors.items()}
    return found | {name: param.detach() for name, param in others.items()}


FAST = [("mixtral", 3)]
CELLS = [(kind, stage) for kind in ("mixtral", "gpt_oss") for stage in (0, 1, 2, 3)]


def launch(cells: list[tuple[str, int]]) -> Outcomes:
    """Both scenarios of some cells on two ranks."""
    wanted = [Scenario(f"train {k} {s}", train_experts, (k, s)) for k, s in cells]
    wanted += [Scenario(f"bf16 {k} {s}", merge_into_bf16, (k, s)) for k, s in cells]
    return run_ranks(2, wanted, 300)


def check(outcomes: Outcomes, cells: list[tuple[str, int]]) -> None:
    """Values as in float64 also after the updates that follow a merge; resumed ones bit for bit."""
    for kind, stage in cells:
        expected = reference(kind)
        for found in outcomes[f"train {kind} {stage}"]:
            assert found["values"].keys() == expected.keys()
            for name, right in expected.items():
                scale = right.abs().max().clamp_min(1e-3)
                error = (found["values"][name].double() - right).abs().max() / scale
                assert error < 3e-5, (kind, stage, name, float(error))
            assert found["same"] == list(found["values"])
        assert max(outcomes[f"bf16 {kind} {stage}"]) < 1e-6


def test_experts_train_merge_and_resume_on_two_ranks_as_in_float64() -> None:
    check(launch(FAST), FAST)


@pytest.mark.slow
def test_experts_train_merge_and_resume_on_every_stage_as_in_float64() -> None:
    rest = [one for one in CELLS if one not in FAST]
    check(launch(rest), rest)


# --- in blocks and runs ---------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_gradient_checkpointing_changes_no_gradient_of_experts(way: str) -> None:
    model = adapted("mixtral", way).train()
    again = copy.deepcopy(model)
    again.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for one in (model, again):
        one(tokens(), labels=tokens()).loss.backward()
    # The batched product's gradient of a weight is a sum by index, whose order torch leaves open.
    rtol, atol = (1e-5, 1e-7) if way == "batched_mm" else (0.0, 0.0)
    for param, other in zip(model.parameters(), again.parameters(), strict=True):
        if param.grad is not None:
            torch.testing.assert_close(other.grad, param.grad, rtol=rtol, atol=atol)


def test_compiled_blocks_with_experts_have_the_same_gradients() -> None:
    """Also where decay has shrunk W since the last merge, without compiling anew."""
    model = adapted("mixtral", "batched_mm").train()
    compiled = copy.deepcopy(model)
    compile_blocks(compiled, torch.float32, backend="aot_eager")
    for shrink in (1.0, 0.9):
        for one in (model, compiled):
            one.zero_grad()
            for _, layer in adapted_layers(one):
                layer.shrink = shrink
            with constant_weights(one):
                one(tokens(), labels=tokens()).loss.backward()
        for param, other in zip(model.parameters(), compiled.parameters(), strict=True):
            if param.grad is not None:
                torch.testing.assert_close(other.grad, param.grad, rtol=1e-4, atol=1e-6)


def test_in_half_precision_experts_multiply_in_it_and_their_factors_train_in_fp32() -> None:
    model = adapted("mixtral", "grouped_mm")
    for layer in experts_of(model).values():
        layer.weight.data = layer.weight.data.bfloat16()
        made = layer(layer.weight)
        assert made.dtype == torch.bfloat16
        exact = layer.weight.double() + delta("mixtral", layer)
        assert (made.double() - exact).norm() / exact.norm() < 2**-8
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    assert all(x.lora_B.grad.dtype == torch.float32 for x in experts_of(model).values())


def test_a_run_with_experts_resumes_and_measures_each_expert(tmp_path: Path) -> None:
    """Singular values of each are those of its update since the start, from the checkpoints."""
    path = tmp_path / "mixtral.json"
    path.write_text(json.dumps(tiny_values("mixtral")))
    options = [
        f"model.config={path}",
        "warm_start=null",
        f"lora={{rank: {RANK}, alpha: {ALPHA}}}",
        "spectra={every: 7}",
        "train.steps=14",
        "train.save_every=7",
        "train.keep_checkpoints=9",
    ]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(whole, *options) == 0
    assert train(cut, *options, "train.stop_after=9") == 75  # behind a merge
    assert train(cut, *options) == 0
    assert differing(checkpoint(whole, 14), checkpoint(cut, 14)) == []
    first = build_model(ModelConfig(config=path), seed=1)
    start, end = dict(first.double().named_parameters()), values_of(checkpoint(whole, 14))
    with safe_open(whole / "spectra" / "step_00000014.safetensors", "pt") as file:
        rows = {row["name"]: row for row in json.loads(file.metadata()["layers"])}
        for layer in (0, 1):
            for name in ("gate_up_proj", "down_proj"):
                weight = f"model.layers.{layer}.mlp.experts.{name}"
                a, b = (end[f"{weight}_of_experts.lora_{letter}"] for letter in "AB")
                scale = ALPHA / RANK
                for expert in range(EXPERTS):
                    key = f"{weight}_of_experts[{expert}]"
                    cycle = scale * b[expert] @ a[expert]
                    total = end[weight][expert] + cycle - start[weight][expert].detach()
                    for kind, matrix in (("cycle", cycle), ("total", total)):
                        right = torch.linalg.svdvals(matrix)
                        found = file.get_tensor(f"{key}|{kind}_values").double()
                        torch.testing.assert_close(found, right[: len(found)], rtol=1e-4, atol=1e-6)
                    assert rows[key]["total_norm"] == pytest.approx(float(total.norm()), rel=1e-4)


def values_of(directory: Path) -> dict[str, Tensor]:
    """What a checkpoint holds, in float64."""
    shapes = json.loads((directory / "state.json").read_text())["shapes"]
    return {
        name: flat.double().view(shapes[name])
        for (name, kind), flat in tensors(directory).items()
        if kind == "value"
    }
