"""The report's tables as plain text cells, and all of it as Markdown."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from relora.report.cells import (
    Format,
    flops,
    gib,
    number,
    percent,
    pm,
    seconds_text,
    share,
    shown,
    signed,
    times,
)
from relora.report.read import AT_WORK
from relora.words import format_bytes, format_count, format_duration

MISSING = ("not reached", "no evaluation yet", "no evaluation")


@dataclass(frozen=True)
class Table:
    """Rows of text; the first column is an arm's name where `arms` says so."""

    title: str
    note: str
    columns: list[str]
    rows: list[list[str]]
    arms: bool = True

    @property
    def text_columns(self) -> list[bool]:
        """Which columns hold words and not numbers."""
        return [
            n == 0 or any(cell[:1].isalpha() and cell not in MISSING for cell in column)
            for n, column in enumerate(zip(*self.rows, strict=True))
        ]


def tables(report: dict[str, Any]) -> dict[str, Table]:
    """Every table of the report, by the name that pages know it by."""
    found = {
        "arms": _arms(report),
        "tokens": _tokens(report),
        "seconds": _seconds(report),
        "memory": _memory(report),
        "target": _target(report),
        "speed": _speed(report),
        "cost": _cost(report),
    }
    if any(len(arm["seeds"]) > 1 for arm in report["arms"]):
        found["seeds"] = _seeds(report)
    if report["spectra"]:
        found["spectra"] = _spectra(report)
        if report["spectra"]["similarity"]:
            found["similarity"] = _similarity(report)
    for key, title in (("config", "Config"), ("environment", "Versions, commits, machines")):
        rows = report["differences"][key]
        if rows:
            found[key] = _differences(report, title, rows)
    return found


def to_markdown(report: dict[str, Any], pictures: dict[str, str]) -> str:
    """The report for papers and terminals.

    Args:
        pictures: file names by picture; the table of the same name is followed by it.
    """
    parts = ["# Comparison", f"Written {report['written']}, baseline: {md(report['baseline'])}."]
    if report["warnings"]:
        parts.append("Read this first:\n\n" + "\n".join(f"- {md(w)}" for w in report["warnings"]))
    for name, table in tables(report).items():
        parts.append(f"## {table.title}")
        parts.append("\n".join(_md_rows(table)))
        if table.note:
            parts.append(table.note)
        parts += [
            f"![{table.title}]({pictures[picture]})"
            for picture in PLACES.get(name, ())
            if picture in pictures
        ]
    return "\n\n".join(parts) + "\n"


# Pictures that follow a table.
PLACES = {
    "tokens": ("curves_tokens",),
    "seconds": ("curves_time",),
    "memory": ("memory",),
    "cost": ("training_loss",),
    "spectra": ("spectra", "ranks", "layers"),
    "similarity": ("similarity",),
}


def md(text: str) -> str:
    """Text that Markdown shows as it is, in a table too."""
    return re.sub(r"([\\|`*_<>\[\]])", r"\\\1", text.replace("\n", " "))


def _md_rows(table: Table) -> list[str]:
    rule = ["---" if words else "---:" for words in table.text_columns]
    lines = [[md(cell) for cell in row] for row in (table.columns, *table.rows)]
    return [f"| {' | '.join(row)} |" for row in (lines[0], rule, *lines[1:])]


def _arms(report: dict[str, Any]) -> Table:
    columns = ["arm", "perplexity", "validation loss", "tokens", "time", "step", "status"]
    columns += ["merges", "seeds", "method"]
    rows = []
    for arm in report["arms"]:
        figures = arm["figures"]
        going = any(seed["status"] in AT_WORK for seed in arm["seeds"])
        row = [arm["name"], "no evaluation yet" if going else "no evaluation", "–"]
        if arm["evaluated"]:
            row[1:] = [pm(figures["perplexity"], number(2)), pm(figures["loss"], number(4))]
        row += [pm(figures["tokens"], format_count), pm(figures["seconds"], format_duration)]
        row += [arm["progress"], arm["status"], pm(figures["merges"], number(0))]
        rows.append([*row, _listed(s["seed"] for s in arm["seeds"]), arm["method"]])
    return Table("Arms", _sentence(report, "spread"), columns, rows)


