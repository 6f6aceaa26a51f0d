"""Figures for other people's dashboards, beside metrics.jsonl and TensorBoard: `train.log_to`.

Each by its own public API, as its users set it up: by `wandb login` or WANDB_MODE=offline and
WANDB_PROJECT; by MLFLOW_TRACKING_URI (a folder or database here, or a server) and
MLFLOW_EXPERIMENT_NAME; trackio keeps its figures here (TRACKIO_DIR) unless TRACKIO_SPACE_ID says
otherwise. Without a name of theirs, project and experiment are called `relora`. What a run is
called there stands in its `trackers.json`, by which a run that goes on goes on there too.
"""

from __future__ import annotations

import math
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from relora.errors import CheckpointError, ConfigError
from relora.files import exists, explain, read_json, write_json
from relora.record.layout import RunDirectory

PROJECT = "relora"
BUILT_IN = "tensorboard"  # is always written, by `metrics`


class Tracker(NamedTuple):
    """One dashboard that a run is shown on."""

    name: str
    identity: str  # what the run is called there
    log: Callable[[int, dict[str, float]], object]  # step, figures
    close: Callable[[], object]


def check_trackers(names: Sequence[str]) -> None:
    """Whether the packages are installed that `train.log_to` names.

    Raises:
        ConfigError: one is not.
    """
    for name in names:
        if name != BUILT_IN and find_spec(name) is None:
            raise ConfigError(
                f"train.log_to: {name} is not installed; pip install 'relora[{name}]', or remove it"
            )


def open_trackers(
    names: Sequence[str], run_dir: Path, settings: Mapping[str, object]
) -> list[Tracker]:
    """Begin, or go on with, what each dashboard shows of a run. Rank 0 alone.

    Args:
        settings: of the run, to tell it from others by.

    Raises:
        ConfigError: one cannot be reached, or wants a login.
        CheckpointError: trackers.json is damaged.
    """
    record = RunDirectory(run_dir).trackers
    known = read_json(record, CheckpointError) if exists(record) else {}
    opened: list[Tracker] = []
    plain = {k: v if isinstance(v, bool | int | float) else str(v) for k, v in settings.items()}
    for name in names:
        if name == BUILT_IN:
            continue
        try:
            opened.append(OPENERS[name](run_dir, known.get(name), plain))
        except Exception as error:  # whatever a service, its network or its own checks may raise
            close_trackers(opened)
            raise ConfigError(
                f"train.log_to: {name} cannot be written to: {_first_sentence(error)}; "
                f"mend that ({WAYS_OUT[name]}), or remove {name}"
            ) from error
    if opened:
        write_json(record, known | {tracker.name: tracker.identity for tracker in opened})
    return opened


def log_figures(trackers: list[Tracker], step: int, values: Mapping[str, object]) -> list[str]:
    """Pass the finite numbers of a line on. One that fails is given up, as the run goes on without.

    Returns:
        A complaint about each of these, which are gone from the list.
    """
    figures = {
        key: float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
    complaints = []
    for tracker in list(trackers) if figures else ():
        try:
            tracker.log(step, figures)
        except Exception as error:  # a dashboard is no reason to end a run
            trackers.remove(tracker)
            complaints.append(
                f"{tracker.name}: {_first_sentence(error)}; it gets no more figures of this "
                "process, metrics.jsonl has them all"
            )
    return complaints


def close_trackers(trackers: Sequence[Tracker]) -> list[str]:
    """Let each send what it still holds; a complaint about each that fails."""
    complaints = []
    for tracker in trackers:
        try:
            tracker.close()
        except Exception as error:  # as above
            complaints.append(f"{tracker.name}: {_first_sentence(error)}")
    return complaints


def _first_sentence(error: Exception) -> str:
    """Of what a package says, which may be a page; its kind if it says nothing."""
    return explain(error).partition("\n")[0].partition(". ")[0] or type(error).__name__


def _open_wandb(run_dir: Path, known: str | None, settings: dict[str, Any]) -> Tracker:
    wandb: Any = import_module("wandb")
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=run_dir.name,
        id=known,
        resume="allow",
        config=settings,
        dir=str(run_dir),
    )

    def log(step: int, figures: dict[str, float]) -> None:
        run.log(figures, step=step)

    return Tracker("wandb", run.id, log, run.finish)


def _open_mlflow(run_dir: Path, known: str | None, settings: dict[str, Any]) -> Tracker:
    mlflow: Any = import_module("mlflow")
    entities: Any = import_module("mlflow.entities")
    client = mlflow.MlflowClient()
    if known is None:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else client.create_experiment(name)
        known = client.create_run(number, run_name=run_dir.name).info.run_id
        parameters = [entities.Param(key, str(value)[:500]) for key, value in settings.items()]
        client.log_batch(known, params=parameters)
    else:
        client.update_run(known, status="RUNNING")
    identity = str(known)

    def log(step: int, figures: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        lines = [entities.Metric(key, value, now, step) for key, value in figures.items()]
        client.log_batch(identity, metrics=lines)

    return Tracker("mlflow", identity, log, lambda: client.set_terminated(identity))


def _open_trackio(run_dir: Path, known: str | None, settings: dict[str, Any]) -> Tracker:
    trackio: Any = import_module("trackio")
    # Its runs are told apart by their names alone.
    identity = known or f"{run_dir.name}-{secrets.token_hex(4)}"
    project = os.environ.get("TRACKIO_PROJECT", PROJECT)
    run = trackio.init(project=project, name=identity, config=settings, resume="allow")

    def log(step: int, figures: dict[str, float]) -> None:
        run.log(figures, step=step)

    return Tracker("trackio", identity, log, trackio.finish)


OPENERS = {"wandb": _open_wandb, "mlflow": _open_mlflow, "trackio": _open_trackio}
WAYS_OUT = {
    "wandb": "wandb login, or WANDB_MODE=offline in the environment",
    "mlflow": "MLFLOW_TRACKING_URI in the environment: a server, or sqlite:///FILE where all of "
    "mlflow is installed, or file:/DIR with MLFLOW_ALLOW_FILE_STORE=true",
    "trackio": "see its documentation",
}
