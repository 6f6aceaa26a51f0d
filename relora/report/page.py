"""The report as files: one HTML page that needs nothing else, Markdown, JSON, and PNGs.

The page has no script, no font, no address: light and dark follow the reader's setting, and a
policy in its head forbids it to load or run anything, whatever a run is called.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from relora.errors import CheckpointError
from relora.files import replacing, write_atomically
from relora.report import curve_figures, spectra_figures
from relora.report.records import Report
from relora.report.setting import setting_lines
from relora.report.spectra_figures import MAPS
from relora.report.style import DARK, LIGHT, Style, to_png
from relora.report.tables import Table, tables
from relora.report.verdict import SPREAD_NOTE, verdict_title, verdicts


class Picture(NamedTuple):
    """The table it stands below, how it is drawn, and what is said of it."""

    table: str
    draw: Callable[[Report, Style], Any]
    caption: str
    wanted: Callable[[Report], bool] = lambda report: True


PICTURES = {
    "curves_tokens": Picture(
        "tokens",
        partial(curve_figures.draw_curves, axis="tokens"),
        "Validation perplexity over tokens. Points are evaluations, of every seed; the band is ± "
        "one standard deviation over seeds. Shaded: the learning rate warms up again.",
    ),
    "difference": Picture(
        "tokens",
        curve_figures.draw_difference,
        "Mean validation loss less the baseline's, which is interpolated in tokens; below the line "
        "an arm is better. The band is ± one standard deviation of a run less one of the "
        "baseline's, where both have several seeds. The first tenth may lie outside.",
        curve_figures.has_difference,
    ),
    "curves_time": Picture(
        "seconds",
        partial(curve_figures.draw_curves, axis="seconds"),
        "The same over wall-clock.",
    ),
    "memory": Picture(
        "memory",
        curve_figures.draw_memory,
        "Whiskers are ± one standard deviation. The grey line is the best perplexity within a "
        "given memory. Hollow: the peak that the planner predicts, on GPUs.",
    ),
    "training_loss": Picture(
        "cost",
        curve_figures.draw_training,
        "Pale: every logged loss. Strong: its centred mean over 1/50 of the run.",
    ),
    "spectra": Picture(
        "spectra",
        spectra_figures.draw_spectra,
        "Singular values of W − W₀, all updates together since the start W₀; layers of one kind "
        "pooled, largest first. Values below 1/10,000 of the largest lie on the lower edge.",
    ),
    "ranks": Picture(
        "spectra",
        spectra_figures.draw_ranks,
        "Medians over layers, by cycle. A level line is an arm without cycles, at its end.",
    ),
    "layers": Picture(
        "spectra",
        spectra_figures.draw_heat,
        f"Effective rank of each cycle's update, layer by layer; of more than {MAPS} arms the "
        "first.",
        spectra_figures.has_heat,
    ),
    "similarity": Picture(
        "similarity",
        spectra_figures.draw_similarity,
        "Mean over layers: 1 means that one subspace lies in the other. Of more than "
        f"{MAPS} pairs the first; the table has all.",
    ),
}


FOLDED = ("spectra", "similarity")  # tables that a page opens on demand, with their pictures


class Drawn(NamedTuple):
    """A picture as PNG, for light and for dark pages."""

    light: bytes
    dark: bytes


def draw_all(report: Report) -> dict[str, Drawn]:
    """Every picture that this report has, by name."""
    found, drawn = tables(report), {}
    for name, picture in PICTURES.items():
        if picture.table in found and picture.wanted(report):
            light, dark = (to_png(partial(picture.draw, report, s), s) for s in (LIGHT, DARK))
            drawn[name] = Drawn(light, dark)
    return drawn


def to_markdown(report: Report, pictures: Mapping[str, str]) -> str:
    """The report for papers and terminals.

    Args:
        pictures: file names by picture.
    """
    parts = ["# Comparison", f"Written {report.written}, baseline: {_md(report.baseline)}."]
    if setting := setting_lines(report):
        parts.append(_md_list(f"{what}: {_md(text)}" for what, text in setting.items()))
    parts.append(_md(verdict_title(report)))
    parts.append(_md_list(f"**{_md(arm)}**: {_md(line)}" for arm, line in verdicts(report).items()))
    parts.append(SPREAD_NOTE)
    if report.warnings:
        parts += ["Read this first:", _md_list(map(_md, report.warnings))]
    if report.notes:
        parts += ["How sure, and how tuned:", _md_list(map(_md, report.notes))]
    for key, table in tables(report).items():
        parts += [f"## {table.title}", _md_table(table), *filter(None, [table.note])]
        there = [name for name, p in PICTURES.items() if p.table == key and name in pictures]
        parts += [f"![{table.title}]({pictures[name]})" for name in there]
    return "\n\n".join(parts) + "\n"


def to_html(report: Report, drawn: Mapping[str, Drawn], refresh_s: float | None) -> str:
    """The page.

    Args:
        refresh_s: how often the page loads itself anew; None for never.
    """
    environment = Environment(
        loader=PackageLoader("relora.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return environment.get_template("page.html.j2").render(
        report=report,
        verdict_title=verdict_title(report),
        verdicts=verdicts(report),
        setting=setting_lines(report),
        spread_note=SPREAD_NOTE,
        folded=FOLDED,
        tables=tables(report),
        drawn=drawn,
        pictures=PICTURES,
        numbers=report.numbers,
        runs=[seed for arm in report.arms for seed in arm.seeds],
        light=LIGHT,
        dark=DARK,
        refresh_s=refresh_s,
    )


def write_report(report: Report, to: Path, refresh_s: float | None = None) -> list[Path]:
    """Write all of it into `to`, each file at once; returns the files.

    Args:
        refresh_s: how often the page loads itself anew while a run is under way.

    Raises:
        CheckpointError: the directory cannot be written.
    """
    try:
        to.mkdir(parents=True, exist_ok=True)
        drawn = draw_all(report)
        for name, picture in drawn.items():
            with replacing(to / f"{name}.png", durable=False) as temporary:
                temporary.write_bytes(picture.light)
        texts = {
            "report.json": report.model_dump_json() + "\n",
            "report.md": to_markdown(report, {name: f"{name}.png" for name in drawn}),
            "report.html": to_html(report, drawn, refresh_s if report.unfinished else None),
        }
        for name, text in texts.items():
            write_atomically(to / name, text, durable=False)
    except OSError as error:
        raise CheckpointError(f"{to}: the report cannot be written: {error}") from None
    return [to / name for name in (*reversed(texts), *(f"{name}.png" for name in drawn))]


def _md(text: str) -> str:
    """Text that Markdown shows as it is, in a table too."""
    return re.sub(r"([\\|`*_<>\[\]])", r"\\\1", text.replace("\n", " "))


def _md_list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _md_table(table: Table) -> str:
    rule = ["---" if words else "---:" for words in table.text_columns]
    head, *rows = [[_md(cell) for cell in row] for row in (table.columns, *table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))
