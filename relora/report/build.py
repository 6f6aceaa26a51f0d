"""The whole report: all that any page shows, from what runs' files say and the planner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime

import numpy as np

from relora.errors import CheckpointError, ConfigError
from relora.record import keys
from relora.report import questions
from relora.report.arms import ArmRuns, perplexity_of, spread
from relora.report.curves import curves_of, place_of
from relora.report.fair import differences_between, warnings_about
from relora.report.predict import Prediction, predict
from relora.report.read import AT_WORK, RunFiles
from relora.report.records import ArmReport, Figures, Questions, Report, SeedReport, Spread
from relora.report.spectra import spectra_of_arms
from relora.version import __version__

CPUS = ("x86_64", "aarch64", "arm64", "AMD64")  # what environment.json calls a device without GPU


def build_report(arms: Sequence[ArmRuns], baseline: str | None = None) -> Report:
    """All figures of a comparison.

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
    spectra, similarity, complaints = spectra_of_arms(arms, base.name)
    complaints += [f"{name}: {line}" for name, p in predictions.items() for line in p.left]
    unpredicted = {p.complaint for p in predictions.values() if p.complaint}
    complaints += [f"not predicted: {complaint}" for complaint in sorted(unpredicted)]
    figures = [_arm(arm, predictions[arm.name]) for arm in arms]
    return Report(
        relora=__version__,
        written=datetime.now().astimezone().isoformat(timespec="seconds"),
        unfinished=any(run.status in AT_WORK for arm in arms for run in arm.runs),
        baseline=base.name,
        warnings=[*warnings_about(arms, base), *complaints],
        arms=figures,
        questions=_answers(evaluated, base, predictions, figures),
        differences=differences_between(arms),
        spectra=spectra,
        similarity=similarity,
    )


def _baseline(arms: Sequence[ArmRuns], evaluated: Sequence[ArmRuns], wanted: str | None) -> ArmRuns:
    if wanted is None:
        full = [arm for arm in evaluated if arm.method == "full rank"]
        return (full or list(evaluated))[0]
    for arm in evaluated:
        if arm.name == wanted:
            return arm
    names = ", ".join(arm.name for arm in evaluated)
    there = "has no evaluation yet" if any(a.name == wanted for a in arms) else "no such arm"
    raise ConfigError(f"--baseline {wanted}: {there}; take one of {names}")


def _answers(
    evaluated: Sequence[ArmRuns],
    base: ArmRuns,
    predictions: dict[str, Prediction],
    figures: Sequence[ArmReport],
) -> Questions:
    tokens = questions.at_equal_tokens(evaluated, base)
    measured = all(arm.on_gpu for arm in figures)
    memory = {
        arm.name: spread(
            [seed.memory_gib and seed.memory_gib * 2**30 for seed in arm.seeds]
            if measured
            else [arm.predicted.state]
        )
        for arm in figures
    }
    flops = {name: prediction.flops for name, prediction in predictions.items()}
    return Questions(
        tokens=tokens,
        seconds=questions.at_equal_seconds(evaluated, base),
        memory=questions.at_equal_memory(tokens, memory, measured),
        target=questions.until_the_baseline(evaluated, base, flops),
    )


def _arm(arm: ArmRuns, prediction: Prediction) -> ArmReport:
    furthest = [any(run is other for other in arm.furthest) for run in arm.runs]
    found = [{key: value(run, prediction) for key, value in FIGURES.items()} for run in arm.runs]
    return ArmReport(
        name=arm.name,
        method=arm.method,
        seeds=[_seed(run, values) for run, values in zip(arm.runs, found, strict=True)],
        status=_together([run.status for run in arm.runs]),
        progress=_together([f"{run.step}/{run.config.total_steps}" for run in arm.runs]),
        evaluated=bool(arm.evaluated),
        on_gpu=arm.runs[0].environment.get("device") not in (*CPUS, None),
        timed=not any(run.mixed for run in arm.runs),
        figures=Figures[Spread](
            **{
                key: spread(
                    [
                        values[key] if there or key not in FINAL else None
                        for values, there in zip(found, furthest, strict=True)
                    ]
                )
                for key in FIGURES
            }
        ),
        predicted=prediction.figures,
        warm_start=spread([_warm(run, "tokens") for run in arm.runs]),
        warm_start_seconds=spread([_warm(run, "seconds") for run in arm.runs]),
        curves=curves_of(arm),
    )


def _seed(run: RunFiles, values: dict[str, float | None]) -> SeedReport:
    commit = run.environment.get("commit")
    return SeedReport(
        run=str(run.path),
        seed=run.config.seed,
        status=run.status,
        step=run.step,
        of=run.config.total_steps,
        world_size=run.world,
        commit=commit and str(commit),
        **values,
    )


def _together(values: Sequence[str]) -> str:
    """One word for all seeds if they agree, else how many say what."""
    counts = {value: values.count(value) for value in dict.fromkeys(values)}
    if len(counts) == 1:
        return values[0]
    return ", ".join(f"{count} × {value}" for value, count in counts.items())


def _warm(run: RunFiles, what: str) -> float | None:
    """Tokens or seconds before the adapters were born, here or in the run this one starts from."""
    before = getattr(run.start, what) if run.start else 0.0
    warm = run.config.warm_start
    if warm is None:
        return before or None
    tokens, seconds = place_of(run, [min(warm.steps, run.step)])
    return float((tokens if what == "tokens" else seconds)[0])


def _highest(*columns: np.ndarray) -> float | None:
    values = np.concatenate(columns)
    return max(values[np.isfinite(values)].tolist(), default=None)


def _loss(run: RunFiles) -> float | None:
    """The last validation loss."""
    return float(run.evaluations.loss[-1]) if len(run.evaluations.loss) else None


def _merges(run: RunFiles) -> list[float]:
    """Seconds of each merge."""
    return [line[keys.MERGE_S] for line in run.events_with(keys.MERGE_S)]


FINAL = ("loss", "perplexity")  # compared only where they are of the same step
FIGURES: dict[str, Callable[[RunFiles, Prediction], float | None]] = {
    "tokens": lambda run, _: _highest(run.log[keys.TOKENS], run.evaluations.tokens),
    "seconds": lambda run, _: _highest(run.log[keys.ELAPSED_S], run.evaluations.seconds),
    "loss": lambda run, _: _loss(run),
    "perplexity": lambda run, _: perplexity_of(_loss(run)),
    "merges": lambda run, _: float(len(run.events_with(keys.MERGE))),
    "tokens_per_s": lambda run, _: run.median(keys.TOKENS_PER_S),
    "step_ms": lambda run, _: run.median(keys.STEP_MS),
    "memory_gib": lambda run, _: _highest(run.of_main(keys.MEMORY_GIB)),
    "checkpoint_bytes": lambda run, _: run.checkpoint_bytes,
    "merge_s": lambda run, _: float(np.median(_merges(run))) if _merges(run) else None,
    "merges_s": lambda run, _: float(sum(_merges(run))) if _merges(run) else None,
    "flops": lambda run, prediction: prediction.flops(run.step) if prediction.flops else None,
}
