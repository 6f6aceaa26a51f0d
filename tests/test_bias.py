"""`lora.bias: none`: biases of adapted layers stay as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import relora
from ranks import Scenario, run_ranks
from relora.load import load_config
from relora.model import build_model
from relora.plan.shape import shape_of
from runs import checkpoint, differing, make_config, tensors, workshop
from runs import relora as run_relora
from test_resume import legs

ADAPTED = ("c_attn", "c_proj", "c_fc")


def frozen_changes(**changes: Any) -> dict[str, Any]:
    """A GPT-2, whose layers all have biases, from its first step with adapters."""
    return {
        "model__config": str(workshop() / "gpt2.json"),
        "warm_start": None,
        "lora": {"rank": 3, "alpha": 6, "bias": "none"},
        **changes,
    }


def biases(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of the adapted layers."""
    return {n: w for n, w in weights.items() if n.endswith(tuple(f"{x}.bias" for x in ADAPTED))}


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_they_stay_bit_for_bit_on_two_ranks_and_a_stop_leaves_no_trace(
    precision: str, tmp_path: Path
) -> None:
    scenarios = []
    for stage in (0, 3):
        for name, stops in (("whole", (None,)), ("cut", (9, None))):
            run_dir = tmp_path / f"{name}_{stage}"
            section = {"zero_stage": stage, "precision": precision}
            config = make_config(run_dir, **frozen_changes(deepspeed=section))
            scenarios.append(Scenario(run_dir.name, legs, (str(config), *stops)))
    outcomes = run_ranks(2, scenarios, timeout=280)
    for stage in (0, 3):
        assert outcomes[f"whole_{stage}"] == [[0]] * 2
        assert outcomes[f"cut_{stage}"] == [[75, 0]] * 2
        whole = tmp_path / f"whole_{stage}"
        assert differing(checkpoint(whole, 24), checkpoint(tmp_path / f"cut_{stage}", 24)) == []
        run = relora.load_run(whole)
        start, end = (biases(m.state_dict()) for m in (run.first_model(), run.merged_model()))
        assert len(start) == 8
        assert all(torch.equal(end[name], value) for name, value in start.items())
        # What is no adapted layer's bias has moved.
        norm = "transformer.ln_f.bias"
        assert not torch.equal(run.merged_model().state_dict()[norm], torch.zeros(18))


def test_they_have_no_moments_and_the_plan_counts_what_trains(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", **frozen_changes())
    assert run_relora("train", config, "train.stop_after=2") == 75
    held = tensors(checkpoint(tmp_path / "run", 2))
    moments = {name for name, kind in held if kind == "exp_avg"}
    assert not biases(dict.fromkeys(moments, torch.zeros(0)))
    checked = load_config(config)
    trained = sum(held[name, "exp_avg"].numel() for name in moments)
    sizes = shape_of(checked).sizes(checked.lora)
    assert sum(size for size, trains in sizes if trains) == trained
    model = build_model(checked.model, 0)
    assert checked.lora is not None
    relora.add_adapters(model, checked.lora)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained


def test_a_merged_model_trains_them_again_and_an_unmerged_one_does_not() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(8, 8))
    relora.add_adapters(layer, relora.LoRAConfig(rank=2, bias="none", targets=["0"]))
    bias = layer[0].bias
    assert not bias.requires_grad
    relora.merge_adapters(layer, keep=True)
    assert not bias.requires_grad
    relora.unmerge_adapters(layer)
    assert not bias.requires_grad
    relora.merge_adapters(layer)
    assert bias.requires_grad
