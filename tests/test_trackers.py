"""`train.log_to`: the dashboards, each in its offline mode, read by other code than their own."""

from __future__ import annotations

import importlib.util
import json
import math
import sqlite3
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from relora.record.trackers import open_trackers
from runs import make_config, metric_lines, relora, run_state, series, train

Figures = dict[str, dict[int, float]]  # key → step → value


def wandb_figures(root: Path) -> Figures:
    """Those of all offline parts of one run, which `wandb sync` would put together."""
    from wandb.proto import wandb_internal_pb2

    files = sorted(root.glob("run/wandb/offline-run-*/run-*.wandb"))
    assert len({path.name for path in files}) == 1  # one run, whatever number of processes
    found: Figures = {}
    for path in files:
        for data in leveldb_records(path.read_bytes()[7:]):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            for item in record.history.item:
                key = item.key or "/".join(item.nested_key)
                if not key.startswith("_"):
                    step = record.history.step.num
                    found.setdefault(key, {})[step] = json.loads(item.value_json)
    return found


def leveldb_records(log: bytes) -> Iterator[bytes]:
    """Of a log in LevelDB's format: blocks of 32 KiB (the first began with a header of 7 bytes),
    in which records have a checksum, a length and a type (whole, first, middle, last)."""
    place, whole = 0, b""
    while place + 7 <= len(log):
        room = 32768 - (place + 7) % 32768
        if room < 7:
            place += room
            continue
        _, length, kind = struct.unpack("<IHB", log[place : place + 7])
        whole += log[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def mlflow_figures(root: Path) -> Figures:
    """Lines of `time value step` in a file for each key."""
    (run,) = (path.parent for path in root.glob("mlruns/*/*/metrics"))
    found: Figures = {}
    for path in (run / "metrics").rglob("*"):
        if path.is_file():
            for line in path.read_text().splitlines():
                _, value, step = line.split()
                key = path.relative_to(run / "metrics").as_posix()
                found.setdefault(key, {})[int(step)] = float(value)
    return found


def trackio_figures(root: Path) -> Figures:
    (path,) = root.glob("trackio/*.db")
    found: Figures = {}
    with sqlite3.connect(path) as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    assert len({name for name, _, _ in rows}) == 1
    for _, step, values in rows:
        for key, value in json.loads(values).items():
            found.setdefault(key, {})[step] = value
    return found


READERS = {"wandb": wandb_figures, "mlflow": mlflow_figures, "trackio": trackio_figures}


@pytest.mark.parametrize("name", READERS)
def test_a_dashboard_has_all_figures_of_a_run_that_was_interrupted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run there, with the figures of metrics.jsonl, and TensorBoard beside it."""
    if importlib.util.find_spec(name) is None:  # trackio must be imported after TRACKIO_DIR is set
        pytest.skip(f"{name} is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    changes = {"train__log_to": [name]}
    assert train(tmp_path / "run", "train.stop_after=14", **changes) == 75
    assert train(tmp_path / "run", **changes) == 0
    found = READERS[name](tmp_path)
    for key in ("train/loss", "train/lr", "eval/loss", "relora/update_ratio"):
        expected = series(tmp_path / "run", key)
        assert found[key] == pytest.approx(expected, rel=1e-12), key
    lines = metric_lines(tmp_path / "run")
    numbers = {k for line in lines for k, v in line.items() if type(v) in (int, float)}
    assert numbers - {"step", "time_s"} <= found.keys()
    assert list((tmp_path / "run").glob("events*"))


@pytest.mark.parametrize("name", READERS)
def test_an_absent_package_is_one_line_before_anything_is_written(
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = importlib.util.find_spec
    absent = lambda each, *more: None if each == name else real(each, *more)  # noqa: E731
    monkeypatch.setattr("relora.record.trackers.find_spec", absent)
    capsys.readouterr()
    config = make_config(tmp_path / "run", train__log_to=["tensorboard", name])
    assert relora("train", config) == 2
    error = capsys.readouterr().err
    assert error == (
        f"relora: train.log_to: {name} is not installed; pip install 'relora[{name}]', or remove "
        "it\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [["neptune"], ["wandb", "wandb"], "wandb"])
def test_what_is_no_dashboard_is_refused(
    value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert relora("train", make_config(tmp_path / "run", train__log_to=value)) == 2
    assert "train.log_to" in capsys.readouterr().err


class FakeTrackio:
    """A dashboard that remembers, and fails when it is told to."""

    def __init__(self, fails_at: float = math.inf, opens: bool = True) -> None:
        self.lines: list[tuple[str, int, dict[str, float]]] = []
        self.names: list[str] = []
        self.fails_at, self.opens, self.closed = fails_at, opens, 0

    def init(self, project: str, name: str, config: Any, resume: str) -> Any:
        if not self.opens:
            raise RuntimeError("no way there. Read on in the documentation.")
        self.names.append(name)
        return SimpleNamespace(log=self.log)

    def log(self, figures: dict[str, float], step: int) -> None:
        if step >= self.fails_at:
            raise OSError("the line is dead")
        self.lines.append((self.names[-1], step, figures))

    def finish(self) -> None:
        self.closed += 1


def put_in_place(fake: FakeTrackio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", fake)
    monkeypatch.setattr("relora.record.trackers.find_spec", lambda name: name)


def test_a_run_goes_on_under_the_name_that_it_has_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeTrackio()
    put_in_place(fake, monkeypatch)
    (tmp_path / "other").mkdir()
    changes = {"train__log_to": ["trackio"]}
    assert train(tmp_path / "run", "train.stop_after=3", **changes) == 75
    assert train(tmp_path / "run", "train.stop_after=5", **changes) == 75
    assert train(tmp_path / "other" / "run", "train.stop_after=1", **changes) == 75
    assert fake.names[0] == fake.names[1] != fake.names[2]
    assert json.loads((tmp_path / "run" / "trackers.json").read_text())["trackio"] == fake.names[0]
    assert fake.closed == 3
    steps = [step for name, step, line in fake.lines if "train/loss" in line]
    assert steps == [1, 2, 3, 4, 5, 1]


def test_a_dashboard_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said once, and metrics.jsonl has all."""
    fake = FakeTrackio(fails_at=4)
    put_in_place(fake, monkeypatch)
    assert train(tmp_path / "run", "train.stop_after=6", train__log_to=["trackio"]) == 75
    assert list(series(tmp_path / "run", "train/loss")) == [1, 2, 3, 4, 5, 6]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("trackio: the line is dead; it gets no more figures") == 1


def test_a_dashboard_that_cannot_be_reached_ends_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_in_place(FakeTrackio(opens=False), monkeypatch)
    assert train(tmp_path / "run", "train.stop_after=2", train__log_to=["trackio"]) == 2
    error = capsys.readouterr().err
    assert "train.log_to: trackio cannot be written to: no way there; mend that" in error
    assert "Traceback" not in error
    assert run_state(tmp_path / "run")["status"] == "failed"


def test_tensorboard_alone_opens_nothing(tmp_path: Path) -> None:
    assert open_trackers(["tensorboard"], tmp_path, {}) == []
    assert not list(tmp_path.iterdir())
