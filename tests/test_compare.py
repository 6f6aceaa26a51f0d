"""`relora compare`: every figure from the files, whatever state the runs are in."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from relora.commands import compare as command
from relora.commands.compare import read_report
from relora.report.page import to_markdown
from relora.report.records import Report
from relora.report.spectra import last_of_cycles
from relora.report.spectra_figures import draw_heat
from relora.report.style import LIGHT
from relora.report.tables import tables
from relora.words import format_bytes
from runs import held, metric_lines, relora, series, train
from spectra_files import low_rank, write_spectra

FULL: dict[str, Any] = {"lora": None, "relora": None, "warm_start": None}
FILES = ["report.html", "report.md", "report.json"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with finished runs `relora` and `full`, and `stopped`."""
    directory = tmp_path_factory.mktemp("runs")
    assert train(directory / "relora") == 0
    assert train(directory / "full", **FULL) == 0
    assert train(directory / "stopped", "train.stop_after=14") == 75
    return directory


def table(report: Report, name: str) -> list[dict[str, str]]:
    """The rows of one of the report's tables, by column."""
    found = tables(report)[name]
    return [dict(zip(found.columns, row, strict=True)) for row in found.rows]


def altered(run: Path, to: Path, **changes: str) -> Path:
    """A copy of a run with words of its config replaced (dots are written as __)."""
    copy = shutil.copytree(run, to)
    text = (copy / "config.yaml").read_text()
    for old, new in changes.items():
        key = old.replace("__", " ")
        assert f"{key}: " in text, key
        text = "\n".join(
            f"{line.split(key)[0]}{key}: {new}" if line.strip().startswith(f"{key}: ") else line
            for line in text.split("\n")
        )
    (copy / "config.yaml").write_text(text)
    return copy


def test_the_tables_are_what_the_metrics_say(runs: Path, tmp_path: Path) -> None:
    report = read_report([str(runs / "relora"), str(runs / "full")])
    rows, speeds = table(report, "arms"), table(report, "speed")
    assert [row["arm"] for row in rows] == ["relora", "full"]
    assert [row["method"] for row in rows] == ["ReLoRA after warm start", "full rank"]
    for row, speed in zip(rows, speeds, strict=True):
        run = runs / row["arm"]
        evaluation = [line for line in metric_lines(run) if "eval/loss" in line][-1]
        log = [line for line in metric_lines(run) if "train/loss" in line]
        assert row["status"] == "finished"
        assert row["step"] == "24/24"
        assert row["validation loss"] == f"{evaluation['eval/loss']:.4f}"
        assert row["perplexity"] == f"{evaluation['eval/perplexity']:.2f}"
        assert row["merges"] == str(len(series(run, "relora/merge")))
        assert row["tokens"] == "6.14K"
        median = np.median([line["perf/step_ms"] for line in log])
        assert float(speed["ms/step"]) == pytest.approx(median, abs=0.06)
        peak = max(line["perf/memory_gib"] for line in log)
        (arm,) = (arm for arm in report.arms if arm.name == row["arm"])
        assert arm.figures.memory_gib.mean == peak
    cost = table(report, "cost")
    merges = list(series(runs / "relora", "time/merge_s").values())
    assert cost[0]["one merge"] == f"{np.median(merges):.2f} s"
    assert cost[1]["one merge"] == "–"
    assert cost[0]["of it warm start"].endswith(" for 1.54K tokens")
    assert relora("export", runs / "relora", "--format", "peft", "--to", tmp_path / "peft") == 0
    adapter = load_file(tmp_path / "peft" / "adapter_model.safetensors").values()
    model = load_file(tmp_path / "peft" / "base" / "model.safetensors").values()
    sizes = [sum(tensor.numel() * 4 for tensor in found) for found in (adapter, model)]
    assert cost[0]["adapter alone, fp32"] == format_bytes(sizes[0])
    assert cost[1]["adapter alone, fp32"] == "–"
    assert {row["model, fp32"] for row in cost} == {format_bytes(sizes[1])}
    size = sum(p.stat().st_size for p in (runs / "full/checkpoints/step_00000024").iterdir())
    assert report.arms[1].figures.checkpoint_bytes.mean == size
    assert report.warnings == []  # this pair is a fair one


