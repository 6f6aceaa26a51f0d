"""Updates that are not finite: on no rank, or on all; the data goes on and the clock does not."""

from __future__ import annotations

import functools
import json
import math
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from ranks import Scenario, run_ranks
from reference import lr_factor
from relora.engine.evaluation import loss_of
from relora.restart.restart import merge_and_restart
from relora.training.phases import restart_adapters, update
from relora.training.start import start_run
from runs import (
    checkpoint,
    checkpoints,
    differing,
    make_config,
    metric_lines,
    run_state,
    series,
    tensors,
    train,
    trajectory,
)

LAST = 24
BATCH = 8


def spoilt(bad: Iterable[int], rank: int = 0, value: float = math.nan, good: Any = update) -> Any:
    """An update that multiplies the losses of some global batches, counted from 0, on one rank.

    Args:
        good: the update of all others.
    """

    def loss(model: Any, batch: torch.Tensor) -> Any:
        found = loss_of(model, batch)
        return found._replace(total=found.total * value, cross_entropy=found.cross_entropy * value)

    def update_(run: Any, micro_batches: Any, rates: Any) -> Any:
        if run.ranks.rank == rank and run.progress.consumed // BATCH in bad:
            return update(run, micro_batches, rates, loss)
        return good(run, micro_batches, rates)

    return update_


@pytest.mark.parametrize(
    ("stage", "value"),
    [
        (1, "nan"),
        (2, "inf"),
        # 0 and 3 are of `two_ranks`, whose runs are asked for the same
        pytest.param(0, "nan", marks=pytest.mark.slow),
        pytest.param(3, "nan", marks=pytest.mark.slow),
        pytest.param(2, "nan", marks=pytest.mark.slow),
        pytest.param(0, "inf", marks=pytest.mark.slow),
    ],
)
def test_a_skipped_update_moves_the_data_and_not_the_clock(
    stage: int, value: str, tmp_path: Path
) -> None:
    """Spoilt: an update of the warm start, the one that a merge would follow, and two in a row."""
    run_dir = tmp_path / "run"
    update = spoilt({3, 12, 20, 21}, value=float(value))
    assert train(run_dir, update=update, deepspeed__zero_stage=stage, train__save_every=12) == 0
    assert list(series(run_dir, "train/loss")) == list(range(1, LAST + 1))
    assert series(run_dir, "relora/merge") == {12: 1, 18: 2}
    skips = [line for line in metric_lines(run_dir) if set(line) == SKIP]
    assert [(line["step"], line["train/skipped"]) for line in skips] == [
        (3, 1),
        (11, 2),
        (18, 3),
        (18, 4),
    ]
    for step, rate in series(run_dir, "train/lr").items():
        base = 1e-2 if step <= 6 else 2e-2
        factor = lr_factor(step - 1, total=LAST, warmup=3, cycle=6, rewarm=2, low=0.1, birth=6)
        assert rate == pytest.approx(base * factor, rel=1e-12, abs=0)
    tokens = {x["step"]: x["train/tokens"] for x in metric_lines(run_dir) if "train/loss" in x}
    assert tokens[3] == 3 * BATCH * 32
    assert tokens[4] == 5 * BATCH * 32
    assert tokens[24] == 28 * BATCH * 32
    for tensor in tensors(checkpoint(run_dir, 24)).values():
        assert tensor.isfinite().all()
    assert "was not finite: skipped (2 in a row)" in (run_dir / "log.txt").read_text()


SKIP = {"step", "time_s", "train/skipped"}


def later(batches: int) -> Any:
    """A start that goes on so many global batches later in the data."""

    def start(*arguments: Any) -> Any:
        run = start_run(*arguments)
        run.progress.consumed += batches * BATCH
        return run

    return start


