"""Two machines, as far as a kernel can make them: `multi_node.sh` over the real ssh and pdsh, and
`slurm.sbatch` under the real Slurm. Ranks on both, stopped, gone on with, against one machine.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from machines import SLURM_NEEDS, SSH_NEEDS, Machine, start_slurm, start_sshd, two_machines, why_not
from runs import Process, checkpoints, logged_step, make_config, run_state, series, wait_for
from test_launch_scripts import ROOT, Tree

pytestmark = pytest.mark.slow
NAMES = ("node-a", "node-b")
# Some seconds of training: a signal on its way through ssh takes one.
CHANGES = {"train__steps": 400, "train__eval_every": None, "relora__cycle_steps": 100}
SBATCH = "sbatch --parsable --nodes=2 --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=1"


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Those of two ranks on one machine that nobody stops."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = make_config(folder / "run", **CHANGES)
    process = Process(folder / "out", "launch", "--devices", 2, config)
    assert process.wait() == 0, process.text
    return series(folder / "run", "train/loss")


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """The scripts in a folder with an environment, and a config to train; its run is `run`."""
    (tmp_path / "clone").mkdir()
    tree = Tree(tmp_path / "clone")
    tree.fake("relora", f'#!/bin/sh\nexec {sys.executable} -m relora "$@"\n', "tools")
    config = make_config(tmp_path / "run", **CHANGES, deepspeed__timeout_minutes=5)
    there = {"CONFIG": str(config), "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    for name, value in (tree.environment | there | {"OMP_NUM_THREADS": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tree.root)
    assert tree.set_up("")[0].returncode == 0
    return tree


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[Machine]]:
    """Two machines with sshd, whose own names mean 127.0.1.1, as Debian's installer has it."""
    if reason := why_not({**SSH_NEEDS, "pdsh": "pdsh"}):
        pytest.skip(reason)
    folder = tmp_path / "machines"
    folder.mkdir()
    with two_machines(folder, NAMES, "loopback") as made:
        start_sshd(made, folder)
        yield made


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Machine]]:
    """Two nodes of Slurm."""
    if reason := why_not(SLURM_NEEDS):
        pytest.skip(reason)
    folder = tmp_path / "machines"
    folder.mkdir()
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    with two_machines(folder, NAMES, "network") as made:
        start_slurm(made, folder)
        wait_for(lambda: made[0].run("sinfo --noheader --format=%T").split() == ["idle"])
        yield made


def ranks(host: Machine) -> set[int]:
    """The ranks on a machine."""
    found = set()
    for process in host.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            environment = process.environ()
            if {"RANK", "LOCAL_RANK"} <= environment.keys():
                found.add(int(environment["RANK"]))
    return found


def wait_for_step(run: Path, step: int, host: Machine) -> None:
    wait_for(lambda: logged_step(run) >= step, host.holder.pid, 120)


def check_stopped(run: Path, asked: int) -> None:
    state = run_state(run)
    assert state["status"] == "preempted"
    assert state["reason"].startswith("stopped by SIG")
    assert asked <= state["step"] < CHANGES["train__steps"]
    assert checkpoints(run)[-1] == f"step_{state['step']:08d}"


