"""A run is a directory of plain files: config, state, environment, metrics, checkpoints."""

from __future__ import annotations

import functools
import json
import os
import platform
import shutil
import stat
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import psutil
import torch
from pydantic import ConfigDict, Field

from relora.engine.distributed import Ranks
from relora.engine.signals import follow_launcher
from relora.errors import CheckpointError
from relora.files import hold, read_json, supplied, write_json
from relora.record.checked import Count, JsonRecord, checked
from relora.record.layout import LEFTOVER, RunDirectory

PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "tokenizers", "sentencepiece")
LOCK_CHARACTERS = 4096
GLANCE_S = 0.05  # more than `is_held` takes
PATIENCE_S = 60.0  # for an orphan to finish its step, save and leave


class RunState(JsonRecord):
    """run_state.json: how a run stands."""

    status: str = Field(description="text")  # running, preempted, failed or finished
    reason: str = Field(description="text")
    step: Count = Field(description="a whole number ≥ 0")
    code: Count = Field(description="a whole number ≥ 0")  # exit code; 0 while running


# What a directory says in which nothing has been started; no process ends with such a code.
NOT_BEGUN = RunState.model_construct(status="unknown", reason="", step=0, code=-1)


def read_run_state(run_dir: Path) -> RunState:
    """What `run_state.json` says; `NOT_BEGUN` before the first start.

    Raises:
        CheckpointError: it is there, and is not what a run writes.
    """
    path = RunDirectory(run_dir).state
    if not os.path.lexists(path):
        return NOT_BEGUN
    try:
        return checked(RunState, read_json(path, CheckpointError), path)
    except CheckpointError as error:
        # The checkpoints know how far the run is.
        raise CheckpointError(f"{error}; remove it, and the run goes on without") from None


def write_run_state(run_dir: Path, status: str, reason: str, step: int, code: int) -> None:
    """JsonRecord how the run stands; launchers lose exit codes, this file keeps them.

    Args:
        status: running, preempted, failed or finished.
        code: the exit code that goes with it (0 while running).
    """
    state = RunState(status=status, reason=reason, step=step, code=code)
    write_json(RunDirectory(run_dir).state, state.model_dump())


