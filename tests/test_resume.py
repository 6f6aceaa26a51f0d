"""Continuing gives the same numbers as never having stopped."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from ranks import Scenario, run_ranks
from runs import (
    Process,
    checkpoint,
    checkpoints,
    differing,
    make_config,
    relora,
    run_state,
    same_bits,
    series,
    tensors,
    train,
    trajectory,
    workshop,
)

LAST = 24
# The warm start ends after 6, merges are after 12 and 18.
STOPS = {
    "in the warm start": 3,
    "just before its end": 5,
    "at its end": 6,
    "right after it": 7,
    "before a merge": 11,
    "on a merge": 12,
    "after a merge": 13,
    "on the last merge": 18,
    "before the end": 23,
}


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit: every figure in its order, every tensor of the last checkpoint."""
    assert trajectory(one) == trajectory(other)
    assert differing(checkpoint(one, LAST), checkpoint(other, LAST)) == []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on ZeRO 1 that never stopped."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train(run_dir) == 0
    return run_dir


def test_an_undisturbed_run_has_one_line_of_each_kind_a_step(undisturbed: Path) -> None:
    assert list(series(undisturbed, "train/loss")) == list(range(1, LAST + 1))
    assert list(series(undisturbed, "eval/loss")) == [4, 8, 12, 16, 20, 24]
    assert series(undisturbed, "relora/merge") == {12: 1, 18: 2}
    assert series(undisturbed, "relora/birth") == {6: 1}
    losses = series(undisturbed, "train/loss")
    assert losses[LAST] < losses[1] - 1  # it learns, so equal losses mean something


