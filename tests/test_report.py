"""What `relora compare` computes and draws: seeds, crossings, pictures, and a page that is safe."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relora.commands.compare import read_report
from relora.errors import CheckpointError, ConfigError
from relora.record.metrics import iter_metrics
from relora.report import curve_figures as figures
from relora.report.arms import (
    ArmRuns,
    at_seconds,
    at_tokens,
    group_runs,
    reached,
    spread,
)
from relora.report.build import build_report
from relora.report.cells import shown, signed
from relora.report.page import draw_all, to_html, to_markdown, write_report
from relora.report.questions import at_equal_memory
from relora.report.read import Evaluations, RunFiles, read_run
from relora.report.records import AtEqual, EqualRow, Report, Similarity, Spread
from relora.report.setting import setting_lines
from relora.report.style import DARK, LIGHT, log_ticks
from relora.report.tables import tables
from relora.report.verdict import verdict_title, verdicts
from relora.words import format_bytes, format_count
from runs import train

HOSTILE = '<script>alert(1)</script> a|b $x_1$ & "q" _u_'


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFiles:
    """A run of 6 steps with 3 evaluations, in full rank."""
    path = tmp_path_factory.mktemp("runs") / "full"
    changes: dict[str, Any] = {"lora": None, "relora": None, "warm_start": None}
    changes |= {"train__steps": 6, "train__eval_every": 2, "schedule__warmup_steps": 1}
    assert train(path, **changes) == 0
    return read_run(path)


def like(run: RunFiles, losses: list[float], seed: int = 1, path: str = "x") -> RunFiles:
    """The run with other losses, evaluated every 100 tokens and every 10 s."""
    n = np.arange(1.0, len(losses) + 1)
    evaluations = Evaluations(n, 100 * n, 10 * n, np.array(losses))
    config = run.config.model_copy(update={"seed": seed})
    return replace(run, path=Path(path), config=config, evaluations=evaluations)


def test_spread_is_the_sample_standard_deviation() -> None:
    three = spread([2.0, 4.0, 9.0])
    assert (three.mean, three.n, three.values) == (5.0, 3, [2.0, 4.0, 9.0])
    assert three.sd == pytest.approx(np.std([2, 4, 9], ddof=1))
    assert spread([1.0, None]) == Spread(mean=1.0, sd=None, n=1, values=[1.0, None])
    assert spread([float("nan")]).mean is None
    assert shown(spread([1.0, 3.0]), lambda v: f"{v:.1f}") == "2.0 ± 1.4"
    assert shown(spread([1.0, 1.01]), lambda v: f"{v:.1f}") == "1.0"
    assert shown(spread([1.0, None]), lambda v: f"{v:.1f}") == "1.0 (1 of 2 seeds)"
    assert signed(-0.001) == "0"


def test_questions_are_answered_between_and_at_evaluations(run: RunFiles) -> None:
    ours = like(run, [5.0, 4.0, 3.0])
    assert at_tokens(ours, 250) == (200, 4.0)  # the last at or before, not between
    assert at_tokens(ours, 99) is None
    assert at_seconds(ours, 25) == pytest.approx((250, 3.5))  # between
    assert at_seconds(ours, 5) is None
    crossing = reached(ours.evaluations, 3.25)
    assert crossing == (2.75, 275, 27.5)
    assert reached(ours.evaluations, 5.5) == (1, 100, 10)
    assert reached(ours.evaluations, 2.9) is None


def test_seeds_are_one_arm_and_the_baseline_is_their_mean(run: RunFiles) -> None:
    runs = [
        like(run, [5.0, 4.0, 3.2], 1, "/r/full/seed_1"),
        like(run, [5.0, 4.0, 2.8], 2, "/r/full/seed_2"),
        like(run, [4.0, 3.0], 1, "/r/other"),
    ]
    fast = runs[2].config.model_copy(
        update={"optimizer": run.config.optimizer.model_copy(update={"lr": 0.5})}
    )
    runs[2] = replace(runs[2], config=fast)
    arms = group_runs(runs, [None, None, None])
    assert [arm.name for arm in arms] == ["full", "other"]
    assert len(arms[0].runs) == 2
    report = build_report(arms)
    figures_of_full = report.arms[0].figures
    assert figures_of_full.loss.mean == pytest.approx(3.0)
    assert figures_of_full.loss.sd == pytest.approx(np.std([3.2, 2.8], ddof=1))
    tokens = report.questions.tokens
    assert tokens.at == 200  # as far as the other one is
    assert tokens.rows[1].difference == pytest.approx(np.exp(3) - np.exp(4))
    target = report.questions.target
    assert target.loss == pytest.approx(3.0)
    assert [row.tokens for row in target.rows] == [300, 200]
    assert [row.seeds_that_reach_it for row in target.rows] == [1, 1]
    assert target.rows[1].tokens_ratio == pytest.approx(2 / 3)
    assert any(w.startswith("seed: 1, 2 in full, 1 in other") for w in report.warnings)
    assert "seeds" in tables(report)


def with_losses(run: RunFiles, each: list[float], path: str, **changes: Any) -> RunFiles:
    """A run whose last evaluation says each sequence's loss; `changes` of its optimizer."""
    new = like(run, [4.0, float(np.mean(each))], changes.pop("seed", 1), path)
    optimizer = run.config.optimizer.model_copy(update=changes)
    config = new.config.model_copy(update={"optimizer": optimizer})
    return replace(
        new, config=config, evaluations=replace(new.evaluations, by_sequence=np.array(each))
    )