def clear_leftovers(run_dir: Path) -> None:
    """Remove what killed processes of this run have left half written; under its lock."""
    for path in run_dir.iterdir():
        if LEFTOVER.fullmatch(path.name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def lock(run_dir: Path, patience_s: float = PATIENCE_S) -> IO[str]:
    """Claim a run directory for this process, for as long as the returned file stays open.

    Waits for a holder that is about to leave: a rank whose launcher was killed, or what a killed
    process has left behind (its loader workers hold the file open for some seconds).

    Raises:
        CheckpointError: another process trains in it, or does not leave.
    """
    path = RunDirectory(run_dir).lock
    check_plain(path)
    file = path.open("a+", encoding="utf8", errors="replace")
    deadline, told = time.monotonic() + patience_s, False
    while not (hold(file) or _hold_after_a_glance(file)):
        holder = _read_holder(file)
        pid = holder.get("pid", "unknown")
        if time.monotonic() > deadline or not _is_leaving(holder):
            file.close()
            raise CheckpointError(
                f"{run_dir}: process {pid} trains in it already; "
                "wait for it, stop it, or choose another run_dir"
            )
        if not told:
            print(f"{run_dir}: waiting for process {pid}, left by a killed run, to leave it")
            told = True
        time.sleep(0.1)
    file.seek(0)
    file.truncate()
    values = {"pid": os.getpid(), "launcher": follow_launcher(), "host": platform.node()}
    file.write(json.dumps(values))
    file.flush()
    return file


def _hold_after_a_glance(file: IO[str]) -> bool:
    """Try again: whoever asks `is_held` shares the lock for a moment."""
    time.sleep(GLANCE_S)
    return hold(file)


def is_held(run_dir: Path) -> bool | None:
    """Whether a process trains in a run directory, without disturbing it.

    None where that cannot be told: the lock is not there (in a copy, say), is that of another
    machine (a network disk may keep its locks to itself), or cannot be asked.
    """
    path = RunDirectory(run_dir).lock
    try:
        check_plain(path)
        with path.open(encoding="utf8", errors="replace") as file:
            if not hold(file, shared=True):
                return True
            return False if _read_holder(file).get("host") == platform.node() else None
    except (OSError, CheckpointError):
        return None


def check_plain(path: Path) -> None:
    """Whether a file of a run can be opened to write: a FIFO would be waited for, for ever.

    Raises:
        CheckpointError: there is something else in its place.
    """
    with supplied(CheckpointError, path):
        mode = path.stat().st_mode if path.exists() else stat.S_IFREG
    if stat.S_ISDIR(mode) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        raise CheckpointError(
            f"{path}: is {'a directory' if stat.S_ISDIR(mode) else 'no plain file'} where a run "
            "writes a file; move it away, and run the same command again"
        )


def _read_holder(file: IO[str]) -> dict[str, Any]:
    """What the holder of the lock wrote about itself; empty while it has not."""
    file.seek(0)
    try:
        values = json.loads(file.read(LOCK_CHARACTERS))
    except (ValueError, RecursionError):
        return {}
    pid = values.get("pid") if isinstance(values, dict) else None
    return values if type(pid) is int and 0 < pid < 2**31 else {}


def _is_leaving(holder: dict[str, Any]) -> bool:
    """Whether the holder is dead, or an orphan: its launcher is not its parent any more."""
    if holder.get("host") != platform.node():  # out of sight
        return False
    try:
        process = psutil.Process(holder["pid"])
        parent, status = process.ppid(), process.status()
    except psutil.NoSuchProcess:
        return True
    return status == psutil.STATUS_ZOMBIE or holder.get("launcher") not in (None, parent)


class _Stretch(JsonRecord):
    """What a run ran on from a step: that, and whatever `describe_environment` said of it."""

    model_config = ConfigDict(extra="allow")

    # Before there were stretches, the last environment was taken for that of the whole run.
    from_step: Count = Field(default=0, description="a whole number ≥ 0")


def read_stretches(run_dir: Path) -> list[dict[str, Any]]:
    """environment.json: for each stretch of a run what it ran on and `from_step`, oldest first.

    A run that goes on with other ranks, settings or code, or on another machine, begins another.

    Raises:
        CheckpointError: the file is there and is not what a run writes.
    """
    path = RunDirectory(run_dir).environment
    if not os.path.lexists(path):
        return []
    newest = read_json(path, CheckpointError)
    earlier = newest.pop("earlier", [])
    if not isinstance(earlier, list):
        raise CheckpointError(f"{path}: earlier must be a list")
    return [checked(_Stretch, each, path).model_dump() for each in (*earlier, newest)]


def record_stretch(run_dir: Path, step: int, environment: dict[str, Any]) -> str | None:
    """Note what a run goes on with from a step; those it went back from are forgotten.

    The newest stands at the top of environment.json, those before it under `earlier`.

    Returns:
        A complaint if what was there cannot be read; it is made anew.
    """
    complaint = None
    try:
        before = [s for s in read_stretches(run_dir) if s["from_step"] < step]
    except CheckpointError as error:
        before, complaint = [], f"{error}; made anew, and what the run ran on before is not known"
    if before and {**before[-1], "from_step": step} == {**environment, "from_step": step}:
        step = before.pop()["from_step"]
    values = {**environment, "from_step": step}
    write_json(RunDirectory(run_dir).environment, values | ({"earlier": before} if before else {}))
    return complaint


@functools.cache
def installed_versions() -> dict[str, str | None]:
    """Versions of relora and of what it stands on; None for what is not installed."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {name: installed(name) for name in ("relora", *PACKAGES)}


def describe_environment(ranks: Ranks) -> dict[str, Any]:
    """Versions, git commit, devices and world size: what a reader needs to place the figures."""
    on_gpu = ranks.device.type == "cuda"
    return {
        "relora": installed_versions()["relora"],
        "commit": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {n: v for n, v in installed_versions().items() if n != "relora"},
        "device": torch.cuda.get_device_name(ranks.device) if on_gpu else platform.machine(),
        "world_size": ranks.world,
        "threads_per_rank": torch.get_num_threads(),
    }


def _git_commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
