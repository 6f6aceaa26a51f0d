"""The console of a run: lines, and on a terminal colours, wrapped lines and a bar below them."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import textwrap
import time
from collections import deque

from relora.engine.distributed import on_terminal
from relora.words import format_duration

LINE_WIDTH = 100  # columns that lines are made for
BAR_WIDTH = 24
PACE = 32  # steps that the speed is a mean of
WIPE = "\r\x1b[2K"
# What stands out, by what a line begins with: SGR parameters.
EMPHASIS = {"MERGE": "1;35", "BIRTH": "1;35", "EVAL": "1;32", "SPECTRA": "36", "note": "33"}
EMPHASIS |= {"changed": "1;33", "rates": "33", "merges": "33", "finished": "1"}


class Console:
    """Where a run's lines are shown; in a file or a pipe as they are.

    Args:
        bar: whether a terminal gets a bar too; where many ranks print, it would be in their way.
    """

    def __init__(self, bar: bool = True) -> None:
        self.terminal = on_terminal()
        self._colours = wants_colours(self.terminal)
        self._has_bar, self._bar = self.terminal and bar, ""
        self._moments: deque[float] = deque(maxlen=PACE + 1)

    def say(self, text: str) -> None:
        """Show a line, above the bar."""
        colour = EMPHASIS.get(text.partition(" ")[0]) if self._colours else None
        lines = text.split("\n")
        if self.terminal:
            width = min(LINE_WIDTH, shutil.get_terminal_size().columns)
            lines = [part for line in lines for part in _wrapped(line, width)]
        if colour:
            lines = [f"\x1b[{colour}m{line}\x1b[0m" for line in lines]
        shown = f"{WIPE if self._bar else ''}{chr(10).join(lines)}\n{self._bar}"
        _show(shown)

    def step(self, done: int, total: int, text: str) -> None:
        """Redraw the bar, once a step is done: how far the run is, how fast, how long still."""
        if not self._has_bar:
            return
        self._moments.append(time.monotonic())
        parts = [f"{done}/{total}", text]
        if len(self._moments) > 1:
            pace = (self._moments[-1] - self._moments[0]) / (len(self._moments) - 1)
            speed = f"{pace:.1f} s/step" if pace >= 1 else f"{1 / max(pace, 1e-6):.1f} steps/s"
            parts += [speed, f"eta {format_duration(pace * (total - done))}"]
        filled = round(BAR_WIDTH * done / total)
        bar = f"[{'█' * filled}{'·' * (BAR_WIDTH - filled)}] {'  '.join(parts)}"
        # A line as wide as the terminal would begin another, which nothing wipes.
        bar = bar[: shutil.get_terminal_size().columns - 1]
        _show(f"{WIPE if self._bar else ''}{bar}")
        self._bar = bar

    def close(self) -> None:
        """Wipe the bar."""
        if self._bar:
            _show(WIPE)
            self._bar = ""


def wants_colours(terminal: bool) -> bool:
    """Whether lines are coloured: on a terminal, unless NO_COLOR is set, or where FORCE_COLOR is.

    https://no-color.org, https://force-color.org: set means not empty.
    """
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return terminal and os.environ.get("TERM") != "dumb"


def _wrapped(line: str, width: int) -> list[str]:
    """A line as it fits; a row of the header goes on below its text."""
    indent = " " * 10 if line[9:10] == " " and line[10:11] != " " else "  "
    parts = textwrap.wrap(
        line,
        width,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
        replace_whitespace=False,
    )
    return parts or [""]


def _show(text: str) -> None:
    """Print; nothing more once nobody can read it, for the run still has to be saved."""
    try:
        print(text, end="", flush=True)
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EPIPE):  # terminal closed; reader of a pipe gone
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
