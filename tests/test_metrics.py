"""What a run tells: lines of JSON, a log that is the console's, a bar where somebody looks."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path
from typing import Any

import pytest

from relora.errors import CheckpointError
from relora.record.metrics import Metrics, drop_after, read_metrics
from relora.words import format_count, format_duration
from runs import metric_lines, train, workshop
from test_resume import read_board


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_no_number_is_null_in_the_file_and_itself_on_the_board(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, active=True, resumed_at=0)
    metrics.write(1, {"train/loss": math.nan, "train/grad_norm": math.inf, "eval/loss": 2.5})
    metrics.close()
    (line,) = metric_lines(tmp_path)  # refuses NaN and Infinity, which are not JSON
    assert line["train/loss"] is None
    assert line["train/grad_norm"] is None
    assert line["eval/loss"] == 2.5
    board = read_board(tmp_path)
    assert math.isnan(board["train/loss"][1])
    assert math.isinf(board["train/grad_norm"][1])


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """All points of each scalar, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return {t: [(e.step, e.value) for e in events.Scalars(t)] for t in events.Tags()["scalars"]}


def test_what_does_not_change_is_on_the_board_where_it_begins_and_ends(tmp_path: Path) -> None:
    """And not as a slope from its first value to the next."""
    metrics = Metrics(tmp_path, active=True, resumed_at=0)
    skipped = [0, 0, 0, 0, 1, 1, 1, 2, 1, 1]
    for step, count in enumerate(skipped, 1):
        metrics.write(step, {"train/skipped": count, "train/loss": 10.0 - step, "train/lr": 0.5})
    metrics.close()
    board = scalars(tmp_path)
    assert board["train/skipped"] == [(1, 0), (4, 0), (5, 1), (7, 1), (8, 2), (9, 1), (10, 1)]
    assert board["train/lr"] == [(1, 0.5), (10, 0.5)]
    assert board["train/loss"] == [(step, 10.0 - step) for step in range(1, 11)]
    assert [line["train/skipped"] for line in metric_lines(tmp_path)] == skipped


def test_the_main_figures_have_an_axis_of_tokens_that_a_resumed_run_goes_on_with(
    tmp_path: Path,
) -> None:
    """What an earlier process wrote from after the checkpoint is gone there too."""
    for resumed, last, jump in ((0, 6, 0), (3, 8, 1000)):
        metrics = Metrics(tmp_path, True, resumed, resumed * 256)
        for step in range(resumed + 1, last + 1):
            figures = {"train/loss": resumed + 1.0 / step, "perf/step_ms": 1.0 * step}
            metrics.write(step, {**figures, "train/tokens": step * 256 + jump})
            metrics.write(step, {"eval/loss": step + 0.5, "train/tokens": step * 256 + jump})
        metrics.close()
        if not resumed:
            time.sleep(1.1)  # files are read in the order of their names: of whole seconds
    board = scalars(tmp_path / "tokens")
    places = [256, 512, 768, *(step * 256 + 1000 for step in range(4, 9))]
    assert board.keys() == {"tokens/train/loss", "tokens/eval/loss"}
    assert [place for place, _ in board["tokens/train/loss"]] == places
    assert board["tokens/train/loss"][3] == (2024, 3.25)
    assert board["tokens/eval/loss"] == [(p, s + 1.5) for s, p in enumerate(places)]


def test_tensorboard_calls_a_run_by_its_directory_and_says_what_its_figures_are(
    tmp_path: Path,
) -> None:
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
    from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR
    from tensorboard.plugins.custom_scalar import layout_pb2

    for name in ("full", "relora"):
        (tmp_path / name).mkdir()
        metrics = Metrics(tmp_path / name, active=True, resumed_at=0)
        metrics.write(1, {"train/loss": 2.0, "train/lr": 0.1, "train/tokens": 256})
        metrics.close()
    runs = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    assert runs.Runs().keys() == {"full", "full/tokens", "relora", "relora/tokens"}
    metadata = runs.SummaryMetadata("full", "train/loss")
    assert metadata.data_class == DATA_CLASS_SCALAR  # for the fast reader
    about = metadata.summary_description
    assert about.endswith("in nats per token.")
    assert runs.SummaryMetadata("full/tokens", "tokens/train/loss").summary_description == about
    (layout,) = runs.Tensors("full", "custom_scalars__config__")
    found = layout_pb2.Layout.FromString(layout.tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for chart in found.category[0].chart}
    assert charts["loss"] == ["train/loss$", "eval/loss$"]
    assert {"learning rate", "norm of the gradient", "memory (GiB)"} < charts.keys()


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, active=True, resumed_at=0)
    for step in (1, 2, 3):
        metrics.write(step, {"train/loss": float(step)})
        assert [line["train/loss"] for line in read_metrics(tmp_path)] == [1.0, 2.0, 3.0][:step]
    metrics.close()


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics(tmp_path, active=False, resumed_at=0)
    metrics.write(1, {"train/loss": 1.0})
    metrics.say("hello")
    metrics.step(1, 2, "x")
    metrics.close()
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


