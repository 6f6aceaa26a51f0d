"""How many cores a process may use, and how its threads wait where the machine is crowded."""

from __future__ import annotations

import math
import os
from pathlib import Path

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
CGROUPS = Path("/sys/fs/cgroup")
SPINS = "1000"


def usable_cores() -> int:
    """Cores of this process: those it may run on, and no more than its control group pays for.

    What others load at the moment does not count: the number of threads decides the order in which
    floats are added, and a resumed run has to add them as before.
    """
    if hasattr(os, "sched_getaffinity"):  # Linux
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _quota())))


def threads_per_rank(local_world: int) -> int | None:
    """Threads for each of so many ranks on this machine; None where the user has set a number."""
    if any(os.environ.get(name) for name in THREADS):
        return None
    return max(1, usable_cores() // local_world)


def limit_spinning() -> None:
    """Let threads that wait give up their core soon, unless the user has said how they wait.

    GNU OpenMP spins for milliseconds; where another process has the core of the thread that is
    waited for, each of the thousand waits of a step then costs a time slice. As many spins as it
    takes itself where it sees more threads than cores. To be called before torch is imported.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS


def _quota() -> float:
    """The CPU quota of this process's control group, in cores; infinite without one."""
    found = math.inf
    for folder in _cgroup_folders():
        try:
            if (folder / "cpu.max").is_file():  # version 2
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = (
                    (folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
                )
        except (OSError, ValueError):  # no such controller here
            continue
        if quota.strip().isdecimal():  # and not `max` or -1
            found = min(found, int(quota) / int(period))
    return found


def _cgroup_folders() -> list[Path]:
    """The control groups of this process with those around them; in a container the top is its."""
    folders = [CGROUPS, CGROUPS / "cpu"]
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return folders
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" or "cpu" in controllers.split(","):
            top = CGROUPS if number == "0" else CGROUPS / "cpu"
            inner = top / path.lstrip("/")
            folders += [p for p in (inner, *inner.parents) if p.is_relative_to(top)]
    return folders