def test_arms_are_compared_sequence_by_sequence(run: RunFiles) -> None:
    """What makes sequences hard for both has no part in the error of their difference."""
    hard, gain = np.array([1.0, 3.0, 5.0, 7.0]), np.array([0.09, 0.11, 0.1, 0.1])
    runs = [
        with_losses(run, [*hard], "/r/full/seed_1"),
        with_losses(run, [*(hard + 1)], "/r/full/seed_2", seed=2),
        with_losses(run, [*(hard - gain)], "/r/good/seed_1", lr=0.5),
        with_losses(run, [*(hard + 1 - 3 * gain)], "/r/good/seed_2", lr=0.5, seed=2),
        with_losses(run, [*(hard[::-1] - gain)], "/r/other", lr=0.6),
        replace(with_losses(run, [3.0], "/r/before", lr=0.7), evaluations=run.evaluations),
    ]
    report = build_report(group_runs(runs, [None] * len(runs)))
    good, other = report.paired
    assert (good.arm, good.sequences) == ("good", 4)
    assert good.difference.values == pytest.approx([-0.1, -0.3])
    assert good.difference.sd == pytest.approx(np.std([-0.1, -0.3], ddof=1))
    assert good.error == pytest.approx(3 * np.std(gain, ddof=1) / 2)
    apart = hard[::-1] - gain - hard
    assert other.error == pytest.approx(np.std(apart, ddof=1) / 2)
    (note,) = [line for line in report.notes if "own error" in line]
    error = f"{np.std(apart, ddof=1) / 2:.4f}"
    assert note.startswith(f"other: the evaluation's own error ({error}) is more than a tenth of")
    assert note.endswith("difference from full (-0.1000): raise train.eval_sequences")
    rows = tables(report)["paired"].rows
    assert [row[0] for row in rows] == ["good", "other"]
    assert rows[0][1:] == ["−0.2000 ± 0.1414", "0.0122", "4"]


@pytest.mark.parametrize("what", ["sequence length", "tokens", "number", "seed", "before"])
def test_what_was_evaluated_on_other_text_is_not_paired(run: RunFiles, what: str) -> None:
    base = with_losses(run, [1.0, 2.0], "/r/full")
    other = with_losses(run, [1.0, 2.5], "/r/other", lr=0.5)
    assert build_report(group_runs([base, other], [None, None])).paired
    if what == "sequence length":
        data = other.config.data.model_copy(update={"sequence_length": 16})
        other = replace(other, config=other.config.model_copy(update={"data": data}))
    elif what == "tokens":
        other = replace(other, data="others")
    elif what == "seed":
        other = with_losses(run, [1.0, 2.5], "/r/other", lr=0.5, seed=2)
    else:
        each = np.array([1.0, 2.5, 3.0]) if what == "number" else None
        other = replace(other, evaluations=replace(other.evaluations, by_sequence=each))
    report = build_report(group_runs([base, other], [None, None]))
    assert report.paired == []
    assert "paired" not in tables(report)


