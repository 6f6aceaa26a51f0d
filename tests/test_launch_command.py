"""The launcher around the ranks: ports, signals to all of them, exit codes, lost ranks."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
import yaml

from relora.commands import launch as under_test
from relora.engine import signals
from relora.engine.distributed import free_port
from relora.errors import CheckpointError
from relora.load import load_config
from runs import (
    Process,
    alive,
    checkpoint,
    checkpoints,
    differing,
    logged_step,
    make_config,
    relora,
    run_state,
    series,
    trajectory,
    wait_for,
    workshop,
)

LAST = 60
CHANGES = {
    "train__steps": LAST,
    "train__eval_every": 10,
    "train__save_every": 8,
    "lora__dropout": 0.1,
    "relora__cycle_steps": 12,
    "deepspeed__zero_stage": 2,
    "deepspeed__timeout_minutes": 1,
}


def launch(config: Path, output: Path, *overrides: str) -> Process:
    """`relora launch --devices 2`."""
    return Process(output, "launch", "--devices", 2, config, *overrides)


def assert_nothing_left(pids: list[int]) -> None:
    """None of these processes runs on."""
    wait_for(lambda: not alive(pids), seconds=20)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two launches at the same time: one undisturbed, one stopped by SIGINT on its way."""
    directory = tmp_path_factory.mktemp("launches")
    workshop()
    whole = make_config(directory / "whole", **CHANGES)
    cut = make_config(directory / "cut", **CHANGES)
    first = launch(whole, directory / "whole.txt")
    second = launch(cut, directory / "cut.txt")
    ports = [port_of(process) for process in (first, second)]  # while both are there
    second.wait_for_step(directory / "cut", 14)
    pids = [second.popen.pid, *second.descendants()]
    asked = logged_step(directory / "cut")
    os.kill(second.popen.pid, signal.SIGINT)
    assert second.wait() == 75, second.text
    assert_nothing_left(pids)
    assert first.wait() == 0, first.text
    assert len(set(ports)) == 2
    state = run_state(directory / "cut")
    assert state["status"] == "preempted"
    assert state["reason"] == "stopped by SIGINT"
    assert state["code"] == 75
    assert asked <= state["step"] < LAST - 10
    # At the next step boundary: what was under way, and one more at the most that had begun.
    assert checkpoints(directory / "cut")[-1] == f"step_{state['step']:08d}"
    assert "Traceback" not in second.text
    assert second.text.count("relora: stopping after this step (") == 1  # not once a rank
    return {"whole": directory / "whole", "cut": directory / "cut", "config": cut}


def port_of(process: Process) -> str:
    """MASTER_PORT of a launch's first rank."""
    import psutil

    wait_for(lambda: bool(process.ranks()), process.popen.pid)
    return psutil.Process(process.ranks()[0]).environ()["MASTER_PORT"]


def test_a_launched_run_is_a_run_on_two_ranks(story: dict[str, Path]) -> None:
    import json

    environment = json.loads((story["whole"] / "environment.json").read_text())
    assert environment["world_size"] == 2
    assert run_state(story["whole"])["status"] == "finished"
    assert list(series(story["whole"], "train/loss")) == list(range(1, LAST + 1))
    assert {path.name for path in checkpoint(story["whole"], LAST).iterdir()} == {
        "manifest.json",
        "state.json",
        "rank_00000.safetensors",
        "rank_00001.safetensors",
    }