@pytest.mark.parametrize("stage", [0, 2])
def test_a_skipped_update_is_as_if_its_batch_had_not_been_there(stage: int, tmp_path: Path) -> None:
    """Weights and moments are untouched: the next step's loss is that of the same weights."""
    changes = {"deepspeed__zero_stage": stage, "train__save_every": 1}
    assert train(tmp_path / "spoilt", "train.stop_after=10", update=spoilt({9}), **changes) == 75
    # The same without a fault, from the same step 9, and with the data one batch further.
    assert train(tmp_path / "moved", "train.stop_after=9", **changes) == 75
    assert train(tmp_path / "moved", "train.stop_after=10", start=later(1), **changes) == 75
    one, other = (checkpoint(tmp_path / name, 10) for name in ("spoilt", "moved"))
    assert differing(one, other) == []


def test_a_stop_after_a_skipped_update_leaves_no_trace(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"train__save_every": 8, "update": spoilt({3, 8, 9})}
    assert train(tmp_path / "whole", **changes) == 0
    # After step 8 a checkpoint is written and then two updates are skipped; they are gone through
    # again, and told of once.
    for stop in (4, 8, 9, 13):
        assert train(tmp_path / "cut", f"train.stop_after={stop}", **changes) == 75
    assert train(tmp_path / "cut", **changes) == 0
    assert trajectory(tmp_path / "cut") == trajectory(tmp_path / "whole")
    assert differing(*(checkpoint(tmp_path / n, LAST) for n in ("cut", "whole"))) == []


def test_too_many_in_a_row_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    changes: dict[str, Any] = {"train__max_skipped": 3, "train__save_every": 5}
    assert train(run_dir, update=spoilt({2, 4, 6, 7, 10, 11, 12}), **changes) == 5
    error = capsys.readouterr().err
    assert "3 updates in a row were not finite" in error
    assert "train.max_skipped" in error
    assert "Traceback" not in error
    state = run_state(run_dir)
    assert state["status"] == "failed"
    assert state["code"] == 5
    assert state["step"] == 6
    assert len([line for line in metric_lines(run_dir) if set(line) == SKIP]) == 7
    # What was bad has passed: the run goes on from its checkpoint, and tells nothing twice.
    assert train(run_dir, **changes) == 0
    assert list(series(run_dir, "train/loss")) == list(range(1, LAST + 1))


def test_a_merge_that_changes_the_function_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The invariant is checked while training, and nothing broken is saved."""
    from relora.lora.layers import LoRALinear

    real = LoRALinear.delta
    monkeypatch.setattr(LoRALinear, "delta", lambda *args: real(*args) * 1.01)
    run_dir = tmp_path / "run"
    assert train(run_dir, train__save_every=6) == 5
    assert "merge 1 changed the model's function" in capsys.readouterr().err
    assert run_state(run_dir)["code"] == 5
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_00000006"]


# --- two ranks ------------------------------------------------------------------------------------


def spoilt_on(ranks: Any, config: str, bad_rank: int, batches: list[int]) -> tuple[int, str]:
    """(exit code, message) of a run in which one rank's loss is NaN now and then."""
    from relora.errors import UserError
    from test_resume import legs

    try:
        return legs(ranks, config, None, update=spoilt(set(batches), bad_rank))[0], ""
    except UserError as error:
        return error.code, str(error)


# 14 steps: adapters after 4, merges after 8 and 12 (or adapters from the start, and a merge at 4).
SHORT: dict[str, Any] = {
    "train__steps": 14,
    "train__eval_every": None,
    "train__save_every": 3,
    "warm_start__steps": 4,
    "relora__cycle_steps": 4,
}
# In fp32 they all compute the same; half of them accumulate two micro-batches.
SETTINGS: dict[str, dict[str, Any]] = {
    "0": {"deepspeed__zero_stage": 0},
    "1": {"deepspeed__zero_stage": 1, "deepspeed__offload_optimizer": True},
    "2": {"deepspeed__zero_stage": 2, "batch__micro_batch_size": 2},
    "3": {"deepspeed__zero_stage": 3, "model__gradient_checkpointing": True},
    "0_bf16": {"deepspeed__zero_stage": 0, "batch__micro_batch_size": 2},
    "2_bf16": {
        "deepspeed__zero_stage": 2,
        "deepspeed__offload_optimizer": True,
        "model__gradient_checkpointing": True,
    },
    "3_bf16": {
        "deepspeed__zero_stage": 3,
        "deepspeed__offload_optimizer": True,
        "batch__micro_batch_size": 2,
    },
}
REPLICATED = {0: "model.norm.weight", 1: "model.layers.1.mlp.up_proj.weight"}
REPLICATED[2] = REPLICATED[1]  # there every step replaces what is trained, but not what is frozen
SHARDED = "model.layers.0.mlp.down_proj.lora_A"


