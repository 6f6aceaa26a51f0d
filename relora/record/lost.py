"""A rank is lost: which one, and who writes down how the run ended.

A rank whose collective failed breaks its connections, so that all the others notice at once and not
when their own patience ends, leaves a mark in the run directory, and reads the marks of the others.
Who has left none is dead, stopped or stuck. Files, and not the store of the process group: that
lives in rank 0, which may be the one. While all goes well nothing of this happens.

    .ranks/
        00001           a mark of rank 1: empty, or the error that it failed with by itself
        told            somebody has written run_state.json
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import stat
import time
from pathlib import Path

from relora.engine.distributed import Ranks
from relora.errors import CheckpointError
from relora.files import write_atomically
from relora.record.layout import RunDirectory
from relora.record.rundir import read_run_state

ANSWER_S = 5.0  # for the others to notice and to leave their marks


def forget_marks(run_dir: Path) -> None:
    """Remove what an earlier start has left; before any rank of this one can leave a mark."""
    shutil.rmtree(RunDirectory(run_dir).marks, ignore_errors=True)


def mark_failed(run_dir: Path, ranks: Ranks, reason: str) -> None:
    """Tell the others why this rank is about to leave them."""
    if ranks.world > 1:
        _leave_mark(run_dir, ranks.rank, reason.removeprefix(f"rank {ranks.rank}: "))


def is_to_tell(run_dir: Path, ranks: Ranks) -> bool:
    """Whether this rank is the one to write how the failed run ended: the first that asks.

    Or a later one, if rank 0 has noted a save in the meantime.
    """
    if ranks.world == 1:
        return True
    try:
        RunDirectory(run_dir).marks.mkdir(exist_ok=True)
        (RunDirectory(run_dir).marks / "told").touch(exist_ok=False)
    except FileExistsError:
        try:
            return read_run_state(run_dir).status == "running"
        except CheckpointError:  # it is not what a rank has told; this one can
            return True
    except OSError:  # no room for a file without content either
        return ranks.is_main
    return True


def describe_loss(run_dir: Path, ranks: Ranks, timeout_minutes: float) -> str:
    """Which ranks are lost, in words with their numbers; takes up to `ANSWER_S` seconds."""
    break_connections()
    deadline = time.monotonic() + ANSWER_S
    while True:
        # Anew each time: after a write of its own, a network disk looks again at what is there.
        _leave_mark(run_dir, ranks.rank, "")
        marks = _read_marks(run_dir)
        missing = [rank for rank in range(ranks.world) if rank not in marks]
        if not missing or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    parts = [f"rank {rank} failed ({why})" for rank, why in sorted(marks.items()) if why]
    if missing:
        many = len(missing) > 1
        numbers = " and ".join(filter(None, [", ".join(map(str, missing[:-1])), str(missing[-1])]))
        parts.append(
            f"{'ranks' if many else 'rank'} {numbers} of {ranks.world} {'are' if many else 'is'} "
            f"gone, or silent for {timeout_minutes:g} minutes"
        )
    return "; ".join(parts) or (
        f"the ranks lost touch with each other, or rank {ranks.rank} was silent for more than "
        f"{timeout_minutes:g} minutes"
    )


def break_connections() -> None:
    """Shut down every TCP connection of this process; ranks that wait for it get an error."""
    for path in list(Path("/proc/self/fd").iterdir()):
        # gloo's abort closes nothing, and its listening socket must not be touched.
        with contextlib.suppress(OSError):
            if not stat.S_ISSOCK(os.fstat(int(path.name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(path.name))) as connection:
                listens = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                if connection.family != socket.AF_UNIX and not listens:
                    connection.shutdown(socket.SHUT_RDWR)


def _leave_mark(run_dir: Path, rank: int, reason: str) -> None:
    directory = RunDirectory(run_dir).marks
    with contextlib.suppress(OSError):  # the error that brought us here matters more
        directory.mkdir(exist_ok=True)
        write_atomically(directory / f"{rank:05d}", reason, durable=False)


def _read_marks(run_dir: Path) -> dict[int, str]:
    marks = {}
    with contextlib.suppress(OSError):
        for path in RunDirectory(run_dir).marks.iterdir():
            if path.name.isdecimal():
                marks[int(path.name)] = path.read_text(encoding="utf8")
    return marks
