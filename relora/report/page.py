"""The report as one HTML file that needs nothing else: no script, no font, no network.

Light and dark follow the reader's setting; log and linear are radio buttons and CSS. A policy in
the head forbids the page to load or run anything, whatever a run is called.
"""

from __future__ import annotations

import html
from typing import Any

from relora.report.spectra_figures import MAPS
from relora.report.svg import CSS_DASHES, DARK, LIGHT, SYMBOLS
from relora.report.text import PLACES, Table, tables

CAPTIONS = {
    "curves_tokens": "Validation perplexity over tokens. Points are evaluations, of every seed; "
    "the band is ± one standard deviation over seeds.",
    "curves_time": "The same over wall-clock.",
    "memory": "Whiskers are ± one standard deviation. The grey line is the best perplexity within "
    "a given memory. Hollow: what the planner predicts, on GPUs.",
    "training_loss": "Pale: every logged loss. Strong: its centred mean over 1/50 of the run.",
    "spectra": "Singular values of W − W₀, all updates together since the start W₀; layers of one "
    "kind pooled, largest first. Values below 1/10,000 of the largest lie on the lower edge.",
    "ranks": "Medians over layers, by cycle. A level line is an arm without cycles, at its end.",
    "layers": f"Effective rank of each cycle's update, layer by layer; of more than {MAPS} arms "
    "the first.",
    "similarity": "Mean over layers: 1 means that one subspace lies in the other. Of more than "
    f"{MAPS} pairs the first; the table has all.",
}
MARKED = ("curves_tokens", "curves_time")
DRAWN_NOTE = (
    "Long curves are thinned for drawing: of each of 240 stretches (fewer where there are many "
    "curves) the lowest and the highest point are drawn. Tables and report.json hold every figure. "
    "Linear axes leave out what lies above the last four fifths of a curve."
)


def to_html(report: dict[str, Any], svgs: dict[str, str], refresh_s: float | None) -> str:
    """The page.

    Args:
        svgs: pictures by `name.scale.room` with scale log or linear and room wide or narrow.
        refresh_s: how often the page loads itself anew; None for never.
    """
    refresh = f'<meta http-equiv="refresh" content="{refresh_s:.0f}">' if refresh_s else ""
    found = tables(report)
    names = {arm["name"]: n for n, arm in enumerate(report["arms"])}
    body = [_header(report), _warnings(report)]
    body.append(_section("arms", found.pop("arms"), names, ""))
    for name, table in found.items():
        pictures = "".join(_picture(p, svgs, report) for p in PLACES.get(name, ()))
        body.append(_section(name, table, names, pictures))
    body.append(f'<footer><p class="note">{DRAWN_NOTE}</p></footer>')
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; img-src data:\">"
        f'{refresh}<link rel="icon" href="data:,"><title>relora: comparison</title>'
        f"<style>{_colours()}{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def _header(report: dict[str, Any]) -> str:
    runs = [seed for arm in report["arms"] for seed in arm["seeds"]]
    finished = sum(seed["status"] == "finished" for seed in runs)
    facts = [
        f"{_count(len(report['arms']), 'arm')}, {_count(len(runs), 'run')}",
        f"{finished} of {len(runs)} finished",
        f"baseline {report['baseline']}",
        f"written {report['written'].replace('T', ' ')}",
        f"relora {report['relora']}",
    ]
    listed = "".join(f"<li>{html.escape(fact)}</li>" for fact in facts)
    return f'<header><h1>Comparison</h1><ul class="facts">{listed}</ul></header>'


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _warnings(report: dict[str, Any]) -> str:
    if not report["warnings"]:
        return ""
    listed = "".join(f"<li>{html.escape(text)}</li>" for text in report["warnings"])
    return f'<section class="warn"><h2>Read this first</h2><ul>{listed}</ul></section>'


def _section(name: str, table: Table, arms: dict[str, int], pictures: str) -> str:
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    return (
        f'<section id="{name}"><h2>{html.escape(table.title)}</h2>'
        f"{_table(table, arms)}{note}{pictures}</section>"
    )


def _table(table: Table, arms: dict[str, int]) -> str:
    words = [' class="w"' if each else "" for each in table.text_columns]
    head = "".join(
        f'<th scope="col"{kind}>{html.escape(cell)}</th>'
        for cell, kind in zip(table.columns, words, strict=True)
    )
    rows = []
    for first, *others in table.rows:
        swatch = _swatch(arms[first]) if table.arms and first in arms else ""
        cells = "".join(
            f"<td{kind}>{html.escape(cell)}</td>"
            for cell, kind in zip(others, words[1:], strict=True)
        )
        rows.append(f'<tr><th scope="row">{swatch}{html.escape(first)}</th>{cells}</tr>')
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _swatch(number: int, point: bool = False) -> str:
    colour, dash = number % len(LIGHT), number // len(LIGHT) % len(CSS_DASHES)
    if point:
        return f'<i class="point" style="color:var(--c{colour})">{SYMBOLS[dash]}</i>'
    return f'<i style="border-top:3px {CSS_DASHES[dash]} var(--c{colour})"></i>'


