"""The README's tables of the ablation, from the report that `launch/compare.sh` has written.

    ARMS=configs/arms/ablation.yaml bash launch/compare.sh configs/ablation.yaml
    python configs/experiments/ablation.py runs/ablation_comparison/{report,arms.json}

Without arguments: from the report that is committed beside this file.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from relora.report.records import Report, Spread

COMMITTED = Path(__file__).parent / "ablation_report"
# Arm: its restarts, reset, rewarm, warm start; perplexity at 130M (arXiv 2307.05695, tables 2, 4).
ARMS: dict[str, tuple[str, float | None]] = {
    "full rank": ("", 23.65),
    "control": ("", None),
    "LoRA": ("    ", 34.17),
    "restarts": ("✓   ", 34.25),
    "restarts, reset": ("✓✓  ", None),
    "restarts, rewarm": ("✓ ✓ ", 34.29),
    "ReLoRA: restarts, reset, rewarm": ("✓✓✓ ", 29.77),
    "LoRA, warm start": ("   ✓", 25.46),
    "ReLoRA, warm start": ("✓✓✓✓", 25.04),
}
DIVERGED = "restarts, reset"  # in the paper
# What the paper's figures say when one arm is set against another.
PAIRS = [
    ("restarts", "LoRA"),
    ("restarts, reset", "LoRA"),
    ("restarts, rewarm", "LoRA"),
    ("ReLoRA: restarts, reset, rewarm", "LoRA"),
    ("LoRA, warm start", "LoRA"),
    ("ReLoRA, warm start", "ReLoRA: restarts, reset, rewarm"),
    ("ReLoRA, warm start", "LoRA, warm start"),
    ("ReLoRA, warm start", "full rank"),
]
SMALL = 0.5  # %: the paper's own differences below it count as none


def rows(report: Report, tuned: dict[str, Any]) -> list[str]:
    """One row an arm: what it has, its rate, its perplexity and what it was in the paper."""
    lines = [
        "| arm | restarts | reset | rewarm | warm start | rate | perplexity | loss | paper, 130M |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    arms = {arm.name: arm for arm in report.arms}
    for name, (parts, paper) in ARMS.items():
        figures, tried = arms[name].figures, tuned[name]["tried"]
        rate = min(tried, key=lambda each: (tried[each] is None, tried[each]))
        edge = " (edge)" if rate in (min(tried, key=float), max(tried, key=float)) else ""
        cells = [name, *(parts or "––––"), _rate(rate) + edge]
        cells += [_pm(figures.perplexity, 2), _pm(figures.loss, 3)]
        there = "diverged" if name == DIVERGED else "–" if paper is None else f"{paper:.2f}"
        lines.append(f"| {' | '.join([*map(str.strip, cells), there])} |")
    return lines


def orderings(report: Report) -> list[str]:
    """One row a pair: how much the first differs, in the paper and here, seed by seed."""
    lines = [
        "| perplexity of | against | paper, 130M | here | as in the paper |",
        "|---|---|---|---|---|",
    ]
    seeds = {
        arm.name: {run.seed: run.perplexity for run in arm.seeds if run.perplexity is not None}
        for arm in report.arms
    }
    for one, other in PAIRS:
        found = [100 * (seeds[one][seed] / seeds[other][seed] - 1) for seed in seeds[one]]
        mean, sd = statistics.mean(found), statistics.stdev(found)
        there = "diverged"
        expected = 1
        if one != DIVERGED:
            change = 100 * (ARMS[one][1] / ARMS[other][1] - 1)  # type: ignore[operator]
            there, expected = f"{change:+.1f} %", _sign(change, SMALL)
        same = _sign(mean, max(sd, SMALL)) == expected and one != DIVERGED
        here = f"{mean:+.1f} ± {sd:.1f} %"
        cells = [one, other, there, here, "yes" if same else "no"]
        lines.append(f"| {' | '.join(cells)} |".replace("-", "−"))
    return lines


def _rate(text: str) -> str:
    return f"{float(text):.1e}".replace(".0e", "e").replace("e-0", "e-")


def _sign(value: float, least: float) -> int:
    return 0 if abs(value) <= least else 1 if value > 0 else -1


def _pm(spread: Spread, digits: int) -> str:
    return f"{spread.mean:.{digits}f} ± {spread.sd:.{digits}f}"


def tables(report: Path, arms: Path) -> str:
    """Both tables as Markdown."""
    figures = Report.model_validate_json((report / "report.json").read_text(encoding="utf8"))
    tuned = json.loads(arms.read_text(encoding="utf8"))
    return "\n".join([*rows(figures, tuned), "", *orderings(figures)])


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    print(tables(*(given or (COMMITTED, COMMITTED / "arms.json"))))
