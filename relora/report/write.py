"""Write a report: report.html, report.md, report.json and one PNG a picture, each at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from relora.errors import CheckpointError
from relora.files import write_atomically
from relora.report import figures, spectra_figures
from relora.report.page import to_html
from relora.report.svg import PAPER, Look, drawing, to_png, to_svg
from relora.report.text import to_markdown

Draw = Callable[[dict[str, Any], Look], Any]
TWO_SCALES = ("curves_tokens", "curves_time", "training_loss")


def pictures_of(report: dict[str, Any]) -> dict[str, Draw]:
    """How each picture that this report has is drawn, by the name of its file."""
    found: dict[str, Draw] = {
        "curves_tokens": partial(figures.draw_curves, axis="tokens"),
        "curves_time": partial(figures.draw_curves, axis="seconds"),
        "memory": figures.draw_memory,
        "training_loss": figures.draw_training,
    }
    if report["spectra"]:
        found["spectra"] = spectra_figures.draw_spectra
        found["ranks"] = spectra_figures.draw_ranks
        if spectra_figures.has_heat(report):
            found["layers"] = spectra_figures.draw_heat
        if report["spectra"]["similarity"]:
            found["similarity"] = spectra_figures.draw_similarity
    return found


def write_report(report: dict[str, Any], to: Path, refresh_s: float | None = None) -> list[Path]:
    """Write all of it into `to`; returns the files.

    Args:
        refresh_s: how often the page loads itself anew while a run is under way.

    Raises:
        CheckpointError: the directory cannot be written.
    """
    try:
        to.mkdir(parents=True, exist_ok=True)
        pictures = pictures_of(report)
        for name, draw in pictures.items():
            with drawing(PAPER):
                to_png(draw(report, PAPER), to / f"{name}.png")
        page = to_html(report, svgs_of(report), refresh_s if report["unfinished"] else None)
        texts = {
            "report.json": json.dumps(report, allow_nan=False, ensure_ascii=False) + "\n",
            "report.md": to_markdown(report, {name: f"{name}.png" for name in pictures}),
            "report.html": page,
        }
        for name, text in texts.items():
            write_atomically(to / name, text, durable=False)
    except OSError as error:
        raise CheckpointError(f"{to}: the report cannot be written: {error}") from None
    return [to / name for name in (*reversed(texts), *(f"{name}.png" for name in pictures))]


def svgs_of(report: dict[str, Any]) -> dict[str, str]:
    """Every picture for the page, by `name.scale.room`."""
    found = {}
    for name, draw in pictures_of(report).items():
        for scale in ("log", "linear") if name in TWO_SCALES else ("log",):
            for room in ("wide", "narrow"):
                look = Look(narrow=room == "narrow", logarithmic=scale == "log")
                with drawing(look):
                    key = f"{name}.{scale}.{room}"
                    found[key] = to_svg(draw(report, look), key.replace(".", "-"), name)
    return found
