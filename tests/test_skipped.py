"""Updates that are not finite: on no rank, or on all; the data goes on and the clock does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ranks import Scenario, run_ranks
from reference import lr_factor
from runs import (
    checkpoint,
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


def spoil(patch: Any, steps_of_data: set[int], rank: int = 0, value: float = float("nan")) -> None:
    """Make the loss of some global batches, counted from 0, not finite on one rank."""
    from relora import run as loop

    real_loss, real_seed = loop.loss_of, loop.seed_dropout
    now = {}

    def seed_dropout(seed: int, consumed: int, this_rank: int) -> None:
        now.update(batch=consumed // BATCH, rank=this_rank)
        real_seed(seed, consumed, this_rank)

    def loss_of(model: Any, batch: torch.Tensor) -> torch.Tensor:
        loss = real_loss(model, batch)
        training = model.training
        spoilt = training and now["batch"] in steps_of_data and now["rank"] == rank
        return loss * value if spoilt else loss

    patch.setattr(loop, "seed_dropout", seed_dropout)
    patch.setattr(loop, "loss_of", loss_of)


@pytest.mark.parametrize(
    ("stage", "value"), [(0, "nan"), (1, "nan"), (2, "nan"), (3, "nan"), (0, "inf"), (2, "inf")]
)
def test_a_skipped_update_moves_the_data_and_not_the_clock(
    stage: int, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spoilt: an update of the warm start, the one that a merge would follow, and two in a row."""
    run_dir = tmp_path / "run"
    spoil(monkeypatch, {3, 12, 20, 21}, value=float(value))
    assert train(run_dir, deepspeed__zero_stage=stage, train__save_every=12) == 0
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


@pytest.mark.parametrize("stage", [0, 2])
def test_a_skipped_update_is_as_if_its_batch_had_not_been_there(
    stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and moments are untouched: the next step's loss is that of the same weights."""
    changes = {"deepspeed__zero_stage": stage, "train__save_every": 1}
    with monkeypatch.context() as patch:
        spoil(patch, {9})
        assert train(tmp_path / "spoilt", "train.stop_after=10", **changes) == 75
    # The same without a fault, from the same step 9, and with the data one batch further.
    assert train(tmp_path / "moved", "train.stop_after=9", **changes) == 75
    from relora import run as loop

    real = loop.start_run

    def start_run(*arguments: Any) -> Any:
        run = real(*arguments)
        run.consumed += BATCH
        return run

    monkeypatch.setattr(loop, "start_run", start_run)
    assert train(tmp_path / "moved", "train.stop_after=10", **changes) == 75
    spoilt, moved = (checkpoint(tmp_path / name, 10) for name in ("spoilt", "moved"))
    assert differing(spoilt, moved) == []


def test_a_stop_after_a_skipped_update_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {3, 8, 9})
    changes = {"train__save_every": 8}
    assert train(tmp_path / "whole", **changes) == 0
    # After step 8 a checkpoint is written and then two updates are skipped; they are gone through
    # again, and told of once.
    for stop in (4, 8, 9, 13):
        assert train(tmp_path / "cut", f"train.stop_after={stop}", **changes) == 75
    assert train(tmp_path / "cut", **changes) == 0
    assert trajectory(tmp_path / "cut") == trajectory(tmp_path / "whole")
    assert differing(*(checkpoint(tmp_path / n, LAST) for n in ("cut", "whole"))) == []


def test_too_many_in_a_row_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    changes = {"train__max_skipped": 3, "train__save_every": 5}
    with monkeypatch.context() as patch:
        spoil(patch, {2, 4, 6, 7, 10, 11, 12})
        assert train(run_dir, **changes) == 5
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
    import relora.restart.merge as under_test

    real = under_test.delta_rows
    monkeypatch.setattr(under_test, "delta_rows", lambda *args: real(*args) * 1.01)
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

    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, set(batches), bad_rank)
        try:
            return legs(ranks, config, None)[0], ""
        except UserError as error:
            return error.code, str(error)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of all stages in which a rank has NaN at three updates, and one with NaN for ever."""
    directory = tmp_path_factory.mktemp("two_ranks")
    scenarios = [
        Scenario(
            f"stage_{stage}",
            spoilt_on,
            (
                str(make_config(directory / f"stage_{stage}", deepspeed__zero_stage=stage)),
                stage % 2,
                [4, 12, 13],
            ),
        )
        for stage in (0, 1, 2, 3)
    ]
    for_ever = make_config(directory / "for_ever", train__max_skipped=2)
    scenarios.append(Scenario("for_ever", spoilt_on, (str(for_ever), 1, list(range(7, 99)))))
    outcomes = run_ranks(2, scenarios, timeout=280)
    for stage in (0, 1, 2, 3):
        assert outcomes[f"stage_{stage}"] == [(0, "")] * 2
    (code, message), other = outcomes["for_ever"]
    assert other == (code, message)
    assert code == 5
    assert "2 updates in a row" in message
    return directory


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_nan_on_one_rank_is_skipped_on_all(stage: int, two_ranks: Path) -> None:
    run_dir = two_ranks / f"stage_{stage}"
    skips = [line for line in metric_lines(run_dir) if set(line) == SKIP]
    assert [line["step"] for line in skips] == [4, 11, 11]
    assert list(series(run_dir, "train/loss")) == list(range(1, LAST + 1))
    assert series(run_dir, "relora/merge") == {12: 1, 18: 2}
    for tensor in tensors(checkpoint(run_dir, LAST)).values():
        assert tensor.isfinite().all()
    assert series(run_dir, "train/loss") == pytest.approx(
        series(two_ranks / "stage_0", "train/loss"), rel=1e-4
    )


def test_nan_for_ever_ends_the_run_on_all_ranks(two_ranks: Path) -> None:
    state = run_state(two_ranks / "for_ever")
    assert (state["status"], state["code"], state["step"]) == ("failed", 5, 7)
