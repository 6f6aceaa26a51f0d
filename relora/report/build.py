"""The whole report as one dict: what `report.json` holds, and all that any page shows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from relora.errors import CheckpointError, ConfigError
from relora.report import questions
from relora.report.arms import Arm, Spread, over_seeds, perplexity_of, spread
from relora.report.curves import curves_of
from relora.report.fair import differences_between, warnings_about
from relora.report.predict import Prediction, predict
from relora.report.read import AT_WORK, RunFiles
from relora.report.spectra import spectra_of_arms
from relora.version import __version__

FORMAT = 1
CPUS = ("x86_64", "aarch64", "arm64", "AMD64")  # what environment.json calls a device without GPU
RULES = {
    "spread": "mean ± sample standard deviation (n − 1) over the seeds of an arm; without ± there "
    "is one seed, or all are equal",
    "tokens": "at the smallest number of tokens at which every run has an evaluation, but for runs "
    "that failed or diverged; each run's last evaluation at or before it",
    "seconds": "at the smallest last elapsed time of these runs; the loss is interpolated linearly "
    "in time between evaluations. Time includes evaluating, merging and saving, and not what was "
    "lost to a stop or a rollback and done again. A run that went on with other ranks, settings or "
    "on another machine has no time to compare",
    "memory": "perplexity is that at equal tokens; memory is the peak of rank 0, allocated on a "
    "GPU and resident on a CPU, where it holds the whole process and no prediction applies",
    "target": "where the mean loss of an arm's seeds first comes down to the baseline's last one, "
    "interpolated linearly between evaluations; its perplexity is the exponential of that mean",
    "warm_start": "a warm start counts: its tokens, time and FLOPs are part of its arm's",
    "flops": "from the config: 2 a multiplication and addition of every matrix product, forward, "
    "backward, recomputation and merges",
    "predicted": "from config, model and number of ranks alone, as relora plan does",
}


def build_report(arms: Sequence[Arm], baseline: str | None = None) -> dict[str, Any]:
    """All figures of a comparison, as plain JSON values.

    Args:
        baseline: an arm's name; by default the first in full rank, else the first.

    Raises:
        CheckpointError: no run has an evaluation yet.
        ConfigError: there is no such arm, or it has no evaluation.
    """
    evaluated = [arm for arm in arms if arm.evaluated]
    if not evaluated:
        listed = ", ".join(str(run.path) for arm in arms for run in arm.runs)
        raise CheckpointError(
            f"{listed}: has no evaluation yet; wait for the first, or set train.eval_every"
        )
    base = _baseline(arms, evaluated, baseline)
    predictions = {arm.name: predict(arm.runs[0]) for arm in arms}
    flops = {name: prediction.flops for name, prediction in predictions.items()}
    tokens = questions.at_equal_tokens(evaluated, base)
    memory = {arm.name: over_seeds(arm, peak_memory_gib) for arm in arms}
    spectra, complaints = spectra_of_arms(arms, base.name)
    unpredicted = {p.complaint for p in predictions.values() if p.complaint}
    complaints += [f"{name}: {line}" for name, p in predictions.items() for line in p.left]
    complaints += [f"not predicted: {complaint}" for complaint in sorted(unpredicted)]
    report = {
        "format": FORMAT,
        "relora": __version__,
        "written": datetime.now().astimezone().isoformat(timespec="seconds"),
        "unfinished": any(run.status in AT_WORK for arm in arms for run in arm.runs),
        "baseline": base.name,
        "rules": RULES,
        "warnings": [*warnings_about(arms, base), *complaints],
        "arms": [_arm(arm, predictions[arm.name]) for arm in arms],
        "questions": {
            "tokens": tokens,
            "seconds": questions.at_equal_seconds(evaluated, base),
            "memory": questions.at_equal_memory(evaluated, tokens, memory),
            "target": questions.until_the_baseline(evaluated, base, flops),
        },
        "differences": differences_between(arms),
        "spectra": spectra,
    }
    json.dumps(report["questions"], allow_nan=False)
    return report


def _baseline(arms: Sequence[Arm], evaluated: Sequence[Arm], wanted: str | None) -> Arm:
    if wanted is None:
        full = [arm for arm in evaluated if arm.method == "full rank"]
        return (full or list(evaluated))[0]
    for arm in evaluated:
        if arm.name == wanted:
            return arm
    names = ", ".join(arm.name for arm in evaluated)
    there = "has no evaluation yet" if any(a.name == wanted for a in arms) else "no such arm"
    raise ConfigError(f"--baseline {wanted}: {there}; take one of {names}")


def peak_memory_gib(run: RunFiles) -> float | None:
    """Peak memory of rank 0 in GiB."""
    values = run.of_main("perf/memory_gib")
    return float(values.max()) if len(values) else None


def _arm(arm: Arm, prediction: Prediction) -> dict[str, Any]:
    return {
        "name": arm.name,
        "method": arm.method,
        "seeds": [_seed(run, prediction) for run in arm.runs],
        "status": _together([run.status for run in arm.runs]),
        "progress": _together([f"{run.step}/{run.config.total_steps}" for run in arm.runs]),
        "evaluated": bool(arm.evaluated),
        "on_gpu": arm.runs[0].environment.get("device") not in (*CPUS, None),
        "figures": _figures(arm, prediction),
        "predicted": {
            "memory_gib": prediction.memory and prediction.memory / 2**30,
            "memory_by_part": prediction.memory_by_part,
            "bytes_per_step": prediction.bytes_per_step,
            "checkpoint_bytes": prediction.checkpoint_bytes,
            "trainable": prediction.trainable,
            "parameters": prediction.parameters,
        },
        "warm_start": spread([_warm(run, "tokens") for run in arm.runs]),
        "warm_start_seconds": spread([_warm(run, "seconds") for run in arm.runs]),
        "curves": curves_of(arm),
    }


def _seed(run: RunFiles, prediction: Prediction) -> dict[str, Any]:
    return {
        "run": str(run.path),
        "seed": run.config.seed,
        "status": run.status,
        "step": run.step,
        "of": run.config.total_steps,
        "world_size": run.world,
        "commit": run.environment.get("commit"),
        **{key: value(run, prediction) for key, value in FIGURES.items()},
    }


def _figures(arm: Arm, prediction: Prediction) -> dict[str, Spread]:
    furthest = [any(run is other for other in arm.furthest) for run in arm.runs]
    return {
        key: spread(
            [
                value(run, prediction) if there or key not in FINAL else None
                for run, there in zip(arm.runs, furthest, strict=True)
            ]
        )
        for key, value in FIGURES.items()
    }


def _together(values: Sequence[str]) -> str:
    """One word for all seeds if they agree, else how many say what."""
    counts = {value: values.count(value) for value in dict.fromkeys(values)}
    if len(counts) == 1:
        return values[0]
    return ", ".join(f"{count} × {value}" for value, count in counts.items())


def _warm(run: RunFiles, what: str) -> float | None:
    """Tokens or seconds before the adapters were born, here or in the run this one starts from."""
    from relora.report.curves import place

    before = getattr(run.start, what) if run.start else 0.0
    warm = run.config.warm_start
    if warm is None:
        return before or None
    tokens, seconds = place(run, np.array([min(warm.steps, run.step)], np.float64))
    return float((tokens if what == "tokens" else seconds)[0])


def _total(run: RunFiles, key: str) -> float | None:
    found = [line[key] for line in run.events_with(key)]
    return float(sum(found)) if found else None


def _last(run: RunFiles, key: str) -> float | None:
    values = np.concatenate([run.log[key], getattr(run.evaluations, _ALSO[key])])
    values = values[np.isfinite(values)]
    return float(values.max()) if len(values) else None


def _merge_seconds(run: RunFiles, _: Prediction) -> float | None:
    found = [line["time/merge_s"] for line in run.events_with("time/merge_s")]
    return float(np.median(found)) if found else None


_ALSO = {"train/tokens": "tokens", "time/elapsed_s": "seconds"}
FINAL = ("loss", "perplexity")  # compared only where they are of the same step
Figure = Callable[[RunFiles, Prediction], float | None]
FIGURES: dict[str, Figure] = {
    "tokens": lambda run, _: _last(run, "train/tokens"),
    "seconds": lambda run, _: _last(run, "time/elapsed_s"),
    "loss": lambda run, _: questions.last(run.evaluations.loss),
    "perplexity": lambda run, _: perplexity_of(questions.last(run.evaluations.loss)),
    "merges": lambda run, _: float(len(run.events_with("relora/merge"))),
    "tokens_per_s": lambda run, _: run.median("perf/tokens_per_s"),
    "step_ms": lambda run, _: run.median("perf/step_ms"),
    "memory_gib": lambda run, _: peak_memory_gib(run),
    "checkpoint_bytes": lambda run, _: run.checkpoint_bytes,
    "merge_s": _merge_seconds,
    "merges_s": lambda run, _: _total(run, "time/merge_s"),
    "flops": lambda run, prediction: prediction.flops(run.step) if prediction.flops else None,
}
