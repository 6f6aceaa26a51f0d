"""Which runs are seeds of one arm, what each arm is called, and statistics over its seeds."""

from __future__ import annotations

import math
import re
import statistics
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import numpy as np

from relora.errors import ConfigError
from relora.load import differences
from relora.locate import PATHS
from relora.report.read import Evaluations, RunFiles
from relora.report.records import Spread

# Leaves of the config in which seeds of one arm may differ.
NOT_THE_EXPERIMENT = {
    "run_dir",
    "seed",
    "data.dir",
    "data.num_workers",
    "train.stop_after",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "train.keep_every",
    "train.keep_checkpoints",
    "train.background_save",
    "train.sample_prompt",
}
HIGHEST = 30.0  # nats; no loss beyond it has a perplexity that anybody reads


@dataclass(frozen=True)
class ArmRuns:
    """Runs of one config that differ by their seed."""

    name: str
    runs: list[RunFiles]

    @property
    def method(self) -> str:
        """full rank, LoRA, LoRA after warm start, ReLoRA, ReLoRA after warm start."""
        config = self.runs[0].config
        warm = config.warm_start is not None or config.model.pretrained is not None
        return config.method + (" after warm start" if warm and config.lora is not None else "")

    @property
    def evaluated(self) -> list[RunFiles]:
        """Seeds that have an evaluation."""
        return [run for run in self.runs if len(run.evaluations.loss)]

    @property
    def furthest(self) -> list[RunFiles]:
        """Seeds whose last evaluation is as late as any; a mean is over these and no others."""
        last = max((run.evaluations.step[-1] for run in self.evaluated), default=0)
        return [run for run in self.evaluated if run.evaluations.step[-1] == last]

    @property
    def leader(self) -> RunFiles:
        """The first seed that has got as far as any."""
        return max(self.runs, key=lambda run: run.step)


def group_runs(runs: Sequence[RunFiles], names: Sequence[str | None]) -> list[ArmRuns]:
    """Arms in the order of their first runs.

    A name that was given decides. Among the others, runs whose configs are equal but for the seed
    are one arm; a seed that comes twice is an arm of its own, since it repeats a run and is no
    other draw.

    Args:
        names: what the user called each run, or None.

    Raises:
        ConfigError: one name for runs that differ in more than their seed.
    """
    groups: list[tuple[str | None, list[RunFiles]]] = []
    for run, name in zip(runs, names, strict=True):
        for other, members in groups:
            if name != other:
                continue
            differing = other_than_seed(members[0], run)
            repeats = run.config.seed in [member.config.seed for member in members]
            if name is None and (differing or repeats):
                continue
            if differing:
                raise ConfigError(
                    f"{name}: {members[0].path} and {run.path} differ in more than their seed "
                    f"({', '.join(differing)}); give them different names"
                )
            members.append(run)
            break
        else:
            groups.append((name, [run]))
    given = {name for name, _ in groups if name}
    short = _short_names([members[0].path for _, members in groups])
    arms: dict[str, ArmRuns] = {}
    for (name, members), default in zip(groups, short, strict=True):
        title = plain(name or default)
        while title in arms or (name is None and title in given):
            title += "′"  # two runs of one directory, or a directory called as another arm
        arms[title] = ArmRuns(title, members)
    return list(arms.values())


def other_than_seed(a: RunFiles, b: RunFiles) -> list[str]:
    """Leaves that make two runs different experiments."""
    found = {path for path, *_ in differences(a.config, b.config) if not only_moved(path, a, b)}
    if None not in (a.model, b.model):  # the content of the file says more than its name
        found = found - {"model.config"} | ({"model.config"} if a.model != b.model else set())
    return sorted(found - NOT_THE_EXPERIMENT)


def only_moved(path: str, a: RunFiles, b: RunFiles) -> bool:
    """Whether a leaf is where two runs found the same tokens, and no more than that."""
    return path.startswith("data.") and path in PATHS and a.data is not None and a.data == b.data