def test_an_earlier_end_says_nothing_of_a_run_that_was_made_longer(
    run: RunFiles, tmp_path: Path
) -> None:
    copy = shutil.copytree(run.path, tmp_path / "run")
    read = read_run(copy).evaluations.by_sequence
    assert read is not None
    assert read.mean() == pytest.approx(run.evaluations.loss[-1], rel=1e-5)
    lines = (copy / "metrics.jsonl").read_text()
    more = {"step": 8, "eval/loss": 3.0, "train/tokens": 9e9, "time/elapsed_s": 9.0}
    (copy / "metrics.jsonl").write_text(lines + json.dumps(more) + "\n")
    assert read_run(copy).evaluations.by_sequence is None


def gave_up(run: RunFiles) -> RunFiles:
    return replace(run, status="failed", reason="not finite")


def test_a_seed_that_gave_up_neither_ends_the_comparison_nor_counts_in_it(run: RunFiles) -> None:
    arms = [
        ArmRuns("full", [like(run, [5.0, 4.0, 3.0], 1), like(run, [5.0, 4.0, 3.2], 2)]),
        ArmRuns("wild", [like(run, [5.0, 3.9, 2.9], 1), gave_up(like(run, [5.0], 2))]),
        ArmRuns("lost", [gave_up(like(run, [5.0, 4.5], 1)), gave_up(like(run, [5.0], 2))]),
    ]
    report = build_report(arms)
    for question in ("tokens", "seconds"):
        answer = getattr(report.questions, question)
        assert answer.at == {"tokens": 300, "seconds": 30}[question]
        rows = {row.arm: row for row in answer.rows}
        assert rows["wild"].loss.values == [2.9, None]
        assert rows["lost"].loss.mean is None
        assert rows["lost"].difference is None
    figures_of = {arm.name: arm.figures for arm in report.arms}
    assert figures_of["wild"].loss.mean == 2.9
    assert figures_of["lost"].loss.values == [4.5, None]  # its last, of those of that step
    shown = {row[0]: row for row in tables(report)["arms"].rows}
    assert shown["wild"][1].endswith("(1 of 2 seeds)")
    target = {row.arm: row for row in report.questions.target.rows}
    assert target["wild"].reached
    assert target["wild"].seeds_that_reach_it == 1
    # Its curve goes on where one of its seeds does, and is of that seed all the way.
    assert report.arms[1].curves.mean.loss == [5.0, 3.9, 2.9]
    to_html(report, {}, None)


def test_the_baseline_s_perplexity_is_that_of_its_furthest_seeds(run: RunFiles) -> None:
    """As while another seed of it is trained."""
    full = [like(run, [5.0, 4.0, 3.0], 1), replace(like(run, [5.0], 2), status="running")]
    report = build_report(
        [ArmRuns("full", full), ArmRuns("other", [like(run, [5.0, 3.0, 2.0], 1)])]
    )
    assert report.questions.target.loss == 3.0
    assert report.questions.tokens.at == 100  # so far one can compare all


def test_a_loss_beyond_all_measure_has_no_perplexity_and_stops_nothing(run: RunFiles) -> None:
    arm = ArmRuns("wild", [like(run, [5.0, 400.0], 1), like(run, [5.0, 500.0], 2)])
    report = build_report([arm])
    assert report.arms[0].figures.perplexity.mean is None
    assert report.arms[0].figures.loss.mean == 450


def test_a_length_in_steps_is_that_in_tokens(run: RunFiles) -> None:
    train = run.config.train
    tokens = run.config.total_steps * run.config.tokens_per_step
    in_tokens = train.model_copy(update={"steps": None, "tokens": tokens})
    other = replace(run, config=run.config.model_copy(update={"train": in_tokens}))
    assert build_report([ArmRuns("steps", [run]), ArmRuns("tokens", [other])]).warnings == []
    section = run.config.model.model_copy(update={"gradient_checkpointing": True})
    other = replace(run, config=run.config.model_copy(update={"model": section}))
    (warning,) = build_report([ArmRuns("a", [run]), ArmRuns("b", [other])]).warnings
    assert warning.endswith("in b: times and memory do not compare")