def test_ctrl_c_a_lost_rank_and_the_deepspeed_launcher_leave_no_trace(
    story: dict[str, Path], tmp_path: Path
) -> None:
    """The run that the story stopped by SIGINT loses a rank to kill -9, and is then finished."""
    run_dir, config = story["cut"], story["config"]
    step = run_state(run_dir)["step"]

    process = launch(config, tmp_path / "killed.txt")
    process.wait_for_step(run_dir, step + 4)
    pids = [process.popen.pid, *process.descendants()]
    os.kill(process.ranks()[1], signal.SIGKILL)
    # An idle wait ends long before the half hour of a collective: nobody has waited for it.
    assert process.wait() == 6, process.text
    assert_nothing_left(pids)
    state = run_state(run_dir)
    assert state["status"] == "failed"
    assert state["code"] == 6
    assert "rank" in state["reason"]

    # The rest by the launcher of deepspeed itself, from the newest checkpoint on.
    program = (str(Path(sys.executable).parent / "deepspeed"),)
    arguments = ("--num_gpus", 2, "--master_port", free_port(), "--module", "relora", "train")
    process = Process(tmp_path / "deepspeed.txt", *arguments, config, program=program)
    assert process.wait() == 0, process.text
    assert "going on from step" in process.text
    assert run_state(run_dir)["status"] == "finished"

    assert trajectory(run_dir) == trajectory(story["whole"])
    assert differing(checkpoint(run_dir, LAST), checkpoint(story["whole"], LAST)) == []


def test_a_second_signal_ends_all_at_once(story: dict[str, Path], tmp_path: Path) -> None:
    """Asked twice, nothing is saved any more, and that is said; what was saved stays good."""
    run_dir = tmp_path / "run"
    # An evaluation without end, as far as a step is concerned: the first signal has to wait for it.
    changes = {**CHANGES, "train__eval_sequences": None, "batch__micro_batch_size": 1}
    process = launch(make_config(run_dir, **changes), tmp_path / "output.txt")
    process.wait_for_step(run_dir, 9)
    pids = [process.popen.pid, *process.descendants()]
    os.kill(process.popen.pid, signal.SIGTERM)
    time.sleep(signals.ECHO_SAME_S + 0.1)
    os.kill(process.popen.pid, signal.SIGTERM)
    code = process.wait()
    assert_nothing_left(pids)
    assert checkpoints(run_dir)[0] == "step_00000008"
    assert relora("verify", checkpoint(run_dir, 8)) == 0
    assert code == 75
    state = run_state(run_dir)
    assert state["status"] == "preempted"
    assert "SIGTERM" in state["reason"]
    if state["reason"] == "stopped at once by SIGTERM":  # the step may have been done in time
        assert process.text.count("relora: stopping after this step (") == 1, process.text
        assert process.text.count("relora: exit now, without a checkpoint; ") == 1


