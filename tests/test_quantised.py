"""A quantised base: its codes, the layers that read them, and merges that lose nothing by them."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import relora
from ranks import Unasked, on_ranks
from relora.errors import ConfigError, NumericsError
from relora.lora.layers import AdaptedLayer, adapted_layers, constant_weights
from relora.lora.quantised import Kind, QuantisedWeight, exact_base
from relora.restart.invariants import check_copies
from relora.restart.restart import merge_and_restart
from runs import checkpoint, differing, same_bits, series, tensors, train
from runs import relora as run_relora
from test_graphs import error, half, one_layer, pass_through
from test_method_reference import make_run_dir, shards
from test_method_reference import settings as config_of

KINDS: tuple[Kind, ...] = ("int8", "fp8", "nf4")

# --- codes ----------------------------------------------------------------------------------------


def numbers_of(kind: Kind) -> np.ndarray:
    """What codes of a kind can stand for before they are scaled, by the standards' own words."""
    if kind == "int8":
        return np.arange(-127, 128) / 127
    if kind == "nf4":  # bitsandbytes' table, as QLoRA's appendix E has it
        return np.array([
            -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
            -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
            0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
            0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
        ])  # fmt: skip
    # OCP 8-bit floating point, E4M3: bias 7, no infinities, 448 the largest.
    positive = [m / 8 * 2.0**-6 for m in range(8)]
    positive += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][:-1]
    return np.array(sorted({*positive, *(-x for x in positive)})) / 448


def nearest(weight: np.ndarray, kind: Kind) -> tuple[np.ndarray, np.ndarray]:
    """(what is nearest to each entry of all that its block can hold, how far it is), in float64."""
    flat = weight.astype(np.float64).ravel()
    values = np.zeros_like(flat)
    for start in range(0, flat.size, 64):
        block = flat[start : start + 64]
        choices = numbers_of(kind) * np.abs(block).max()
        values[start : start + 64] = choices[np.abs(block[:, None] - choices).argmin(1)]
    return values.reshape(weight.shape), np.abs(values - flat).reshape(weight.shape)