def test_one_name_holds_one_experiment(run: RunFiles) -> None:
    other = replace(run, config=run.config.model_copy(update={"lora": None, "seed": 9}))
    assert [arm.name for arm in group_runs([run, other], ["a", "a"])] == ["a"]
    section = run.config.batch.model_copy(update={"global_batch_size": 4})
    other = replace(run, config=run.config.model_copy(update={"batch": section}))
    with pytest.raises(ConfigError, match=r"a: .* \(batch.global_batch_size\)"):
        group_runs([run, other], ["a", "a"])
    assert [arm.name for arm in group_runs([run, run], [None, None])] == ["full", "full′"]
    assert [arm.name for arm in group_runs([run, run], ["full", None])] == ["full", "full′"]
    assert group_runs([run], ["a\nb\x1b"])[0].name == "a?b?"


def test_within_a_memory_the_best_that_fits_is_named() -> None:
    def row(name: str, perplexity: float) -> EqualRow:
        nothing = spread([None])
        return EqualRow(arm=name, loss=nothing, perplexity=spread([perplexity]), tokens=nothing)

    rows = [row("large", 10.0), row("small", 12.0), row("wasteful", 11.0)]
    memory = {"large": spread([8.0]), "small": spread([4.0]), "wasteful": spread([16.0])}
    answer = at_equal_memory(AtEqual(at=100, rows=rows), memory, measured=True).rows
    assert [(r.arm, r.best_within, r.best_perplexity) for r in answer] == [
        ("small", "small", 12.0),
        ("large", "large", 10.0),
        ("wasteful", "large", 10.0),
    ]


