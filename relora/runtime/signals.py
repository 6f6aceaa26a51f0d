"""Ctrl-C and SIGTERM: the first asks for a stop at the next step, the second stops at once.

A launcher that is killed cannot tell its ranks anything; the kernel does, and they stop likewise.
"""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import sys
import time
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# One Ctrl-C in a terminal reaches a rank twice: as SIGINT from the terminal, and as SIGTERM from
# the launcher, which got the SIGINT too. Another signal so soon after the first is the same wish.
ECHO_S = 1.0
# What the kernel sends when the launcher has died; a number that nobody else sends.
LAUNCHER_GONE: signal.Signals = getattr(signal, "SIGRTMIN", signal.SIGUSR2)
PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # now: between fork and exec it could wait for ever


class StopRequest:
    """Becomes true when this process is asked to stop. Nothing is saved inside a handler."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self._first: str | None = None
        self._since = 0.0
        self._previous = {
            number: signal.signal(number, self._on_signal) for number in (*SIGNALS, LAUNCHER_GONE)
        }

    def __bool__(self) -> bool:
        return self.signal is not None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == LAUNCHER_GONE:  # nobody's wish: neither the first of two nor the second
            self.signal = self.signal or "the loss of its launcher"
            return
        name = signal.Signals(number).name
        if self._first is None:
            self._first, self._since = name, time.monotonic()
            self.signal = self.signal or name
        elif name == self._first or time.monotonic() - self._since > ECHO_S:
            os._exit(128 + number)

    def ignore_further(self) -> None:
        """From here on the end is near and a second signal changes nothing for the better."""
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)

    def restore(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


@functools.cache
def follow_launcher() -> int | None:
    """Get LAUNCHER_GONE when the launcher of this rank dies; the first call counts.

    Until a StopRequest listens, it ends the process. Only under deepspeed's `launch.py`: what was
    started by hand lives on without the shell that started it, and srun minds its own tasks.

    Returns:
        Process id of that launcher; None without one.
    """
    if "CROSS_RANK" not in os.environ:  # no other launcher sets it
        return None
    signal.signal(LAUNCHER_GONE, signal.SIG_DFL)  # who started us may have ignored it
    set_parent_death_signal(LAUNCHER_GONE)
    parent = os.getppid()
    if not _same_session(parent):  # it died before that call; this is who takes in orphans
        print("relora: the launcher of this rank is gone already", file=sys.stderr)
        os.kill(os.getpid(), LAUNCHER_GONE)
    return parent


def set_parent_death_signal(number: int) -> None:
    """Have the kernel send this process a signal when its parent dies. Linux only."""
    if sys.platform == "linux":
        _LIBC.prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)


def _same_session(pid: int) -> bool:
    try:
        return os.getsid(pid) == os.getsid(0)
    except ProcessLookupError:
        return False