def test_how_sure_a_loss_is_and_what_was_tuned_is_said(runs: Path, tmp_path: Path) -> None:
    pair = [shutil.copytree(runs / name, tmp_path / name / "seed_0") for name in ("relora", "full")]
    for run, loss in zip(pair, (3.0, 3.04), strict=True):
        lines = metric_lines(run)
        for line in (line for line in lines if "eval/loss" in line):
            line.update({"eval/loss": loss, "eval/standard_error": 0.03})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run / "metrics.jsonl").write_text(text)
    said = {"full": {"runs": [str(pair[1])], "tuning": ["full: optimizer.lr 1, the best of 1, 2"]}}
    (tmp_path / "arms.json").write_text(json.dumps(said))
    report = read_report([str(run) for run in pair])
    assert "rates: full: optimizer.lr 1, the best of 1, 2" in report.notes
    assert table(report, "arms")[0]["its standard error"] == "0.0300"

    decayed = (pair[0] / "config.yaml").read_text().replace("grad_clip: 1.0", "grad_clip: 2.0")
    (pair[0] / "config.yaml").write_text(decayed)
    (tmp_path / "arms.json").write_text("[]")
    report = read_report([str(run) for run in pair])
    warnings = report.warnings
    assert [line for line in warnings if "another clipping" in line]
    assert [line for line in report.notes if "arms.json: cannot be read" in line]