def some_weight(rows: int, columns: int) -> Tensor:
    """Blocks of all sizes, one of them zero, and one of subnormal numbers."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    flat = weight.view(-1)
    for block in range(0, flat.numel(), 64):
        flat[block : block + 64] *= 10.0 ** (block // 64 % 9 - 4)
    flat[64:128] = 0
    flat[128:192] = torch.randn(64, generator=generator) * 1e-42
    return weight


@pytest.mark.parametrize("shape", [(16, 64), (37, 29), (1, 3)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_each_entry_becomes_the_nearest_that_its_block_can_hold(
    kind: Kind, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = some_weight(16, 128)[: shape[0], : shape[1]].clone() if shape[0] < 2 else (
        some_weight(*shape)
    )  # fmt: skip
    quantised = QuantisedWeight(weight, kind)
    quantised.take_(weight)
    found = quantised.values(torch.float64).numpy()
    expected, distance = nearest(weight.numpy(), kind)
    blocks = np.repeat([np.abs(b).max() for b in split_blocks(weight)], 64)[: weight.numel()]
    largest = blocks.reshape(weight.shape)
    normal = largest > 1e-30  # below, scales themselves are rounded
    # In halves between two, either is nearest; else it is the reference's choice, rounded to fp32.
    error = np.abs(found - weight.numpy())
    assert (error[normal] <= (distance + 3e-7 * largest)[normal]).all()
    same = np.abs(found - expected) <= 3e-7 * largest
    assert same[normal].mean() > 0.999
    assert np.isfinite(found).all()
    assert (error <= largest).all()
    assert not found[largest == 0].any()
    # In pieces it is the same.
    monkeypatch.setattr("relora.lora.quantised.AT_A_TIME", 3)
    again = QuantisedWeight(weight, kind)
    again.take_(weight)
    assert torch.equal(again.codes, quantised.codes)
    assert torch.equal(again.scales, quantised.scales)


def split_blocks(weight: Tensor) -> list[np.ndarray]:
    flat = weight.double().numpy().ravel()
    return [flat[start : start + 64] for start in range(0, flat.size, 64)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_stays_within_its_bound_and_the_bytes_are_few(kind: Kind) -> None:
    weight = torch.randn(512, 256, generator=torch.Generator().manual_seed(1))
    quantised = QuantisedWeight(weight, kind)
    quantised.take_(weight)
    error = (quantised.values(torch.float64) - weight.double()).abs().view(-1, 64)
    largest = weight.double().abs().view(-1, 64).amax(1, keepdim=True)
    bound = {
        "int8": largest / 254,
        # half a step of 3 bits of mantissa, and of what lies below the least normal number
        "fp8": (weight.double().abs().view(-1, 64) / 16).maximum(largest / 448 / 1024),
        "nf4": largest * (1 - 0.6961928) / 2,
    }[kind]
    assert (error <= bound * (1 + 1e-5)).all()
    relative = float(error.norm() / weight.norm())
    print(f"{kind}: relative error {relative:.2%} of normal weights")
    assert {"int8": 5e-3, "fp8": 2e-2, "nf4": 7e-2}[kind] < relative * 1.5
    assert relative < {"int8": 7e-3, "fp8": 3e-2, "nf4": 1e-1}[kind]
    size = quantised.codes.nbytes + quantised.scales.nbytes
    assert size == weight.numel() * (0.5 if kind == "nf4" else 1) + weight.numel() / 64 * 4


@pytest.mark.parametrize("kind", KINDS)
def test_quantising_what_was_dequantised_changes_nothing(kind: Kind) -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    quantised = QuantisedWeight(weight, kind)
    quantised.take_(weight)
    values = quantised.values(torch.float32)
    quantised.take_(values)
    assert error(quantised.values(torch.float32), values) < 1e-6


# --- one layer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [False, True], ids=["formed", "kept"])
@pytest.mark.parametrize("graph", ["low_rank", "effective"])
@pytest.mark.parametrize("layer_kind", ["linear", "conv1d"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_graph_is_that_of_a_layer_with_the_dequantised_weight(
    kind: Kind, layer_kind: str, graph: str, kept: bool
) -> None:
    x = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(0))
    layer: Any = one_layer(layer_kind, graph)
    exact: Any = one_layer(layer_kind, "low_rank", torch.float64)
    values, _ = nearest(layer.weight.numpy(), kind)
    exact.weight.data = torch.from_numpy(values)
    layer.quantise_(kind)
    layer.keeps_effective = kept
    right = pass_through(exact, x.double())
    with constant_weights(layer):
        found = pass_through(layer, x)
    for mine, expected in zip(found, right, strict=True):
        assert error(mine, expected) < 1e-6
    # Left out of the products, the codes leave what the weight itself gives.
    plain: Any = one_layer(layer_kind, graph)
    with exact_base(layer):
        assert torch.equal(layer(x), plain(x))
    assert error(layer(x).detach(), plain(x).detach()) > 1e-4


@pytest.mark.parametrize("graph", ["low_rank", "effective"])
@pytest.mark.parametrize("kind", KINDS)
def test_in_half_precision_it_errs_as_a_bf16_base_of_these_values_does(
    kind: Kind, graph: str
) -> None:
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(0))
    layer: Any = one_layer("linear", graph)
    layer.quantise_(kind)
    bf16: Any = one_layer("linear", graph)
    bf16.weight.data = layer.quantised.values(torch.bfloat16)
    pairs = zip(pass_through(layer, x, True), pass_through(bf16, x, True), strict=True)
    for number, (mine, theirs) in enumerate(pairs):
        if number == 1 and graph == "low_rank":  # two summands of x's gradient, rounded elsewhere
            assert error(mine, theirs) < 2.0**-8
        else:
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("graph", ["low_rank", "effective"])
def test_the_backward_pass_finds_no_dequantised_weight_saved(graph: str) -> None:
    layer: Any = one_layer("linear", graph)
    layer.quantise_("nf4")
    x = torch.randn(64, 24, requires_grad=True)
    sizes = []
    parameters = {p.data_ptr() for p in layer.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), half():
        layer(x)
    # x in bf16 (and not twice), A and B in bf16, and x Aᵀ as it is and scaled: no W of 40 × 24.
    small = {2 * 64 * 24, 2 * 5 * 24, 2 * 40 * 5, 2 * 64 * 5}
    assert set(sizes) <= small
    assert sizes.count(2 * 64 * 24) == 1


# --- merges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_requantising_without_exact_values_would_keep_little(kind: Kind) -> None:
    """What carrying the exact values is for: each merge adds 1e-4 of W, fifty times."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(256, 128, generator=generator)
    quantised = QuantisedWeight(start, kind)
    quantised.take_(start)
    first = quantised.values(torch.float32)
    wanted = torch.zeros(256, 128, dtype=torch.float64)
    for _ in range(50):
        delta = torch.randn(256, 128, generator=generator) * 1e-4
        wanted += delta
        quantised.take_(quantised.values(torch.float32) + delta)
    moved = quantised.values(torch.float64) - first
    kept = float((moved * wanted).sum() / wanted.square().sum())
    print(f"{kind}: fifty merges of 1e-4 by requantising keep {kept:.1%}")
    assert abs(kept) < 0.3


