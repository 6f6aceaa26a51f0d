"""`relora compare`: one report on runs that are finished, stopped or under way."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

from relora.errors import ConfigError, UserError
from relora.report.arms import ArmRuns, group_runs
from relora.report.build import build_report
from relora.report.page import write_report
from relora.report.read import AT_WORK, read_run
from relora.report.records import Report
from relora.report.verdict import verdict_title, verdicts

_COLUMNS = 100  # columns of the terminal's lines


def compare(
    runs: Sequence[str], to: Path, watch: float | None = None, baseline: str | None = None
) -> int:
    """Write the report on `runs` into `to` and print its tables.

    Args:
        runs: run directories, each `DIR` or `NAME=DIR`.
        watch: write it anew every so many seconds until no run can get further by itself.
        baseline: the arm that others are compared with.

    Raises:
        CheckpointError: something is no run directory, or no run has an evaluation yet.
        ConfigError: names do not fit.
    """
    if watch is None:
        report = read_report(runs, baseline)
        files = write_report(report, to)
        print(f"{verdict_title(report)}\n")
        for arm, line in verdicts(report).items():
            print(fill(f"  {arm}: {line}", _COLUMNS, subsequent_indent="    "))
        for warning in report.warnings:
            print(fill(f"! {warning}", _COLUMNS, subsequent_indent="  "))
        print(f"\nwritten  {to / 'report.html'}, .md with every table, .json with every figure")
        pictures = ", ".join(sorted(file.name for file in files if file.suffix == ".png"))
        print(fill(f"         {pictures}", _COLUMNS, subsequent_indent=" " * 9))
        return 0
    with contextlib.suppress(KeyboardInterrupt):  # what was written last is whole
        while _renew(runs, to, watch, baseline):
            time.sleep(watch)
    return 0


def read_report(runs: Sequence[str], baseline: str | None = None) -> Report:
    """All figures, from the files of the run directories."""
    return build_report(_read_arms(runs), baseline)


def _read_arms(runs: Sequence[str]) -> list[ArmRuns]:
    pairs = [_named(run) for run in runs]
    return group_runs([read_run(path) for _, path in pairs], [name for name, _ in pairs])


def _named(run: str) -> tuple[str | None, Path]:
    """`NAME=DIR` or `DIR`; a directory that is there by the whole name is taken as that."""
    name, equals, path = run.partition("=")
    if not equals or Path(run).exists() or "/" in name:
        return None, Path(run)
    if not name.strip() or not path:
        raise ConfigError(f"{run!r}: write it as NAME=DIR, or DIR alone")
    return name.strip(), Path(path)


def _renew(runs: Sequence[str], to: Path, watch: float, baseline: str | None) -> bool:
    """Write the report as things stand; whether some run may get further."""
    arms = _read_arms(runs)
    try:
        report = build_report(arms, baseline)
    except UserError as error:
        at_work = any(run.status in AT_WORK for arm in arms for run in arm.runs)
        if not at_work or "no evaluation yet" not in str(error):
            raise
        print(f"{time.strftime('%H:%M:%S')} waiting: {error}", flush=True)
        return True
    write_report(report, to, refresh_s=max(5.0, watch))
    going = [f"{arm.name} {arm.progress} ({arm.status})" for arm in report.arms]
    print(f"{time.strftime('%H:%M:%S')} {to / 'report.html'}: {'; '.join(going)}", flush=True)
    if not report.unfinished:
        print("\n".join(f"{arm}: {line}" for arm, line in verdicts(report).items()), flush=True)
    return report.unfinished
