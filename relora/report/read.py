"""What a run's files say, as plain data: columns of figures, evaluations, merges, measurements.

Everything comes from files, so a run may be finished, stopped or at work. A metrics file of 10⁶
lines is read in seconds: training figures go into columns as they are read.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from relora.config import Config
from relora.errors import CheckpointError, ConfigError
from relora.files import exists, is_file, read_json
from relora.load import build_config, leaves, load_run_config
from relora.record import keys
from relora.record.changes import Change, read_changes
from relora.record.checkpoint import Standing, newest_state
from relora.record.layout import CHECKPOINT_STATE, RunDirectory
from relora.record.metrics import iter_metrics
from relora.record.moved import moved_path
from relora.record.rundir import is_held, read_run_state, read_stretches

COLUMNS = (
    "step",
    keys.TOKENS,
    keys.ELAPSED_S,
    keys.TRAIN_LOSS,
    keys.LR,
    keys.TOKENS_PER_S,
    keys.STEP_MS,
    keys.MEMORY_GIB,
)
# Of an environment: what decides how long a step takes.
MACHINE = ("device", "world_size", "threads_per_rank", "platform")
LARGEST = 1e300  # no figure is beyond it; sums of such stay finite
AT_WORK = ("running", "preempted", "unknown")  # these may still get further by themselves
CPUS = ("x86_64", "aarch64", "arm64", "AMD64")  # what environment.json calls a device without GPU
UNTOLD = ("running", "unknown")  # what run_state.json says until a run ends, or has saved once
DIED = "died"  # of a run that has not said how it ended, and that no process holds


@dataclass(frozen=True)
class Start:
    """What was spent before a run's first step on the weights it starts from."""

    config: Config  # of the run that made them
    step: int
    tokens: float
    seconds: float
    changes: list[Change]  # of its settings, on its way


@dataclass(frozen=True)
class Evaluations:
    """Every finite evaluation, in order; times and tokens include what the start had cost."""

    step: np.ndarray
    tokens: np.ndarray
    seconds: np.ndarray
    loss: np.ndarray
    lost: int = 0  # evaluations after the last finite one
    error: float | None = None  # standard error of the last loss
    by_sequence: np.ndarray | None = None  # of the run's end: the loss of each sequence

    def at(self, steps: np.ndarray) -> Evaluations:
        """Those of some steps, all of which there must be."""
        rows = np.searchsorted(self.step, steps)
        return Evaluations(steps, self.tokens[rows], self.seconds[rows], self.loss[rows])


@dataclass(frozen=True)
class Stretch:
    """What a run ran on for a while."""

    begin: int  # after this step
    end: int  # as far as the run has got
    environment: dict[str, Any]

    @property
    def speed(self) -> dict[str, Any]:
        """What decides how long a step takes."""
        flat = leaves(self.environment)
        return {k: v for k, v in flat.items() if k in MACHINE or k.startswith("settings.")}


