"""Whole runs with an adapted embedding and ranks by name: resumed, measured, planned, exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ranks import Scenario, run_ranks
from relora.load import load_config
from relora.lora.config import LoRAConfig
from relora.lora.inject import add_adapters
from relora.lora.layers import adapted_layers, constant_weights
from relora.model import build_model
from relora.plan.estimate import bytes_per_step, flops_per_token, memory_by_part, merge_flops
from relora.plan.shape import shape_of
from relora.record.spectra_files import read_tensors
from relora.training.spectra import measure_layer
from relora.training.start import equip
from runs import checkpoint, make_config, relora, tensors, train
from test_estimate import LLAMA, config_of, measure
from test_layer_kinds import CASES, adapted
from test_resume import LAST, assert_same_run, legs

LORA: dict[str, Any] = {
    "rank": 3,
    "alpha": 6.0,
    "targets": ["embed_tokens", "q_proj", "down_proj"],
    "rank_pattern": {"embed_tokens": 5, "1.self_attn.q_proj": 2},
    "alpha_pattern": {"down_proj": 12.0},
}
RUN: dict[str, Any] = {"lora": LORA, "spectra": {"every": 6}, "train__save_every": 6}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that never stopped."""
    run_dir = tmp_path_factory.mktemp("layer_runs") / "whole"
    assert train(run_dir, **RUN, train__keep_every=6) == 0
    return run_dir


