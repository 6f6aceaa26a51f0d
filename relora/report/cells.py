"""How the report writes numbers: fixed digits, signs, spreads, units."""

from __future__ import annotations

from collections.abc import Callable

from relora.report.records import Spread
from relora.words import format_duration

Format = Callable[[float], str]


def shown(value: float | None, form: Format) -> str:
    """A number, or a dash."""
    return "–" if value is None else form(value)


def pm(spread: Spread, form: Format) -> str:
    """mean ± sd, or the mean alone where there is no spread."""
    text = shown(spread.mean, form)
    if spread.sd:
        text += f" ± {form(spread.sd)}"
    seeds = len(spread.values)
    return text if spread.n in (0, seeds) else f"{text} ({spread.n} of {seeds} seeds)"


def number(digits: int) -> Format:
    """Fixed digits after the point."""
    return lambda value: f"{value:,.{digits}f}"


def signed(digits: int) -> Format:
    """The same with a sign; no −0."""
    return lambda value: (
        f"{value:+,.{digits}f}".replace("-", "−") if abs(value) >= 0.5 * 10**-digits else "0"
    )


def percent(value: float) -> str:
    """A ratio as its difference from 1."""
    return f"{100 * (value - 1):+.1f} %".replace("-", "−") if abs(value - 1) >= 5e-4 else "0 %"


def share(value: float) -> str:
    """A part of a whole; 0 only if it is."""
    return f"{100 * value:.2g} %" if value else "0"


def times(value: float) -> str:
    """A ratio as a factor."""
    return f"× {value:.2f}"


def gib(value: float) -> str:
    """GiB."""
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def flops(value: float) -> str:
    """1.23e+15."""
    return f"{value:.3g}" if value < 1e5 else f"{value:.2e}"


def seconds_text(value: float) -> str:
    """0.25 s, or as durations are written."""
    return f"{value:.2f} s" if value < 60 else format_duration(value)