def small_model() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 20))


@pytest.mark.parametrize("kind", KINDS)
def test_in_ones_own_loop_a_quantised_base_merges_exactly(kind: Kind) -> None:
    outputs = {}
    for base in (None, kind):
        model = small_model()
        relora.add_adapters(model, relora.LoRAConfig(rank=3, targets=["0", "2"]))
        if base:
            relora.quantise_base(model, base)
        optimizer = torch.optim.AdamW(relora.parameter_groups(model), lr=1e-3)
        state = relora.EngineState(model, optimizer)
        assert all(key.endswith(("weight", "bias", "_A", "_B")) for key in model.state_dict())
        for merge in range(1, 51):
            generator = torch.Generator().manual_seed(merge)
            for name, _ in adapted_layers(model):
                b = torch.randn(state[f"{name}.lora_B"].shape, generator=generator)
                state[f"{name}.lora_B"].write_(b * 1e-5)
            relora.merge_and_restart(state, merge)
        for name, layer in adapted_layers(model):
            outputs[base, name] = layer.weight.detach().clone()
            if base:
                right, _ = nearest(layer.weight.detach().numpy(), kind)
                read = layer.base(torch.float64).numpy()
                assert np.abs(read - right).max() < 1e-5, "what is read follows the merges"
        relora.merge_adapters(model)
        assert type(model[0]) is nn.Linear
        outputs[base, "out"] = model(torch.ones(2, 20)).detach()
        assert model[0].weight.requires_grad
    for what in ("0", "2", "out"):
        assert torch.equal(outputs[None, what], outputs[kind, what]), what
    assert not torch.equal(outputs[kind, "0"], small_model()[0].weight)


def test_taking_adapters_off_gives_back_the_weights_in_their_dtype() -> None:
    model = small_model().bfloat16()
    before = copy.deepcopy(model.state_dict())
    relora.add_adapters(model, relora.LoRAConfig(rank=3, targets=["0", "2"]))
    relora.quantise_base(model, "nf4")
    assert model[0].weight.dtype == torch.float32
    relora.remove_adapters(model)
    for name, value in model.state_dict().items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, before[name])


def test_partitioned_weights_are_refused_by_name() -> None:
    model = small_model()
    relora.add_adapters(model, relora.LoRAConfig(rank=3, targets=["0", "2"]))
    model[2].weight.data = torch.empty(0)
    with pytest.raises(ConfigError, match="2: its weight is partitioned over ranks"):
        relora.quantise_base(model, "int8")
    assert model[0].quantised is None, "nothing is done by half"


# --- on engines -----------------------------------------------------------------------------------

SCALE = 1.5


def started(ranks: Any, model: Path, run_dir: Path, stage: int, base: str | None) -> Any:
    """A run with adapters after one update, between merges."""
    from relora.training.loop import train_run
    from relora.training.start import start_run

    changes = {
        "deepspeed.zero_stage": stage,
        "batch.micro_batch_size": 1,
        "warm_start": None,
        "train.steps": 7,
        "train.stop_after": 1,
        "lora.base": base,
    }
    config = config_of(str(model), str(run_dir), changes)
    make_run_dir(config, ranks)
    run = start_run(config, shards(), ranks)  # type: ignore[arg-type]
    train_run(run, Unasked())  # type: ignore[arg-type]
    run.metrics.close()
    return run