@dataclass(frozen=True, eq=False)
class RunFiles:
    """One run directory."""

    path: Path
    config: Config
    status: str
    reason: str
    model: dict[str, Any] | None  # model/config.json
    stretches: list[Stretch]
    log: dict[str, np.ndarray]
    evaluations: Evaluations
    events: list[dict[str, Any]]  # all lines that are neither training figures nor evaluations
    checkpoint_bytes: int | None
    data: str | None  # fingerprint of the token shards, by the newest checkpoint
    start: Start | None = None
    changes: list[Change] = field(default_factory=list)  # of its settings, on its way
    silent_s: float | None = None  # since the newest line; of a run that says it is running
    complaints: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Updates done, as far as the metrics say."""
        return _last_step(self.log, self.evaluations)

    @property
    def main(self) -> Stretch:
        """The longest stretch: figures of speed and memory are of it alone."""
        return max(self.stretches, key=lambda stretch: stretch.end - stretch.begin)

    @property
    def environment(self) -> dict[str, Any]:
        """What the run ran on, for most of it."""
        return self.main.environment

    @property
    def mixed(self) -> bool:
        """Whether its time is a mixture: of other machines, ranks or settings."""
        return any(stretch.speed != self.main.speed for stretch in self.stretches)

    @property
    def world(self) -> int:
        """Ranks; 1 if the run does not say."""
        world = self.environment.get("world_size")
        return world if type(world) is int and 0 < world < 2**31 else 1

    @property
    def gave_up(self) -> bool:
        """Whether it ended before its end, by an error or because its loss is no number."""
        return self.status == "failed" or self.evaluations.lost > 0

    def events_with(self, key: str) -> list[dict[str, Any]]:
        """Event lines that have `key` as a number."""
        return [line for line in self.events if is_number(line.get(key))]

    def of_main(self, key: str) -> np.ndarray:
        """A training figure in the longest stretch, where it is finite."""
        values, steps = self.log[key], self.log["step"]
        within = (steps > self.main.begin) & (steps <= self.main.end)
        return values[np.isfinite(values) & within]

    def median(self, key: str) -> float | None:
        """Median of a training figure in the longest stretch; robust against a pause."""
        values = self.of_main(key)
        return float(np.median(values)) if len(values) else None


def read_run(run_dir: Path) -> RunFiles:
    """Read one run directory.

    Raises:
        CheckpointError: it is none, or a file in it is broken; names the file and the line.
    """
    files = RunDirectory(run_dir)
    held = is_held(run_dir)  # asked first: a run says how it ended before it lets go
    state = read_run_state(run_dir)
    lacking = None
    if not is_file(files.config):
        lacking = "it has no config.yaml" if exists(run_dir) else "no such directory"
    elif not exists(files.metrics) and state.status in ("finished", "unknown") and not held:
        lacking = "it has no metrics.jsonl"
    if lacking:
        raise CheckpointError(f"{run_dir}: is no run directory that has started: {lacking}")
    try:
        config = load_run_config(run_dir)
    except ConfigError as error:
        raise CheckpointError(f"{run_dir}: its config cannot be read: {error}") from None
    complaints: list[str] = []
    given, start = config.model.pretrained, _read_start(config, run_dir, complaints)
    if given is not None and start is None:
        complaints.append(
            f"what the weights it starts from ({given}) had cost is unknown and not counted"
        )
    log, evaluations, events, last = _read_metrics(run_dir, start)
    newest = _read_newest(run_dir, complaints)
    status = state.status
    if status in UNTOLD and held is not None:
        status = "running" if held else DIED
    return RunFiles(
        path=run_dir,
        config=config,
        status=status,
        reason=state.reason,
        model=read_json(files.model_json, CheckpointError) if exists(files.model_json) else None,
        stretches=_read_stretches(run_dir, _last_step(log, evaluations), complaints),
        log=log,
        evaluations=evaluations,
        events=events,
        checkpoint_bytes=newest and newest.bytes,
        data=newest and newest.state.data,
        start=start,
        changes=_read_changes(run_dir, complaints),
        silent_s=max(0.0, time.time() - last) if status == "running" and last else None,
        complaints=complaints,
    )


def _read_newest(place: Path, complaints: list[str]) -> Standing | None:
    """How a run's newest whole checkpoint stands, or the one that `place` is."""
    found, unsound = newest_state(place)
    complaints += [f"passed over {complaint}" for complaint in unsound]
    return found


def _read_changes(run_dir: Path, complaints: list[str]) -> list[Change]:
    """What a run has changed on its way."""
    try:
        return read_changes(run_dir)
    except CheckpointError as error:
        complaints.append(f"{error}; what it has changed on its way is unknown")
        return []