def test_lines_are_read_without_losing_any(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {n}}}\n' for n in range(5000)) + '{"step": 99')
    assert [line["step"] for line in iter_metrics(tmp_path)] == list(range(5000))
    # Two broken lines that would make one good one when joined.
    path.write_text('{"step": 1}\n{"step": 2\n"a": 3}\n')
    with pytest.raises(CheckpointError, match="line 2 is not valid JSON"):
        list(iter_metrics(tmp_path))


def test_what_a_start_had_cost_is_counted(run: RunFiles, tmp_path: Path) -> None:
    """`model.pretrained` names a checkpoint of a run: its tokens, time and FLOPs come first."""
    path = shutil.copytree(run.path, tmp_path / "next")
    checkpoint = run.path / "checkpoints" / "step_00000006"
    text = (path / "config.yaml").read_text()
    text = re.sub(r"(?m)^  config: .*$", "  config: null", text)
    text = re.sub(r"(?m)^  pretrained: .*$", f"  pretrained: {checkpoint}", text)
    (path / "config.yaml").write_text(text)
    again = read_run(path)
    assert again.start is not None
    assert again.start.tokens == 6 * 256
    assert again.start.seconds > 0
    assert list(again.evaluations.tokens) == [6 * 256 + t for t in run.evaluations.tokens]
    report = build_report(group_runs([run, again], ["one", "two"]))
    one, two = (arm.figures for arm in report.arms)
    assert two.flops.mean == pytest.approx(2 * one.flops.mean)
    assert report.arms[1].warm_start.mean == 6 * 256
    (path / "config.yaml").write_text(text.replace(str(checkpoint), str(tmp_path / "gone")))
    (complaint,) = read_run(path).complaints
    assert "is unknown and not counted" in complaint


def test_a_long_curve_is_drawn_whole_with_every_spike(run: RunFiles) -> None:
    """One update among 100,000 has its own ink, far above the others'."""
    report = build_report([ArmRuns("a", [run])])
    (arm,) = report.arms

    def picture(loss: float) -> np.ndarray:
        steps = np.arange(100_000.0)
        losses = 3 + np.sin(steps)
        losses[[54_321, 99_999]] = loss, 40  # the last one gives all pictures one axis
        columns = {"tokens": steps.tolist(), "loss": losses.tolist()}
        curve = arm.curves.training[0].model_copy(update=columns)
        curves = arm.curves.model_copy(update={"training": [curve]})
        drawn = arm.model_copy(update={"curves": curves})
        figure = figures.draw_training(report.model_copy(update={"arms": [drawn]}), LIGHT)
        assert len(figure.axes[0].lines[0].get_xdata()) == 100_000
        figure.canvas.draw()
        return np.asarray(figure.canvas.buffer_rgba()).astype(int)

    other = np.abs(picture(39.0) - picture(3.0)).max(axis=-1) > 30
    rows, columns = np.nonzero(other)
    height, width = other.shape
    assert rows.min() < 0.25 * height  # up to where 39 is
    assert abs(np.median(columns) / width - 0.54) < 0.1


def test_smoothing_is_centred() -> None:
    line = 3 + 2 * np.arange(1000.0)
    assert figures.running_mean(line) == pytest.approx(line)  # no lag
    assert figures.running_mean(np.array([1.0])) == [1.0]


@pytest.mark.parametrize("limits", [(4.9, 5.2), (16.8, 34.7), (5, 110), (1e-4, 3), (99, 101)])
def test_a_log_axis_has_some_round_ticks(limits: tuple[float, float]) -> None:
    ticks = log_ticks(*limits)
    assert 3 <= len(ticks) <= 8
    assert all(limits[0] <= tick <= limits[1] for tick in ticks)


class Reader(HTMLParser):
    """Tags, ids, addresses and inline pictures of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.asked: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        assert not [key for key in values if key.startswith("on")]
        self.ids += [values["id"]] if "id" in values else []
        for key in ("href", "src", "srcset", "xlink:href"):
            self.asked += [values[key]] if key in values else []


def test_a_page_needs_nothing_and_runs_nothing_whatever_a_run_is_called(run: RunFiles) -> None:
    arms = [ArmRuns(HOSTILE, [run]), ArmRuns("_hidden", [run])]
    report = build_report(arms)
    drawn = draw_all(report)
    page = to_html(report, drawn, refresh_s=None)
    reader = Reader(page)
    assert "script" not in reader.tags
    assert {"img", "table"} <= set(reader.tags)
    assert len(reader.ids) == len(set(reader.ids))
    assert all(asked.startswith("data:") for asked in reader.asked)
    assert "default-src 'none'" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; a|b $x_1$ &amp;" in page
    assert 'http-equiv="refresh"' not in page
    assert '<meta http-equiv="refresh" content="30">' in to_html(report, drawn, refresh_s=30)


def size_of(png: bytes) -> tuple[int, int]:
    """Width and height, from the header."""
    assert png.startswith(b"\x89PNG")
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


def test_each_picture_is_there_once_for_light_and_once_for_dark_pages(run: RunFiles) -> None:
    report = build_report([ArmRuns("a", [run])])
    drawn = draw_all(report)
    page = to_html(report, drawn, None)
    assert [*drawn] == ["curves_tokens", "curves_time", "memory", "training_loss"]
    for light, dark in drawn.values():
        for png, before in ((light, 'src="'), (dark, '(prefers-color-scheme: dark)" srcset="')):
            text = f"{before}data:image/png;base64,{base64.b64encode(png).decode()}"
            assert page.count(text) == 1
        assert size_of(light) == size_of(dark)
        assert size_of(light)[0] == 2 * 720  # twice what the page shows it at
        assert light != dark
    assert "img{display:block;width:720px;max-width:100%" in page
    assert "prefers-color-scheme:dark){:root{--bg:#0f1318" in page
    assert 'name="viewport" content="width=device-width' in page


def test_a_report_is_read_as_it_was_written(run: RunFiles, tmp_path: Path) -> None:
    report = build_report([ArmRuns(HOSTILE, [run])])
    write_report(report, tmp_path)
    assert Report.model_validate_json((tmp_path / "report.json").read_text()) == report


def test_the_verdict_comes_first_and_says_what_each_arm_gives_and_costs(run: RunFiles) -> None:
    half = replace(like(run, [5.0, 4.0, 3.5]), log={k: v / 2 for k, v in run.log.items()})
    arms = [ArmRuns("full", [like(run, [5.0, 4.0, 3.0])]), ArmRuns("half", [half])]
    arms.append(ArmRuns("late", [replace(like(run, []), status="running")]))
    report = build_report(arms)
    lines = verdicts(report)
    title = verdict_title(report)
    assert title.startswith("At 300 tokens; FLOPs and time a token, and training state, as shares ")
    assert re.search(r"of full \(\S+ FLOPs in all, 30s in all, \S+B a rank\):$", title)
    assert lines["full"] == "perplexity 20.09, the baseline"
    assert lines["half"].replace("\u00a0", " ") == (
        "perplexity 33.12: 13.03 (+64.9 %) above the baseline's, with one seed only, so the "
        "spread over seeds is unknown; 1.00 × FLOPs, 2.00 × time, 1.00 × training state; "
        "never as good"
    )
    assert lines["late"] == "no evaluation yet (running, 6/6)"
    page, text = html.unescape(to_html(report, {}, None)), to_markdown(report, {})
    assert page.index(title) < page.index("perplexity 20.09")
    assert title in text
    for name, line in lines.items():
        assert f"<b>{name}</b>: {line}" in page
        assert page.index(f"<b>{name}</b>: {line}") < page.index("Read this first")
        assert f"- **{name}**: {line}" in text


@pytest.mark.parametrize(
    ("ours", "base", "says"),
    [
        ((2.9, 2.7), (3.0, 3.2), "(-25.9 %) below the baseline's, more than the spread over seeds"),
        ((2.9, 3.2), (3.0, 3.2), "(-4.3 %) below the baseline's, no more than the spread"),
        ((2.9,), (3.0, 3.2), "with one seed of ours only, so the spread over seeds is unknown"),
        (
            (2.9, 2.7),
            (3.0,),
            "with one seed of the baseline only, so the spread over seeds is unknown",
        ),
        ((3.0, 3.2), (3.0, 3.2), ": the baseline's;"),
    ],
)
def test_a_verdict_says_whether_a_difference_is_beyond_the_spread_over_seeds(
    ours: tuple[float, ...], base: tuple[float, ...], says: str, run: RunFiles
) -> None:
    """The deviation of a difference of two runs: of both arms' variances together."""
    arms = [
        ArmRuns(name, [like(run, [5.0, loss], seed) for seed, loss in enumerate(losses)])
        for name, losses in (("full", base), ("ours", ours))
    ]
    line = verdicts(build_report(arms))["ours"]
    assert says.replace("-", "−") in line.replace("\u00a0", " ")
    found = re.search(r"spread over seeds \(([\d.]+)\)", line)
    assert bool(found) == (len(ours) == len(base) and ours != base)
    if found:
        deviations = [np.std(np.exp(losses), ddof=1) for losses in (ours, base)]
        assert float(found[1]) == pytest.approx(np.hypot(*deviations), abs=0.005)


def test_the_difference_to_the_baseline_is_a_curve_over_tokens(run: RunFiles) -> None:
    """Interpolated between the baseline's evaluations; there is none where that has none."""
    base = [like(run, [5.0, 4.0, 3.0], 1), like(run, [5.2, 4.0, 3.2], 2)]
    ours = [like(run, [4.0, 3.5, 3.0, 2.0], 1), like(run, [4.0, 3.7, 3.0, 2.0], 2)]
    ours = [
        replace(one, evaluations=replace(one.evaluations, tokens=np.array([50.0, 150, 250, 350])))
        for one in ours
    ]
    report = build_report([ArmRuns("full", base), ArmRuns("ours", ours)])
    full, found = (arm.curves.difference for arm in report.arms)
    assert full is None
    assert found is not None
    assert found.tokens == [150, 250]
    assert found.loss == pytest.approx([3.6 - (5.1 + 4) / 2, 3.0 - (4 + 3.1) / 2])
    of_base = [np.std(each, ddof=1) for each in ((5.0, 5.2), (4.0, 4.0), (3.0, 3.2))]
    mean = [(of_base[0] + of_base[1]) / 2, (of_base[1] + of_base[2]) / 2]
    assert found.sd == pytest.approx(np.hypot(mean, [np.std((3.5, 3.7), ddof=1), 0]))
    (axes,) = figures.draw_difference(report, LIGHT).axes
    (line,) = [line for line in axes.lines if line.get_marker() == "o"]
    assert list(line.get_ydata()) == found.loss
    assert "difference" in draw_all(report)
    alone = build_report([ArmRuns("full", base[:1]), ArmRuns("ours", ours)])
    assert alone.arms[1].curves.difference.sd == []
    assert "difference" not in draw_all(build_report([ArmRuns("full", base)]))


def test_device_model_data_and_sizes_stand_on_top(run: RunFiles) -> None:
    report = build_report([ArmRuns("a", [run]), ArmRuns("b", [run])])
    lines = setting_lines(report)
    assert list(lines) == ["device", "model", "data", "sizes"]
    assert lines["device"].startswith(f"1 × {run.environment['device']}")
    assert lines["device"].endswith("fp32, ZeRO 1")
    parameters = report.arms[0].predicted.parameters
    assert lines["model"] == f"llama, {format_count(parameters)} parameters"
    assert "text/*.txt" in lines["data"]
    assert lines["sizes"].startswith("8 sequences of 32 = 256 tokens a step; 6 steps = 1.54K token")
    assert lines["sizes"].endswith(f", {6 * 256 / parameters:.3g} a parameter")
    page, text = to_html(report, {}, None), to_markdown(report, {})
    assert page.index(lines["sizes"]) < page.index(verdict_title(report))
    assert text.index("- sizes: 8 sequences") < text.index("At 1.54K tokens")
    elsewhere = replace(run, stretches=[replace(run.main, environment={"device": "H<100>"})])
    report = build_report([ArmRuns("a", [run]), ArmRuns("b", [elsewhere])])
    assert setting_lines(report)["device"].endswith("(a); 1 × H<100>, fp32, ZeRO 1 (b)")
    assert "H&lt;100&gt;" in to_html(report, {}, None)


def test_seeds_are_counted_and_named(run: RunFiles) -> None:
    two = ArmRuns("two", [like(run, [3.0], 7), like(run, [3.0], 5)])
    table = tables(build_report([ArmRuns("one", [run]), two]))["arms"]
    at = table.columns.index("seeds")
    assert [row[at] for row in table.rows] == ["1 (1)", "2 (7, 5)"]


def test_spectra_are_folded_and_tables_show_that_they_go_on(run: RunFiles) -> None:
    """By style alone: no script is needed for either."""
    report = build_report([ArmRuns("a", [run])])
    pair = Similarity(what="arms", of=("a", "b"), layers=1, width=1, phi=[[1.0]], whole=1.0)
    page = to_html(report.model_copy(update={"similarity": [pair]}), {}, None)
    folded = re.findall(r'<section id="(\w+)">\s*<details><summary>', page)
    assert folded == ["similarity"]
    assert page.count("<details>") == page.count("</details>") == 1
    assert " no-repeat local" in page
    assert "<script" not in page


def test_training_state_heads_memory_and_a_process_s_memory_is_not_in_it(run: RunFiles) -> None:
    """Without a GPU; on one its peak stands beside, with what was predicted, and decides."""
    report = build_report([ArmRuns("a", [run])])
    (arm,) = report.arms
    table = tables(report)["memory"]
    row = dict(zip(table.columns, table.rows[0], strict=True))
    parts = arm.predicted.memory_by_part
    held = sum(size for part, size in parts.items() if part not in ("buffers", "host"))
    assert table.columns[1] == "training state per rank"
    assert row["training state per rank"] == format_bytes(held)
    assert row["moments"] == format_bytes(8 * arm.predicted.parameters)
    assert report.questions.memory.rows[0].memory.mean == held
    assert not [column for column in table.columns if "peak" in column]
    on_gpu = replace(run, stretches=[replace(run.main, environment={"device": "H100"})])
    report = build_report([ArmRuns("a", [on_gpu])])
    table = tables(report)["memory"]
    row = dict(zip(table.columns, table.rows[0], strict=True))
    peak = run.log["perf/memory_gib"].max()
    assert float(row["peak GiB on the GPU"]) == pytest.approx(peak, abs=0.006)
    assert float(row["predicted"]) == pytest.approx(arm.predicted.memory / 2**30, abs=0.006)
    assert report.questions.memory.rows[0].memory.mean == pytest.approx(peak * 2**30)
    assert report.questions.memory.measured
    assert draw_all(report)["memory"]


def test_a_bar_in_a_name_does_not_break_a_table(run: RunFiles) -> None:
    text = to_markdown(build_report([ArmRuns(HOSTILE, [run])]), {})
    for line in text.splitlines():
        if line.startswith("| ---"):
            columns = line.count("|")
        elif line.startswith("| \\<script"):
            assert len(re.findall(r"(?<!\\)\|", line)) == columns


def test_colours_can_be_read_on_both_grounds() -> None:
    """Contrast of 3 : 1 (WCAG 2.1, 1.4.11) in the dark; 2.3 : 1 on white, where sky blue is."""

    def light(colour: str) -> float:
        parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for style, least in ((LIGHT, 2.3), (DARK, 3)):
        for colour in style.arms:
            one, other = sorted((light(colour), light(style.ground)), reverse=True)
            assert (one + 0.05) / (other + 0.05) >= least, colour


def test_other_shards_under_equal_settings_are_named(run: RunFiles) -> None:
    other = replace(run, data="another")
    assert build_report(group_runs([run, run], ["a", "b"])).warnings == []
    report = build_report(group_runs([run, other], ["a", "b"]))
    assert report.warnings == ["data: b was trained on other token shards than a"]


# --- runs that went on elsewhere ------------------------------------------------------------------


def went_on(run_dir: Path, step: int, **changes: Any) -> Path:
    """As if a run had gone on from a step with something else about its environment."""
    from relora.record.rundir import read_stretches, record_stretch

    (environment,) = read_stretches(run_dir)
    record_stretch(run_dir, step, {**environment, **changes})
    return run_dir


def test_a_run_on_two_machines_has_no_time_to_compare_and_says_what_changed(
    run: RunFiles, tmp_path: Path
) -> None:
    """Speed, ranks and prediction are of its longest stretch; what has no time stays compared."""
    mixed = went_on(shutil.copytree(run.path, tmp_path / "mixed"), 2, world_size=2, device="Abacus")
    lines = [json.loads(line) for line in (mixed / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "perf/step_ms" in line:
            line["perf/step_ms"] = 1.0 if line["step"] <= 2 else 2.0 + line["step"] % 2
    (mixed / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plain = shutil.copytree(run.path, tmp_path / "plain")
    report = read_report([str(plain), str(mixed)])
    first, second = report.arms
    assert first.name == "plain"
    notes = "\n".join(report.warnings)
    assert "mixed went on from step 2 with device" in notes
    assert "world_size 1 → 2" in notes
    assert "its time is a mixture and is not compared" in notes
    times = report.questions.seconds.rows
    assert [row.loss.mean is None for row in times] == [False, True]
    assert all(row.loss.mean for row in report.questions.tokens.rows)
    assert [row.seconds is None for row in report.questions.target.rows] == [
        False,
        True,
    ]
    (seed,) = second.seeds
    assert seed.world_size == 2
    assert seed.step_ms == pytest.approx(2.5, abs=0.51)
    assert second.predicted.bytes_per_step > 0
    assert first.predicted.bytes_per_step == 0
    assert read_report([str(mixed)]).questions.seconds.at is None
    assert write_report(report, tmp_path / "report")


def test_going_on_with_the_same_is_one_stretch_and_going_back_forgets(tmp_path: Path) -> None:
    from relora.record.rundir import read_stretches, record_stretch

    def stretches() -> list[tuple[int, str]]:
        return [(s["from_step"], s["on"]) for s in read_stretches(tmp_path)]

    for step, on, expected in [
        (0, "a", [(0, "a")]),
        (5, "a", [(0, "a")]),
        (8, "b", [(0, "a"), (8, "b")]),
        (9, "b", [(0, "a"), (8, "b")]),
        (12, "a", [(0, "a"), (8, "b"), (12, "a")]),
        (12, "c", [(0, "a"), (8, "b"), (12, "c")]),
        (7, "a", [(0, "a")]),
        (0, "b", [(0, "b")]),
    ]:
        assert record_stretch(tmp_path, step, {"on": on}) is None
        assert stretches() == expected
    (tmp_path / "environment.json").write_text('{"on": "old"}')
    assert stretches() == [(0, "old")]