def _tokens(report: dict[str, Any]) -> Table:
    at = format_count(report["questions"]["tokens"]["at"])
    note = f"{_sentence(report, 'tokens')} {_sentence(report, 'warm_start')}"
    return _at_equal(report, "tokens", f"At equal tokens: {at}", note)


def _seconds(report: dict[str, Any]) -> Table:
    at = shown(report["questions"]["seconds"]["at"], format_duration)
    return _at_equal(report, "seconds", f"At equal wall-clock: {at}", _sentence(report, "seconds"))


def _at_equal(report: dict[str, Any], question: str, title: str, note: str) -> Table:
    columns = ["arm", "perplexity", "difference", "relative", "validation loss", "tokens"]
    rows = [
        [row["arm"], *_perplexity(row), pm(row["tokens"], format_count)]
        for row in report["questions"][question]["rows"]
    ]
    return Table(title, note, columns, rows)


def _perplexity(row: dict[str, Any]) -> list[str]:
    return [
        pm(row["perplexity"], number(2)),
        shown(row["difference"], signed(2)),
        shown(row["ratio"], percent),
        pm(row["loss"], number(4)),
    ]


def _memory(report: dict[str, Any]) -> Table:
    columns = [
        "arm",
        "peak GiB per rank",
        "perplexity",
        "best within this memory",
        "its perplexity",
    ]
    rows = [
        [
            row["arm"],
            pm(row["memory_gib"], gib),
            pm(row["perplexity"], number(2)),
            row["best_within"] or "–",
            shown(row["best_perplexity"], number(2)),
        ]
        for row in report["questions"]["memory"]["rows"]
    ]
    return Table("At equal peak memory", _sentence(report, "memory"), columns, rows)


def _target(report: dict[str, Any]) -> Table:
    target = report["questions"]["target"]
    columns = ["arm", "tokens", "of baseline", "time", "of baseline", "FLOPs", "of baseline"]
    columns += ["seeds that reach it"]
    forms: dict[str, Format] = {"tokens": format_count, "seconds": format_duration, "flops": flops}
    rows = []
    for row in target["rows"]:
        cells = [row["arm"]]
        for key, form in forms.items():
            missed = "not reached" if not row["reached"] else "–"
            cells.append(missed if row[key] is None else form(row[key]))
            cells.append(shown(row[f"{key}_ratio"], times))
        rows.append([*cells, f"{row['seeds_that_reach_it']} of {row['of']}"])
    title = f"Until the baseline's perplexity: {shown(target['perplexity'], number(2))}"
    note = f"{_sentence(report, 'target')} {_sentence(report, 'flops')}"
    return Table(title, note, columns, rows)


def _speed(report: dict[str, Any]) -> Table:
    columns = ["arm", "tokens/s", "ms/step", "peak GiB per rank", "predicted", "trainable"]
    columns += ["parameters", "bytes/step per rank"]
    rows = []
    for arm in report["arms"]:
        figures, predicted = arm["figures"], arm["predicted"]
        rows.append(
            [
                arm["name"],
                pm(figures["tokens_per_s"], number(0)),
                pm(figures["step_ms"], number(1)),
                pm(figures["memory_gib"], gib),
                shown(predicted["memory_gib"], gib),
                shown(predicted["trainable"], format_count),
                shown(predicted["parameters"], format_count),
                shown(predicted["bytes_per_step"], format_bytes),
            ]
        )
    note = "tokens/s and ms/step are medians of a run. Trainable: in the run's last phase. Bytes a "
    note += f"step and what is called predicted are computed {report['rules']['predicted']}."
    return Table("Speed and memory", note, columns, rows)