def layers_of(run: Any) -> Iterator[tuple[str, AdaptedLayer]]:
    yield from adapted_layers(run.engine.module)


def fifty_merges(ranks: Any, model: Path, root: Path, stage: int) -> dict[str, Any]:
    """Base weights after the same fifty merges of 1e-4, by base and name; in float64 as `truth`."""
    found: dict[str, Any] = {}
    for base in (None, *KINDS):
        run = started(ranks, model, root / f"{stage}_{base}", stage, base)
        state = run.state
        first = {n: v.weight.detach().clone() for n, v in layers_of(run)}
        if base is None:
            kept = first
            truth = {n: w.double() for n, w in first.items()}
        for name, layer in layers_of(run):
            view = state[f"{name}.weight"]
            view.write_(kept[name])  # the same start for all
            layer.requantise_()
        for merge in range(1, 51):
            generator = torch.Generator().manual_seed(merge)
            for name, _ in layers_of(run):
                a = state.gather([state[f"{name}.lora_A"]], "value")[0].double()
                b = torch.randn(state[f"{name}.lora_B"].shape, generator=generator)
                whole = SCALE * b.double() @ a
                b *= 1e-4 * kept[name].double().norm() / whole.norm()
                state[f"{name}.lora_B"].write_(b)
                if base is None:
                    truth[name] += SCALE * b.double() @ a
            merge_and_restart(state, merge, seed=5)
            check_copies(state, merge)
        found[str(base)] = {n: v.weight.detach().clone() for n, v in layers_of(run)}
        if base:
            read = {n: v.base(torch.float64) for n, v in layers_of(run)}
            found[f"read {base}"] = {n: w.numpy() for n, w in read.items()}
        if base == "nf4" and ranks.world > 1:
            name, layer = next(layers_of(run))
            if ranks.rank == 1:
                layer.quantised.codes[0, 0] ^= 1  # type: ignore[union-attr]
            with pytest.raises(NumericsError) as problem:
                check_copies(state, 51)
            found["tampered"] = (name, str(problem.value))
    found["start"], found["truth"] = kept, truth
    return found