LINES = [
    {"step": 1, "train/loss": 3.0},
    {"step": 2, "train/loss": 2.0},
    {"step": 2, "time/save_s": 0.1},
    {"step": 2, "train/skipped": 1},
    {"step": 3, "train/loss": 1.0},
]


@pytest.mark.parametrize(("step", "kept"), [(0, 0), (1, 1), (2, 3), (3, 5), (9, 5)])
def test_a_resumed_run_drops_what_came_after_its_checkpoint(
    step: int, kept: int, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES) + '{"step": 1, "tra')
    drop_after(path, step)
    assert lines_of(path) == LINES[:kept]
    assert path.read_text().endswith("\n") or not kept
    drop_after(path, step)
    assert lines_of(path) == LINES[:kept]


def test_nothing_is_dropped_where_nothing_is(tmp_path: Path) -> None:
    drop_after(tmp_path / "metrics.jsonl", 3)
    assert not list(tmp_path.iterdir())


def test_the_reader_skips_an_unfinished_end_and_names_a_broken_middle(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2')
    assert read_metrics(tmp_path) == [{"step": 1}]
    path.write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(CheckpointError, match="line 2"):
        read_metrics(tmp_path)


def test_the_log_is_what_the_console_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    workshop()
    capsys.readouterr()
    assert train(run_dir, "train.stop_after=13") == 75
    said = capsys.readouterr().out
    assert said == (run_dir / "log.txt").read_text()
    assert "\r" not in said  # no bar where nobody watches
    assert "\x1b" not in said
    header = said.split("step  1/24")[0]
    for part in ("ReLoRA", "38.4K parameters", "40.9K tokens", "ZeRO 1", "fp32", "1 × 4 × 2"):
        assert part in header, part
    assert "full rank to step 6 · cycles of 6: merges after 12, 18 · ends at 24" in header
    steps = [line for line in said.splitlines() if line.startswith("step ")]
    assert len(steps) == 13
    loss = {x["step"]: x["train/loss"] for x in metric_lines(run_dir) if "train/loss" in x}
    for number, line in enumerate(steps, 1):
        assert f"loss {loss[number]:.4f}  lr " in line
        assert re.search(r"gnorm [\d.]+  [\d.]+K? tok/s  eta \S+$", line)
    assert "  warm start 6/6  " in steps[5]
    assert "  cycle 1 6/6  " in steps[11]
    assert "  cycle 2 1/6  " in steps[12]
    assert said.count("MERGE 1 at step 12: 14 layers") == 1
    assert said.count("EVAL at step 12: loss ") == 1
    assert said.endswith("stopped at step 13; the same command goes on from there\n")
    assert train(run_dir) == 0
    again = capsys.readouterr().out
    assert f"going on from step 13 ({run_dir / 'checkpoints' / 'step_00000013'})" in again
    assert (run_dir / "log.txt").read_text() == said + again


def test_intervals_are_kept(tmp_path: Path) -> None:
    """Speed is a mean over the steps since the last line; the first and last step are logged."""
    changes = {"train__log_every": 5, "train__eval_every": None, "train__save_every": 9}
    assert train(tmp_path / "run", **changes) == 0
    found = metric_lines(tmp_path / "run")
    assert [x["step"] for x in found if "train/loss" in x] == [1, 5, 10, 15, 20, 24]
    assert [x["step"] for x in found if "eval/loss" in x] == [24]
    assert [x["step"] for x in found if "time/save_s" in x] == [9, 18, 24]


def test_counts_and_durations_are_short() -> None:
    counts = {0: "0", 310: "310", 1500: "1.5K", 24_600: "24.6K", 1.5e6: "1.5M", 2.5e9: "2.5B"}
    assert {n: format_count(n) for n in counts} == counts
    durations = {12: "12s", 59.6: "1m00s", 185: "3m05s", 3720: "1h02m", math.inf: "?"}
    assert {s: format_duration(s) for s in durations} == durations