def _read_stretches(run_dir: Path, last: int, complaints: list[str]) -> list[Stretch]:
    """A run's stretches up to its last step, at least one."""
    try:
        found = read_stretches(run_dir)
    except CheckpointError as error:  # the figures do not depend on it
        complaints.append(f"{error}; what it ran on is unknown")
        found = []
    found = found or [{"from_step": 0}]
    begins = [min(environment.pop("from_step"), last) for environment in found]
    stretches = [*map(Stretch, begins, [*begins[1:], last], found)]
    # One that has not got to a step yet says nothing of the run so far.
    return [s for s in stretches if s.end > s.begin] or stretches[-1:]


def _read_metrics(
    run_dir: Path, start: Start | None
) -> tuple[dict[str, np.ndarray], Evaluations, list[dict[str, Any]], float | None]:
    """Columns of training figures, evaluations, other lines, and when the last was written."""
    columns: dict[str, list[Any]] = {key: [] for key in COLUMNS}
    evaluated: list[dict[str, Any]] = []
    events: list[dict[str, Any]] = []
    last = None
    sequences: dict[str, Any] | None = None
    for line in iter_metrics(run_dir) if exists(RunDirectory(run_dir).metrics) else ():
        last = line.get("time_s", last)
        if keys.TRAIN_LOSS in line:
            for key, values in columns.items():
                values.append(line.get(key))
        elif isinstance(line.get(keys.SEQUENCE_LOSSES), list):
            sequences = line
        elif keys.EVAL_LOSS not in line:
            events.append(line)
        if keys.EVAL_LOSS in line:
            evaluated.append(line)
    log = {key: numbers(values) for key, values in columns.items()}
    finite = [n for n, line in enumerate(evaluated) if is_number(line[keys.EVAL_LOSS])]
    step, tokens, seconds, loss = (
        numbers([evaluated[n].get(key) for n in finite])
        for key in ("step", keys.TOKENS, keys.ELAPSED_S, keys.EVAL_LOSS)
    )
    if start is not None:  # in place
        for column in (log[keys.TOKENS], tokens):
            column += start.tokens
        for column in (log[keys.ELAPSED_S], seconds):
            column += start.seconds
    lost = len(evaluated) - (finite[-1] + 1 if finite else 0)
    error: Any = evaluated[finite[-1]].get(keys.EVAL_ERROR) if finite else None
    error = float(error) if is_number(error) else None
    # A run that was made longer has gone on from its earlier end.
    ended = sequences is not None and finite and sequences["step"] == evaluated[-1]["step"]
    each = numbers(sequences[keys.SEQUENCE_LOSSES]) if ended and sequences else None
    evaluations = Evaluations(step, tokens, seconds, loss, lost, error, each)
    return log, evaluations, events, last if is_number(last) else None


def _last_step(log: dict[str, np.ndarray], evaluations: Evaluations) -> int:
    return int(max([*log["step"][-1:], *evaluations.step[-1:]], default=0))


def numbers(values: list[Any]) -> np.ndarray:
    """Values as fp64; what is null or no number becomes NaN."""
    try:
        return np.array(values, dtype=np.float64)  # None becomes NaN
    except (TypeError, ValueError, OverflowError):
        return np.array([v if is_number(v) else math.nan for v in values], np.float64)


def is_number(value: Any) -> bool:
    """Whether a value is a number that fp64 can hold, and finite."""
    return type(value) in (int, float) and abs(value) < LARGEST


def _read_start(config: Config, run_dir: Path, complaints: list[str]) -> Start | None:
    """What the weights of `model.pretrained` had cost; None if they are from no run."""
    given = config.model.pretrained
    found = given and _read_newest(moved_path(given, config, run_dir), complaints)
    if not found:
        return None
    state = found.state
    try:
        source = build_config(state.config or {}, f"{given}: {CHECKPOINT_STATE}", read_model=False)
    except ConfigError:
        return None
    if source.model.pretrained is not None:
        before = source.model.pretrained
        complaints.append(f"{given} itself starts from {before}, whose cost is not counted")
    tokens = float(state.consumed * source.data.sequence_length)
    return Start(source, state.step, tokens, state.elapsed_s, state.changes)
