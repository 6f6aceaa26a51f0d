"""Ctrl-C and SIGTERM: the first asks for a stop after this step, another soon after stops at once.

A signal that was ignored when this process began (SIGHUP under nohup, SIGINT in a script's
background job) stays ignored. A launcher that is killed cannot tell its ranks anything; the kernel
does, and they stop likewise.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import select
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Asked at import, before anybody here sets a handler.
HEEDED = tuple(number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN)
AGAIN_S = 3.0  # a signal so soon after the last means: now
# One wish may come twice. One Ctrl-C under deepspeed's launcher is SIGINT from the terminal and
# SIGTERM from the launcher; `timeout` and systemd send SIGTERM to a child and to its whole group.
ECHO_S = 1.0  # for a signal of another name
ECHO_SAME_S = 0.2
# What the kernel sends when the launcher has died; a number that nobody else sends.
LAUNCHER_GONE: signal.Signals = getattr(signal, "SIGRTMIN", signal.SIGUSR2)
# What `relora launch` sends to its ranks when it was asked a second time. They leave the counting
# to it: it alone gets each wish once.
EXIT_NOW = int(signal.SIGRTMIN) + 1 if hasattr(signal, "SIGRTMIN") else int(signal.SIGQUIT)
FRONT = "RELORA_FRONT"  # set by it in their environment
PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # now: between fork and exec it could wait for ever


class Wishes:
    """Tells a second wish to stop from the echo of the first."""

    def __init__(self) -> None:
        self._number: int | None = None
        self._since = 0.0

    def judge(self, number: int) -> str:
        """What a signal means that came just now: `stop`, `echo` or `now`."""
        now = time.monotonic()
        passed = now - self._since
        if self._number is not None:
            if passed <= (ECHO_SAME_S if number == self._number else ECHO_S):
                return "echo"
            if passed <= AGAIN_S:
                return "now"
        self._number, self._since = number, now
        return "stop"


class StopRequest:
    """Becomes true when this process is asked to stop. Nothing is saved inside a handler.

    A thread of its own listens, so that the answer comes at once: a handler would wait for the end
    of what the main thread does in C, and that may be a whole backward pass or a hung collective.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._wishes = Wishes()
        self._counts = FRONT not in os.environ
        self._speaks = os.environ.get("RANK", "0") == "0"
        self._seconds: deque[float] = deque(maxlen=16)
        self._step = self._saved = 0
        self._ends, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        self._previous_pipe = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        # The handlers do nothing; without one, the number would not be written to the pipe.
        numbers = (*HEEDED, LAUNCHER_GONE, EXIT_NOW)
        self._previous = {n: signal.signal(n, lambda number, frame: None) for n in numbers}
        threading.Thread(target=self._listen, name="stop request", daemon=True).start()

    def __bool__(self) -> bool:
        return self.signal is not None

    def note(self, step: int, saved: int | None, seconds: float) -> None:
        """How far the run is, for what a signal's sender is told.

        Args:
            saved: step of the newest checkpoint; below 0 without one, and None while another
                is being written, which does not count before it is complete.
            seconds: that the last step took.
        """
        self._step = step
        if saved is not None:
            self._saved = max(0, saved)
        self._seconds.append(seconds)

    def _listen(self) -> None:
        while numbers := os.read(self._ends, 64):
            for number in numbers:
                self._hear(number)
        os.close(self._ends)

    def _hear(self, number: int) -> None:
        if number == LAUNCHER_GONE:  # nobody's wish: neither the first of two nor the second
            self.signal = self.signal or "the loss of its launcher"
            self._counts = True
        elif number == EXIT_NOW:
            self._leave(signal.SIGTERM)
        elif number in self._previous:
            self.signal = self.signal or signal.Signals(number).name
            meaning = self._wishes.judge(number)
            if meaning == "now" and self._counts:
                self._leave(number)
            elif meaning == "stop":
                self._tell(self._promise())

    def _promise(self) -> str:
        pace = ""
        if self._seconds:
            seconds = statistics.median(self._seconds)
            pace = f" ({seconds:.0f} s a step)" if seconds >= 10 else f" ({seconds:.2g} s a step)"
        return (
            f"stopping after this step{pace}, checkpoint follows; again within {AGAIN_S:.0f} s: "
            "exit now without it"
        )

    def _leave(self, number: int) -> None:
        lost = self._step - self._saved
        self._tell(
            f"exit now, without a checkpoint; {lost} finished step{'s' * (lost != 1)} and the one "
            f"under way are lost: the same command goes on from step {self._saved}"
        )
        os._exit(128 + number)

    def _tell(self, text: str) -> None:
        """A line on standard error, from rank 0 alone; nothing that could hold anything up."""
        if self._speaks:
            with contextlib.suppress(OSError, ValueError):  # closed, or the terminal is gone
                if select.select([], [2], [], 0)[1]:
                    bar = "\n" if os.isatty(2) else ""  # of progress, which has no line end
                    os.write(2, f"{bar}relora: {text}\n".encode())

    def ignore_further(self) -> None:
        """From here on the end is near and a second signal changes nothing for the better."""
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)
        self._stop_listening()

    def restore(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._stop_listening()

    def _stop_listening(self) -> None:
        if self._pipe >= 0:
            signal.set_wakeup_fd(self._previous_pipe)
            os.close(self._pipe)
            self._pipe = -1


def _forget_pipe() -> None:
    signal.set_wakeup_fd(-1)


# A forked process, such as one that loads data, must not write its signals into our pipe.
os.register_at_fork(after_in_child=_forget_pipe)


@contextlib.contextmanager
def caught(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Call `handler` for a stop signal, or for the loss of who started us, from now to the end."""
    previous = {number: signal.signal(number, handler) for number in (*HEEDED, LAUNCHER_GONE)}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """Whatever handlers a block sets, those of before are in place after it."""
    before = {number: signal.getsignal(number) for number in (*HEEDED, LAUNCHER_GONE, EXIT_NOW)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """A block that no wish to stop interrupts: a message that is the last thing to do."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are not for it to set, and do not come to it
        return
    with handlers_kept():
        for number in HEEDED:
            signal.signal(number, signal.SIG_IGN)
        yield


def name_of(number: int) -> str:
    """A stop signal in words."""
    lost = "the loss of the process that started it"
    return lost if number == LAUNCHER_GONE else signal.Signals(number).name


def following(number: int) -> Callable[[], None]:
    """A preexec_fn for a child that is to get a signal when this process dies. Linux only."""
    front = os.getpid()

    def follow() -> None:
        set_parent_death_signal(number)
        if os.getppid() != front:  # killed before that call
            os._exit(1)

    return follow


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