def test_one_command_writes_a_page_a_text_and_every_figure(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "a" / "b"
    assert relora("compare", runs / "relora", runs / "full", "--to", to) == 0
    printed = capsys.readouterr().out
    assert "  relora: perplexity " in printed
    assert max(map(len, printed.splitlines())) <= 100 or str(to) in printed
    assert f"written  {to / 'report.html'}, .md with every table" in printed
    pictures = ["curves_tokens", "difference", "curves_time", "memory", "training_loss"]
    assert sorted(p.name for p in to.iterdir()) == sorted(FILES + [f"{p}.png" for p in pictures])
    for picture in pictures:
        assert (to / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
        assert f"]({picture}.png)" in (to / "report.md").read_text()
        assert f"{picture}.png" in printed
    assert "| relora |" in (to / "report.md").read_text()

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    json.loads((to / "report.json").read_text(), parse_constant=refuse)
    report = Report.model_validate_json((to / "report.json").read_text())
    assert report.format == 3
    assert report.baseline == "full"
    mean = report.arms[0].curves.mean
    evaluations = series(runs / "relora", "eval/loss")
    assert mean.step == list(evaluations)
    assert mean.loss == list(evaluations.values())
    curves = report.arms[0].curves
    assert curves.training[0].loss == list(series(runs / "relora", "train/loss").values())
    assert curves.merges.step == [12, 18]
    assert curves.births.tokens == [6 * 256]
    assert curves.rewarm_from.step == [6, 12, 18]
    assert curves.rewarm_to.step == [8, 14, 20]
    assert to_markdown(report, {}).startswith("# Comparison")  # the JSON alone makes the pages


def test_a_run_against_itself_differs_in_nothing(runs: Path) -> None:
    report = read_report([str(runs / "full"), str(runs / "full")])
    assert [arm.name for arm in report.arms] == ["full", "full′"]
    for question in ("tokens", "seconds"):
        rows = getattr(report.questions, question).rows
        assert [row.difference for row in rows] == [0, 0]
        assert [row.ratio for row in rows] == [1, 1]
    target = report.questions.target.rows
    assert [row.tokens_ratio for row in target] == [1, 1]
    assert target[0] == target[1].model_copy(update={"arm": target[0].arm})
    assert report.differences == {"config": [], "environment": []}
    assert report.warnings == []
    first, second = table(report, "arms")
    assert {**first, "arm": ""} == {**second, "arm": ""}


@pytest.mark.parametrize(
    ("changes", "word", "why"),
    [
        ({"global_batch_size": "4"}, "batch.global_batch_size", "another global batch"),
        ({"sequence_length": "16"}, "data.sequence_length", "other data or another order"),
        ({"steps": "20"}, "train.steps", "another length"),
        ({"eval_sequences": "4"}, "train.eval_sequences", "measured on other text"),
    ],
)
def test_unfair_comparisons_are_named(
    changes: dict[str, str], word: str, why: str, runs: Path, tmp_path: Path
) -> None:
    other = altered(runs / "full", tmp_path / "other", **changes)
    report = read_report([str(runs / "full"), str(other)])
    (note,) = report.warnings
    assert note.startswith(f"{word}: ")
    assert "in full" in note
    assert "in other" in note
    assert note.endswith(why)
    assert [row.path for row in report.differences["config"]] == [word]


def test_another_seed_of_another_arm_is_another_order(runs: Path, tmp_path: Path) -> None:
    other = altered(runs / "relora", tmp_path / "other", seed="2")
    report = read_report([str(runs / "full"), str(other)])
    assert report.warnings == [
        "seed: 1 in full, 2 in other: other data order and other initial weights"
    ]


def test_other_machines_versions_and_models_are_named(runs: Path, tmp_path: Path) -> None:
    other = shutil.copytree(runs / "full", tmp_path / "other")
    environment = json.loads((other / "environment.json").read_text())
    environment |= {"device": "Abacus 9", "commit": "0123456789ab"}
    (other / "environment.json").write_text(json.dumps(environment))
    model = json.loads((other / "model" / "config.json").read_text())
    (other / "model" / "config.json").write_text(json.dumps({**model, "rms_norm_eps": 0.5}))
    report = read_report([str(runs / "full"), str(other)])
    notes = "\n".join(report.warnings)
    assert "model.config.rms_norm_eps: " in notes
    assert "Abacus 9 in other: times do not compare" in notes
    assert "0123456789ab in other: other code" in notes
    assert len(report.warnings) == 3
    paths = {row.path for row in report.differences["environment"]}
    assert paths == {"device", "commit"}


def test_a_stopped_run_is_compared_as_far_as_it_is(runs: Path) -> None:
    report = read_report([str(runs / "full"), str(runs / "stopped")])
    row = table(report, "arms")[1]
    assert row["status"] == "preempted"
    assert row["step"] == "14/24"
    assert row["merges"] == "1"
    assert row["validation loss"] == f"{series(runs / 'stopped', 'eval/loss')[12]:.4f}"
    assert report.warnings == ["stopped is preempted: unfinished, 14 of 24 steps"]
    assert report.unfinished
    # Equal tokens: where the shorter one was evaluated last.
    rows = report.questions.tokens
    assert rows.at == 12 * 256
    assert rows.rows[0].loss.mean == series(runs / "full", "eval/loss")[12]
    # It has not come as far as full rank's end.
    assert table(report, "target")[1]["tokens"] == "not reached"
    assert report.questions.target.rows[1].tokens is None


def test_a_running_run_is_compared_while_it_writes(runs: Path, tmp_path: Path) -> None:
    """An unfinished last line is somebody at work, not damage."""
    run = shutil.copytree(runs / "relora", tmp_path / "running")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if '"eval/loss"' in line)
    (run / "metrics.jsonl").write_text("".join(lines[: at + 2]) + '{"step": 6, "train/lo')
    (run / "run_state.json").write_text('{"status": "running", "reason": "", "step": 5, "code": 0}')
    with held(run):
        report = read_report([str(run)])
    assert table(report, "arms")[0]["status"] == "running"
    assert report.arms[0].curves.mean.step == [4]


def test_an_evaluation_before_the_first_log_line_is_enough(tmp_path: Path) -> None:
    changes = {"train__log_every": 20, "train__eval_every": 2}
    assert train(tmp_path / "run", "train.stop_after=4", **changes) == 75
    assert relora("compare", tmp_path / "run", "--to", tmp_path / "report") == 0
    report = Report.model_validate_json((tmp_path / "report" / "report.json").read_text())
    loss = report.arms[0].figures.loss.mean
    assert loss == series(tmp_path / "run", "eval/loss")[4]


def test_a_run_without_an_evaluation_is_listed_beside_others(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "relora", tmp_path / "young")
    lines = [line for line in metric_lines(run) if line["step"] < 4]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "run_state.json").write_text('{"status": "running", "reason": "", "step": 3, "code": 0}')
    with held(run):
        assert relora("compare", runs / "full", run, "--to", tmp_path / "report") == 0
    report = Report.model_validate_json((tmp_path / "report" / "report.json").read_text())
    assert table(report, "arms")[1]["perplexity"] == "no evaluation yet"
    assert [row.arm for row in report.questions.tokens.rows] == ["full"]
    (run / "metrics.jsonl").unlink()  # it has only just begun
    assert read_report([str(runs / "full"), str(run)]).arms[1].progress == "0/24"


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
    report = Report.model_validate_json((tmp_path / "report" / "report.json").read_text())
    assert table(report, "arms")[1]["validation loss"] == "900.0000"
    assert table(report, "arms")[1]["perplexity"] == "–"
    assert "diverged has diverged: its last 4 evaluations are not finite" in report.warnings