def values_at(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Values of a checkpoint, in their shapes, in float64."""
    config = load_config(make_config(run_dir, **RUN))
    assert config.lora is not None
    model = build_model(config.model, config.seed)
    add_adapters(model, config.lora)
    flat = tensors(checkpoint(run_dir, step))
    return {
        name: flat[name, "value"].double().view(param.shape)
        for name, param in model.named_parameters()
        if (name, "value") in flat
    }


def test_stops_in_a_cycle_and_on_a_merge_leave_no_trace(whole: Path, tmp_path: Path) -> None:
    for stop in (8, 12, None):
        options = {**RUN, "train__keep_every": 6, "train__stop_after": stop}
        assert train(tmp_path / "cut", **options) == (75 if stop else 0)
    assert_same_run(tmp_path / "cut", whole)


def test_spectra_are_of_the_update_of_each_layer_at_its_rank(whole: Path) -> None:
    measured = read_tensors(whole, LAST)
    start, end = (values_at(whole, step) for step in (6, LAST))
    config = LoRAConfig(**LORA)
    for name in ("model.embed_tokens", "model.layers.1.self_attn.q_proj"):
        own, (a, b) = config.for_layer(name), (end[f"{name}.lora_{x}"] for x in "AB")
        values = np.linalg.svd(own.scale * b.numpy() @ a.numpy())[1]
        found = measured[f"{name}|cycle_values"].double().numpy()
        assert own.rank == len(a) == {"model.embed_tokens": 5}.get(name, 2)
        assert found[: own.rank] == pytest.approx(values[: own.rank], rel=1e-4)
        update = own.scale * (b @ a)
        moved = end[f"{name}.weight"] - start[f"{name}.weight"]
        moved = moved + (update.t() if "embed" in name else update)
        values = np.linalg.svd(moved.numpy())[1]
        found = measured[f"{name}|total_values"].double().numpy()
        count = min(len(found), 3 * own.rank)  # cycles
        assert found[:count] == pytest.approx(values[:count], rel=1e-3)
        assert values[count] < 1e-4 * values[0]


@pytest.mark.parametrize("case", CASES)
def test_spectra_of_any_kind_are_numpys(case: str) -> None:
    layer, _ = adapted(case, torch.float32)
    held = [layer.weight.detach(), layer.lora_A.detach(), layer.lora_B.detach()]
    start = torch.zeros_like(layer.weight)
    figures, found = measure_layer(layer, held, start, None, count=2)
    matrix = layer.matrix(layer.weight).detach().double()
    update = layer.scale * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    for name, whole in (("cycle", update), ("total", matrix + update)):
        values = np.linalg.svd(whole.numpy())[1]
        size = len(found[f"{name}_values"])
        assert found[f"{name}_values"].numpy() == pytest.approx(values[:size], rel=1e-4, abs=1e-5)
        assert figures[f"{name}_norm"] == pytest.approx(float(whole.norm()), rel=1e-4)


def test_the_planner_counts_what_the_model_has(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_config(whole, **RUN)
    config = load_config(path)
    assert config.lora is not None
    model = build_model(config.model, config.seed)
    names = add_adapters(model, config.lora)
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    shape = shape_of(config)
    assert sorted(n for n, trains in shape.sizes(config.lora) if trains) == sorted(trained)
    assert sum(n for n, _ in shape.sizes(config.lora)) == sum(p.numel() for p in model.parameters())
    flops = sum(
        (2 * layer.lora_A.shape[0] + 1) * layer.weight.numel() for _, layer in adapted_layers(model)
    )
    assert len(names) == 5
    assert merge_flops(config) == flops
    assert relora("plan", path) == 0
    plan = capsys.readouterr().out
    factors = sum(x.lora_A.numel() + x.lora_B.numel() for _, x in adapted_layers(model))
    assert f"adapters                  {factors:,}".split() == next(
        line.split()[:2] for line in plan.splitlines() if line.strip().startswith("adapters ")
    )


def test_the_export_is_the_plain_model_with_the_sums(whole: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert relora("export", whole, "--to", tmp_path / "export") == 0
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "export").state_dict()
    end, config = values_at(whole, LAST), LoRAConfig(**LORA)
    for name in ("model.embed_tokens", "model.layers.0.mlp.down_proj"):
        a, b = (end[f"{name}.lora_{x}"] for x in "AB")
        update = config.for_layer(name).scale * b @ a
        expected = end[f"{name}.weight"] + (update.t() if "embed" in name else update)
        torch.testing.assert_close(found[f"{name}.weight"].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_two_ranks_stops_leave_no_trace(stage: int, precision: str, tmp_path: Path) -> None:
    options = {**RUN, "deepspeed__zero_stage": stage, "deepspeed__precision": precision}
    runs = {name: make_config(tmp_path / name, **options) for name in ("whole", "cut")}
    outcomes = run_ranks(
        2,
        [
            Scenario("whole", legs, (str(runs["whole"]), None)),
            Scenario("cut", legs, (str(runs["cut"]), 8, 12, None)),
        ],
        timeout=280,
    )
    assert outcomes["whole"] == [[0]] * 2
    assert outcomes["cut"] == [[75, 75, 0]] * 2
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_the_planner_counts_the_products_of_an_adapted_embedding(tmp_path: Path) -> None:
    config = config_of(tmp_path, LLAMA, lora=LORA)
    model = build_model(config.model, 0)
    model.set_attn_implementation("eager")  # torch does not count the fused kernel of CPUs
    equip(model, config, True)
    tokens = torch.zeros(2, 32, dtype=torch.long)
    counters, found = [FlopCounterMode(display=False) for _ in range(2)], [0.0, 0.0]
    count = tokens.numel() * config.micro_batches
    with constant_weights(model.train()):
        for _ in range(config.micro_batches):
            with counters[0]:
                loss = model(input_ids=tokens, labels=tokens).loss
            with counters[1]:
                loss.backward()
            for number, counter in enumerate(counters):
                found[number] += counter.get_total_flops() / count
    assert list(flops_per_token(config, True)) == pytest.approx(found, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
)
def test_memory_and_traffic_are_those_of_two_ranks(
    stage: int, precision: str, tmp_path: Path
) -> None:
    section = {"zero_stage": stage, "precision": precision}
    config = config_of(tmp_path, LLAMA, lora=LORA, deepspeed=section, warm_start=None)
    parts = memory_by_part(config, 2, True)
    for found in run_ranks(2, [Scenario("it", measure, (config,))], 280)["it"]:
        for part in ("weights", "masters", "moments", "gradients"):
            assert found[part] == pytest.approx(parts[part], rel=0.05), part
        assert found["received"] == pytest.approx(bytes_per_step(config, 2, True), rel=0.05)