@pytest.fixture(scope="module")
def two(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """stage → what each of 2 ranks found."""
    root = tmp_path_factory.mktemp("quantised")
    return cache(lambda stage: on_ranks(2, fifty_merges, tiny_llama, root, stage, timeout=240))


STAGES = [pytest.param(0, marks=pytest.mark.slow), 2]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_fifty_merges_into_a_quantised_base_are_those_into_fp32_bit_for_bit(
    kind: Kind, stage: int, two: Any
) -> None:
    for found in two(stage):
        assert len(found[kind]) == 14
        for name, weight in found[kind].items():
            assert weight.dtype == torch.float32
            assert same_bits(weight, found["None"][name]), name
            moved = found["truth"][name] - found["start"][name].double()
            lost = weight.double() - found["truth"][name]
            assert lost.norm() < 2e-3 * moved.norm(), "what fp32 itself rounds away"
            right, _ = nearest(weight.numpy(), kind)
            size = np.abs(right).max()
            assert np.mean(np.abs(found[f"read {kind}"][name] - right) < 1e-6 * size) > 0.999


@pytest.mark.parametrize("stage", STAGES)
def test_codes_that_differ_between_ranks_are_noticed_by_name(stage: int, two: Any) -> None:
    for found in two(stage):
        name, message = found["tampered"]
        assert f"ranks hold different values of {name}.weight" in message


# --- whole runs -----------------------------------------------------------------------------------


def lora(base: str | None, **more: Any) -> dict[str, Any]:
    return {"rank": 4, "alpha": 8, "base": base, **more}


def zero(stage: int, precision: str, **more: Any) -> dict[str, Any]:
    return {"zero_stage": stage, "precision": precision, **more}


@pytest.mark.parametrize(
    ("base", "stage", "precision"),
    [
        ("nf4", 2, "bf16"),
        ("int8", 0, "fp32"),
        pytest.param("fp8", 1, "fp16", marks=pytest.mark.slow),
        pytest.param("int8", 2, "A frozen", marks=pytest.mark.slow),
        pytest.param("nf4", 1, "deepspeed_bf16", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_goes_on_bit_for_bit(
    base: str, stage: int, precision: str, tmp_path: Path
) -> None:
    changes = {"lora": lora(base), "deepspeed": zero(stage, precision)}
    if precision == "A frozen":
        precision = "bf16"
        changes = {"lora": lora(base, train="b"), "deepspeed": zero(stage, precision)}
    assert train(tmp_path / "whole", **changes) == 0
    for stop in (11, 13):  # before and after a merge
        assert train(tmp_path / "cut", f"train.stop_after={stop}", **changes) == 75
    assert train(tmp_path / "cut", **changes) == 0
    losses = series(tmp_path / "whole", "train/loss")
    assert len(losses) == 24
    assert series(tmp_path / "cut", "train/loss") == losses
    assert differing(checkpoint(tmp_path / "whole", 24), checkpoint(tmp_path / "cut", 24)) == []
    deviations = series(tmp_path / "whole", "relora/probe_deviation")
    assert set(deviations) == {12, 18}
    assert max(deviations.values()) < (1e-5 if precision == "fp32" else 5e-2)


def test_how_a_layer_is_computed_changes_no_bit(tmp_path: Path) -> None:
    """In fp32: kept or formed anew, with checkpointing, with the optimizer offloaded."""
    ways: dict[str, dict[str, Any]] = {
        "plain": {"lora": lora("nf4")},
        "kept": {"lora": lora("nf4", graph="effective", keep_effective=True)},
        "again": {"lora": lora("nf4"), "model__gradient_checkpointing": True},
        "offload": {"lora": lora("nf4"), "deepspeed": zero(1, "fp32", offload_optimizer=True)},
    }
    losses = {}
    for name, changes in ways.items():
        assert train(tmp_path / name, "train.stop_after=14", **changes) == 75
        losses[name] = series(tmp_path / name, "train/loss")
    assert losses["kept"] == losses["again"] == losses["plain"]
    for step, loss in losses["offload"].items():
        assert loss == pytest.approx(losses["plain"][step], rel=1e-6)


def test_a_run_goes_on_with_another_base_from_the_same_exact_weights(tmp_path: Path) -> None:
    run, bf16 = tmp_path / "run", {"deepspeed": zero(1, "bf16")}
    order = [("int8", 13), (None, 14), ("nf4", 15), ("fp8", 16), (None, 17)]
    for base, stop in order:
        assert train(run, f"train.stop_after={stop}", lora=lora(base), **bf16) == 75
    saved = {stop: tensors(checkpoint(run, stop)) for stop in (15, 16, 17)}
    for (name, kind), first in saved[15].items():
        if name.endswith("proj.weight"):  # no merge in between
            assert same_bits(first, saved[16][name, kind])
            assert same_bits(first, saved[17][name, kind])
    b = next(key for key in saved[15] if key[0].endswith("lora_B"))
    assert not same_bits(saved[15][b], saved[17][b]), "and the rest goes on"


def test_exports_evaluation_and_text_come_from_the_exact_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    run = tmp_path / "run"
    assert train(run, "train.stop_after=15", lora=lora("nf4"), deepspeed=zero(2, "bf16")) == 75
    assert run_relora("export", run, "--to", tmp_path / "export") == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export").state_dict()
    held = tensors(checkpoint(run, 15))
    adapted = [name for name, _ in held if name.endswith("proj.weight")]
    assert len(adapted) == 14
    for name in adapted:
        layer, shape = name.removesuffix(".weight"), exported[name].shape
        a = held[f"{layer}.lora_A", "value"].view(4, -1).double()
        b = held[f"{layer}.lora_B", "value"].view(-1, 4).double()
        merged = held[name, "value"].view(shape).double() + 2 * b @ a
        assert error(exported[name], merged) < 1e-6
    capsys.readouterr()
    assert run_relora("evaluate", run) == 0
    loss = float(re.findall(r"loss ([\d.]+)", capsys.readouterr().out)[0])
    assert loss == pytest.approx(series(run, "eval/loss")[12], rel=0.3)
    assert run_relora("generate", run, "--prompt", "def", "--max-new-tokens", "8") == 0