def spoilt_for_ever(ranks: Any, config: str) -> tuple[int, str]:
    """As `spoilt_on`, on rank 1 from the 8th batch on."""
    return spoilt_on(ranks, config, 1, list(range(7, 99)))


def differ_on(ranks: Any, config: str, stage: int) -> tuple[int, str]:
    """(exit code, message) of a run in which rank 1 comes to hold one other number than rank 0.

    Between two merges, in a weight that both hold; under ZeRO 3 nobody else holds what a rank
    does, but there is the optimizer's copy of it, so there while the merge writes both.
    """
    from relora.errors import UserError
    from test_resume import legs

    def disturbed(run: Any, *arguments: Any) -> Any:
        if stage < 3 and ranks.rank == 1 and run.step == 2:
            run.state[REPLICATED[stage]].live.data[3] += 1e-3
        return update(run, *arguments)

    def merge(state: Any, *arguments: Any) -> Any:
        report = merge_and_restart(state, *arguments)
        if stage == 3 and ranks.rank == 1:
            state[SHARDED].live.data[3] += 1e-7
        return report

    restart = functools.partial(restart_adapters, merge=merge)
    try:
        return legs(ranks, config, None, update=disturbed, restart=restart)[0], ""
    except UserError as error:
        return error.code, str(error)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs in which a rank has NaN or inf at three updates, has it for ever, or differs."""
    directory = tmp_path_factory.mktemp("two_ranks")

    fp32 = [name for name in SETTINGS if "bf16" not in name]

    def config(name: str, **changes: Any) -> str:
        precision = "bf16" if "bf16" in name else "fp32"
        changes = {**SHORT, "deepspeed__precision": precision, **changes}
        if name not in fp32:  # to spare the second engine
            changes["warm_start"] = None
        return str(make_config(directory / name, **changes))

    scenarios = [
        Scenario(name, spoilt_on, (config(name, **changes), number % 2, [3, 8, 9]))
        for number, (name, changes) in enumerate(SETTINGS.items())
    ]
    end = config("for_ever", train__max_skipped=2, train__save_every=1)
    scenarios.append(Scenario("for_ever", spoilt_for_ever, (end,)))
    for stage in range(4):
        name = f"differ_{stage}"
        scenarios.append(
            Scenario(name, differ_on, (config(name, deepspeed__zero_stage=stage), stage))
        )
    outcomes = run_ranks(2, scenarios, timeout=280)
    for name in SETTINGS:
        assert outcomes[name] == [(0, "")] * 2
    (code, message), other = outcomes["for_ever"]
    assert other == (code, message)
    assert code == 5
    assert "2 updates in a row" in message
    for stage in range(4):
        (code, message), other = outcomes[f"differ_{stage}"]
        assert other == (code, message)
        assert code == 5
        if stage < 3:
            assert (
                f"after merge 1 the ranks hold different values of {REPLICATED[stage]};" in message
            )
        else:
            assert f"after merge 1 the optimizer's fp32 copy of {SHARDED} differs" in message
    return directory


@pytest.mark.parametrize("name", SETTINGS)
def test_nan_on_one_rank_is_skipped_on_all(name: str, two_ranks: Path) -> None:
    run_dir, last, birth = two_ranks / name, SHORT["train__steps"], 0 if "bf16" in name else 4
    skips = [line for line in metric_lines(run_dir) if set(line) == SKIP]
    assert [(line["step"], line["train/skipped"]) for line in skips] == [(3, 1), (7, 2), (7, 3)]
    assert list(series(run_dir, "train/loss")) == list(range(1, last + 1))
    assert list(series(run_dir, "relora/merge")) == ([8, 12] if birth else [4, 8, 12])
    for step, rate in series(run_dir, "train/lr").items():
        base = 1e-2 if step <= birth else 2e-2
        factor = lr_factor(step - 1, total=last, warmup=3, cycle=4, rewarm=2, low=0.1, birth=birth)
        assert rate == pytest.approx(base * factor, rel=1e-12, abs=0)
    tokens = {x["step"]: x["train/tokens"] for x in metric_lines(run_dir) if "train/loss" in x}
    moved = {3: 0, 4: 1, 7: 1, 8: 3, last: 3}
    assert {k: tokens[k] for k in moved} == {k: (k + n) * BATCH * 32 for k, n in moved.items()}
    for tensor in tensors(checkpoint(run_dir, last)).values():
        assert tensor.isfinite().all()
    like = two_ranks / ("0_bf16" if "bf16" in name else "0")
    assert series(run_dir, "train/loss") == pytest.approx(
        series(like, "train/loss"), rel=1e-2 if "bf16" in name else 1e-4
    )


def test_nan_for_ever_ends_the_run_with_a_checkpoint_from_before(two_ranks: Path) -> None:
    """Even if it saves at every step: a skipped update is none."""
    run_dir = two_ranks / "for_ever"
    state = run_state(run_dir)
    assert (state["status"], state["code"], state["step"]) == ("failed", 5, 7)
    assert checkpoints(run_dir)[-1] == "step_00000007"
    saved = json.loads((checkpoint(run_dir, 7) / "state.json").read_text())
    assert (saved["consumed"], saved["skipped"]) == (7 * BATCH, 0)
    for tensor in tensors(checkpoint(run_dir, 7)).values():
        assert tensor.isfinite().all()


@pytest.mark.parametrize("stage", range(4))
def test_replicas_that_differ_end_the_run_at_the_next_merge(stage: int, two_ranks: Path) -> None:
    """On all ranks, with the parameter's name (see the fixture), and nothing of it is saved."""
    run_dir = two_ranks / f"differ_{stage}"
    state = run_state(run_dir)
    assert (state["status"], state["code"], state["step"]) == ("failed", 5, 4)
    named = SHARDED if stage == 3 else REPLICATED[stage]
    assert named in state["reason"]
    assert checkpoints(run_dir) == ["step_00000003"]
    assert series(run_dir, "relora/merge") == {}


