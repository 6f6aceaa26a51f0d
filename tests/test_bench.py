"""`relora bench`: the arms are what they are called, and what is counted of them is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from relora.load import load_config
from relora.plan.estimate import flops_per_token
from relora.training.bench import measure_steps, variants
from runs import SEQUENCE, make_config, relora

NAMES = ["full", "full-lean", "published", "relora", "relora-frozen-a"]


def test_a_table_of_all_arms_and_its_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_config(tmp_path / "run", deepspeed__precision="bf16", train__steps=40)
    where = tmp_path / "bench.json"
    assert relora("bench", path, "--rounds", "2", "--to", where) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[-5:]] == NAMES
    values = json.loads(where.read_text())
    assert values["config"] == [str(path)]
    found = {arm["arm"]: arm for arm in values["arms"]}
    assert list(found) == NAMES
    assert found["full"]["ratio"] == 1
    config = load_config(path)
    for name, (settings, adapters, _) in variants(config).items():
        if name != "relora-frozen-a":
            planned = flops_per_token(settings, adapters).total
            assert found[name]["flops"] == pytest.approx(planned, rel=0.01)
    # dA = s (g B)ᵀ x of every layer is not computed.
    layers = 2 * (4 * (32 + 32) + 3 * (32 + 50))
    assert config.lora is not None
    saved = found["relora"]["flops"] - found["relora-frozen-a"]["flops"]
    assert saved == pytest.approx(2 * config.lora.rank * layers, rel=1e-6)
    assert found["relora"]["saved_bytes"] < 0.7 * found["published"]["saved_bytes"]
    for arm in found.values():
        assert arm["tokens_per_s"] == pytest.approx(
            config.batch.micro_batch_size * SEQUENCE / arm["ms"] * 1e3
        )


def test_arms_that_there_are_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_config(tmp_path / "run")
    assert relora("bench", path, "lora=null", "relora=null", "warm_start=null",
                  "--arms", "relora") == 2  # fmt: skip
    assert "--arms: relora: this config has full, full-lean" in capsys.readouterr().err
    assert relora("bench", path, "--to", tmp_path / "none" / "x.json") == 2
    assert "is no directory" in capsys.readouterr().err


def test_the_first_arm_is_what_others_are_compared_with(tmp_path: Path) -> None:
    config = load_config(make_config(tmp_path / "run"))
    timings = measure_steps(config, ["published", "full"], 3)
    assert [timing.arm for timing in timings] == ["published", "full"]
    assert timings[0].ratio == 1
