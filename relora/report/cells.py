"""How the report writes numbers: fixed digits, signs, spreads, units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from relora.report.records import Spread
from relora.words import format_duration

Format = str | Callable[[Any], str]  # as for `str.format`, or a function


def shown(value: Any, form: Format = str) -> str:
    """A value or a dash; of seeds mean ± sd, or the mean alone where no spread would be seen."""
    if isinstance(value, Spread):
        text = shown(value.mean, form)
        if value.sd and (sd := shown(value.sd, form)) != shown(0.0, form):
            text += f" ± {sd}"
        seeds = len(value.values)
        return text if value.n in (0, seeds) else f"{text} ({value.n} of {seeds} seeds)"
    if value is None:
        return "–"
    return form.format(value) if isinstance(form, str) else form(value)


def loss_difference(value: float) -> str:
    """Of two losses."""
    return f"{value:,.4f}".replace("-", "−")


def signed(value: float) -> str:
    """Two digits and a sign; no −0."""
    return f"{value:+,.2f}".replace("-", "−") if abs(value) >= 0.005 else "0"


def percent(value: float) -> str:
    """A ratio as its difference from 1."""
    return f"{100 * (value - 1):+.1f} %".replace("-", "−") if abs(value - 1) >= 5e-4 else "0 %"


def share(value: float) -> str:
    """A part of a whole; 0 only if it is."""
    return f"{100 * value:.2g} %" if value else "0"


def gib(value: float) -> str:
    """GiB."""
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def flops(value: float) -> str:
    """1.23e+15."""
    return f"{value:.3g}" if value < 1e5 else f"{value:.2e}"


def seconds_text(value: float) -> str:
    """0.25 s, or as durations are written."""
    return f"{value:.2f} s" if value < 60 else format_duration(value)
