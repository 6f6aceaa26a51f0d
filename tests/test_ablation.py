"""The page of results says of the ablation what the committed report says, nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ablation import ARMS, COMMITTED, orderings, tables
from relora.load import load_config
from relora.report.page import to_markdown
from relora.report.records import Report
from relora.training.arms import read_arms

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "configs/experiments/README.md").read_text(encoding="utf8")


@pytest.fixture
def report() -> Report:
    """The committed report.json."""
    return Report.model_validate_json((COMMITTED / "report.json").read_text(encoding="utf8"))


def test_the_page_s_tables_are_those_of_the_report() -> None:
    assert tables(COMMITTED, COMMITTED / "arms.json") in PAGE


def test_the_report_is_of_the_shipped_arms_and_whole(
    report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    shipped = read_arms(ROOT / "configs" / "arms" / "ablation.yaml")
    assert shipped.arms is not None
    assert list(shipped.arms) == list(ARMS) == [arm.name for arm in report.arms]
    config = load_config(Path("configs/ablation.yaml"))
    for arm in report.arms:
        assert [run.seed for run in arm.seeds] == shipped.seeds
        assert {run.of for run in arm.seeds} == {config.total_steps}
        assert arm.status == "finished"
    commits = {run.commit for arm in report.arms for run in arm.seeds}
    assert len(commits) == 1
    assert f"commit `{commits.pop()[:7]}`" in PAGE


def test_each_arm_has_the_best_of_the_rates_it_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    chosen = json.loads((COMMITTED / "arms.json").read_text(encoding="utf8"))
    tune = read_arms(ROOT / "configs" / "arms" / "ablation.yaml").tune
    assert tune is not None
    for name, arm in chosen.items():
        config = load_config(Path("configs/ablation.yaml"), arm["overrides"])
        finite = {float(rate): loss for rate, loss in arm["tried"].items() if loss is not None}
        best = min(finite, key=lambda rate: finite[rate])
        assert config.learning_rate(300) == pytest.approx(best * config.clock.lr_factor(300)), name
        assert len(arm["tried"]) == len(tune.factors)


def test_the_committed_text_is_made_from_the_committed_figures(report: Report) -> None:
    text = (COMMITTED / "report.md").read_text(encoding="utf8")
    shown = {path.stem: path.name for path in COMMITTED.glob("*.png")}
    assert text == to_markdown(report, shown)


def test_an_ordering_that_is_not_there_is_denied(report: Report) -> None:
    """Each verdict follows the seeds' figures: set them to the paper's, and to the opposite."""

    def verdicts(factor: float) -> list[str]:
        arms = [
            arm.model_copy(
                update={
                    "seeds": [
                        run.model_copy(
                            update={"perplexity": (ARMS[arm.name][1] or 100.0) ** factor}
                        )
                        for run in arm.seeds
                    ]
                }
            )
            for arm in report.arms
        ]
        made = report.model_copy(update={"arms": arms})
        return [row.split("|")[-2].strip() for row in orderings(made)[2:]]

    assert verdicts(1) == ["yes", "no", *["yes"] * 6]  # nothing diverges here
    assert verdicts(-1) == ["yes", "no", "yes", *["no"] * 5]  # two differences are too small
