"""`relora launch`: the deepspeed launcher with a free port, signals forwarded, exit code kept.

The `deepspeed` front-end, on SIGTERM, ends itself and leaves its ranks training; its `launch.py`
stops them one after the other, so that a save in which all take part would never end. Here every
rank gets the signal at once, here and on other hosts (`engine.hosts`). Killed outright, none of us
can pass on anything: the kernel then ends the next in the chain on this machine, and tells the
ranks (`engine.signals`).
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

import psutil
import torch

from relora.config import Config
from relora.engine.devices import choose_devices
from relora.engine.distributed import free_port
from relora.engine.hosts import (
    ask_hosts,
    check_choice,
    multi_node_command,
    read_hostfile,
    signal_command,
)
from relora.engine.launcher import launcher_environment, one_node_command
from relora.engine.signals import (
    EXIT_NOW,
    LAUNCHER_GONE,
    Wishes,
    caught,
    following,
    name_of,
)
from relora.errors import PREEMPTED, LostRankError
from relora.load import check_world
from relora.record.rundir import RunState, read_run_state, write_run_state
from relora.record.settled import Typed, settled

OURS = (0, 1, 2, 3, 4, 5, 6, PREEMPTED)  # exit codes that a rank gives on purpose
LOST = LostRankError.code


def launch(
    config: Config,
    given: Sequence[str],
    devices: int | None,
    hostfile: Path | None,
    resume: str = "auto",
    change: bool = False,
) -> int:
    """Train on `devices` ranks here, or on the hosts of `hostfile`; returns the run's code.

    Args:
        given: the config's path and its overrides, which every rank is started with.
        change: as for `train`.
    """
    arguments = ["train", *given, *(["--change"] if change else [])]
    if resume != "auto":
        arguments += ["--resume", resume]
    else:  # the ranks find it out for themselves; here nothing has been started yet
        on = [f"--{k}={v}" for k, v in (("devices", devices), ("hostfile", hostfile)) if v]
        config = settled(config, None, change, Typed(["relora", "launch", *on, *given]))
    pass_on: Callable[[int, int], None]
    if hostfile is not None:
        slots, port = read_hostfile(hostfile), free_port()
        check_choice(slots)
        check_world(config, sum(slots.values()))
        command = multi_node_command(slots, ask_hosts(list(slots)), port, arguments)
        parting, pass_on = signal.SIGTERM, functools.partial(_pass_on_to_hosts, slots, port)
    else:
        chosen = choose_devices(devices)
        check_world(config, len(chosen))
        # Ended so, `launch.py` cannot stop its ranks one by one; the kernel tells all of them.
        command, parting = one_node_command(chosen, free_port(), arguments), signal.SIGKILL
        pass_on = _pass_on
    before = read_run_state(config.run_dir)
    # Of other hosts nothing is known here.
    environment = launcher_environment(hostfile is None and not torch.cuda.is_available())
    return _keep_code(*_run(command, environment, parting, pass_on), config, before)


def _run(
    command: Sequence[str],
    environment: Mapping[str, str],
    parting: signal.Signals,
    pass_on: Callable[[int, int], None],
) -> tuple[int, str | None]:
    """Run the launcher in a session of its own and pass our signals to the ranks.

    Args:
        parting: what the launcher gets when this process is killed.
        pass_on: sends the ranks of a launcher, which has a process id, a signal.

    Returns:
        Its exit code, and the name of the last signal that came on the way.
    """
    asked: list[int] = []
    wishes = Wishes()
    process: subprocess.Popen[bytes] | None = None

    def forward(number: int, frame: FrameType | None) -> None:
        meaning = "stop" if number == LAUNCHER_GONE else wishes.judge(number)
        asked.append(number)
        if process is not None and meaning != "echo":
            pass_on(process.pid, number if meaning == "stop" else EXIT_NOW)

    with caught(forward):
        process = subprocess.Popen(
            command,
            env=environment,
            start_new_session=True,
            preexec_fn=following(parting),
        )
        if asked:  # while it was started
            pass_on(process.pid, asked[-1])
        code = process.wait()
        while _ranks_of(process.pid):  # the launcher was killed; they save, and leave
            time.sleep(0.1)
    return code, name_of(asked[-1]) if asked else None


def _pass_on(launcher: int, number: int) -> None:
    """Send a signal to every rank, or to the launcher as long as there are none."""
    for pid in _ranks_of(launcher) or [launcher]:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _pass_on_to_hosts(slots: Mapping[str, int], port: int, launcher: int, number: int) -> None:
    """`_pass_on` where the ranks are elsewhere; they save together, which ends the launcher too."""
    quiet = subprocess.DEVNULL
    subprocess.Popen(
        signal_command(slots, port, number), start_new_session=True, stdout=quiet, stderr=quiet
    )


def _ranks_of(launcher: int) -> list[int]:
    """Process ids of the ranks that the per-node launcher has started, also after its death."""
    # The ranks' own children, which load data, are in the launcher's session too.
    parents = {}
    for pid in psutil.pids():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if pid != launcher and os.getsid(pid) == launcher:
                process = psutil.Process(pid)
                if process.status() != psutil.STATUS_ZOMBIE:
                    parents[pid] = process.ppid()
    return [pid for pid, parent in parents.items() if parent not in parents]


def _keep_code(code: int, asked: str | None, config: Config, before: RunState | None = None) -> int:
    """The run's exit code. What ranks could not note in run_state.json themselves is noted here.

    Args:
        code: of the launcher, which is that of the first rank that failed.
        asked: the signal that asked the run to stop, if one did.
        before: what run_state.json said before the launch.
    """
    if code in OURS and code != LOST:
        state = read_run_state(config.run_dir)
        if code == 1 and state.status == "running":  # a bug, on another rank than the first
            reason = "a rank failed with an error of its own; its traceback is above"
            write_run_state(config.run_dir, "failed", reason, state.step, code)
        return code
    if code == LOST and not asked and config.run_dir.is_dir():
        state = read_run_state(config.run_dir)
        if state.code == LOST and state != before:  # a rank has said which one is lost
            return code
    if code < 0:  # the launcher was killed, not a rank: those may have come to a good end
        state = read_run_state(config.run_dir)
        finished = state.status == "finished" and state.step == config.total_steps
        if finished or state.status == "preempted":
            return state.code
    if asked:  # before the ranks listened, or a second time: gone at once, as was wanted
        status, result, reason = "preempted", PREEMPTED, f"stopped at once by {asked}"
    else:
        status, result, reason = "failed", LOST, f"a rank was lost: it ended with code {code}"
    print(f"relora: {reason}; the same command goes on from the newest checkpoint", file=sys.stderr)
    if config.run_dir.is_dir():
        state = read_run_state(config.run_dir)
        if state.code != result:
            write_run_state(config.run_dir, status, reason, state.step, result)
    return result