def test_multi_node_trains_on_both_stops_and_goes_on(
    clone: Tree, hosts: list[Machine], losses: dict[int, float], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    hostfile = clone.root / "launch" / "hostfile"
    hostfile.write_text("# both\n" + "".join(f"{host.name} slots=1\n" for host in hosts))
    program = tuple(hosts[0].command("bash", "launch/multi_node.sh", "seed=1"))
    process = Process(tmp_path / "first", program=program)
    try:
        wait_for_step(run, 3, hosts[0])
        assert [ranks(host) for host in hosts] == [{0}, {1}]
        asked = logged_step(run)
        os.kill(process.descendants()[0], signal.SIGTERM)  # nsenter's child: the script
        assert process.wait(600) == 75, process.text
    finally:
        process.kill()
    # Once; or never, if the other machine heard of it first and both have stopped already.
    assert process.text.count("relora: stopping after this step (") <= 1, process.text
    check_stopped(run, asked)
    assert [ranks(host) for host in hosts] == [set(), set()]
    process = Process(tmp_path / "second", program=program)
    try:
        assert process.wait(600) == 0, process.text
    finally:
        process.kill()
    assert run_state(run)["status"] == "finished"
    assert series(run, "train/loss") == losses


def test_a_rank_lost_on_the_other_machine_ends_the_run(
    clone: Tree, hosts: list[Machine], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    hostfile = clone.root / "launch" / "hostfile"
    hostfile.write_text("node-a slots=1\nnode-b slots=1\n")
    program = tuple(hosts[0].command("bash", "launch/multi_node.sh", "train.steps=20000"))
    process = Process(tmp_path / "out", program=program)
    try:
        wait_for_step(run, 3, hosts[0])
        hosts[1].run("pkill -KILL -f -- '-m relora .*train'")
        assert process.wait(600) == 6, process.text
    finally:
        process.kill()
    state = run_state(run)
    assert (state["status"], state["code"]) == ("failed", 6)
    assert "rank 1" in state["reason"]
    assert [ranks(host) for host in hosts] == [set(), set()]


def test_train_stops_and_goes_on_as_the_first_process_of_a_container(
    clone: Tree, losses: dict[int, float], tmp_path: Path
) -> None:
    """To which the kernel gives no signal that it does not handle."""
    if reason := why_not({}):
        pytest.skip(reason)
    run, lone = tmp_path / "run", ("unshare", "--pid", "--mount-proc", "--fork", "--kill-child")
    for number, code in enumerate((75, 0)):
        program = (*lone, "bash", "launch/train.sh", "seed=1")
        process = Process(tmp_path / f"out{number}", program=program)
        try:
            if code == 75:
                process.wait_for_step(run, 3)
                asked = logged_step(run)
                os.kill(psutil.Process(process.popen.pid).children()[0].pid, signal.SIGTERM)
            assert process.wait() == code, process.text
        finally:
            process.kill()
        if code == 75:
            check_stopped(run, asked)
    assert series(run, "train/loss") == losses


def about(host: Machine, job: str, key: str) -> str:
    """What Slurm says of a job."""
    said = host.run(f"scontrol show job {job}")
    return dict(word.split("=", 1) for word in said.split() if "=" in word)[key]


def wait_for_the_end(host: Machine, job: str) -> str:
    """How a job has ended, or that it waits in the queue."""
    at_work = ("RUNNING", "COMPLETING", "CONFIGURING")
    wait_for(lambda: about(host, job, "JobState") not in at_work, host.holder.pid, 240)
    return about(host, job, "JobState")


def test_multi_node_names_the_host_that_does_not_answer(
    clone: Tree, hosts: list[Machine], tmp_path: Path
) -> None:
    hostfile = clone.root / "launch" / "hostfile"
    hostfile.write_text("node-a slots=1\nnode-b slots=1\n")
    hosts[1].end()
    program = tuple(hosts[0].command("bash", "launch/multi_node.sh"))
    process = Process(tmp_path / "out", program=program)
    assert process.wait(600) == 1
    assert f"relora: node-b ({hostfile}) is not reached by ssh" in process.text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", ["the time is up", "another job comes first", "requeued by hand"])
def test_a_slurm_job_goes_on_after_its_requeue(
    how: str, clone: Tree, cluster: list[Machine], losses: dict[int, float], tmp_path: Path
) -> None:
    run, first = tmp_path / "run", cluster[0]
    job = first.run(f"{SBATCH} launch/slurm.sbatch seed=1").strip()
    log = clone.root / f"relora-{job}.log"
    wait_for_step(run, 3, first)
    assert [ranks(host) for host in cluster] == [{0}, {1}]
    asked = logged_step(run)
    if how == "the time is up":
        first.run(f"scancel --signal=TERM --batch {job}")  # what --signal=B:TERM@180 does
    elif how == "requeued by hand":
        first.run(f"scontrol requeue {job}")
    else:
        first.run(f"{SBATCH} --partition=high --output=/dev/null --wrap 'sleep 1'")
    assert wait_for_the_end(first, job) == "PENDING"
    assert about(first, job, "Restarts") == "1"
    assert log.read_text().count("relora: stopping after this step (") <= 1, log.read_text()
    check_stopped(run, asked)
    # Not after two minutes, as Slurm has it, but not in the second of the end either: what it has
    # revoked then it takes for revoked.
    first.run(f"scontrol update JobId={job} StartTime=now+3seconds")
    wait_for(lambda: about(first, job, "JobState") != "PENDING", first.holder.pid)
    assert wait_for_the_end(first, job) == "COMPLETED", log.read_text()
    assert about(first, job, "Restarts") == "1"
    assert run_state(run)["status"] == "finished"
    assert series(run, "train/loss") == losses


def test_a_slurm_job_that_was_cancelled_saves_and_does_not_come_back(
    clone: Tree, cluster: list[Machine], tmp_path: Path
) -> None:
    run, first = tmp_path / "run", cluster[0]
    job = first.run(f"{SBATCH} launch/slurm.sbatch").strip()
    wait_for_step(run, 3, first)
    asked = logged_step(run)
    first.run(f"scancel {job}")
    assert wait_for_the_end(first, job) == "CANCELLED"
    check_stopped(run, asked)
    assert about(first, job, "Restarts") == "0"
