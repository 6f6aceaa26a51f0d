"""Continuing gives the same numbers as never having stopped."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from ranks import Scenario, run_ranks
from relora.training.phases import PHASES
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
# The warm start ends after 6, merges are after 12 and 18: before, on and after each. In three
# chains, so that a resume from one kind of stop ends where none of its neighbours was met.
BLOCKS = {
    "lora": {"blocks": 2},
    "relora__reset": {"mode": "zero"},
    "optimizer__matrices": "muon",
}
STOPS = [(3, 6, 11, 13, 23), (2, 7, 12, 14), (5, 18)]


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


@pytest.mark.parametrize("stops", STOPS, ids=str)
def test_a_stop_leaves_no_trace(stops: tuple[int, ...], undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for stop in stops:
        assert train(run_dir, f"train.stop_after={stop}") == 75
        assert run_state(run_dir) == {
            "status": "preempted",
            "reason": "stopped by train.stop_after",
            "step": stop,
            "code": 75,
        }
        assert checkpoints(run_dir)[-1] == f"step_{stop:08d}"
        assert trajectory(run_dir) == [x for x in trajectory(undisturbed) if x["step"] <= stop]
    assert train(run_dir) == 0
    assert_same_run(run_dir, undisturbed)


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (0, {"lora__dropout": 0.3, "relora__reset": {"mode": "random", "adam_step": True}}),
        (1, {"deepspeed__precision": "bf16", "lora__dropout": 0.1}),
        (
            2,
            {
                "deepspeed__precision": "bf16",
                "lora__train": "b",
                "lora__share_a": [["gate_proj", "up_proj"]],
            },
        ),
        # 15 is inside a cycle: the frozen weights have decayed
        (2, {"batch__micro_batch_size": 8, "lora__decay": "merged"}),
        (2, BLOCKS),
        (
            3,
            {
                "deepspeed__precision": "bf16",
                "model__gradient_checkpointing": True,
                "optimizer__matrices": "muon",
            },
        ),
        *(
            pytest.param(*cell, marks=pytest.mark.slow)
            for cell in (
                (0, {}),
                (3, {}),
                (3, {"deepspeed__precision": "bf16", "model__gradient_checkpointing": True}),
                (3, {"deepspeed__precision": "bf16", "lora__train": "b"}),
                (3, {"optimizer__matrices": "muon"}),
                (3, BLOCKS),
            )
        ),
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
        ("evaluate", 8, signal.SIGTERM),
        ("restart", 12, signal.SIGINT),
        ("save", 10, signal.SIGUSR1),
        ("birth", 6, signal.SIGTERM),
        ("log", 9, signal.SIGINT),
    ],
    ids=str,
)
def test_a_signal_in_any_phase_stops_at_the_end_of_a_step_and_leaves_no_trace(
    phase: str, at: int, number: signal.Signals, undisturbed: Path, tmp_path: Path
) -> None:
    real = getattr(PHASES, phase)

    def interrupted(run: Any, *arguments: Any) -> None:
        if run.step == at:
            os.kill(os.getpid(), number)
        real(run, *arguments)

    run_dir = tmp_path / "run"
    assert train(run_dir, train__save_every=5, **{phase: interrupted}) == 75
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
    assert train(run_dir) == 0
    assert_same_run(run_dir, undisturbed)


# --- going back -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints of 6, 12, 18 and 24."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    assert train(run_dir, train__save_every=6, train__keep_checkpoints=9) == 0
    return run_dir


@pytest.fixture
def back(finished: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return shutil.copytree(finished, tmp_path / "run")


def test_an_older_checkpoint_is_gone_on_from(
    back: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a finished run, too; what came later goes, and comes again the same."""
    wanted = checkpoint(back, 12)
    assert train(back, "--resume", str(wanted), "train.stop_after=13") == 75
    output = capsys.readouterr().out
    assert "going on from step 12" in output
    assert "going back: step_00000018, step_00000024 will go once" in output
    assert checkpoints(back) == ["step_00000006", "step_00000012", "step_00000013"]
    assert trajectory(back) == [line for line in trajectory(undisturbed) if line["step"] <= 13]
    assert run_state(back)["status"] == "preempted"
    assert train(back) == 0
    assert "going back" not in capsys.readouterr().out
    assert_same_run(back, undisturbed)


