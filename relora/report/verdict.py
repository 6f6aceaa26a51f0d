"""The first screen: in one line an arm, what it costs and what it gives beside the baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping

from relora.report.cells import flops, percent, shown
from relora.report.questions import ratio
from relora.report.read import AT_WORK
from relora.report.records import ArmReport, EqualRow, Report
from relora.words import format_bytes, format_count, format_duration

SPREAD_NOTE = (
    "The spread over seeds is the standard deviation of a run of the arm less one of the "
    "baseline's: the square root of the sum of both sample variances."
)


def verdict_title(report: Report) -> str:
    """Where arms are compared, and what the baseline costs."""
    arm = _baseline(report)
    spent = [
        (shown(arm.figures.flops, flops), "FLOPs in all"),
        (shown(arm.figures.seconds, format_duration), "in all"),
        (shown(arm.predicted.state, format_bytes), "a rank"),
    ]
    known = ", ".join(f"{figure} {what}" for figure, what in spent if figure != "–")
    return (
        f"At {shown(report.questions.tokens.at, format_count)} tokens; FLOPs and time a token, and "
        f"training state, as shares of those of {arm.name} ({known or 'unknown'}):"
    )


def verdicts(report: Report) -> dict[str, str]:
    """In one line an arm: what it gives, and what a token costs as a share of the baseline's."""
    rows = {row.arm: row for row in report.questions.tokens.rows}
    return {arm.name: _verdict(report, arm, rows) for arm in report.arms}


def _verdict(report: Report, arm: ArmReport, rows: Mapping[str, EqualRow]) -> str:
    going = "" if arm.status == "finished" else f" ({arm.status}, {arm.progress})"
    row = rows.get(arm.name)
    if row is None:
        return f"{no_evaluation(arm)}{going}"
    text = f"perplexity {shown(row.perplexity, '{:,.2f}')}"
    if arm.name == report.baseline:
        return f"{text}, the baseline{going}"

    def a_token(of: ArmReport, key: str) -> float | None:
        return ratio(getattr(of.figures, key).mean, of.figures.tokens.mean)

    base = _baseline(report)
    costs = {
        "FLOPs": ratio(a_token(arm, "flops"), a_token(base, "flops")),
        "time": ratio(a_token(arm, "seconds"), a_token(base, "seconds")),
        "training state": ratio(arm.predicted.state, base.predicted.state),
    }
    if not (arm.timed and base.timed):
        del costs["time"]
    listed = ", ".join(f"{cost:.2f}\u00a0×\u00a0{what}" for what, cost in costs.items() if cost)
    after = next(each for each in report.questions.target.rows if each.arm == arm.name)
    reaches = "not as good so far" if going else "never as good"
    if after.tokens_ratio is not None:
        reaches = f"as good after {after.tokens_ratio:.2f}\u00a0× tokens"
    text = ": ".join(filter(None, [text, _beside(row, rows[report.baseline])]))
    return "; ".join(filter(None, [text, listed, reaches])) + going


def _beside(row: EqualRow, base: EqualRow) -> str:
    """How far a perplexity is from the baseline's, and whether that is beyond the seeds' spread."""
    if row.difference is None:
        return ""
    if row.difference == 0:
        return "the baseline's"
    relative = shown(row.ratio, percent).replace(" ", "\u00a0")
    way = "above" if row.difference > 0 else "below"
    text = f"{_size(abs(row.difference))} ({relative}) {way} the baseline's"
    deviations = [one.perplexity.sd for one in (row, base)]
    known = [sd for sd in deviations if sd is not None]
    if len(known) == len(deviations):
        spread = math.hypot(*known)
        more = "more" if abs(row.difference) > spread else "no more"
        return f"{text}, {more} than the spread over seeds ({_size(spread)})"
    of = "" if not known else f" of {row.arm if deviations[0] is None else 'the baseline'}"
    return f"{text}, with one seed{of} only, so the spread over seeds is unknown"


def _size(value: float) -> str:
    """Two digits after the point, or the first that is not 0."""
    return f"{value:,.2f}" if value >= 0.095 or value == 0 else f"{value:.1g}"


def _baseline(report: Report) -> ArmReport:
    return next(arm for arm in report.arms if arm.name == report.baseline)


def no_evaluation(arm: ArmReport) -> str:
    """What stands in place of a perplexity that there is not."""
    going = any(seed.status in AT_WORK for seed in arm.seeds)
    return "no evaluation yet" if going else "no evaluation"
