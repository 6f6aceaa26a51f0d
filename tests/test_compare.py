"""`relora compare`: every figure from the files, whatever state the runs are in."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from runs import metric_lines, relora, series, train

FULL: dict[str, Any] = {"lora": None, "relora": None, "warm_start": None}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with finished runs `relora` and `full`, and `stopped`."""
    directory = tmp_path_factory.mktemp("runs")
    assert train(directory / "relora") == 0
    assert train(directory / "full", **FULL) == 0
    assert train(directory / "stopped", "train.stop_after=14") == 75
    return directory


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Figures that are closed while the test runs."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figures: list[Any] = []
    real = plt.close
    monkeypatch.setattr(plt, "close", lambda figure: (figures.append(figure), real(figure)))
    return figures


def table(path: Path) -> list[dict[str, str]]:
    """The rows of a Markdown table, by column."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in path.read_text().splitlines()
        if line.startswith("|")
    ]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def test_the_table_is_what_the_metrics_say(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert relora("compare", runs / "relora", runs / "full", "--to", tmp_path / "a" / "b") == 0
    report = tmp_path / "a" / "b" / "comparison.md"
    assert report.read_text().strip() in capsys.readouterr().out
    rows = table(report)
    assert [row["run"] for row in rows] == ["relora", "full"]
    assert [row["method"] for row in rows] == ["ReLoRA", "full rank"]
    for row in rows:
        run = runs / row["run"]
        evaluation = [line for line in metric_lines(run) if "eval/loss" in line][-1]
        log = [line for line in metric_lines(run) if "train/loss" in line]
        assert row["status"] == "finished"
        assert row["step"] == "24/24"
        assert row["validation loss"] == f"{evaluation['eval/loss']:.4f}"
        assert row["perplexity"] == f"{evaluation['eval/perplexity']:.2f}"
        assert row["merges"] == str(len(series(run, "relora/merge")))
        assert row["tokens"] == "6.14K"
        speeds = sorted(line["perf/step_ms"] for line in log)
        assert float(row["ms/step"]) == pytest.approx(speeds[len(speeds) // 2], abs=0.5)
        assert float(row["memory (GiB per rank)"]) == pytest.approx(
            log[-1]["perf/memory_gib"], abs=0.005
        )
    assert "Not the same" not in report.read_text()  # this pair is a fair one


def test_the_picture_shows_both_curves_and_the_merges(
    runs: Path, tmp_path: Path, drawn: list[Any]
) -> None:
    import numpy as np
    from matplotlib.image import imread

    assert relora("compare", runs / "relora", runs / "full", "--to", tmp_path) == 0
    image = imread(tmp_path / "comparison.png")
    assert image.shape[0] > 600
    assert image.shape[1] > 900
    colours = np.unique(image[..., :3].reshape(-1, 3), axis=0)
    assert len(colours) > 50
    (figure,) = drawn
    top, bottom = figure.axes
    curves = {line.get_label().split(" ")[0]: line for line in top.lines if len(line.get_xdata())}
    for name in ("relora", "full"):
        evaluations = series(runs / name, "eval/loss")
        x, y = curves[name].get_data()
        assert list(y) == list(evaluations.values())
        assert list(x) == [step * 256 for step in evaluations]
    marks = {line.get_xdata()[0] for line in top.lines if line.get_linestyle() == ":"}
    assert marks == {12 * 256, 18 * 256}
    births = {line.get_xdata()[0] for line in top.lines if line.get_linestyle() == "--"}
    assert births == {6 * 256}
    rates = series(runs / "relora", "train/lr")
    assert list(bottom.lines[0].get_ydata()) == list(rates.values())


def test_a_run_against_itself_differs_in_nothing(runs: Path, tmp_path: Path) -> None:
    assert relora("compare", runs / "relora", runs / "relora", "--to", tmp_path) == 0
    rows = table(tmp_path / "comparison.md")
    assert rows[0] == rows[1]
    assert "Not the same" not in (tmp_path / "comparison.md").read_text()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"seed": 2}, "seed"),
        ({"batch__global_batch_size": 4}, "batch.global_batch_size"),
        ({"data__sequence_length": 16}, "data.sequence_length"),
        ({"train__steps": 20}, "train.steps"),
        ({"train__eval_sequences": 4}, "train.eval_sequences"),
    ],
)
def test_unfair_comparisons_are_named(
    changes: dict[str, Any], word: str, runs: Path, tmp_path: Path
) -> None:
    assert train(tmp_path / "other", **changes) == 0
    assert relora("compare", runs / "relora", tmp_path / "other", "--to", tmp_path / "report") == 0
    report = (tmp_path / "report" / "comparison.md").read_text()
    notes = [line for line in report.splitlines() if line.startswith("- ")]
    assert len(notes) == 1
    assert notes[0].startswith(f"- {word}: ")
    assert "in relora" in notes[0]
    assert "in other" in notes[0]


def test_a_stopped_run_is_compared_as_far_as_it_is(runs: Path, tmp_path: Path) -> None:
    assert relora("compare", runs / "relora", runs / "stopped", "--to", tmp_path) == 0
    row = table(tmp_path / "comparison.md")[1]
    assert row["status"] == "preempted"
    assert row["step"] == "14/24"
    assert row["merges"] == "1"
    assert row["validation loss"] == f"{series(runs / 'stopped', 'eval/loss')[12]:.4f}"
    assert "stopped is preempted" in (tmp_path / "comparison.md").read_text()


def test_a_running_run_is_compared_while_it_writes(runs: Path, tmp_path: Path) -> None:
    """An unfinished last line is somebody at work, not damage."""
    run = shutil.copytree(runs / "relora", tmp_path / "running")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if '"eval/loss"' in line)
    (run / "metrics.jsonl").write_text("".join(lines[: at + 2]) + '{"step": 6, "train/lo')
    (run / "run_state.json").write_text('{"status": "running", "reason": "", "step": 5, "code": 0}')
    assert relora("compare", run, "--to", tmp_path / "report") == 0
    assert table(tmp_path / "report" / "comparison.md")[0]["status"] == "running"


def test_an_evaluation_before_the_first_log_line_is_enough(tmp_path: Path) -> None:
    changes = {"train__log_every": 20, "train__eval_every": 2}
    assert train(tmp_path / "run", "train.stop_after=4", **changes) == 75
    assert relora("compare", tmp_path / "run", "--to", tmp_path / "report") == 0
    row = table(tmp_path / "report" / "comparison.md")[0]
    assert row["validation loss"] == f"{series(tmp_path / 'run', 'eval/loss')[4]:.4f}"


def test_a_diverged_run_is_compared_too(runs: Path, tmp_path: Path) -> None:
    """A loss that is no number is null in the file."""
    run = shutil.copytree(runs / "full", tmp_path / "diverged")
    lines = metric_lines(run)
    for line in lines:
        if line["step"] > 8:
            line.update({key: None for key in line if key in ("eval/loss", "eval/perplexity")})
        if line["step"] == 8 and "eval/perplexity" in line:
            line.update({"eval/loss": 900.0, "eval/perplexity": None})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert relora("compare", runs / "relora", run, "--to", tmp_path / "report") == 0
    assert table(tmp_path / "report" / "comparison.md")[1]["validation loss"] == "900.0000"


@pytest.mark.parametrize(
    "state", ["missing", "empty", "a file", "no evaluation", "no metrics", "broken metrics"]
)
def test_what_is_no_run_is_named(
    state: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    if state == "empty":
        run.mkdir()
    elif state == "a file":
        run.write_text("mine")
    elif state == "no evaluation":
        assert train(run, "train.stop_after=3") == 75
    elif state != "missing":
        shutil.copytree(runs / "relora", run)
        if state == "no metrics":
            (run / "metrics.jsonl").unlink()
        else:
            lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
            lines[7] = lines[7][:20] + "\n"
            (run / "metrics.jsonl").write_text("".join(lines))
    assert relora("compare", runs / "relora", run, "--to", tmp_path / "report") == 4
    error = capsys.readouterr().err
    assert str(run) in error
    assert "Traceback" not in error
    if state == "broken metrics":
        assert "line 8" in error
    assert not (tmp_path / "report").exists()


def test_runs_of_one_name_can_be_told_apart(runs: Path, tmp_path: Path) -> None:
    for place in ("here", "there"):
        shutil.copytree(runs / "relora", tmp_path / place / "run")
    arguments = [tmp_path / place / "run" for place in ("here", "there")]
    assert relora("compare", *arguments, "--to", tmp_path / "report") == 0
    assert [row["run"] for row in table(tmp_path / "report" / "comparison.md")] == [
        "here/run",
        "there/run",
    ]


def test_a_hundred_thousand_lines_take_seconds(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "relora", tmp_path / "long")
    (log, evaluation) = (
        next(line for line in metric_lines(run) if key in line) for key in ("train/lr", "eval/loss")
    )
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, 100_001):
            line = evaluation if step % 100 == 0 else log
            file.write(json.dumps({**line, "step": step, "train/tokens": step * 256}) + "\n")
    from relora.commands.compare import draw, read_run, report

    began = time.process_time()
    curves = [read_run(run, "long")]
    text = report(curves)
    assert time.process_time() - began < 4
    draw(curves, tmp_path / "picture.png")
    assert time.process_time() - began < 12
    assert "100000/24" in text
