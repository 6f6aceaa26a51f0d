"""`relora bench`: the arms are what they are called, and what is counted of them is right."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from relora.engine.muon import Muon
from relora.engine.state import EngineState
from relora.load import load_config
from relora.plan.estimate import flops_per_token
from relora.training import bench, bench_arms
from relora.training.bench import PEAKS, WARM_UP, _peak, _Step, measure_steps
from relora.training.bench_arms import DESCRIPTIONS, blocks_alone, build_variant, variants
from relora.training.compiled import compile_blocks
from runs import SEQUENCE, make_config, relora

pytestmark = pytest.mark.process  # it asks git for the commit
CPU = torch.device("cpu")


@pytest.fixture
def config(tmp_path: Path) -> Any:
    """A tiny Llama in bf16."""
    return load_config(make_config(tmp_path / "run", deepspeed__precision="bf16"))


def test_a_table_a_picture_and_all_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, to = make_config(tmp_path / "run", train__steps=40), tmp_path / "deep" / "out"
    precisions = ("--precision", "fp32", "bf16")
    assert relora("bench", path, *precisions, "--rounds", "2", "--to", to) == 0
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    for precision in ("fp32", "bf16"):
        head = next(n for n, words in enumerate(lines) if words and words[0] == precision)
        assert [words[0] for words in lines[head + 1 : head + 7]] == list(DESCRIPTIONS)
    assert (to / "bench.png").read_bytes().startswith(b"\x89PNG")
    values = json.loads((to / "bench.json").read_text())
    assert values["config"] == [str(path)]
    assert {"commit", "device"} <= values["environment"].keys()
    assert values["date"].startswith("20")
    assert list(values["steps"]) == ["fp32", "bf16"]
    saved = {}
    for precision, arms in values["steps"].items():
        config = load_config(path, [f"deepspeed.precision={precision}"])
        found = {arm["arm"]: arm for arm in arms}
        saved[precision] = found["published"]["saved_bytes"]
        assert list(found) == list(DESCRIPTIONS)
        for name, (settings, adapters, *_) in variants(config).items():
            if name != "peft":
                planned = flops_per_token(settings, adapters).total
                assert found[name]["flops"] == pytest.approx(planned, rel=0.01)
        assert found["peft"]["flops"] == found["published"]["flops"]
        # dA = s (g B)ᵀ x of every layer is not computed.
        layers = 2 * (4 * (32 + 32) + 3 * (32 + 50))
        assert config.lora is not None
        less = found["relora"]["flops"] - found["frozen_a"]["flops"]
        assert less == pytest.approx(2 * config.lora.rank * layers, rel=1e-6)
        assert found["relora"]["saved_bytes"] < 0.7 * found["published"]["saved_bytes"]
        assert found["relora"]["peak_bytes"] < found["published"]["peak_bytes"]
        for arm in arms:
            tokens = config.batch.micro_batch_size * SEQUENCE
            assert arm["tokens_per_s"] == pytest.approx(tokens / arm["ms"] * 1e3)
            assert arm["mfu"] is None
            assert (arm["merge_ms"] is None) == (arm["arm"] not in ("relora", "frozen_a"))
    assert saved["bf16"] < saved["fp32"]


def test_times_are_compared_round_by_round(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine does to a round as a whole changes no ratio."""
    clock = {"full": 0.2, "full_lean": 0.1, "relora": 0.05}
    rounds: dict[str, int] = {}

    def take(step: Any, _: Any) -> float:
        name = next(n for n, v in arms.items() if v.config is step.config)
        rounds[name] = rounds.get(name, 0) + 1
        return clock[name] * rounds[name]

    arms = {name: variants(config)[name] for name in clock}
    monkeypatch.setattr(_Step, "take", take)
    monkeypatch.setattr(_Step, "merge", lambda *_: 0.3)
    monkeypatch.setattr(_Step, "count", lambda step, _: setattr(step, "flops", 1000))
    found = measure_steps(arms, 3)
    counted = [WARM_UP + n for n in (1, 2, 3)]
    for name, each in found.items():
        assert each.ms == pytest.approx(1e3 * clock[name] * counted[1])
        assert each.ratios == pytest.approx(
            {"full_lean": clock[name] / 0.1, "full": clock[name] / 0.2}
        )
        assert each.reached == pytest.approx(0.1 / clock[name])
    cycle = config.relora.cycle_steps * found["relora"].ms / 1e3
    assert found["relora"].merge_share == pytest.approx(0.3 / (cycle + 0.3))
    del arms["full_lean"]
    assert list(measure_steps(arms, 1)["relora"].ratios) == ["full"]
    del arms["full"]
    alone = measure_steps(arms, 1)["relora"]
    assert (alone.ratios, alone.reached) == ({"relora": 1.0}, None)


@pytest.mark.parametrize("arm", ["full", "full_lean", "published", "relora"])
def test_what_is_counted_of_a_block_is_what_another_block_adds(
    arm: str, config: Any, tmp_path: Path
) -> None:
    found, planned = [], []
    for blocks in (2, 3):
        variant = variants(blocks_alone(config, blocks, tmp_path))[arm]
        planned.append(flops_per_token(variant.config, variant.adapters).total)
        found.append(measure_steps({arm: variant}, 1, True)[arm])
    two, three = found
    assert two.block_launches == three.block_launches == three.launches - two.launches
    assert three.flops - two.flops == pytest.approx(planned[1] - planned[0])