def test_a_signal_before_the_first_step_is_a_preemption_too(tmp_path: Path) -> None:
    """A scheduler may change its mind while the ranks are still importing torch."""
    process = launch(make_config(tmp_path / "run", **CHANGES), tmp_path / "output.txt")
    process.wait_until(lambda: len(process.ranks()) == 2)
    pids = [process.popen.pid, *process.descendants()]
    os.kill(process.popen.pid, signal.SIGTERM)
    assert process.wait() == 75, process.text
    assert_nothing_left(pids)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_lost_rank_is_code_6_whoever_notices_first(rank: int, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = launch(make_config(run_dir, **CHANGES), tmp_path / "output.txt")
    process.wait_for_step(run_dir, 3)
    pids = [process.popen.pid, *process.descendants()]
    os.kill(process.ranks()[rank], signal.SIGKILL)
    assert process.wait() == 6, process.text
    assert_nothing_left(pids)
    assert run_state(run_dir)["status"] == "failed"
    assert run_state(run_dir)["code"] == 6
    assert "goes on from the newest checkpoint" in process.text


def test_a_signal_that_one_rank_alone_hears_stops_all_by_its_name(tmp_path: Path) -> None:
    """As where it reaches another machine first."""
    run_dir = tmp_path / "run"
    config = make_config(run_dir, train__steps=2000, train__eval_every=None)
    process = launch(config, tmp_path / "output.txt")
    process.wait_for_step(run_dir, 3)
    os.kill(process.ranks()[1], signal.SIGUSR1)
    assert process.wait() == 75, process.text
    state = run_state(run_dir)
    assert (state["status"], state["reason"]) == ("preempted", "stopped by SIGUSR1")
    assert checkpoints(run_dir)[-1] == f"step_{state['step']:08d}"


@pytest.mark.slow
def test_a_hung_rank_is_code_6(tmp_path: Path) -> None:
    """Stopped, not killed: only the timeout of a collective can tell."""
    run_dir = tmp_path / "run"
    changes = {**CHANGES, "deepspeed__timeout_minutes": 0.2, "train__steps": 2000}
    process = launch(make_config(run_dir, **changes), tmp_path / "output.txt")
    process.wait_for_step(run_dir, 3)
    pids = [process.popen.pid, *process.descendants()]
    os.kill(process.ranks()[1], signal.SIGSTOP)
    began = time.monotonic()
    assert process.wait() == 6, process.text
    assert time.monotonic() - began > 5
    assert_nothing_left(pids)
    assert run_state(run_dir)["code"] == 6
    assert "0.2 minutes" in process.text


# What a rank does about its launcher, in a process that is quick to start. ROLE says what it is.
CHILD = """
import os, sys, time
from pathlib import Path
from relora.engine.signals import StopRequest, follow_launcher

directory, role = Path(sys.argv[1]), sys.argv[2]
parent = os.getppid()
if role == "late":  # its parent is gone before it can ask to hear of that
    (directory / "ready").touch()
    while os.getppid() == parent:
        time.sleep(0.01)
if role == "by hand":
    del os.environ["CROSS_RANK"]
follow_launcher()
stop = StopRequest()
(directory / "ready").touch()
while os.getppid() == parent:
    time.sleep(0.01)
time.sleep(0.2)
(directory / "said.tmp").write_text(f"{os.getpid()} {stop.signal}")
(directory / "said.tmp").rename(directory / "said")
"""
PARENT = """
import subprocess, sys, time
print(subprocess.Popen([sys.executable, *sys.argv[1:]]).pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("role", "said"),
    [("rank", "the loss of its launcher"), ("by hand", "None"), ("late", None)],
)
def test_a_rank_hears_of_its_launcher_s_death(role: str, said: str | None, tmp_path: Path) -> None:
    """What was started by hand lives on; what comes too late to listen ends at once."""
    (tmp_path / "child.py").write_text(CHILD)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, tmp_path / "child.py", tmp_path, role],
        env={**os.environ, "CROSS_RANK": "0", "PYTHONPATH": str(Path(__file__).parent.parent)},
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    wait_for(lambda: (tmp_path / "ready").exists(), child)
    parent.kill()
    parent.wait()
    assert_nothing_left([child])
    if said is None:
        assert not (tmp_path / "said").exists()
    else:
        assert (tmp_path / "said").read_text() == f"{child} {said}"


def test_the_launcher_s_death_is_no_second_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    monkeypatch.setattr(signals, "ECHO_SAME_S", -1.0)
    gone, term = signals.LAUNCHER_GONE, signal.SIGTERM
    for order, reason, exits in (
        ((gone,), "the loss of its launcher", 0),
        ((gone, term), "the loss of its launcher", 0),
        ((term, gone), "SIGTERM", 0),
        ((gone, gone), "the loss of its launcher", 0),
        ((term, gone, term), "SIGTERM", 1),
        ((gone, term, term), "the loss of its launcher", 1),
    ):
        stop = signals.StopRequest()
        assert not stop
        try:
            for number in order:
                signal.raise_signal(number)
            wait_for(functools.partial(heard, stop, reason, left, exits))
        finally:
            stop.restore()
            left.clear()


def heard(stop: signals.StopRequest, reason: str, left: list[int], exits: int) -> bool:
    return stop.signal == reason and len(left) == exits


def listeners() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "stop request"]


# Signals with the time between them, and how often it then says what, and exits.
@pytest.mark.parametrize(
    ("order", "promises", "exits"),
    [
        (((signal.SIGTERM, 0),), 1, 0),
        (((signal.SIGTERM, 0), (signal.SIGTERM, 0.05)), 1, 0),  # `timeout` sends it twice
        (((signal.SIGINT, 0), (signal.SIGTERM, 0.5)), 1, 0),  # terminal, then launcher
        (((signal.SIGINT, 0), (signal.SIGTERM, 0.1), (signal.SIGINT, 0.3)), 1, 1),
        (((signal.SIGINT, 0), (signal.SIGINT, 0.5)), 1, 1),
        (((signal.SIGINT, 0), (signal.SIGTERM, 2)), 1, 1),
        (((signal.SIGINT, 0), (signal.SIGINT, 4)), 2, 0),  # too late to mean it: told again
        (((signal.SIGINT, 0), (signal.SIGINT, 4), (signal.SIGINT, 1)), 2, 1),
    ],
)
def test_a_second_wish_counts_as_the_message_says(
    order: tuple[tuple[signal.Signals, float], ...],
    promises: int,
    exits: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    clock, left = [100.0], []
    monkeypatch.setattr(os, "_exit", left.append)
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    wishes = signals.Wishes()
    stop = signals.StopRequest()
    try:
        for number, passed in order:
            clock[0] += passed
            stop._hear(number)
    finally:
        stop.restore()
    said = capfd.readouterr().err
    assert said.count(
        "relora: stopping after this step, checkpoint follows; again within 3 s:"
    ) == (promises)
    assert len(left) == exits
    assert said.count("exit now, without a checkpoint") == exits
    # `relora launch` counts by the same rule.
    clock[0] = 500.0
    found = []
    for number, passed in order:
        clock[0] += passed
        found.append(wishes.judge(number))
    assert (found.count("stop"), found.count("now")) == (promises, exits)


def test_what_is_told_names_the_pace_and_what_would_be_lost(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    stop = signals.StopRequest()
    try:
        for step in range(21, 38):
            stop.note(step, None if step > 30 else 20, 70.0 if step == 21 else 0.524)
        stop._hear(signal.SIGINT)
        stop._hear(signals.EXIT_NOW)
    finally:
        stop.restore()
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        "relora: stopping after this step (0.52 s a step), checkpoint follows; again within 3 s: "
        "exit now without it",
        "relora: exit now, without a checkpoint; 17 finished steps and the one under way are lost: "
        "the same command goes on from step 20",
    ]
    assert left


def test_ranks_leave_the_counting_to_relora_launch_and_one_speaks(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A signal to a whole group reaches a rank as often as it likes."""
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    monkeypatch.setattr(signals, "ECHO_SAME_S", -1.0)
    monkeypatch.setenv(signals.FRONT, "1")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        stop = signals.StopRequest()
        try:
            for _ in range(3):
                stop._hear(signal.SIGTERM)
            assert not left
            assert capfd.readouterr().err.count("stopping after this step") == (rank == "0")
            stop._hear(signals.EXIT_NOW)
            assert left
            assert capfd.readouterr().err.count("exit now") == (rank == "0")
        finally:
            stop.restore()
            left.clear()


# Hears a signal while its main thread is in one long call that runs no bytecode.
BUSY = """
import torch
from relora.engine.signals import StopRequest

stop = StopRequest()
torch.set_num_threads(1)
a = torch.ones(8000, 8000)  # ten seconds a product
print("busy", flush=True)
a @ a
print("done", flush=True)
"""


def test_the_answer_comes_at_once_and_not_after_the_computation() -> None:
    """On a GPU or in a backward pass the main thread is deaf for as long as a step takes."""
    command = [sys.executable, "-c", BUSY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            assert process.stdout.readline() == b"busy\n"
            process.send_signal(signal.SIGINT)
            assert process.stderr.readline().startswith(b"relora: stopping after this step")
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            assert process.stderr.readline().startswith(b"relora: exit now, without a checkpoint")
            assert process.wait() == 128 + signal.SIGINT
            assert process.stdout.read() == b""
        finally:
            process.kill()


def test_a_forked_process_keeps_its_signals_to_itself() -> None:
    """Loader workers are forked; what ends one of them is no wish to end the run."""
    stop = signals.StopRequest()
    try:
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        time.sleep(0.1)
        assert not stop
        wait_for(lambda: len(listeners()) == 1)  # those of earlier tests may still be on their way
    finally:
        stop.restore()
    wait_for(lambda: not listeners())


# Holds the lock for some seconds, and says who it is; or leaves that to a child of its own.
HOLDER = """
import fcntl, json, os, platform, sys, time

path, launcher, seconds, role = sys.argv[1:]
file = open(path, "w")
fcntl.flock(file, fcntl.LOCK_EX)
launcher = {"none": None, "parent": os.getppid()}.get(launcher, -1)
host = "elsewhere" if role == "host" else platform.node()
file.write(json.dumps({"pid": os.getpid(), "launcher": launcher, "host": host}))
file.flush()
if role == "child" and os.fork():
    os._exit(0)
print("held", flush=True)
time.sleep(float(seconds))
"""


@pytest.mark.parametrize(
    ("launcher", "role", "waits"),
    [
        ("another", "itself", True),  # an orphan
        ("none", "child", True),  # a dead one; its loader workers are not yet
        ("parent", "itself", False),
        ("none", "itself", False),  # started by hand
        ("another", "host", False),  # who can tell?
    ],
)
def test_a_run_dir_is_waited_for_only_if_its_holder_is_about_to_leave(
    launcher: str,
    role: str,
    waits: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from relora.record.rundir import lock

    command = [sys.executable, "-c", HOLDER, tmp_path / ".lock", launcher, "1.5", role]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        if role == "child":
            holder.wait()
        began = time.monotonic()
        with pytest.raises(CheckpointError, match=f"process {holder.pid} trains in it already"):
            lock(tmp_path, patience_s=0.3)
        assert time.monotonic() - began > 0.3 or not waits
        said = capsys.readouterr().out
        assert (f"waiting for process {holder.pid}" in said) == waits
        assert said.count("\n") == waits
        if waits:
            lock(tmp_path).close()  # it is waited for, and held for 1.5 s
        else:
            holder.kill()


def test_who_asks_whether_a_run_dir_is_held_keeps_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that starts at that moment tries again, also where nobody has said who holds it."""
    from relora.files import hold
    from relora.record import rundir

    (tmp_path / ".lock").touch()
    asking = (tmp_path / ".lock").open()
    assert hold(asking, shared=True)
    monkeypatch.setattr(rundir.time, "sleep", lambda seconds: asking.close())
    with rundir.lock(tmp_path):
        assert rundir.is_held(tmp_path) is True
    assert rundir.is_held(tmp_path) is False


@pytest.mark.slow
def test_one_ctrl_c_under_the_deepspeed_launcher_is_one_wish(tmp_path: Path) -> None:
    """The terminal tells every process; the launcher then tells its ranks once more."""
    run_dir = tmp_path / "run"
    program = (str(Path(sys.executable).parent / "deepspeed"),)
    arguments = ("--num_gpus", 2, "--master_port", free_port(), "--module", "relora", "train")
    config = make_config(run_dir, **{**CHANGES, "train__steps": 2000})
    process = Process(tmp_path / "deepspeed.txt", *arguments, config, program=program)
    process.wait_for_step(run_dir, 9)
    pids = process.descendants()
    os.killpg(process.popen.pid, signal.SIGINT)
    process.wait()
    assert_nothing_left(pids)
    state = run_state(run_dir)
    assert state["status"] == "preempted"
    assert checkpoints(run_dir)[-1] == f"step_{state['step']:08d}"
    assert process.text.count("relora: stopping after this step (") == 1, process.text


def ignore_hangup() -> None:
    """As nohup does, and a shell that starts a background job of a script."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def test_what_was_ignored_at_the_start_stays_ignored(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = make_config(run_dir, train__steps=2000, train__eval_every=None, data__num_workers=1)
    process = Process(tmp_path / "output.txt", "train", config, preexec=ignore_hangup)
    process.wait_for_step(run_dir, 5)
    for number in (signal.SIGHUP, signal.SIGINT):
        os.killpg(process.popen.pid, number)
    step = logged_step(run_dir)
    process.wait_for_step(run_dir, step + 5)
    os.kill(process.popen.pid, signal.SIGTERM)  # which was not; so a lone process is stopped
    assert process.wait() == 75, process.text
    state = run_state(run_dir)
    assert state["status"] == "preempted"
    assert state["reason"] == "stopped by SIGTERM"
    assert checkpoints(run_dir) == [f"step_{state['step']:08d}"]
    assert f"stopped at step {state['step']}; the same command goes on" in process.text
    # A preparation goes on too, and so do those who tokenize for it.
    process = Process(tmp_path / "text.txt", "prepare", config, preexec=ignore_hangup)
    while process.popen.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.popen.pid, signal.SIGHUP)
        time.sleep(0.02)
    assert process.wait() == 0, process.text


def test_a_closed_terminal_stops_a_run_and_loses_no_step(tmp_path: Path) -> None:
    """SIGHUP comes, and printing fails from then on; the checkpoint is written all the same."""
    run_dir = tmp_path / "run"
    config = make_config(run_dir, train__steps=2000, train__eval_every=None)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "relora", "train", config],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # its own terminal
    )
    try:
        os.close(theirs)
        os.set_blocking(ours, False)
        while logged_step(run_dir) < 5:
            assert process.poll() is None
            with contextlib.suppress(BlockingIOError):  # a terminal that is full would stop it
                os.read(ours, 1 << 16)
            time.sleep(0.01)
        os.close(ours)
        assert process.wait() == 75
    finally:
        process.kill()
    state = run_state(run_dir)
    assert state["reason"] == "stopped by SIGHUP"
    assert checkpoints(run_dir) == [f"step_{state['step']:08d}"]