def plain(name: str) -> str:
    """A name without characters that would break a line or hide."""
    return "".join("?" if unicodedata.category(c)[0] == "C" else c for c in name) or "?"


def _short_names(paths: Sequence[Path]) -> list[str]:
    """For each arm its directory's name, with as many parents as tell it from the others.

    A last part such as `seed_2` says nothing about an arm of several seeds, and is left out where
    another part is left.
    """
    parts = [_without_seed(path.resolve().parts) for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def _without_seed(parts: tuple[str, ...]) -> tuple[str, ...]:
    if len(parts) > 2 and re.fullmatch(r"seed[_-]?\d+", parts[-1]):
        return parts[:-1]
    return (*parts[:-1], re.sub(r"(?<=.)[_-]seed[_-]?\d+$", "", parts[-1]))


def spread(values: Sequence[float | None]) -> Spread:
    """Mean and sample standard deviation (n − 1) of the seeds that have a value."""
    kept = [None if v is None or not math.isfinite(v) else float(v) for v in values]
    known = [v for v in kept if v is not None]
    return Spread(
        mean=statistics.fmean(known) if known else None,
        sd=statistics.stdev(known) if len(known) > 1 else None,
        n=len(known),
        values=kept,
    )


def perplexity_of(loss: float | None) -> float | None:
    """exp(loss), or None where that is no number, or one of more than 13 digits."""
    if loss is None or not math.isfinite(loss) or loss > HIGHEST:
        return None
    return math.exp(loss)


def at_tokens(run: RunFiles, tokens: float) -> tuple[float, float] | None:
    """(tokens, loss) of the last evaluation at or before so many tokens."""
    evaluations = run.evaluations
    place = int(np.searchsorted(evaluations.tokens, tokens, side="right")) - 1
    if place < 0 or _is_past(run, evaluations.tokens, tokens):
        return None
    return float(evaluations.tokens[place]), float(evaluations.loss[place])


def at_seconds(run: RunFiles, seconds: float) -> tuple[float, float] | None:
    """(tokens, loss) at a moment, on the straight line between the evaluations around it."""
    e = run.evaluations
    if not len(e.seconds) or seconds < e.seconds[0] or _is_past(run, e.seconds, seconds):
        return None
    tokens, loss = (float(np.interp(seconds, e.seconds, column)) for column in (e.tokens, e.loss))
    return tokens, loss


def _is_past(run: RunFiles, column: np.ndarray, place: float) -> bool:
    """Whether a run had given up by then: what it was before says nothing about it there."""
    return run.gave_up and (not len(column) or bool(column[-1] < place))


def mean_over_seeds(arm: ArmRuns) -> Evaluations:
    """Means of tokens, seconds and loss at the steps that all of the furthest seeds evaluated.

    One that gave up, or is still on its way, would change what the mean is over on its way.
    """
    steps = reduce(np.intersect1d, [run.evaluations.step for run in arm.furthest])
    each = [run.evaluations.at(steps) for run in arm.furthest]  # not empty: all have the last step

    def mean(name: str) -> np.ndarray:
        return np.mean([getattr(evaluations, name) for evaluations in each], axis=0)

    return Evaluations(steps, mean("tokens"), mean("seconds"), mean("loss"))


class Crossing(NamedTuple):
    """A moment between two evaluations."""

    step: float
    tokens: float
    seconds: float


def reached(evaluations: Evaluations, loss: float) -> Crossing | None:
    """Where the validation loss first comes down to `loss`.

    On the straight line between two evaluations; None if it never does.
    """
    e = evaluations
    below = np.flatnonzero(e.loss <= loss)
    if not len(below):
        return None
    after = below[0]
    before = max(after - 1, 0)
    share = (e.loss[before] - loss) / (e.loss[before] - e.loss[after]) if after else 1.0
    columns = (e.step, e.tokens, e.seconds)
    return Crossing(*(float(v[before] + share * (v[after] - v[before])) for v in columns))
