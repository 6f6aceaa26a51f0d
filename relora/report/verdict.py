"""The first screen: in one line an arm, what it costs and what it gives beside the baseline."""

from __future__ import annotations

from relora.report.cells import flops, percent, shown
from relora.report.questions import ratio
from relora.report.read import AT_WORK
from relora.report.records import ArmReport, EqualRow, Report
from relora.words import format_bytes, format_count, format_duration


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
    return {arm.name: _verdict(report, arm, rows.get(arm.name)) for arm in report.arms}


def _verdict(report: Report, arm: ArmReport, row: EqualRow | None) -> str:
    going = "" if arm.status == "finished" else f" ({arm.status}, {arm.progress})"
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
    listed = ", ".join(f"{cost:.2f}\u00a0× {what}" for what, cost in costs.items() if cost)
    after = next(each for each in report.questions.target.rows if each.arm == arm.name)
    reaches = "not as good so far" if going else "never as good"
    if after.tokens_ratio is not None:
        reaches = f"as good after {after.tokens_ratio:.2f}\u00a0× tokens"
    text += f" ({shown(row.ratio, percent)})"
    return "; ".join(filter(None, [text, listed, reaches])) + going


def _baseline(report: Report) -> ArmReport:
    return next(arm for arm in report.arms if arm.name == report.baseline)


def no_evaluation(arm: ArmReport) -> str:
    """What stands in place of a perplexity that there is not."""
    going = any(seed.status in AT_WORK for seed in arm.seeds)
    return "no evaluation yet" if going else "no evaluation"
