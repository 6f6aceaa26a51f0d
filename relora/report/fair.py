"""What differs between arms, and which of it makes their comparison unfair."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from relora.errors import ConfigError
from relora.files import is_file, read_json
from relora.load import leaves
from relora.record.layout import ARMS_FILE
from relora.report.arms import ArmRuns, only_moved, plain
from relora.report.read import DIED, MACHINE, RunFiles, Stretch
from relora.report.records import Difference
from relora.words import format_duration

LENGTHS = ("train.steps", "train.tokens")
UNFAIR = {
    "data.": "other data or another order",
    "batch.global_batch_size": "another global batch",
    "optimizer.weight_decay": "another weight decay",
    "optimizer.grad_clip": "another clipping",
    "model.gradient_checkpointing": "times and memory do not compare",
    "model.": "another model",
    "train.steps": "another length",
    "train.tokens": "another length",
    "train.eval_sequences": "measured on other text",
}
HARMLESS = ("data.dir", "data.num_workers")
NOT_SHOWN = ("run_dir", "seed", "data.dir", "train.stop_after")
SILENT_S = 600.0  # a run at work that has written nothing for so long may be dead
NOT_OF_THE_MACHINE = ("settings", "shards")  # the config says it, and places do not matter


def differences_between(arms: Sequence[ArmRuns]) -> dict[str, list[Difference]]:
    """Leaves of config, model and environment that are not the same in all arms."""
    runs = [arm.runs[0] for arm in arms]
    names = [arm.name for arm in arms]
    known = all(run.model is not None for run in runs)

    def rows(tables: Sequence[dict[str, Any]]) -> list[Difference]:
        paths = {path for table in tables for path in table}
        return [
            Difference(path=path, values=dict(zip(names, values, strict=True)))
            for path, values in _differing(tables, missing="–")
            if path not in NOT_SHOWN
            # Of a section that is null in one arm the keys are listed.
            and not any(other.startswith(f"{path}.") for other in paths)
        ]

    return {
        "config": rows([_config_of(run, known) for run in runs]) + rows([*map(_model_of, runs)]),
        "environment": rows([leaves(_of_the_machine(run.environment)) for run in runs]),
    }


def warnings_about(arms: Sequence[ArmRuns], baseline: ArmRuns) -> list[str]:
    """One line for each thing that makes curves incomparable, or a run not what it seems."""
    runs = [(_title_of(arm, run), run) for arm in arms for run in arm.runs]
    return [
        *_unlike(arms, baseline),
        *_other_seeds(arms, baseline),
        *_other_data(runs, baseline),
        *_other_machines(runs),
        *(line for title, run in runs for line in _state_of(title, run)),
    ]


def searches_of(arms: Sequence[ArmRuns]) -> list[str]:
    """What `relora arms` says of the rates that it has tried for these runs."""
    said: list[str] = []
    for run in (run for arm in arms for run in arm.runs):
        place = run.path.parent.parent / ARMS_FILE
        if not is_file(place):
            continue
        try:
            listed = read_json(place, ConfigError).values()
            found = [one for one in listed if str(run.path) in one["runs"]]
            said += [f"rates: {plain(line)}" for one in found for line in one.get("tuning", ())]
        except (ConfigError, AttributeError, KeyError, TypeError):
            said.append(f"{place}: cannot be read; which rates were tried is unknown")
    return list(dict.fromkeys(said))


def _title_of(arm: ArmRuns, run: RunFiles) -> str:
    return arm.name if len(arm.runs) == 1 else f"{arm.name} (seed {run.config.seed})"


def _config_of(run: RunFiles, model_known: bool) -> dict[str, Any]:
    found = leaves(run.config.model_dump(mode="json"))
    # The content of the model's file says more than its name.
    return {path: v for path, v in found.items() if path != "model.config" or not model_known}


def _model_of(run: RunFiles) -> dict[str, Any]:
    return leaves(run.model or {}, "model.config.")


def _of_the_machine(environment: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in environment.items() if k not in NOT_OF_THE_MACHINE}


def _differing(
    tables: Sequence[dict[str, Any]], missing: Any = None
) -> Iterator[tuple[str, list[Any]]]:
    """Keys under which tables do not all have the same, and what each has."""
    for key in dict.fromkeys(key for table in tables for key in table):
        values = [table.get(key, missing) for table in tables]
        if any(value != values[0] for value in values):
            yield key, values


def _unlike(arms: Sequence[ArmRuns], baseline: ArmRuns) -> Iterator[str]:
    first = baseline.runs[0]
    for arm, run in ((arm, arm.runs[0]) for arm in arms if arm is not baseline):
        known = None not in (first.model, run.model)
        same_length = run.config.total_steps == first.config.total_steps
        harmless = (*HARMLESS, *(LENGTHS if same_length else ()))
        both = [_config_of(of, known) | (_model_of(of) if known else {}) for of in (first, run)]
        for path, (a, b) in _differing(both):
            why = next((why for begin, why in UNFAIR.items() if path.startswith(begin)), None)
            if why and path not in harmless and not only_moved(path, first, run):
                yield f"{path}: {a!r} in {baseline.name}, {b!r} in {arm.name}: {why}"


def _other_seeds(arms: Sequence[ArmRuns], baseline: ArmRuns) -> Iterator[str]:
    ours = sorted(run.config.seed for run in baseline.runs)
    for arm in arms:
        theirs = sorted(run.config.seed for run in arm.runs)
        if theirs != ours:
            yield (
                f"seed: {str(ours)[1:-1]} in {baseline.name}, {str(theirs)[1:-1]} in {arm.name}: "
                "other data order and other initial weights"
            )
        for seed in sorted({seed for seed in theirs if theirs.count(seed) > 1}):
            yield f"seed: {arm.name} has seed {seed} {theirs.count(seed)} times: no other draw"


def _other_data(runs: Sequence[tuple[str, RunFiles]], baseline: ArmRuns) -> Iterator[str]:
    """Equal settings may name files whose content is not."""
    ours = baseline.runs[0].data
    for title, run in runs:
        if None not in (ours, run.data) and run.data != ours:
            yield f"data: {title} was trained on other token shards than {baseline.name}"


def _other_machines(runs: Sequence[tuple[str, RunFiles]]) -> Iterator[str]:
    """Times are of a machine, and figures of a commit."""
    for key in (*MACHINE, "relora", "commit", "packages.torch", "packages.deepspeed"):
        found: dict[Any, list[str]] = {}
        for title, run in runs:
            value = leaves(run.environment).get(key)
            if isinstance(value, str | int):
                found.setdefault(value, []).append(title)
        if len(found) > 1:
            what = "times do not compare" if key in MACHINE else "other code"
            listed = ", ".join(f"{value} in {_names(names)}" for value, names in found.items())
            yield f"{key}: {listed}: {what}"


def _state_of(title: str, run: RunFiles) -> Iterator[str]:
    if run.status == DIED:
        yield (
            f"{title} has died, killed perhaps: it has not said how it ended, and no process "
            f"trains in it; {run.step} of {run.config.total_steps} steps; the same command goes on"
        )
    elif run.status != "finished":
        reason = f" ({run.reason})" if run.reason and run.status == "failed" else ""
        yield (
            f"{title} is {run.status}{reason}: unfinished, {run.step} of {run.config.total_steps} "
            "steps"
        )
    if run.silent_s is not None and run.silent_s > SILENT_S:
        silence = format_duration(run.silent_s)
        yield f"{title} says it is running, and has written nothing for {silence}"
    yield from _changes_in(title, run)
    if run.evaluations.lost:
        yield f"{title} has diverged: its last {run.evaluations.lost} evaluations are not finite"
    yield from (f"{title}: {complaint}" for complaint in run.complaints)


def _changes_in(title: str, run: RunFiles) -> Iterator[str]:
    """What a run went on with after a stop, if that was something else."""
    for change in run.changes:
        yield f"{title} changed its settings from step {change.step} on: {change.describe()}"
    for before, after in itertools.pairwise(run.stretches):
        found = _differing([leaves(_described(stretch)) for stretch in (before, after)])
        changed = [f"{key} {a} → {b}" for key, (a, b) in sorted(found)]
        if changed:
            yield f"{title} went on from step {after.begin} with {', '.join(changed)}"
    if run.mixed:
        yield (
            f"{title}: its time is a mixture and is not compared; speed and memory are those of "
            f"steps {run.main.begin + 1} – {run.main.end}"
        )


def _described(stretch: Stretch) -> dict[str, Any]:
    """A stretch's environment with settings by their own names."""
    return _of_the_machine(stretch.environment) | (stretch.environment.get("settings") or {})


def _names(names: Sequence[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
