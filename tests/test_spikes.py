"""A jump of the loss: back to the newest checkpoint and past the data, exactly and resumably."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranks import Scenario, run_ranks
from relora.record.rollbacks import Rollback
from relora.training.config import SpikeConfig
from relora.training.phases import go_back
from relora.training.spikes import position_after, threshold_of
from runs import (
    checkpoint,
    checkpoints,
    differing,
    make_config,
    metric_lines,
    run_state,
    series,
    train,
    trajectory,
    workshop,
)
from test_run_directory import Killed, kill
from test_skipped import BATCH, later, spoilt

LAST = 24
# The tiny run: warm-up to 3, birth at 6, merges after 12 and 18, each with 2 steps of rewarm.
SPIKE = {"sigmas": 6.0, "window": 6, "max_rollbacks": 2}
CHANGES: dict[str, Any] = {"train__spike": SPIKE, "train__save_every": 5}
FACTOR = 20.0
JUMP = spoilt({16}, value=FACTOR)


def gone_back_and_killed(*arguments: Any) -> None:
    """All that a run that goes back writes, and the end of it before it starts again."""
    go_back(*arguments)
    kill()


def kill_at(step: int, update: Any) -> Any:
    """An update that does not come after so many."""
    return lambda run, *arguments: kill() if run.step == step else update(run, *arguments)


def rollback_lines(run_dir: Path) -> list[dict[str, Any]]:
    return [line for line in metric_lines(run_dir) if "train/rollbacks" in line]


def without_rollbacks(run_dir: Path) -> list[dict[str, Any]]:
    return [line for line in trajectory(run_dir) if "train/rollbacks" not in line]


def assert_as_if_the_data_began_later(jumped: Path, moved: Path) -> None:
    assert without_rollbacks(jumped) == trajectory(moved)
    assert differing(checkpoint(jumped, LAST), checkpoint(moved, LAST)) == []


# --- one rank -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def jumped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose 17th update has a bad batch, two after the checkpoint of step 15."""
    run_dir = tmp_path_factory.mktemp("jumped") / "run"
    assert train(run_dir, update=JUMP, **CHANGES) == 0
    return run_dir


def test_a_run_goes_back_and_past_the_data(jumped: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "moved", "train.stop_after=15", **CHANGES) == 75
    assert train(tmp_path / "moved", start=later(2), **CHANGES) == 0
    assert_as_if_the_data_began_later(jumped, tmp_path / "moved")


def test_a_rollback_is_told_of(jumped: Path) -> None:
    (line,) = rollback_lines(jumped)
    (record,) = json.loads((jumped / "rollbacks.json").read_text())
    assert line["step"] == record["step"] == 15
    assert line["train/rollbacks"] == 1
    assert line["train/spike_step"] == 17
    assert line["train/spike_sequences"] == 2 * BATCH
    assert line["train/spike_loss"] > line["train/spike_threshold"]
    assert (record["consumed"], record["skip_to"]) == (15 * BATCH, 17 * BATCH)
    log = (jumped / "log.txt").read_text()
    said = f"the loss jumped to {record['loss']:.4f} at step 17, above {record['threshold']:.4f}"
    assert f"{said}, 16 sequences after the checkpoint of step 15; going back to step 15" in log
    assert list(series(jumped, "train/loss")) == list(range(1, LAST + 1))


@pytest.mark.parametrize("moment", ["before the record", "after the record", "two steps on"])
def test_a_kill_around_a_rollback_leaves_no_trace(
    moment: str, jumped: Path, tmp_path: Path
) -> None:
    def update(run: Any, *arguments: Any) -> Any:
        if moment == "two steps on" and run.step == 17:
            raise Killed
        return JUMP(run, *arguments)

    ends = {"before the record": kill, "after the record": gone_back_and_killed}
    with pytest.raises(Killed):
        train(tmp_path / "run", update=update, go_back=ends.get(moment, go_back), **CHANGES)
    assert (tmp_path / "run" / "rollbacks.json").exists() == (moment != "before the record")
    if moment == "after the record":  # and stopped before the next save
        assert train(tmp_path / "run", "train.stop_after=16", update=JUMP, **CHANGES) == 75
    assert train(tmp_path / "run", update=JUMP, **CHANGES) == 0
    assert trajectory(tmp_path / "run") == trajectory(jumped)
    assert differing(checkpoint(tmp_path / "run", LAST), checkpoint(jumped, LAST)) == []