@pytest.mark.parametrize(
    ("first", "save_every"),
    [(5, 24), (5, 5), (0, 24)],
    ids=["no checkpoint yet", "one of this step", "before the first step"],
)
def test_a_stop_request_is_seen_while_updates_are_skipped(
    first: int, save_every: int, tmp_path: Path
) -> None:
    """And the run goes on from there as if nobody had asked."""
    bad = spoilt(range(first, first + 10))
    changes: dict[str, Any] = {"train__save_every": save_every, "train__max_skipped": 100}
    changes["update"] = bad
    assert train(tmp_path / "whole", **changes) == 0

    def ask(run: Any, *arguments: Any) -> Any:
        if run.progress.consumed // BATCH == first + 3:
            signal.raise_signal(signal.SIGTERM)
        return bad(run, *arguments)

    assert train(tmp_path / "cut", **{**changes, "update": ask}) == 75
    state = run_state(tmp_path / "cut")
    assert (state["status"], state["step"]) == ("preempted", first)
    assert metric_lines(tmp_path / "cut")[-1]["step"] == first  # it did not go on to the next
    assert train(tmp_path / "cut", **changes) == 0
    assert trajectory(tmp_path / "cut") == trajectory(tmp_path / "whole")
    assert differing(checkpoint(tmp_path / "cut", 24), checkpoint(tmp_path / "whole", 24)) == []