def _cost(report: dict[str, Any]) -> Table:
    columns = ["arm", "FLOPs", "time", "of it warm start", "all merges", "one merge"]
    columns += ["checkpoint", "predicted"]
    rows = []
    for arm in report["arms"]:
        figures, predicted = arm["figures"], arm["predicted"]
        warm = pm(arm["warm_start_seconds"], format_duration)
        if arm["warm_start"]["mean"] is not None:
            warm += f" for {pm(arm['warm_start'], format_count)} tokens"
        rows.append(
            [
                arm["name"],
                pm(figures["flops"], flops),
                pm(figures["seconds"], format_duration),
                warm,
                pm(figures["merges_s"], seconds_text),
                pm(figures["merge_s"], seconds_text),
                pm(figures["checkpoint_bytes"], format_bytes),
                shown(predicted["checkpoint_bytes"], format_bytes),
            ]
        )
    note = (
        f"{_sentence(report, 'warm_start')} {_sentence(report, 'flops')} One merge is the median "
    )
    note += "of a run's. A checkpoint is the newest on disk; predicted: its tensors alone."
    return Table("Cost", note, columns, rows)


def _seeds(report: dict[str, Any]) -> Table:
    columns = ["run", "arm", "seed", "status", "step", "time", "validation loss"]
    columns += ["perplexity", "tokens/s", "peak GiB per rank"]
    rows = [
        [
            seed["run"],
            arm["name"],
            str(seed["seed"]),
            seed["status"],
            f"{seed['step']}/{seed['of']}",
            shown(seed["seconds"], format_duration),
            shown(seed["loss"], number(4)),
            shown(seed["perplexity"], number(2)),
            shown(seed["tokens_per_s"], number(0)),
            shown(seed["memory_gib"], gib),
        ]
        for arm in report["arms"]
        for seed in arm["seeds"]
    ]
    return Table("Every run", "", columns, rows, arms=False)


def _spectra(report: dict[str, Any]) -> Table:
    titles = {
        "cycle_effective_rank": "effective rank, cycle",
        "cycle_stable_rank": "stable rank, cycle",
        "total_effective_rank": "effective rank, all",
        "total_stable_rank": "stable rank, all",
        "overlap": "overlap",
        "amplification": "amplification",
        "total_ratio": "‖ΔW‖ / ‖W₀‖",
    }
    columns = ["arm", "from step", "to step", *titles.values(), "lost to rounding"]
    rows = [
        [
            arm["arm"],
            str(arm["start"]),
            str(arm["step"]),
            *(pm(arm["last"][key], number(2)) for key in titles),
            pm(arm["rounding_loss"], share),
        ]
        for arm in report["spectra"]["arms"]
    ]
    note = (
        "Medians over layers, at the last measurement. cycle: s·B·A of one cycle; all: W + s·B·A "
        "minus W₀, the weights at the first of the steps. Overlap: with the cycle before. "
        "Amplification: how many times W₀ the update is in its own leading directions (LoRA, arXiv "
        "2106.09685, §7.3). ‖ΔW‖ is that of all updates. Lost to rounding: the largest share of a "
        "merge."
    )
    return Table("What the updates are made of", note, columns, rows)


def _similarity(report: dict[str, Any]) -> Table:
    rows = [
        [
            f"{pair['of'][0]} / {pair['of'][1]}",
            pair["what"],
            str(pair["layers"]),
            shown(pair["whole"], number(3)),
        ]
        for pair in report["spectra"]["similarity"]
    ]
    note = (
        "φ(i, j): how much of the first i left directions of one update lies in the first j of "
        "another; 1 if all, 0 if none (LoRA, arXiv 2106.09685, §7.2). Mean over layers."
    )
    columns = ["pair", "of", "layers", "φ of all directions"]
    return Table("Subspace similarity", note, columns, rows, arms=False)


def _differences(report: dict[str, Any], title: str, rows: list[dict[str, Any]]) -> Table:
    names = [arm["name"] for arm in report["arms"]]
    cells = [[row["path"], *(_value(row["values"][name]) for name in names)] for row in rows]
    return Table(f"What differs: {title}", "", ["", *names], cells, arms=False)


def _value(value: Any) -> str:
    plain = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return plain[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _listed(values: Any) -> str:
    return ", ".join(map(str, values))


def _sentence(report: dict[str, Any], rule: str) -> str:
    text = report["rules"][rule]
    return text[0].upper() + text[1:] + "."
