"""What a run tells while it goes: metrics.jsonl (the truth), TensorBoard, console, log.txt.

Keys are `group/name`, with the unit in the name where there is one. One JSON object a line, each
with `step`; a line holds training figures, an evaluation, or a merge.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from relora.errors import CheckpointError
from relora.files import explain, replacing, supplied
from relora.record import keys
from relora.record.board import Board
from relora.record.console import Console
from relora.record.layout import RunDirectory
from relora.record.rundir import check_plain
from relora.record.trackers import Tracker, close_trackers, log_figures, open_trackers


class Metrics:
    """Writes one run's figures. On ranks other than 0 it does nothing.

    Args:
        run_dir: the run directory, which exists.
        active: whether this rank writes.
        resumed_at: step the run goes on from; later lines of an earlier process are dropped.
        resumed_tokens: as many as it has been trained on by then.
        bar: whether a terminal has a bar below the lines.

    What cannot be written (disk full, say) is noted in `problem` and not raised: rank 0 alone would
    leave the others waiting. The run asks for it at each step.
    """

    def __init__(
        self,
        run_dir: Path,
        active: bool,
        resumed_at: int,
        resumed_tokens: int = 0,
        bar: bool = True,
    ) -> None:
        self.run_dir = run_dir
        self.active = active
        self.problem: CheckpointError | None = None
        self._console = Console(bar) if active else None
        self._trackers: list[Tracker] = []
        if not active:
            return
        complaints = []
        with self.noting_trouble():
            files = RunDirectory(run_dir)
            path, log = files.metrics, files.log
            for each in (path, log):
                check_plain(each)
            complaints = drop_after(path, resumed_at)
            self._lines = path.open("a", encoding="utf8")
            self._log = log.open("a", encoding="utf8")
            self._board = Board(run_dir, resumed_at, resumed_tokens)
        for complaint in complaints:
            self.say(complaint)

    def open_trackers(self, names: Sequence[str], settings: Mapping[str, object]) -> None:
        """Write figures to these dashboards too, from now on; see `trackers`."""
        self._trackers = open_trackers(names, self.run_dir, settings)

    @contextmanager
    def noting_trouble(self, where: object = None) -> Iterator[None]:
        """Keep the first failure to write as `problem`, for all ranks to hear of.

        Args:
            where: what is written to, if not the run directory.
        """
        try:
            yield
        except CheckpointError as error:
            self.problem = self.problem or error
        except OSError as error:
            self.problem = self.problem or CheckpointError(
                f"{where or self.run_dir}: cannot be written: {error}; the checkpoints of "
                f"{self.run_dir} are intact; make room, and run the same command again"
            )

    def write(self, step: int, values: Mapping[str, float | int | str | list[float]]) -> None:
        """Add a line to metrics.jsonl and its numbers, but not lists of them, to TensorBoard."""
        if not self.active or self.problem:
            return
        # Strict JSON has no NaN or Infinity; a reader gets null.
        plain = {key: None if _is_odd(value) else value for key, value in values.items()}
        line = {"step": step, "time_s": round(time.time(), 3), **plain}
        with self.noting_trouble():
            self._lines.write(json.dumps(line) + "\n")
            self._lines.flush()
            self._board.add(step, values)
        for complaint in log_figures(self._trackers, step, values):
            self.say(complaint)

    def text(self, step: int, key: str, text: str) -> None:
        """A text for TensorBoard, as it is."""
        if self.active and not self.problem:
            with self.noting_trouble():
                self._board.add_text(step, key, text)

    def figure(self, step: int, key: str, figure: Any) -> None:
        """A matplotlib figure for TensorBoard."""
        if self.active and not self.problem:
            with self.noting_trouble():
                self._board.add_figure(step, key, figure)

    def conclude(self, settings: Mapping[str, Any], results: Mapping[str, float]) -> None:
        """The run's settings and final figures, for TensorBoard's HParams tab."""
        if self.active and not self.problem:
            with self.noting_trouble():
                self._board.conclude(settings, results)

    def say(self, text: str) -> None:
        """A line on the console and in log.txt."""
        if self._console is None:
            return
        with self.noting_trouble("standard output"):
            self._console.say(text)
        with self.noting_trouble():
            self._log.write(text + "\n")
            self._log.flush()

    def step(self, done: int, total: int, text: str) -> None:
        """A step is done: the bar at the bottom of a terminal moves."""
        if self._console is not None:
            with self.noting_trouble("standard output"):
                self._console.step(done, total, text)

    def close(self) -> None:
        """Flush and close everything."""
        if self._console is None:
            return
        self._console.close()
        for complaint in close_trackers(self._trackers):
            self.say(complaint)
        self._trackers = []
        for name in ("_board", "_lines", "_log"):  # those that could be opened
            with self.noting_trouble():
                if hasattr(self, name):
                    getattr(self, name).close()


def drop_after(path: Path, step: int) -> list[str]:
    """Remove the lines of metrics.jsonl from after the checkpoint of `step`; they come again.

    That is, lines of later steps and lines behind the one about that save; a run that starts where
    there is none (step 0, or killed before it was written) tells of its rollbacks there again. A
    last line cut off by a kill goes too.

    Returns:
        A complaint about each other line that is broken; it is removed.
    """
    if not path.is_file():
        return []
    kept: list[bytes] = []
    complaints = []
    saved = None
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            values = decode_line(line)
        except ValueError as error:
            if number < len(lines):
                complaints.append(f"{path}: line {number} {error}; it is left out from here on")
            continue
        again = values["step"] == step and (step == 0 or keys.ROLLBACK_COUNT in values)
        if values["step"] <= step and not again:
            kept.append(line)
        if values["step"] == step and keys.SAVE_S in values:
            saved = len(kept)
    with replacing(path) as temporary:
        temporary.write_bytes(b"".join(line + b"\n" for line in kept[:saved]))
    return complaints


def decode_line(line: bytes | str) -> dict[str, Any]:
    """One line of metrics.jsonl.

    Raises:
        ValueError: it is broken; the message goes on behind the line's number.
    """
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not valid JSON: {explain(error)}") from None
    step = values.get("step") if isinstance(values, dict) else None
    if type(step) is not int or not 0 <= step < 2**63:
        raise ValueError("is no object with a step")
    return values


def iter_metrics(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; an unfinished last line of a running run is left out.

    Raises:
        CheckpointError: another line is broken; names it.
    """
    path = RunDirectory(run_dir).metrics
    check_plain(path)
    with (
        supplied(CheckpointError, path),
        path.open(encoding="utf8", errors="replace", newline="\n") as file,
    ):
        for number, line in enumerate(file, 1):
            if line.endswith("\n"):  # else somebody is writing it
                try:
                    yield decode_line(line)
                except ValueError as error:
                    raise CheckpointError(f"{path}: line {number} {error}") from None


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """`iter_metrics` as a list."""
    return list(iter_metrics(run_dir))


def _is_odd(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