# Beside 75 and 6, which the launches above give.
@pytest.mark.slow
@pytest.mark.parametrize(("code", "word"), [(2, "vocab"), (3, "train.bin")])
def test_exit_codes_and_messages_pass_through(code: int, word: str, tmp_path: Path) -> None:
    """What only the ranks can find out: a vocabulary too small, and a shard that was changed."""
    from test_run_directory import own_data

    config = own_data(tmp_path)
    assert relora("prepare", config) == 0
    if code == 2:
        model = tmp_path / "own" / "llama.json"
        model.write_text(model.read_text().replace('"vocab_size": 320', '"vocab_size": 300'))
        # The check of the config alone would see it; a tokenizer by path has no size there.
        (tokenizer,) = (tmp_path / "own" / "data").glob("*/tokenizer")
        values = yaml.safe_load(config.read_text())
        values["data"]["tokenizer"] = {"path": str(tokenizer)}
        config.write_text(yaml.safe_dump(values))
        assert relora("prepare", config) == 0
    else:
        (shard,) = (tmp_path / "own" / "data").rglob("train.bin")
        content = bytearray(shard.read_bytes())
        content[1000] ^= 1
        shard.write_bytes(content)
    process = launch(config, tmp_path / "output.txt")
    assert process.wait() == code, process.text
    messages = [line for line in process.text.splitlines() if line.startswith("relora: ")]
    assert len(messages) == 1, process.text
    assert word in messages[0]
    assert "Traceback" not in process.text