@pytest.mark.parametrize("arm", ["full", "relora"])
def test_the_peak_is_that_of_the_allocator(arm: str, config: Any) -> None:
    step = _Step(variants(config)[arm], CPU, False)
    generator = torch.Generator().manual_seed(0)
    step.count(step.draw(generator))
    held = sum(t.nbytes for t in step._held())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step.take(step.draw(generator))
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    there = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        there += event.nbytes()
        most = max(most, there)
    assert step.peak == pytest.approx(held + most, rel=0.03)


def test_blocks_are_compiled_once_everything_is_counted(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = measure_steps({"relora": variants(config)["relora"]}, 1)["relora"]
    compiled: list[Any] = []

    def graphs(module: Any, _: Any) -> Any:
        compiled.append(module)
        return module.forward

    train = config.train.model_copy(update={"compile": "blocks"})
    config = config.model_copy(update={"train": train})
    monkeypatch.setattr(bench, "compile_blocks", partial(compile_blocks, backend=graphs))
    found = measure_steps({"relora": variants(config)["relora"]}, 1)["relora"]
    assert compiled
    for figure in ("flops", "saved_bytes", "launches", "block_launches"):
        assert getattr(found, figure) == getattr(plain, figure)


def test_the_published_layer_and_the_librarys_are_one_function(config: Any) -> None:
    arms = variants(config)
    models = {name: build_variant(arms[name]) for name in ("published", "peft")}
    ours = dict(models["published"].named_parameters())
    ids = torch.randint(320, (2, 16), generator=torch.Generator().manual_seed(0))
    for name, param in models["peft"].named_parameters():
        plain = name.replace(".base_layer", "").replace(".default.weight", "")
        mine = ours.pop(plain)
        assert (param.shape, param.dtype, param.requires_grad) == (
            mine.shape, mine.dtype, mine.requires_grad
        )  # fmt: skip
        param.data.copy_(mine)
    assert not ours
    losses = {}
    for name, model in models.items():
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses[name] = loss.item()
    assert losses["peft"] == pytest.approx(losses["published"], rel=1e-3)
    for layer in ("gate_proj", "o_proj"):
        one, other = (
            next(p.grad for n, p in m.named_parameters() if f"{layer}.lora_A" in n)
            for m in models.values()
        )
        assert one.norm() > 0
        assert (one - other).norm() < 0.03 * one.norm()


def test_without_the_library_its_arm_is_left_out_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_arms, "find_spec", lambda _: None)
    path = make_config(tmp_path / "run")
    assert relora("bench", path, "--rounds", "1", "--blocks", "1") == 0
    printed = capsys.readouterr().out
    assert "peft is not installed, so its layer is left out: pip install peft" in printed
    assert "1 blocks alone" in printed
    assert relora("bench", path, "--arms", "peft") == 2
    assert "--arms: peft: is not installed; pip install peft" in capsys.readouterr().err


def test_what_there_is_not_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_config(tmp_path / "run")
    assert relora("bench", path, "lora=null", "relora=null", "warm_start=null",
                  "--arms", "relora") == 2  # fmt: skip
    assert "--arms: relora: this config has full, full_lean" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert relora("bench", path, "--to", tmp_path / "file") == 2
    assert f"{tmp_path / 'file'}: File exists" in capsys.readouterr().err
    assert relora("bench", path, "deepspeed={precision: deepspeed_bf16, zero_stage: 2}") == 2
    assert "none runs here; take another --precision" in capsys.readouterr().err
    assert relora("bench", path, "model.half_residual=true", "--precision", "fp32") == 2
    assert "model.half_residual: would do nothing" in capsys.readouterr().err


def test_blocks_by_muon_are_timed_beside_full_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = {"lora": {"blocks": 2}, "relora__reset": {"mode": "zero"}}
    path = make_config(tmp_path / "run", optimizer__matrices="muon", **blocks)
    assert list(variants(load_config(path))) == ["full", "full_lean", "relora"]
    assert relora("bench", path, "--rounds", "1") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows if row and row[0] in DESCRIPTIONS] == [
        "full",
        "full_lean",
        "relora",
    ]


def test_muon_launches_as_often_for_twice_the_layers(config: Any) -> None:
    """Matrices of one shape are one batch; what grows is to take them there and back."""
    counts = []
    for layers in (2, 4):
        model = torch.nn.Sequential(*(torch.nn.Linear(8, 8, bias=False) for _ in range(layers)))
        optimizer = Muon([{"name": "matrices", "params": list(model.parameters())}], lr=1e-3)
        EngineState(model, optimizer)
        model(torch.ones(1, 8)).sum().backward()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            optimizer.step()
        products = [event for event in profiled.events() if event.name == "aten::bmm"]
        counts.append(len(products))
    assert counts == [15, 15]


def test_full_rank_has_its_two_arms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_config(tmp_path / "run")
    assert relora("bench", path, "lora=null", "relora=null", "warm_start=null",
                  "--rounds", "1") == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert "peft" not in printed
    assert "a merge" not in printed


def test_what_a_gpu_can_do_at_most_goes_by_its_name(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA H100 PCIe": "H100 PCIe",
        "NVIDIA A100-SXM4-80GB": "A100",
        "NVIDIA L40S": "L40S",
        "NVIDIA L4": "L4",
        "NVIDIA RTX A1000": None,
        "AMD Instinct MI300X": None,
    }
    for name, key in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_, name=name: name)
        assert _peak(torch.device("cuda"), config) == (key and PEAKS[key])
    assert _peak(CPU, config) is None
    fp32 = config.deepspeed.model_copy(update={"precision": "fp32"})
    assert _peak(torch.device("cuda"), config.model_copy(update={"deepspeed": fp32})) is None
