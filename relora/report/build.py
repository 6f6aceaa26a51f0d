"""The whole report: all that any page shows, from what runs' files say and the planner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime

import numpy as np

from relora.errors import CheckpointError, ConfigError
from relora.record import keys
from relora.report import questions
from relora.report.arms import ArmRuns, perplexity_of, spread
from relora.report.curves import curves_of, place_of
from relora.report.fair import differences_between, searches_of, warnings_about
from relora.report.paired import beside_baseline, unsure
from relora.report.predict import Prediction, predict
from relora.report.read import AT_WORK, CPUS, RunFiles
from relora.report.records import ArmReport, Figures, Questions, Report, SeedReport, Spread
from relora.report.setting import setting_of
from relora.report.spectra import spectra_of_arms
from relora.version import __version__

FINAL = ("loss", "perplexity")  # compared only where they are of the same step


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
    paired = beside_baseline(evaluated, base)
    figures = [_arm(arm, predictions[arm.name], base) for arm in arms]
    return Report(
        relora=__version__,
        written=datetime.now().astimezone().isoformat(timespec="seconds"),
        unfinished=any(run.status in AT_WORK for arm in arms for run in arm.runs),
        baseline=base.name,
        setting=setting_of(arms, {name: p.figures for name, p in predictions.items()}),
        warnings=[*warnings_about(arms, base), *complaints],
        notes=[*unsure(paired, base), *searches_of(arms)],
        arms=figures,
        questions=_answers(evaluated, base, predictions, figures),
        paired=paired,
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


def _arm(arm: ArmRuns, prediction: Prediction, base: ArmRuns) -> ArmReport:
    seeds = [_seed(run, prediction) for run in arm.runs]
    furthest = [run in arm.furthest for run in arm.runs]

    def over_seeds(figure: str) -> Spread:
        values = [getattr(seed, figure) for seed in seeds]
        if figure in FINAL:
            values = [v if last else None for v, last in zip(values, furthest, strict=True)]
        return spread(values)

    errors = [run.evaluations.error for run in arm.furthest]
    warm = [_warm_start(run) for run in arm.runs]
    return ArmReport(
        name=arm.name,
        method=arm.method,
        seeds=seeds,
        status=_together([run.status for run in arm.runs]),
        progress=_together([f"{run.step}/{run.config.total_steps}" for run in arm.runs]),
        evaluated=bool(arm.evaluated),
        evaluation_error=max(filter(None, errors), default=None),
        on_gpu=arm.runs[0].environment.get("device") not in (*CPUS, None),
        timed=not any(run.mixed for run in arm.runs),
        figures=Figures[Spread](**{figure: over_seeds(figure) for figure in Figures.model_fields}),
        predicted=prediction.figures,
        warm_start=spread([tokens for tokens, _ in warm]),
        warm_start_seconds=spread([seconds for _, seconds in warm]),
        curves=curves_of(arm, base),
    )


def _seed(run: RunFiles, prediction: Prediction) -> SeedReport:
    evaluations, commit = run.evaluations, run.environment.get("commit")
    loss = float(evaluations.loss[-1]) if len(evaluations.loss) else None
    merges = [line[keys.MERGE_S] for line in run.events_with(keys.MERGE_S)]
    return SeedReport(
        run=str(run.path),
        seed=run.config.seed,
        status=run.status,
        step=run.step,
        of=run.config.total_steps,
        world_size=run.world,
        commit=commit and str(commit),
        tokens=_highest(run.log[keys.TOKENS], evaluations.tokens),
        seconds=_highest(run.log[keys.ELAPSED_S], evaluations.seconds),
        loss=loss,
        perplexity=perplexity_of(loss),
        merges=len(run.events_with(keys.MERGE)),
        tokens_per_s=run.median(keys.TOKENS_PER_S),
        step_ms=run.median(keys.STEP_MS),
        memory_gib=_highest(run.of_main(keys.MEMORY_GIB)),
        checkpoint_bytes=run.checkpoint_bytes,
        merge_s=float(np.median(merges)) if merges else None,
        merges_s=sum(merges) if merges else None,
        flops=prediction.flops and prediction.flops(run.step),
    )


def _together(values: Sequence[str]) -> str:
    """One word for all seeds if they agree, else how many say what."""
    counts = Counter(values)
    if len(counts) == 1:
        return values[0]
    return ", ".join(f"{count} × {value}" for value, count in counts.items())


def _warm_start(run: RunFiles) -> tuple[float | None, float | None]:
    """(tokens, seconds) before the adapters were born, here or in the run this one starts from."""
    if run.config.warm_start is not None:
        tokens, seconds = place_of(run, [min(run.config.warm_start.steps, run.step)])
        return tokens.item(), seconds.item()
    return (run.start.tokens or None, run.start.seconds or None) if run.start else (None, None)


def _highest(*columns: np.ndarray) -> float | None:
    values = np.concatenate(columns)
    return max(values[np.isfinite(values)].tolist(), default=None)