def _picture(name: str, svgs: dict[str, str], report: dict[str, Any]) -> str:
    scales = [scale for scale in ("log", "linear") if f"{name}.{scale}.wide" in svgs]
    if not scales:
        return ""
    buttons = ""
    if len(scales) > 1:
        buttons = '<span class="scales">' + "".join(
            f'<input type="radio" name="{name}" id="{name}-{scale}" class="{scale}"'
            f'{" checked" if scale == "log" else ""}><label for="{name}-{scale}">{scale}</label>'
            for scale in scales
        )
        buttons += "</span>"
    drawings = "".join(
        f'<div class="plot {scale} {room}">{svgs[f"{name}.{scale}.{room}"]}</div>'
        for scale in scales
        for room in ("wide", "narrow")
    )
    kind = " two" if len(scales) > 1 else ""
    legend = _legend(name, report) if name not in ("layers", "similarity") else ""
    caption = html.escape(CAPTIONS[name])
    return (
        f'<figure class="fig{kind}"><div class="bar">{legend}{buttons}</div>{drawings}'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _legend(name: str, report: dict[str, Any]) -> str:
    there = {arm["name"] for arm in report["arms"] if name == "training_loss" or arm["evaluated"]}
    if name in ("spectra", "ranks"):
        there = {arm["arm"] for arm in report["spectra"]["arms"]}
    entries = [
        f"<li>{_swatch(n, name == 'memory')}{html.escape(arm['name'])}</li>"
        for n, arm in enumerate(report["arms"])
        if arm["name"] in there
    ]
    if name in MARKED:
        marks = [arm["curves"]["marks"] for arm in report["arms"]]
        if any(mark["merges"] for mark in marks):
            entries.append('<li><i class="merge"></i>merge</li>')
        if any(mark["births"] for mark in marks):
            entries.append('<li><i class="birth"></i>adapters born</li>')
        if any(mark["rewarm_from"] for mark in marks):
            entries.append('<li><i class="rewarm"></i>rewarm</li>')
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _colours() -> str:
    def block(colours: tuple[str, ...]) -> str:
        return "".join(f"--c{n}:{colour};" for n, colour in enumerate(colours))

    light = "--bg:#fff;--card:#f6f8fa;--fg:#1b1f24;--muted:#57606a;--grid:#d8dee4;--warn:#9a6700;"
    dark = "--bg:#0f1318;--card:#171d24;--fg:#e6edf3;--muted:#9aa5b1;--grid:#2d353e;--warn:#e3b341;"
    return (
        f":root{{color-scheme:light dark;{light}{block(LIGHT)}}}"
        f"@media(prefers-color-scheme:dark){{:root{{{dark}{block(DARK)}}}}}"
    )


STYLE = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--fg);
 font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
main{max-width:1040px;margin:0 auto;padding:28px 24px 48px}
h1{font-size:26px;line-height:1.2;margin:0 0 6px}
h2{font-size:18px;line-height:1.3;margin:0 0 10px}
section{margin:34px 0 0}
.facts,.legend{list-style:none;margin:0;padding:0;display:flex;flex-wrap:wrap;gap:2px 16px}
.facts{color:var(--muted);font-size:14px}
.warn{margin:20px 0 0;padding:14px 18px;background:var(--card);border-left:4px solid var(--warn);
 border-radius:4px}
.warn h2{font-size:15px;margin:0 0 4px;color:var(--warn)}
.warn ul{margin:0;padding-left:18px;overflow-wrap:anywhere}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch;border:1px solid var(--grid);
 border-radius:6px}
.scroll:focus-visible{outline:2px solid var(--c0)}
table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{padding:6px 9px;text-align:right;white-space:nowrap;border-top:1px solid var(--grid)}
th.w,td.w{text-align:left}
thead th{border-top:0;background:var(--card);color:var(--muted);font-weight:600;
 vertical-align:bottom;white-space:normal;min-width:68px}
th:first-child{text-align:left;position:sticky;left:0;background:var(--bg);font-weight:600;
 max-width:44vw;overflow:hidden;text-overflow:ellipsis}
thead th:first-child{background:var(--card)}
#config td,#environment td,#seeds th:first-child,#similarity th:first-child,
#config th:first-child,#environment th:first-child{white-space:normal;overflow-wrap:anywhere;
 min-width:110px}
#config th:first-child,#environment th:first-child{min-width:158px}
#seeds th:first-child{font-weight:400;font-size:12.5px;min-width:160px}
i{display:inline-block;width:18px;margin-right:7px;vertical-align:middle;flex:none}
i.point{font-style:normal;text-align:center}
i.merge{border-top:2px dotted var(--muted)}
i.birth{border-top:2px dashed var(--muted)}
i.rewarm{height:12px;background:var(--muted);opacity:.25}
.note,figcaption{color:var(--muted);font-size:13px;margin:8px 0 0;max-width:78ch}
figure{margin:22px 0 0}
.bar{display:flex;flex-wrap:wrap;justify-content:space-between;align-items:center;gap:8px 20px;
 margin:0 0 8px;font-size:13px}
.legend li{display:flex;align-items:center;overflow-wrap:anywhere}
.plot svg{display:block;width:100%;height:auto;overflow:visible}
.plot text{font-family:inherit!important}
.plot image{image-rendering:pixelated}
.narrow{display:none}
.scales{display:inline-flex;margin-left:auto;border:1px solid var(--grid);border-radius:6px;
 overflow:hidden}
.scales input{position:absolute;opacity:0;pointer-events:none}
.scales label{padding:3px 12px;cursor:pointer;color:var(--muted)}
.scales input:checked+label{background:var(--fg);color:var(--bg)}
.scales input:focus-visible+label{outline:2px solid var(--c0);outline-offset:-2px}
.fig.two:has(input.log:checked) .plot.linear,
.fig.two:has(input.linear:checked) .plot.log{display:none}
footer{margin:40px 0 0;border-top:1px solid var(--grid)}
@media(max-width:640px){
 main{padding:18px 14px 36px}
 h1{font-size:22px}
 th,td{padding:6px 9px}
 .wide{display:none}
 .narrow{display:block}
 .fig.two:has(input.log:checked) .plot.linear,
 .fig.two:has(input.linear:checked) .plot.log{display:none}
}
@media print{.narrow{display:none}.wide{display:block}.scales{display:none}}
"""
