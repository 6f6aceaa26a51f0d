"""Ctrl-C and SIGTERM: the first asks for a stop at the next step, the second stops at once."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# One Ctrl-C in a terminal reaches a rank twice: as SIGINT from the terminal, and as SIGTERM from
# the launcher, which got the SIGINT too. Another signal so soon after the first is the same wish.
ECHO_S = 1.0


class StopRequest:
    """Becomes true when this process is asked to stop. Nothing is saved inside a handler."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self._since = 0.0
        self._previous = {number: signal.signal(number, self._on_signal) for number in SIGNALS}

    def __bool__(self) -> bool:
        return self.signal is not None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.signal is None:
            self.signal, self._since = name, time.monotonic()
        elif name == self.signal or time.monotonic() - self._since > ECHO_S:
            os._exit(128 + number)

    def ignore_further(self) -> None:
        """From here on the end is near and a second signal changes nothing for the better."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def restore(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