@pytest.mark.parametrize("stop", STOPS.values(), ids=STOPS.keys())
def test_a_stop_leaves_no_trace(stop: int, undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert train(run_dir, f"train.stop_after={stop}") == 75
    assert run_state(run_dir) == {
        "status": "preempted",
        "reason": "stopped by train.stop_after",
        "step": stop,
        "code": 75,
    }
    assert checkpoints(run_dir) == [f"step_{stop:08d}"]
    assert trajectory(run_dir) == [x for x in trajectory(undisturbed) if x["step"] <= stop]
    assert train(run_dir) == 0
    assert_same_run(run_dir, undisturbed)


def test_stops_one_after_the_other_leave_no_trace(undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for stop in (2, 6, 7, 12, 14):
        assert train(run_dir, f"train.stop_after={stop}") == 75
    assert train(run_dir) == 0
    assert_same_run(run_dir, undisturbed)


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (0, {}),
        (2, {"batch__micro_batch_size": 8}),
        (3, {}),
        (1, {"deepspeed__precision": "bf16", "lora__dropout": 0.1}),
        (3, {"deepspeed__precision": "bf16", "model__gradient_checkpointing": True}),
        (0, {"lora__dropout": 0.3, "relora__reset": {"mode": "random", "adam_step": True}}),
    ],
    ids=lambda value: str(value).replace("__", "."),
)
def test_a_stop_leaves_no_trace_on_other_stages_and_settings(
    stage: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    changes = {"deepspeed__zero_stage": stage, **changes}
    assert train(tmp_path / "whole", **changes) == 0
    for stop in (4, 12, 15):
        assert train(tmp_path / "cut", f"train.stop_after={stop}", **changes) == 75
    assert train(tmp_path / "cut", **changes) == 0
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("method", ["full rank", "LoRA"])
def test_the_other_methods_resume_too(method: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"relora": None, "warm_start": None}
    if method == "full rank":
        changes["lora"] = None
    assert train(tmp_path / "whole", **changes) == 0
    assert train(tmp_path / "cut", "train.stop_after=9", **changes) == 75
    assert train(tmp_path / "cut", **changes) == 0
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_other_machine_settings_give_the_same_losses_to_rounding(
    undisturbed: Path, tmp_path: Path
) -> None:
    """Another micro-batch and another ZeRO stage after each of two stops."""
    run_dir = tmp_path / "run"
    assert train(run_dir, "train.stop_after=4", batch__micro_batch_size=2) == 75
    changed = {"deepspeed__zero_stage": 3, "batch__micro_batch_size": 8}
    assert train(run_dir, "train.stop_after=14", **changed) == 75
    assert train(run_dir, deepspeed__zero_stage=0, batch__micro_batch_size=1) == 0
    assert_close(run_dir, undisturbed)


def assert_close(one: Path, other: Path) -> None:
    for key in ("train/loss", "eval/loss"):
        assert series(one, key) == pytest.approx(series(other, key), rel=1e-5)


def test_a_killed_run_goes_on_from_its_newest_checkpoint(undisturbed: Path, tmp_path: Path) -> None:
    """Killed where nothing can be tidied up, in the middle of a cycle."""
    run_dir = tmp_path / "run"
    config = make_config(run_dir, train__save_every=5)
    process = Process(tmp_path / "output.txt", "train", config)
    # Not knowing where it will be is the point; anywhere after the first checkpoint will do.
    process.wait_until(lambda: checkpoint(run_dir, 5).is_dir())
    os.kill(process.popen.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    torn = '{"step": 23, "train/lo'
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(torn)
    assert run_state(run_dir)["status"] == "running"
    assert relora("train", config) == 0
    assert_same_run(run_dir, undisturbed)
    assert torn not in (run_dir / "metrics.jsonl").read_text()
    assert run_state(run_dir)["status"] == "finished"


@pytest.mark.parametrize(
    ("phase", "at", "number"),
    [
        ("_evaluate", 8, signal.SIGTERM),
        ("_restart", 12, signal.SIGTERM),
        ("_save", 10, signal.SIGTERM),
        ("_give_birth", 6, signal.SIGTERM),
        ("_log", 9, signal.SIGTERM),
        ("_log", 9, signal.SIGINT),
        ("_log", 9, signal.SIGUSR1),
    ],
    ids=str,
)
def test_a_signal_in_any_phase_stops_at_the_end_of_a_step_and_leaves_no_trace(
    phase: str,
    at: int,
    number: signal.Signals,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from relora import run as loop

    real = getattr(loop, phase)

    def interrupted(run: Any, *arguments: Any) -> None:
        if run.step == at:
            os.kill(os.getpid(), number)
        real(run, *arguments)

    monkeypatch.setattr(loop, phase, interrupted)
    run_dir = tmp_path / "run"
    assert train(run_dir, train__save_every=5) == 75
    # What is under way is finished, and the step after it at the most.
    stopped = run_state(run_dir)["step"]
    assert at <= stopped <= at + 1
    assert run_state(run_dir) == {
        "status": "preempted",
        "reason": f"stopped by {number.name}",
        "step": stopped,
        "code": 75,
    }
    assert checkpoints(run_dir)[-1] == f"step_{stopped:08d}"
    monkeypatch.undo()
    assert train(run_dir) == 0
    assert_same_run(run_dir, undisturbed)


def test_tensorboard_has_the_figures_and_the_merges(undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert train(run_dir, "train.stop_after=13") == 75
    assert train(run_dir) == 0
    for directory in (undisturbed, run_dir):
        board = read_board(directory / "tensorboard")
        for key in ("train/loss", "train/lr", "train/grad_norm", "eval/loss", "relora/merge"):
            logged = series(directory, key)
            assert list(board[key]) == list(logged)
            assert list(board[key].values()) == pytest.approx(list(logged.values()), rel=1e-6)
        assert board["relora/birth"] == {6: 1}
        assert {"perf/tokens_per_s", "perf/step_ms", "perf/memory_gib", "eval/perplexity"} < set(
            board
        )


def read_board(directory: Path) -> dict[str, dict[int, float]]:
    """Scalars by tag and step, as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory)).Reload()
    tags = events.Tags()["scalars"]
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in tags}


# --- two ranks ------------------------------------------------------------------------------------


def legs(ranks: Any, config: str, *stops: int | None) -> list[int]:
    """Exit codes of `relora train`, once for each stop, on ranks that have a group already."""
    from pathlib import Path

    from relora.commands.train import _guarded
    from relora.config import load_config
    from relora.data.shards import open_shards

    codes = []
    for stop in stops:
        settings = load_config(Path(config), [f"train.stop_after={stop}"] if stop else [])
        codes.append(_guarded(settings, open_shards(settings.data), ranks))
    return codes


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on two ranks: `whole_S` and `cut_S` on stages S, and `cut_to_be`, left at step 14."""
    directory = tmp_path_factory.mktemp("two_ranks")
    workshop()
    scenarios = []
    for stage in (1, 3):  # 2 is that of test_launch_command, 0 has nothing of its own to restore
        changes = {"deepspeed__zero_stage": stage, "lora__dropout": 0.1}
        whole = make_config(directory / f"whole_{stage}", **changes)
        cut = make_config(directory / f"cut_{stage}", **changes)
        scenarios += [
            Scenario(f"whole_{stage}", legs, (str(whole), None)),
            Scenario(f"cut_{stage}", legs, (str(cut), 5, 12, 19, None)),
        ]
    fewer = make_config(directory / "fewer", deepspeed__zero_stage=2)
    scenarios.append(Scenario("fewer", legs, (str(fewer), 14)))
    outcomes = run_ranks(2, scenarios, timeout=280)
    for name, function, _ in scenarios:
        assert function is legs
        codes = outcomes[name]
        expected = [0] if "whole" in name else [75] if "fewer" in name else [75, 75, 75, 0]
        assert codes == [expected] * 2, name
    return directory


@pytest.mark.parametrize("stage", [1, 3])
def test_on_two_ranks_stops_leave_no_trace(stage: int, two_ranks: Path) -> None:
    assert_same_run(two_ranks / f"cut_{stage}", two_ranks / f"whole_{stage}")


def test_two_ranks_to_one_gives_the_same_losses_to_rounding(
    two_ranks: Path, undisturbed: Path
) -> None:
    run_dir = two_ranks / "fewer"
    assert relora("train", make_config(run_dir, deepspeed__zero_stage=2)) == 0
    assert_close(run_dir, undisturbed)


def test_a_checkpoint_does_not_depend_on_how_it_was_made(
    two_ranks: Path, undisturbed: Path
) -> None:
    """Two ranks on stage 2 write what one rank on stage 1 writes, up to rounding."""
    run_dir, again = two_ranks / "fewer", two_ranks / "alone"
    assert train(again, "train.stop_after=14") == 75
    mine, theirs = (tensors(checkpoint(d, 14)) for d in (run_dir, again))
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        if not same_bits(tensor, theirs[key]):
            difference = (tensor - theirs[key]).norm() / theirs[key].norm()
            assert difference < 1e-3, key
