"""`relora.keep_adapters`: the adapters of all cycles, whose sum is what a run has done to W."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import relora
from ranks import Scenario, run_ranks
from relora.lora.names import names_of
from relora.record.layout import RunDirectory
from runs import make_config, train, workshop
from runs import relora as run_relora
from test_resume import legs
from tiny_models import tiny_values

KEPT = {
    "warm_start": None,
    "relora": {"cycle_steps": 6, "rewarm_steps": 2, "lr": 2e-2, "keep_adapters": True},
}


def assert_they_add_up(run_dir: Path) -> None:
    """Σ s·B·A = W_end − W_start for every adapted weight, up to sums in fp32."""
    run = relora.load_run(run_dir)
    start, end = run.first_model().state_dict(), run.merged_model().state_dict()
    directories = sorted(RunDirectory(run_dir).adapters.iterdir())
    assert [path.name for path in directories] == [f"cycle_{n:05d}" for n in range(1, 5)]
    cycles = [relora.read_adapter(path) for path in directories]
    assert len(cycles[0].factors) in (12, 14)  # of two blocks, Mixtral's or Llama's
    for name in cycles[0].factors:
        weight = names_of(name).weight
        total = torch.zeros_like(end[weight], dtype=torch.float64)
        for cycle in cycles:
            a, b = (factor.double() for factor in cycle.factors[name])
            assert b.abs().max() > 0
            total += cycle.scales[name] * (b @ a)
        change = end[weight].double() - start[weight].double()
        assert (total - change).abs().max() < 1e-6 * max(1.0, float(change.abs().max()))


def contents(run_dir: Path) -> dict[str, bytes]:
    """Every file of all cycles."""
    files = RunDirectory(run_dir).adapters.rglob("*")
    return {str(p.relative_to(run_dir)): p.read_bytes() for p in files if p.is_file()}


def test_the_adapters_of_all_cycles_add_up_and_stops_leave_no_trace(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(whole, **KEPT) == 0
    assert_they_add_up(whole)
    for stop in (5, 12, 20):
        assert train(cut, f"train.stop_after={stop}", **KEPT) == 75
    # What a killed run has left of a cycle that comes again goes.
    later = RunDirectory(cut).cycle(4)
    later.mkdir()
    assert train(cut, "train.stop_after=22", **KEPT) == 75
    assert not later.exists()
    assert train(cut, **KEPT) == 0
    assert contents(cut) == contents(whole)
    # A finished run that is started again loses nothing.
    assert train(cut, **KEPT) == 0
    assert contents(cut) == contents(whole)


def test_the_first_cycle_on_the_beginning_is_the_run_before_its_first_merge(tmp_path: Path) -> None:
    """Read by PEFT."""
    assert train(tmp_path / "run", **KEPT, train__save_every=5, train__keep_checkpoints=9) == 0
    run = relora.load_run(tmp_path / "run")
    first = str(RunDirectory(tmp_path / "run").cycle(1))
    found = PeftModel.from_pretrained(run.first_model(), first).merge_and_unload().state_dict()
    after_it = relora.load_run(RunDirectory(tmp_path / "run").checkpoint(10))
    name = "model.layers.0.mlp.up_proj.weight"
    base = after_it.adapted_model().state_dict()[name]  # merged once, at step 6
    torch.testing.assert_close(found[name], base, atol=1e-6, rtol=0)


def test_on_two_ranks_they_add_up_on_each_stage(tmp_path: Path) -> None:
    workshop()
    configs = {z: make_config(tmp_path / str(z), **KEPT, deepspeed__zero_stage=z) for z in (0, 3)}
    scenarios = [Scenario(str(z), legs, (str(path), 9, None)) for z, path in configs.items()]
    outcomes = run_ranks(2, scenarios, timeout=280)
    for stage in configs:
        assert outcomes[str(stage)] == [[75, 0]] * 2
        assert_they_add_up(tmp_path / str(stage))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lora={blocks: 2}", "blocks are no A and B"),
        ("lora.decay=merged", "W shrinks between merges"),
    ],
)
def test_what_is_no_sum_of_adapters_is_refused(
    override: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tmp_path / "run", **KEPT)
    assert run_relora("train", config, override, "optimizer.weight_decay=0.1") == 2
    assert said in capsys.readouterr().err


def test_the_experts_of_all_cycles_add_up_on_two_ranks(tmp_path: Path) -> None:
    """And PEFT reads them."""
    (tmp_path / "model.json").write_text(json.dumps(tiny_values("mixtral")))
    workshop()
    changes = {**KEPT, "model__config": str(tmp_path / "model.json"), "deepspeed__zero_stage": 3}
    path, place = make_config(tmp_path / "run", **changes), tmp_path / "run"
    outcomes = run_ranks(2, [Scenario("experts", legs, (str(path), 9, None))], timeout=280)
    assert outcomes["experts"] == [[75, 0]] * 2
    assert_they_add_up(place)
    run, first = relora.load_run(place), str(RunDirectory(place).cycle(1))
    start = run.first_model().state_dict()
    found = PeftModel.from_pretrained(run.first_model(), first).merge_and_unload().state_dict()
    weight = "model.layers.0.mlp.experts.down_proj"
    adapter = relora.read_adapter(first)
    a, b = adapter.factors[f"{weight}_of_experts"]
    change = adapter.scales[f"{weight}_of_experts"] * (b @ a)
    torch.testing.assert_close(found[weight], start[weight] + change, atol=1e-6, rtol=0)
