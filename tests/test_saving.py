"""Saving: beside the training, on disks that fail, and which checkpoints stay."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ranks import Outcomes, Scenario, run_ranks
from relora.record import saving
from relora.training.phases import log_step
from relora.training.run import save
from runs import (
    Process,
    checkpoint,
    checkpoints,
    differing,
    make_config,
    metric_lines,
    relora,
    run_state,
    series,
    tensors,
    train,
    trajectory,
    workshop,
)

LAST = 24
# 12 is on a merge. While it is written slowly, the run trains on into the next cycle.
EVERY_12 = {"train__save_every": 12}


def slow_writer(patch: pytest.MonkeyPatch, until: int) -> Any:
    """No file is written before step `until` is logged, as on a slow disk; only then is it read.

    Returns:
        What logs steps in a run with this disk.
    """
    there, real_save = threading.Event(), saving.save_file

    def log(run: Any, *arguments: Any) -> None:
        if run.step >= until:
            there.set()
        log_step(run, *arguments)

    def slow(*args: Any, **options: Any) -> None:
        assert there.wait(60)
        real_save(*args, **options)

    patch.setattr(saving, "save_file", slow)
    return log


def assert_same_checkpoints(one: Path, other: Path) -> None:
    """The same checkpoints, and every rank's file the same byte for byte."""
    assert checkpoints(one) == checkpoints(other)
    for name in checkpoints(one):
        mine, theirs = one / "checkpoints" / name, other / "checkpoints" / name
        files = sorted(path.name for path in mine.iterdir())
        assert files == sorted(path.name for path in theirs.iterdir())
        for file in files:
            if file.endswith(".safetensors"):
                assert (mine / file).read_bytes() == (theirs / file).read_bytes(), file
        a, b = (json.loads((d / "state.json").read_text()) for d in (mine, theirs))
        apart = {"elapsed_s": 0, "config": None}  # one of the two saves in the background
        assert a | apart == b | apart


def commits(run_dir: Path) -> dict[int, float]:
    """Where background saves were completed: seconds that took, by step."""
    return series(run_dir, "time/commit_s")


@pytest.fixture(scope="module")
def foreground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run whose checkpoints of 12 and 24 were waited for."""
    run_dir = tmp_path_factory.mktemp("foreground") / "run"
    assert train(run_dir, **EVERY_12, deepspeed__zero_stage=0) == 0
    assert not commits(run_dir)
    return run_dir


# --- beside the training --------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_background_save_holds_the_state_of_its_step(
    precision: str, foreground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one rank, on stage 0 for fp32, where what is saved are views of what is trained."""
    changes = {"deepspeed__precision": precision, **EVERY_12}
    changes["deepspeed__zero_stage"] = 0 if precision == "fp32" else 1
    if precision == "bf16":
        foreground = tmp_path / "foreground"
        assert train(foreground, **changes) == 0
    log = slow_writer(monkeypatch, until=16)
    run_dir = tmp_path / "run"
    assert train(run_dir, log=log, train__background_save=True, **changes) == 0
    # It went on meanwhile, past several updates that changed the tensors in place.
    assert all(step >= 16 for step in commits(run_dir))
    assert commits(run_dir)
    assert_same_checkpoints(run_dir, foreground)
    assert trajectory(run_dir) == trajectory(foreground)


def test_a_save_that_falls_due_waits_for_the_one_before(
    foreground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"train__save_every": 6, "train__keep_checkpoints": 9, "deepspeed__zero_stage": 0}
    run_dir = tmp_path / "run"
    real = saving.save_file
    # The next save is due long before.
    monkeypatch.setattr(saving, "save_file", lambda *a, **o: (time.sleep(1), real(*a, **o)))
    assert train(run_dir, train__background_save=True, **changes) == 0
    assert checkpoints(run_dir) == [f"step_{step:08d}" for step in (6, 12, 18, 24)]
    assert max(commits(run_dir).values()) > 0.3
    for step in (12, 24):
        assert differing(checkpoint(run_dir, step), checkpoint(foreground, step)) == []