def test_without_a_checkpoint_a_run_goes_back_to_its_beginning(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"train__spike": {**SPIKE, "window": 3}}
    assert train(tmp_path / "moved", start=later(5), **changes) == 0
    jump = spoilt({4}, value=FACTOR)
    with pytest.raises(Killed):
        train(tmp_path / "run", update=jump, go_back=gone_back_and_killed, **changes)
    with pytest.raises(Killed):  # once more: it is told of once all the same
        train(tmp_path / "run", update=kill_at(4, jump), **changes)
    changes["update"] = jump
    assert train(tmp_path / "run", **changes) == 0
    assert [line["step"] for line in rollback_lines(tmp_path / "run")] == [0]
    assert_as_if_the_data_began_later(tmp_path / "run", tmp_path / "moved")


def test_one_jump_too_many_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each return goes on behind the bad batch, and two updates later there is another."""
    run_dir = tmp_path / "run"
    jumps = spoilt({16, 18, 20}, value=FACTOR)
    for _ in range(2):  # the same command meets the same end
        assert train(run_dir, update=jumps, **CHANGES) == 5
        error = capsys.readouterr().err
        assert "the run has gone back 2 times already" in error
        assert "train.spike.max_rollbacks" in error
        assert "Traceback" not in error
        assert (run_state(run_dir)["status"], run_state(run_dir)["code"]) == ("failed", 5)
        assert checkpoints(run_dir)[-1] == "step_00000015"
        assert [x["train/spike_sequences"] for x in rollback_lines(run_dir)] == [16, 32]
    # Once more is allowed; what was skipped stays skipped.
    more = {**CHANGES, "train__spike": {**SPIKE, "max_rollbacks": 3}}
    assert train(run_dir, update=jumps, **more) == 0
    assert [x["train/spike_sequences"] for x in rollback_lines(run_dir)] == [16, 32, 48]
    tokens = {x["step"]: x["train/tokens"] for x in metric_lines(run_dir) if "train/loss" in x}
    assert tokens[16] - tokens[15] == (6 + 1) * BATCH * 32


def test_a_run_may_train_on_through_a_jump(tmp_path: Path) -> None:
    for name, changes in (("on", {"train__spike": None}), ("off", {})):
        stopped = train(
            tmp_path / name, "train.stop_after=18", update=JUMP, train__save_every=5, **changes
        )
        assert stopped == 75
        assert not (tmp_path / name / "rollbacks.json").exists()
        assert series(tmp_path / name, "train/loss")[17] > 30


def test_updates_that_are_not_finite_are_another_matter(tmp_path: Path) -> None:
    """They neither enter the window nor count as jumps; those that were undone are not counted."""
    update = spoilt({7, 16}, good=spoilt({18}, value=FACTOR))
    assert train(tmp_path / "run", update=update, train__keep_checkpoints=9, **CHANGES) == 0
    assert [x["train/spike_step"] for x in rollback_lines(tmp_path / "run")] == [17]
    assert series_last(tmp_path / "run", "train/skipped") == 1
    losses = json.loads((checkpoint(tmp_path / "run", 10) / "state.json").read_text())["losses"]
    shown = series(tmp_path / "run", "train/loss")
    assert losses == [shown[step] for step in range(5, 11)]


def series_last(run_dir: Path, key: str) -> Any:
    return [line[key] for line in metric_lines(run_dir) if key in line][-1]


# Of two losses that lie close together by chance, and a jump that is none by chance.
NARROW, FAR = {"sigmas": 100.0, "window": 2, "max_rollbacks": 9}, 1000.0


@pytest.mark.parametrize("warming", [(3, 7, 13, 19), (8, 14, 20)], ids=str)
def test_steps_of_warm_up_and_rewarm_never_count_as_jumps(
    warming: tuple[int, ...], tmp_path: Path
) -> None:
    jumps = spoilt([step - 1 for step in warming], value=FAR)
    assert train(tmp_path / "run", update=jumps, train__spike=NARROW) == 0
    assert rollback_lines(tmp_path / "run") == []
    losses = [*series(tmp_path / "run", "train/loss").values()]
    for step in warming:
        assert losses[step - 1] > threshold_of(losses[: step - 1], SpikeConfig(**NARROW))


@pytest.mark.slow
def test_the_steps_after_them_do_and_all_losses_are_in_the_window(tmp_path: Path) -> None:
    """Each return goes to the step before, and on with the next batch."""
    steady = [4, 6, 9, 12, 15, 18, 21, 24]
    jumps = spoilt([step - 1 + number for number, step in enumerate(steady)], value=FAR)
    changes = {"train__spike": NARROW, "train__save_every": 1}
    assert train(tmp_path / "run", update=jumps, **changes) == 0
    assert [line["train/spike_step"] for line in rollback_lines(tmp_path / "run")] == steady
    losses = [*series(tmp_path / "run", "train/loss").values()]
    for record in json.loads((tmp_path / "run" / "rollbacks.json").read_text()):
        before = losses[: record["spike_step"] - 1]
        assert record["threshold"] == threshold_of(before, SpikeConfig(**NARROW))


def test_a_real_curve_over_nine_merges_has_no_jump(tmp_path: Path) -> None:
    changes = {"train__steps": 66, "train__eval_every": None, "batch__micro_batch_size": 8}
    spike = {"sigmas": 6.0, "window": 16}
    assert train(tmp_path / "watched", train__spike=spike, **changes) == 0
    assert len(series(tmp_path / "watched", "relora/merge")) == 9
    assert rollback_lines(tmp_path / "watched") == []
    assert train(tmp_path / "unwatched", **changes) == 0
    assert trajectory(tmp_path / "watched") == trajectory(tmp_path / "unwatched")


@pytest.mark.parametrize("content", ["{", "[1]", '[{"step": 1}]', '{"a": 1}', "3"])
def test_a_broken_record_is_named(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "rollbacks.json").write_text(content)
    assert train(tmp_path / "run") == 4
    assert "rollbacks.json: is broken" in capsys.readouterr().err


# --- two ranks ------------------------------------------------------------------------------------


def jump_on(ranks: Any, config: str, bad_rank: int, killed: bool) -> list[int]:
    """A run in which one rank alone has a bad batch; the other must go back with it."""
    from test_resume import legs

    jump = spoilt({16}, bad_rank, FACTOR)
    if killed:
        with pytest.raises(Killed):
            legs(ranks, config, None, update=jump, go_back=gone_back_and_killed)
    return legs(ranks, config, None, update=jump)


def move(ranks: Any, config: str) -> list[int]:
    """The run that goes on from step 15 two batches later."""
    from test_resume import legs

    return legs(ranks, config, 15) + legs(ranks, config, None, start=later(2))


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_two_ranks_go_back_together(stage: int, tmp_path: Path) -> None:
    """On stage 3 they are killed while they go back, too."""
    workshop()
    jumped, moved = (
        str(make_config(tmp_path / name, deepspeed__zero_stage=stage, **CHANGES))
        for name in ("jumped", "moved")
    )
    scenarios = [
        Scenario("jumped", jump_on, (jumped, stage // 3, stage == 3)),
        Scenario("moved", move, (moved,)),
    ]
    outcomes = run_ranks(2, scenarios, timeout=280)
    assert outcomes["jumped"] == [[0]] * 2
    assert outcomes["moved"] == [[75, 0]] * 2
    (line,) = rollback_lines(tmp_path / "jumped")
    assert line["train/spike_step"] == 17
    assert_as_if_the_data_began_later(tmp_path / "jumped", tmp_path / "moved")


# --- the rule itself ------------------------------------------------------------------------------

losses_st = st.lists(st.floats(0.01, 100), min_size=1, max_size=60)
window_st = st.integers(2, 30)


@given(losses_st, window_st, st.floats(0.1, 20))
def test_the_threshold_is_mean_and_deviations_of_a_full_window(
    losses: list[float], window: int, sigmas: float
) -> None:
    threshold = threshold_of(losses, SpikeConfig(sigmas=sigmas, window=window))
    if len(losses) < window:
        assert threshold == math.inf
        return
    newest = np.array(losses[-window:])
    assert threshold == pytest.approx(newest.mean() + sigmas * newest.std(), rel=1e-9)
    assert threshold_of([1e9, *losses], SpikeConfig(sigmas=sigmas, window=window)) == threshold


@given(losses_st, window_st)
def test_no_step_of_the_window_is_a_jump_at_the_square_root_of_its_length(
    losses: list[float], window: int
) -> None:
    """Samuelson's inequality: no value is further than √(n − 1) deviations from the mean."""
    threshold = threshold_of(losses, SpikeConfig(sigmas=math.sqrt(window), window=window))
    assert all(loss <= threshold * (1 + 1e-12) for loss in losses[-window:])


def rollback(begin: int, end: int) -> Rollback:
    return Rollback(step=0, consumed=begin, skip_to=end, spike_step=0, loss=0.0, threshold=0.0)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=6), st.integers(0, 100))
def test_a_run_goes_on_at_the_next_place_that_nothing_skips(
    stretches: list[tuple[int, int]], consumed: int
) -> None:
    skipped = {x for begin, length in stretches for x in range(begin, begin + length)}
    place = position_after(consumed, [rollback(b, b + n) for b, n in stretches])
    assert place == next(x for x in range(consumed, 1000) if x not in skipped)
