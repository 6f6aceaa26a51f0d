"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Sequence


def format_duration(seconds: float) -> str:
    """1h02m, 3m05s or 12s."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def format_count(count: float) -> str:
    """1.50M, 24.6K, 310."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= 0.9995 * size:  # what would round to 1000 of the next smaller unit
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def format_bytes(count: float) -> str:
    """1.50GB, 24.6KB, 310B; powers of a thousand."""
    return f"{format_count(count).replace('B', 'G')}B"


def format_table(rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """Rows of equally many cells as lines, each column as wide as its widest cell.

    Args:
        align: `<` or `>` for each column.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, align, widths, strict=True)
        lines.append("   ".join(f"{cell:{side}{width}}" for cell, side, width in cells).rstrip())
    return lines