def test_a_stop_completes_what_is_under_way(
    foreground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = slow_writer(monkeypatch, until=7)
    run_dir = tmp_path / "run"
    stage_0 = {"deepspeed__zero_stage": 0}
    changes = {"train__save_every": 6, "train__background_save": True, **stage_0}
    assert train(run_dir, "train.stop_after=7", log=log, **changes) == 75
    assert checkpoints(run_dir) == ["step_00000006", "step_00000007"]
    # On a save's own step nothing is left to the background.
    assert train(run_dir, "train.stop_after=12", **changes) == 75
    assert checkpoints(run_dir)[-1] == "step_00000012"
    monkeypatch.undo()
    assert train(run_dir, **EVERY_12, **stage_0) == 0
    assert trajectory(run_dir) == trajectory(foreground)
    assert differing(checkpoint(run_dir, LAST), checkpoint(foreground, LAST)) == []


def test_numbers_that_end_the_run_leave_the_save_before_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_skipped import spoilt

    log = slow_writer(monkeypatch, until=6)
    run_dir = tmp_path / "run"
    changes = {"train__save_every": 5, "train__background_save": True, "train__max_skipped": 1}
    assert train(run_dir, update=spoilt({6}), log=log, **changes) == 5
    assert checkpoints(run_dir) == ["step_00000005"]
    assert relora("verify", run_dir) == 0


def test_a_bug_drops_the_save_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = slow_writer(monkeypatch, until=7)

    def broken(run: Any, *arguments: Any) -> None:
        log(run, *arguments)
        if run.step == 7:
            raise ZeroDivisionError

    run_dir = tmp_path / "run"
    changes = {"train__save_every": 5, "train__background_save": True}
    with pytest.raises(ZeroDivisionError):
        train(run_dir, log=broken, **changes)
    assert checkpoints(run_dir) == []
    assert run_state(run_dir)["code"] == 1


def test_a_bug_of_the_writer_is_no_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(saving, "save_file", broken)
    for background in (False, True):
        with pytest.raises(ZeroDivisionError):
            train(tmp_path / "run", train__save_every=5, train__background_save=background)
        assert checkpoints(tmp_path / "run") == []
        assert run_state(tmp_path / "run")["code"] == 1


@pytest.mark.slow
def test_killed_while_a_thread_writes_a_run_goes_on(foreground: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    changes = {"train__background_save": True, "deepspeed__zero_stage": 0}
    config = make_config(run_dir, train__save_every=5, **changes)
    program = (
        "import sys, time\n"
        "from relora.record import saving\n"
        "real = saving.save_file\n"
        "def slow(pieces, path, **options):\n"
        "    real(pieces, path, **options)\n"
        "    if 'step_00000010' in str(path):\n"
        "        time.sleep(60)\n"
        "saving.save_file = slow\n"
        "from relora.cli import main\n"
        f"sys.exit(main(['train', {str(config)!r}]))\n"
    )
    process = Process(tmp_path / "out.txt", program=(sys.executable, "-c", program))
    process.wait_for_step(run_dir, 13)
    complete, unfinished = checkpoints(run_dir)
    assert complete == "step_00000005"
    assert unfinished.startswith(f"step_00000010.{process.popen.pid}-")
    os.kill(process.popen.pid, signal.SIGKILL)
    process.wait()
    assert relora("train", config) == 0
    assert "going on from step 5" in (run_dir / "log.txt").read_text()
    assert trajectory(run_dir) == trajectory(foreground)
    assert differing(checkpoint(run_dir, LAST), checkpoint(foreground, LAST)) == []


# --- which stay -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "keep", "save_every", "background", "kept"),
    [
        (7, 2, 5, True, [7, 14, 20, 21, 24]),
        (5, 1, 5, False, [5, 10, 15, 20, 24]),
        ("cycle", 1, 5, False, [12, 18, 24]),
        ("cycle", 3, 5, True, [12, 15, 18, 20, 24]),
        (9, 1, None, False, [9, 18, 24]),
    ],
)
def test_milestones_are_written_stay_and_are_not_counted(
    every: Any, keep: int, save_every: int, background: bool, kept: list[int], tmp_path: Path
) -> None:
    changes = {"train__keep_every": every, "train__keep_checkpoints": keep}
    changes |= {"train__save_every": save_every, "train__background_save": background}
    assert train(tmp_path / "run", **changes) == 0
    assert checkpoints(tmp_path / "run") == [f"step_{step:08d}" for step in kept]
    if every == "cycle":  # with the merge done
        state = json.loads((checkpoint(tmp_path / "run", 12) / "state.json").read_text())
        assert state["merges"] == 1


@pytest.mark.parametrize("background", [False, True])
def test_without_an_interval_a_save_falls_due_by_the_clock(
    background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After half an hour of training: here at once, then never again but for the end."""
    changes = {"train__save_every": None, "train__keep_checkpoints": 99}
    changes["train__background_save"] = background
    run_dir = tmp_path / "never"
    assert train(run_dir, **changes) == 0
    assert checkpoints(run_dir) == ["step_00000024"]
    monkeypatch.setattr("relora.training.run.LONGEST_UNSAVED_S", -1.0)
    real = save

    def save_once(run: Any, background: bool) -> None:
        real(run, background)
        monkeypatch.setattr("relora.training.run.LONGEST_UNSAVED_S", 1800.0)

    assert train(tmp_path / "run", save=save_once, **changes) == 0
    assert checkpoints(tmp_path / "run") == ["step_00000001", "step_00000024"]
    assert trajectory(tmp_path / "run") == trajectory(run_dir)
    # An interval is the whole of the matter where there is one.
    monkeypatch.setattr("relora.training.run.LONGEST_UNSAVED_S", -1.0)
    assert train(tmp_path / "often", **changes | {"train__save_every": 10}) == 0
    assert checkpoints(tmp_path / "often") == [f"step_000000{n}" for n in (10, 20, 24)]


@pytest.mark.parametrize("stop", [2, 8], ids=["full rank", "with adapters"])
def test_the_size_of_a_checkpoint_is_as_foretold(stop: int, tmp_path: Path) -> None:
    """In files, names and all, for a model that is not all names."""
    values = json.loads((workshop() / "llama.json").read_text())
    model = tmp_path / "wide.json"
    model.write_text(json.dumps(values | {"hidden_size": 128, "intermediate_size": 512}))
    run_dir = tmp_path / "run"
    assert train(run_dir, f"train.stop_after={stop}", model__config=str(model)) == 75
    directory = checkpoint(run_dir, stop)
    found = tensors(directory)
    trained = {name for name, kind in found if kind == "exp_avg"}
    counts = [0, 0]
    for (name, kind), tensor in found.items():
        if kind == "value":
            counts[name not in trained] += tensor.numel()
    assert (counts[1] > 0) == (stop == 8)
    size = sum(path.stat().st_size for path in directory.iterdir())
    assert saving.checkpoint_bytes(*counts) == pytest.approx(size, rel=0.02)
    assert saving.checkpoint_bytes(*counts) == sum(4 * t.numel() for t in found.values())


# --- figures that cannot be written ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["log.txt", "metrics.jsonl"])
def test_figures_that_find_no_room_end_the_run_with_one_line(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The file is the device that is always full; it has no room for what is in a buffer either."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / name).symlink_to("/dev/full")
    assert train(run_dir) == 4
    captured = capfd.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("relora:")]
    assert len(lines) == 1
    assert "No space left on device" in lines[0]
    assert str(run_dir) in lines[0]
    assert "Traceback" not in captured.err + captured.out
    state = run_state(run_dir)
    assert (state["status"], state["code"], state["reason"]) == ("failed", 4, lines[0][8:])


def test_a_console_that_is_gone_ends_the_run_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Path("/dev/full").open("w")  # noqa: SIM115 (closing it fails)
    monkeypatch.setattr(sys, "stdout", full)
    assert train(tmp_path / "run") == 4
    monkeypatch.undo()
    with contextlib.suppress(OSError):
        full.close()
    error = capsys.readouterr().err
    assert error.startswith("relora: standard output: cannot be written: [Errno 28] No space left")
    assert run_state(tmp_path / "run")["code"] == 4


# --- two ranks ------------------------------------------------------------------------------------


def leg(ranks: Any, config: str, harm: Callable[..., Any] | None, *args: Any) -> tuple[int, str]:
    """(exit code, message) of `relora train` on ranks that have a group already.

    Args:
        harm: called with the ranks, a MonkeyPatch and the arguments first; gives what logs steps.
    """
    from relora.errors import UserError
    from test_resume import legs

    with pytest.MonkeyPatch.context() as patch:
        log = harm(ranks, patch, *args) if harm else log_step
        try:
            return legs(ranks, config, None, log=log)[0], ""
        except UserError as error:
            return error.code, str(error)
        finally:
            limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def after_step_7(act: Callable[[], None]) -> Any:
    """What logs steps and does something in the middle of a run, between its saves at 5 and 10."""

    def log(run: Any, *arguments: Any) -> None:
        log_step(run, *arguments)
        if run.step == 7:
            act()

    return log


def slow_on_1(ranks: Any, patch: pytest.MonkeyPatch) -> Any:
    return slow_writer(patch, until=16) if ranks.rank == 1 else log_step


def broken_writer_on_1(ranks: Any, patch: pytest.MonkeyPatch) -> Any:
    def failing(*args: Any, **options: Any) -> None:
        raise OSError(5, "Input/output error")

    act = lambda: patch.setattr(saving, "save_file", failing)  # noqa: E731
    return after_step_7(act) if ranks.rank == 1 else log_step


def small_files_on(
    ranks: Any, patch: pytest.MonkeyPatch, rank: int, size: int, beyond: str | None = None
) -> Any:
    """No file of one rank may grow beyond some bytes (or this file any further by them)."""

    def limit() -> None:
        largest = size + (Path(beyond).stat().st_size if beyond else 0)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))

    if ranks.rank != rank:
        return log_step
    patch.setattr(sys, "stdout", io.StringIO())  # else a file of pytest's
    return after_step_7(limit)


def turn_read_only(ranks: Any, patch: pytest.MonkeyPatch, mount: str) -> Any:
    command = ["mount", "-o", "remount,ro", mount]
    act = lambda: subprocess.run(command, check=True)  # noqa: E731
    return after_step_7(act) if ranks.is_main else log_step  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """File systems of their own, by purpose, where this process may mount any."""
    root = tmp_path_factory.mktemp("disks")
    # Room for a checkpoint and a half, for any checkpoint, and for a run's figures so far.
    places = {"small": ("checkpoints", "700k"), "fixed": ("checkpoints", "4m"), "all": ("", "4m")}
    mounted: dict[str, Path] = {}
    try:
        for name, (below, size) in places.items():
            mount = root / name / below
            mount.mkdir(parents=True)
            command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "relora-test", str(mount)]
            if subprocess.run(command, capture_output=True, check=False).returncode:
                break
            mounted[name] = mount
        yield mounted
    finally:
        for mount in mounted.values():
            subprocess.run(["umount", "-l", str(mount)], check=False)


@pytest.fixture(scope="module")
def two_ranks(
    disks: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Outcomes]:
    """One launch with everything that needs two ranks: the directory of its runs, what came out."""
    directory = tmp_path_factory.mktemp("two_ranks")
    workshop()
    scenarios = []

    def add(name: str, harm: Any, *args: Any, **changes: Any) -> None:
        config = make_config(changes.pop("run_dir", directory / name), **changes)
        scenarios.append(Scenario(name, leg, (str(config), harm, *args)))

    background = {"train__background_save": True}
    for stage in (1, 3):
        changes = {**EVERY_12, "deepspeed__zero_stage": stage}
        add(f"fore_{stage}", None, **changes)
        add(f"back_{stage}", slow_on_1, **changes, **background)
    plain = {"lora": None, "relora": None, "warm_start": None, "train__save_every": 5}
    add("limit_fore", small_files_on, 1, 100_000, **plain)
    add("limit_back", small_files_on, 1, 100_000, **plain, **background)
    add("broken", broken_writer_on_1, **plain, **background)
    figures = str(directory / "figures" / "metrics.jsonl")
    add("figures", small_files_on, 0, 500, figures, **plain)
    if "all" in disks:
        small, fixed = disks["small"], disks["fixed"]
        add("small", None, run_dir=small.parent, train__keep_checkpoints=1, **plain)
        add("fixed", turn_read_only, str(fixed), run_dir=fixed.parent, **plain)
        (disks["all"] / "filler").write_bytes(bytes(4_100_000))
        add("all", None, run_dir=disks["all"], **plain)
    return directory, run_ranks(2, scenarios, timeout=280)


@pytest.mark.parametrize("stage", [1, 3])
def test_on_two_ranks_a_background_save_holds_the_state_of_its_step(
    stage: int, two_ranks: tuple[Path, Outcomes]
) -> None:
    directory, outcomes = two_ranks
    assert outcomes[f"fore_{stage}"] == outcomes[f"back_{stage}"] == [(0, "")] * 2
    fore, back = directory / f"fore_{stage}", directory / f"back_{stage}"
    assert all(16 <= step < LAST for step in commits(back))
    assert commits(back)
    assert_same_checkpoints(back, fore)
    assert trajectory(back) == trajectory(fore)


def assert_refused(
    outcome: list[tuple[int, str]], run_dir: Path, kept: list[int], why: str
) -> None:
    """Code 4 with one line on all ranks, and only checkpoints that are sound."""
    (code, message), other = outcome
    assert other == (code, message)
    assert code == 4
    assert why in message
    assert "\n" not in message
    assert checkpoints(run_dir) == [f"step_{step:08d}" for step in kept]
    for step in kept:
        assert relora("verify", checkpoint(run_dir, step)) == 0
    state = run_state(run_dir)
    assert (state["status"], state["code"], state["reason"]) == ("failed", 4, message)


@pytest.mark.parametrize("name", ["fore", "back"])
def test_a_disk_that_is_full_for_one_rank_stops_all(
    name: str, two_ranks: tuple[Path, Outcomes]
) -> None:
    directory, outcomes = two_ranks
    run_dir = directory / f"limit_{name}"
    why = "rank 1: Error while serializing: I/O error: File too large (os error 27)"
    assert_refused(outcomes[f"limit_{name}"], run_dir, [5], why)
    assert "step_00000010" in run_state(run_dir)["reason"]


def test_a_writer_that_fails_on_one_rank_stops_all(two_ranks: tuple[Path, Outcomes]) -> None:
    directory, outcomes = two_ranks
    assert_refused(outcomes["broken"], directory / "broken", [5], "rank 1: [Errno 5] Input")


@pytest.mark.parametrize(
    ("disk", "cause"), [("small", "No space left on device"), ("fixed", "Read-only file system")]
)
def test_a_disk_that_is_full_or_turned_read_only_keeps_what_was_on_it(
    disk: str, cause: str, two_ranks: tuple[Path, Outcomes], disks: dict[str, Path]
) -> None:
    if "all" not in disks:
        pytest.skip("file systems cannot be mounted here")
    assert_refused(two_ranks[1][disk], disks[disk].parent, [5], cause)


def test_figures_too_large_stop_all_and_leave_no_gap(two_ranks: tuple[Path, Outcomes]) -> None:
    directory, outcomes = two_ranks
    run_dir = directory / "figures"
    assert_refused(outcomes["figures"], run_dir, [5], "File too large")
    assert f"{run_dir}: cannot be written" in run_state(run_dir)["reason"]
    assert relora("train", run_dir.with_name("figures.yaml")) == 0
    assert list(series(run_dir, "train/loss")) == list(range(1, LAST + 1))


def test_figures_on_a_full_disk_stop_all(
    two_ranks: tuple[Path, Outcomes], disks: dict[str, Path]
) -> None:
    if "all" not in disks:
        pytest.skip("file systems cannot be mounted here")
    (code, message), other = two_ranks[1]["all"]
    assert other == (code, message)
    assert code == 4
    assert "No space left on device" in message
    run_dir = disks["all"]
    (run_dir / "filler").unlink()
    assert relora("train", run_dir.with_name("all.yaml")) == 0
    assert list(series(run_dir, "train/loss")) == list(range(1, LAST + 1))
    assert metric_lines(run_dir)