def test_going_back_loses_nothing_before_a_new_checkpoint_is_complete(
    back: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from relora.record import saving

    def failing(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saving, "save_file", failing)
        assert train(back, "--resume", str(checkpoint(back, 12)), train__save_every=6) == 4
    assert checkpoints(back) == [f"step_{step:08d}" for step in (6, 12, 18, 24)]
    assert relora("verify", back) == 0
    # The step that is saved first may be one that was there before.
    changes = {"train__save_every": 6, "train__keep_checkpoints": 9}
    stop = ("--resume", str(checkpoint(back, 12)), "train.stop_after=18")
    assert train(back, *stop, **changes) == 75
    assert checkpoints(back) == [f"step_{step:08d}" for step in (6, 12, 18)]


def test_a_run_past_a_shorter_length_is_gone_on_with_from_before_it(back: Path) -> None:
    assert train(back, "train.steps=20") == 2
    assert train(back, "train.steps=20", "--resume", str(checkpoint(back, 24))) == 2
    assert train(back, "train.steps=20", "--resume", str(checkpoint(back, 18))) == 0
    assert checkpoints(back)[-1] == "step_00000020"


def test_a_damaged_checkpoint_that_was_asked_for_is_refused(
    back: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint(back, 12) / "rank_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    assert train(back, "--resume", str(path.parent)) == 4
    assert capsys.readouterr().err.startswith(f"relora: {path}: its content changed")
    (path.parent / "manifest.json").unlink()
    assert train(back, "--resume", str(path.parent)) == 4
    assert capsys.readouterr().err.startswith(
        f"relora: {path.parent / 'manifest.json'}: is missing"
    )
    assert checkpoints(back) == [f"step_{step:08d}" for step in (6, 12, 18, 24)]
    assert max(series(back, "train/loss")) == LAST


def test_what_is_no_checkpoint_of_this_run_is_refused(
    back: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    has = f"{back / 'checkpoints'} has step_00000006, step_00000012, step_00000018, step_00000024"
    (back / "checkpoints" / "step_00000020.tmp").mkdir()
    for path, message in {
        checkpoint(back, 13): f"no such checkpoint; {has}",
        checkpoint(finished, 12): f"is no checkpoint of this run; {has}. To start another run",
        back: "is no checkpoint of this run",
        back / "checkpoints" / "step_00000020.tmp": "is no checkpoint of this run",
        checkpoint(back, 12) / "..": "is no checkpoint of this run",
    }.items():
        assert train(back, "--resume", str(path)) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"relora: --resume: {path}")
        assert message in error
    assert f"set model.pretrained={checkpoint(finished, 12)}" in _refused(finished, back, capsys)
    # Another way to write the same place is no other place.
    link = back.with_name("link")
    link.symlink_to(back)
    wanted = checkpoint(link, 12) / ".." / "step_00000012"
    assert train(back, "--resume", str(wanted), "train.stop_after=13") == 75


def _refused(other: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert train(run_dir, "--resume", str(checkpoint(other, 12))) == 2
    return capsys.readouterr().err


def test_auto_is_what_comes_without_asking(back: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(back, "--resume", "auto") == 0
    assert "is finished (24 steps); nothing to do" in capsys.readouterr().out


def test_launch_passes_on_where_to_resume(back: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from relora.commands import launch

    commands: list[list[str]] = []
    monkeypatch.setattr(
        launch, "_run", lambda command, *_: (commands.append(list(command)) or 0, None)
    )
    config, wanted = make_config(back), checkpoint(back, 12)
    for asked in ([], ["--resume", "auto"], ["--resume", str(wanted)]):
        assert relora("launch", "--devices", "1", config, *asked, "train.log_every=2") == 0
    rest = ["train", str(config), "train.log_every=2"]
    assert [command[-len(rest) :] for command in commands[:2]] == [rest, rest]
    assert commands[2][-5:] == [*rest, "--resume", str(wanted)]


@pytest.mark.slow
def test_both_launchers_go_back(back: Path, undisturbed: Path, tmp_path: Path) -> None:
    wanted, config = checkpoint(back, 12), make_config(back, train__keep_checkpoints=9)
    process = Process(tmp_path / "launch.txt", "launch", "--devices", 1, config, "--resume", wanted)
    assert process.wait() == 0, process.text
    assert "going back: step_00000018, step_00000024" in process.text
    assert checkpoints(back) == [f"step_{step:08d}" for step in (6, 12, 24)]
    program = (str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "1")
    arguments = ("--module", "relora", "train", config, "--resume", checkpoint(back, 6))
    process = Process(tmp_path / "deepspeed.txt", *arguments, program=program)
    assert process.wait() == 0, process.text
    assert "going back: step_00000012, step_00000024" in process.text
    assert_same_run(back, undisturbed)


def test_tensorboard_has_the_figures_and_the_merges(undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert train(run_dir, "train.stop_after=13") == 75
    assert train(run_dir) == 0
    for directory in (undisturbed, run_dir):
        board = read_board(directory)
        for key in ("train/loss", "train/lr", "train/grad_norm", "eval/loss", "relora/merge"):
            logged = series(directory, key)
            assert list(board[key]) == list(logged)
            assert list(board[key].values()) == pytest.approx(list(logged.values()), rel=1e-6)
        assert board["relora/birth"] == {6: 1}
        assert {"perf/tokens_per_s", "perf/step_ms", "perf/memory_gib", "eval/perplexity"} < set(
            board
        )


def test_tensorboard_has_each_figure_of_a_step_once(undisturbed: Path) -> None:
    """An evaluation says again how far the run is; the board needs it once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(undisturbed)).Reload()
    assert "train/tokens" in events.Tags()["scalars"]
    for tag in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(tag)]
        assert len(steps) == len(set(steps)), tag
        if not tag.startswith("time/"):  # whose name says it
            assert events.SummaryMetadata(tag).summary_description, tag


def test_the_table_of_hyperparameters_begins_with_what_runs_are_compared_by(
    undisturbed: Path,
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    events = EventAccumulator(str(undisturbed)).Reload()
    data = plugin_data_pb2.HParamsPluginData.FromString(
        events.summary_metadata["_hparams_/experiment"].plugin_data.content
    )
    names = [info.name for info in data.experiment.hparam_infos]
    assert names[:3] == ["method", "optimizer.lr", "optimizer.lr_embeddings"]
    assert {"lora.rank", "relora.cycle_steps", "relora.reset.mode", "seed"} <= set(names)
    hidden = ("dir", "files", "every", "path", "config", "num_workers", "micro_batch_size")
    assert not [name for name in names if name.rpartition(".")[2].startswith(hidden)]
    assert not [name for name in names if "dir" in name or "every" in name]


def read_board(directory: Path) -> dict[str, dict[int, float]]:
    """Scalars by tag and step, as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory)).Reload()
    tags = events.Tags()["scalars"]
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in tags}


# --- two ranks ------------------------------------------------------------------------------------


def legs(ranks: Any, config: str, *stops: int | None, **seams: Any) -> list[int]:
    """Exit codes of `relora train`, once for each stop, on ranks that have a group already.

    Args:
        seams: functions in place of those of `training.phases.Phases`, by name.
    """
    from pathlib import Path

    from relora.data.shards import open_shards
    from relora.load import load_config
    from relora.training.guard import guarded
    from relora.training.phases import Phases

    codes = []
    for stop in stops:
        settings = load_config(Path(config), [f"train.stop_after={stop}"] if stop else [])
        codes.append(guarded(settings, open_shards(settings.data), ranks, phases=Phases(**seams)))
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
    more = make_config(directory / "more", deepspeed__zero_stage=2)
    assert relora("train", more, "train.stop_after=14") == 75
    scenarios.append(Scenario("more", legs, (str(more), None)))
    outcomes = run_ranks(2, scenarios, timeout=280)
    for name, function, _ in scenarios:
        assert function is legs
        codes = outcomes[name]
        expected = (
            [0]
            if name in ("whole_1", "whole_3", "more")
            else [75]
            if "fewer" in name
            else [75, 75, 75, 0]
        )
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


def test_one_rank_to_two_gives_the_same_losses_to_rounding(
    two_ranks: Path, undisturbed: Path
) -> None:
    assert (checkpoint(two_ranks / "more", LAST) / "rank_00001.safetensors").is_file()
    assert_close(two_ranks / "more", undisturbed)


# What changes at step 9, in the middle of a cycle: ranks, ZeRO stage and micro-batch, then and now.
CHANGES = {
    "2 → 1 ranks": ((2, 2, 4), (1, 2, 4)),
    "1 → 2 ranks": ((1, 2, 4), (2, 2, 4)),
    "2 → 4 ranks": ((2, 2, 4), (4, 2, 2)),
    "stage 0 → 3": ((2, 0, 4), (2, 3, 4)),
    "stage 3 → 1": ((2, 3, 4), (2, 1, 4)),
    "micro-batch 4 → 1": ((2, 2, 4), (2, 2, 1)),
    "all at once": ((4, 3, 1), (1, 0, 8)),
}


@pytest.mark.slow
def test_a_run_goes_on_elsewhere_with_the_same_losses(undisturbed: Path, tmp_path: Path) -> None:
    """Each row against the run that was never stopped, on one rank and stage 1, in fp32."""
    workshop()
    for leg, stop in enumerate((9, None)):
        scenarios: dict[int, list[Scenario]] = {}
        for name, settings in CHANGES.items():
            ranks, stage, micro_batch = settings[leg]
            changes = {"deepspeed__zero_stage": stage, "batch__micro_batch_size": micro_batch}
            config = make_config(tmp_path / name, **changes)
            scenarios.setdefault(ranks, []).append(Scenario(name, legs, (str(config), stop)))
        for ranks, rows in scenarios.items():
            outcomes = run_ranks(ranks, rows, timeout=250)
            for row in rows:
                assert outcomes[row.name] == [[75 if stop else 0]] * ranks, row.name
    print(f"\n{'ranks, ZeRO, micro-batch':<38} train/loss   eval/loss (largest relative deviation)")
    for name, (then, now) in CHANGES.items():
        deviations = []
        for key in ("train/loss", "eval/loss"):
            mine, theirs = series(tmp_path / name, key), series(undisturbed, key)
            assert mine.keys() == theirs.keys()
            deviations.append(max(abs(mine[s] / theirs[s] - 1) for s in mine if s > 9))
        print(f"{name:<19} {then} → {now}   {deviations[0]:.1e}      {deviations[1]:.1e}")
        assert max(deviations) <= 1e-5, name


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