@pytest.mark.parametrize(
    "state",
    ["missing", "empty", "a file", "no evaluation", "no metrics", "broken metrics", "no step"],
)
def test_what_is_no_run_is_named(
    state: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    others = [runs / "relora"]
    if state == "empty":
        run.mkdir()
    elif state == "a file":
        run.write_text("mine")
    elif state != "missing":
        shutil.copytree(runs / "relora", run)
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        if state == "no metrics":
            (run / "metrics.jsonl").unlink()
        elif state == "no evaluation":
            others = []
            (run / "metrics.jsonl").write_text(lines[0])
        else:
            lines[7] = lines[7][:20] + "\n" if state == "broken metrics" else '{"a": 1}\n'
            (run / "metrics.jsonl").write_text("".join(lines))
    assert relora("compare", *others, run, "--to", tmp_path / "report") == 4
    error = capsys.readouterr().err
    assert str(run) in error
    assert "Traceback" not in error
    if state in ("broken metrics", "no step"):
        assert f"{run / 'metrics.jsonl'}: line 8" in error
    assert not (tmp_path / "report").exists()


def test_runs_of_one_name_can_be_told_apart(runs: Path, tmp_path: Path) -> None:
    for place in ("here", "there"):
        shutil.copytree(runs / "relora", tmp_path / place / "run")
    arguments = [str(tmp_path / place / "run") for place in ("here", "there")]
    report = read_report(arguments)
    assert [arm.name for arm in report.arms] == ["here/run", "there/run"]


def test_arms_are_named_and_chosen_as_baseline(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"ours={runs / 'relora'}", f"mine={runs / 'full'}"]
    report = read_report(arguments, baseline="ours")
    assert [arm.name for arm in report.arms] == ["ours", "mine"]
    assert report.baseline == "ours"
    capsys.readouterr()
    assert relora("compare", *arguments, "--to", tmp_path / "r", "--baseline", "theirs") == 2
    assert "take one of ours, mine" in capsys.readouterr().err
    one_name = [f"x={runs / 'relora'}", f"x={runs / 'full'}"]
    assert relora("compare", *one_name, "--to", tmp_path / "r") == 2
    error = capsys.readouterr().err
    assert "differ in more than their seed (lora" in error


def test_a_watch_ends_with_the_last_run(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It waits for the first evaluation, renews the page while runs go, and stops by itself."""
    run = shutil.copytree(runs / "full", tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    done = (run / "run_state.json").read_text()
    (run / "run_state.json").write_text('{"status": "running", "reason": "", "step": 1, "code": 0}')
    (run / "metrics.jsonl").write_text(lines[0])
    page, slept = tmp_path / "report" / "report.html", []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 1:
            assert not page.exists()
            (run / "metrics.jsonl").write_text("".join(lines[:8]))
        else:
            assert '<meta http-equiv="refresh" content="7">' in page.read_text()
            (run / "metrics.jsonl").write_text("".join(lines))
            (run / "run_state.json").write_text(done)

    monkeypatch.setattr(command.time, "sleep", sleep)
    with held(run):
        assert relora("compare", run, "--to", page.parent, "--watch", "7") == 0
    assert slept == [7, 7]
    assert 'http-equiv="refresh"' not in page.read_text()
    printed = capsys.readouterr().out
    assert "waiting: " in printed
    assert "24/24 (finished)" in printed
    assert not list(page.parent.glob("*.tmp"))


def test_a_watch_does_not_wait_for_a_run_that_failed(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(runs / "full", tmp_path / "failed")
    lines = [line for line in metric_lines(run) if "eval/loss" not in line]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "run_state.json").write_text('{"status": "failed", "reason": "", "step": 3, "code": 5}')
    assert relora("compare", run, "--to", tmp_path / "report", "--watch", "1") == 4
    assert "has no evaluation yet" in capsys.readouterr().err
    report = read_report([str(runs / "full"), str(run)])
    assert table(report, "arms")[1]["perplexity"] == "no evaluation"


@pytest.mark.parametrize("told", ["running", None])
def test_a_run_that_was_killed_has_died_and_no_watch_waits_for_it(
    told: str | None, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one that was killed before its first save, and has said nothing of itself."""
    run = shutil.copytree(runs / "full", tmp_path / "killed")
    lines = [line for line in metric_lines(run) if line["step"] <= 9]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "run_state.json").unlink()
    if told:
        state = {"status": told, "reason": "", "step": 9, "code": 0}
        (run / "run_state.json").write_text(json.dumps(state))
    with held(run):
        report = read_report([str(run)])
        assert (report.arms[0].status, report.unfinished) == ("running", True)
    assert relora("compare", run, "--to", tmp_path / "report", "--watch", "1") == 0
    assert "killed 9/24 (died)" in capsys.readouterr().out
    report = Report.model_validate_json((tmp_path / "report" / "report.json").read_text())
    assert (report.arms[0].status, report.unfinished) == ("died", False)
    (warning,) = report.warnings
    assert warning.startswith("killed has died, killed perhaps: it has not said how it ended")
    # It is compared as far as it has come, since the same command goes on.
    assert read_report([str(runs / "full"), str(run)]).questions.tokens.at == 8 * 256


@pytest.mark.parametrize("lock", ["of another machine", "missing", "a directory"])
def test_whether_a_run_is_alive_elsewhere_is_not_guessed(
    lock: str, runs: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(runs / "full", tmp_path / "copy")
    (run / "run_state.json").write_text('{"status": "running", "reason": "", "step": 9, "code": 0}')
    holder = json.loads((run / ".lock").read_text())
    (run / ".lock").write_text(json.dumps({**holder, "host": "elsewhere"}))
    if lock != "of another machine":
        (run / ".lock").unlink()
    if lock == "a directory":
        (run / ".lock").mkdir()
    assert read_report([str(run)]).arms[0].status == "running"


def test_an_interrupt_ends_a_watch_with_the_report_whole(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sleep(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command.time, "sleep", sleep)
    monkeypatch.setattr(command, "write_report", lambda report, to, refresh_s: None)
    assert relora("compare", runs / "stopped", "--to", tmp_path, "--watch") == 0


@pytest.mark.parametrize("thousands", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_million_lines_take_seconds(thousands: int, runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "full", tmp_path / "long")
    (log, evaluation) = (
        next(line for line in metric_lines(run) if key in line) for key in ("train/lr", "eval/loss")
    )
    block = []
    for step in range(1, 1001):
        line = evaluation if step % 100 == 0 else log
        block.append({**line, "step": step})
    text = "".join(json.dumps(line) + "\n" for line in block)
    with (run / "metrics.jsonl").open("w") as file:
        file.writelines(text for _ in range(thousands))
    from relora.report.read import read_run

    began = time.process_time()
    found = read_run(run)
    # A million take 4 on a core of its own, and would take hours if it were quadratic.
    assert time.process_time() - began < 0.1 * thousands
    assert len(found.log["step"]) == 990 * thousands
    assert len(found.evaluations.loss) == 10 * thousands


def test_spectra_of_arms_stand_beside_each_other(runs: Path, tmp_path: Path) -> None:
    """LoRA's update has rank 2, ReLoRA's sum of three cycles rank 6, full rank all of 16."""
    full = shutil.copytree(runs / "full", tmp_path / "full")
    ours = shutil.copytree(runs / "relora", tmp_path / "ours")
    names = [f"model.layers.{n}.self_attn.{kind}" for n in (0, 1) for kind in ("q_proj", "k_proj")]
    write_spectra(full, 24, None, {name: (None, low_rank(16, (16, 16), 9)) for name in names})
    total = np.zeros((16, 16))
    for number, step in ((1, 12), (2, 18), (None, 24)):
        update = low_rank(2, (16, 16), step)
        total = total + update
        write_spectra(ours, step, number, dict.fromkeys(names, (update, total)))
    assert relora("compare", full, ours, "--to", tmp_path / "report") == 0
    report = Report.model_validate_json((tmp_path / "report" / "report.json").read_text())
    arms = {arm.arm: arm for arm in report.spectra}
    ranks = [m.cycle_effective_rank for m in arms["ours"].seeds[0]]
    assert ranks == pytest.approx([2, 2, 2], abs=1e-3)
    assert [m.cycles for m in arms["ours"].seeds[0]] == [1, 2, 3]
    assert arms["full"].last.total_effective_rank.mean == pytest.approx(16, abs=1e-3)
    values = arms["ours"].total_values["self_attn.q_proj"]
    assert len(values) == 32  # two layers
    assert sum(value > 1e-4 for value in values) == 12  # of rank 6 each
    assert values == sorted(values, reverse=True)
    between = {pair.what: pair for pair in report.similarity}
    assert between["arms"].of == ("full", "ours")
    assert between["cycles"].layers == 4
    assert np.shape(between["arms"].phi) == (8, 8)
    rows = {row["arm"]: row for row in table(report, "spectra")}
    assert rows["full"]["‖ΔW‖ / ‖W₀‖"] == "4.00"  # 16 singular values of 1
    assert (rows["full"]["lost to rounding"], rows["ours"]["lost to rounding"]) == ("–", "0")
    for picture in ("spectra", "ranks", "layers", "similarity"):
        assert (tmp_path / "report" / f"{picture}.png").stat().st_size > 10_000
    lines = metric_lines(ours)
    next(x for x in lines if "relora/rounding_loss" in x)["relora/rounding_loss"] = 0.0213
    (ours / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    again = read_report([str(full), str(ours)])
    assert table(again, "spectra")[1]["lost to rounding"] == "2.1 %"
    (ours / "spectra" / "step_00000018.safetensors").write_bytes(b"mine")
    again = read_report([str(full), str(ours)])
    assert "step_00000018.safetensors: is left out" in again.warnings[0]


def test_cycles_are_counted_and_not_measurements(runs: Path, tmp_path: Path) -> None:
    """Two measurements in each of three cycles, and layers with fewer directions than others."""
    ours = shutil.copytree(runs / "relora", tmp_path / "ours")
    block = "model.layers.0.self_attn"
    names = {f"{block}.q_proj": (16, 16), f"{block}.k_proj": (4, 16)}
    steps = [(10, None), (12, 1), (15, None), (18, 2), (20, None), (24, None)]
    for seed, (step, number) in enumerate(steps):
        updates = {name: low_rank(2, shape, seed) for name, shape in names.items()}
        write_spectra(ours, step, number, {name: (x, x) for name, x in updates.items()})
    report = read_report([str(ours)])
    (arm,) = report.spectra
    assert arm.layers.cycles == [1, 1, 2, 2, 3, 3]
    assert last_of_cycles(arm.layers.cycles) == {1: 1, 2: 3, 3: 5}
    assert last_of_cycles([0, 0]) == {}  # a run without cycles
    (pair,) = report.similarity
    assert pair.of == ("ours, step 18", "ours, step 24")  # of two cycles, not of one
    assert pair.layers == 2
    assert np.shape(pair.phi) == (4, 4)
    heat = draw_heat(report, LIGHT)
    assert [label.get_text() for label in heat.axes[0].get_xticklabels()] == ["1", "2", "3"]
    assert heat.axes[0].images[0].get_array().shape == (2, 3)
