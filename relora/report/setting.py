"""What runs were: device, model, data and sizes, said once where they are all alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from relora.report.arms import ArmRuns, plain
from relora.report.read import CPUS, RunFiles
from relora.report.records import Predicted, Report
from relora.words import format_count

LONGEST = 120  # characters of a name of data


def setting_of(
    arms: Sequence[ArmRuns], predicted: Mapping[str, Predicted]
) -> dict[str, dict[str, list[str]]]:
    """For each of device, model, data and sizes: what is true of which arms."""
    found: dict[str, dict[str, list[str]]] = {}
    for arm in arms:
        for run in arm.runs:
            for what, text in _described(run, predicted[arm.name].parameters).items():
                names = found.setdefault(what, {}).setdefault(plain(text), [])
                names += [arm.name] if arm.name not in names else []
    return found


def setting_lines(report: Report) -> dict[str, str]:
    """The same as a line each; arms are named where they differ."""
    return {
        what: "; ".join(
            text if len(found) == 1 else f"{text} ({', '.join(arms)})"
            for text, arms in found.items()
        )
        for what, found in report.setting.items()
    }


def _described(run: RunFiles, parameters: int | None) -> dict[str, str]:
    config, model = run.config, run.model or {}
    batch, length = config.batch.global_batch_size, config.data.sequence_length
    tokens = config.total_steps * config.tokens_per_step
    a_parameter = f", {tokens / parameters:.3g} a parameter" if parameters else ""
    device = run.environment.get("device") or "unknown"
    given, file = config.model.pretrained, config.model.config
    name = f"{given.name} (pretrained)" if given else file.stem if file else ""
    kind, words = model.get("model_type"), model.get("vocab_size")
    size = f"{format_count(parameters)} parameters" if parameters else ""
    return {
        "device": f"{run.world} × {device}{' (CPU)' if device in CPUS else ''}, "
        f"{config.deepspeed.precision}, ZeRO {config.deepspeed.zero_stage}",
        "model": ", ".join(filter(None, [name, str(kind or "") if kind != name else "", size])),
        "data": config.data.source.title[:LONGEST]
        + (f", vocabulary of {words:,}" if isinstance(words, int) else ""),
        "sizes": f"{batch:,} sequences of {length:,} = {format_count(config.tokens_per_step)} "
        f"tokens a step; {config.total_steps:,} steps = {format_count(tokens)} tokens{a_parameter}",
    }