def test_config_errors_come_before_any_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(under_test, "_run", None)  # no rank may be started
    config = make_config(tmp_path / "run")
    for arguments, words in (
        (("--devices", 3, config), ("batch.global_batch_size", "3 ranks")),
        (("--devices", 2, config, "lora.rang=4"), ("lora.rang", "did you mean rank?")),
        (("--devices", 0, config), ("--devices", "at least 1")),
        (("--devices", -1, config), ("--devices", "at least 1")),
        (("--hostfile", tmp_path / "none", config), ("--hostfile", "no such file")),
        ((tmp_path / "none.yaml",), ("none.yaml", "no such config file")),
    ):
        assert relora("launch", *arguments) == 2
        error = capsys.readouterr().err
        assert all(word in error for word in words), error


def test_the_command_carries_config_and_overrides() -> None:
    one = under_test.one_node_command(["0", "1"], 29512, ["train", "c.yaml", "seed=3"])
    assert one[-4:] == ["relora", "train", "c.yaml", "seed=3"]
    assert "deepspeed.launcher.launch" in one
    assert "--master_port=29512" in one
    assert len({free_port() for _ in range(20)}) > 1


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 5, 75])
def test_codes_that_a_rank_gives_on_purpose_are_kept(code: int, tmp_path: Path) -> None:
    config = load_config(make_config(tmp_path / "run"))
    assert under_test._keep_code(code, None, config) == code
    assert not (tmp_path / "run").exists()
