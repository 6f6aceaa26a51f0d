"""Every table of the report, once: text cells that Markdown and HTML are made from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from types import SimpleNamespace
from typing import Any, NamedTuple

from relora.report.cells import (
    Format,
    flops,
    gib,
    loss_difference,
    percent,
    seconds_text,
    share,
    shown,
    signed,
)
from relora.report.records import ArmReport, Report
from relora.report.verdict import no_evaluation
from relora.words import format_bytes, format_count, format_duration

Cell = Callable[[Any], str]  # of a row's record
OPTIONAL = {
    "its standard error",
    "in host memory",
    "peak GiB on the GPU",
    "predicted",
    "adapter alone, fp32",
}  # only where an arm has any
NO_FIGURE = ("not reached", "no evaluation yet", "no evaluation")


class Table(NamedTuple):
    """Rows of text; the first column is an arm's name where `arms` says so."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    arms: bool = True
    note: str = ""

    @property
    def text_columns(self) -> list[bool]:
        """Which columns hold words and not numbers."""
        return [
            n == 0 or any(cell[:1].isalpha() and cell not in NO_FIGURE for cell in column)
            for n, column in enumerate(zip(*self.rows, strict=True))
        ]


def tables(report: Report) -> dict[str, Table]:
    """Every table of the report, by the name that pages know it by."""
    answers, arms = report.questions, report.arms
    tokens = f"At equal tokens: {shown(answers.tokens.at, format_count)}"
    seconds = f"At equal wall-clock: {shown(answers.seconds.at, format_duration)}"
    memory = f"At equal {'peak memory of the GPU' if answers.memory.measured else 'training state'}"
    target = f"Until the baseline's perplexity: {shown(answers.target.perplexity, '{:,.2f}')}"
    fitting = [
        SimpleNamespace(arm=arms[report.numbers[row.arm]], answer=row)
        for row in answers.memory.rows
    ]
    runs = [SimpleNamespace(arm=arm, seed=seed) for arm in arms for seed in arm.seeds]
    found = {
        "arms": _build("Arms", arms, ARMS),
        "tokens": _build(tokens, answers.tokens.rows, AT_EQUAL),
        "paired": _build("Sequence by sequence", report.paired, BY_SEQUENCE),
        "seconds": _build(seconds, answers.seconds.rows, AT_EQUAL),
        "memory": _build(memory, fitting, MEMORY),
        "target": _build(target, answers.target.rows, TARGET),
        "speed": _build("Speed", arms, SPEED),
        "cost": _build("Cost", arms, COST),
        "seeds": _build("Every run", runs if len(runs) > len(arms) else [], SEEDS, arms=False),
        "spectra": _build("What the updates are made of", report.spectra, UPDATES),
        "similarity": _build("Subspace similarity", report.similarity, SIMILARITY, arms=False),
        "config": _differences(report, "config", "Config"),
        "environment": _differences(report, "environment", "Versions, commits, machines"),
    }
    return {
        name: table._replace(note=NOTES.get(name, ""))
        for name, table in found.items()
        if table.rows
    }


def _build(
    title: str, rows: Sequence[Any], columns: Mapping[str, Cell], arms: bool = True
) -> Table:
    """A table whose cells are functions of a row, by column."""
    cells = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    for name in OPTIONAL & cells.keys():
        if set(cells[name]) <= {"–", "0B"}:
            del cells[name]
    return Table(title, [*cells], [[*row] for row in zip(*cells.values(), strict=True)], arms)


def _of(path: str, form: Format = str) -> Cell:
    """A figure of a row's record as a cell."""
    value = attrgetter(path)
    return lambda row: shown(value(row), form)


def _in_fp32(path: str) -> Cell:
    """Bytes of so many parameters."""
    return _of(path, lambda count: format_bytes(4 * count))


def _spent(key: str, form: Format) -> Cell:
    """What was spent until the baseline's perplexity, by those that have it."""
    cell = _of(key, form)
    return lambda row: cell(row) if row.reached else "not reached"


def _held(*parts: str) -> Cell:
    """Bytes of some parts of the training state."""

    def cell(row: Any) -> str:
        held = row.arm.predicted.memory_by_part
        return "–" if held is None else format_bytes(sum(held[part] for part in parts))

    return cell


def _on_gpu(path: str, form: Format) -> Cell:
    """A figure that elsewhere would be one of the whole process, which says nothing."""
    cell = _of(path, form)
    return lambda row: cell(row) if row.arm.on_gpu else "–"


def _perplexity(arm: ArmReport) -> str:
    return shown(arm.figures.perplexity, "{:,.2f}") if arm.evaluated else no_evaluation(arm)


def _warm(arm: ArmReport) -> str:
    text = shown(arm.warm_start_seconds, format_duration)
    tokens = shown(arm.warm_start, format_count)
    return text if arm.warm_start.mean is None else f"{text} for {tokens} tokens"


def _differences(report: Report, what: str, title: str) -> Table:
    names = [arm.name for arm in report.arms]
    differing = report.differences[what]
    rows = [[row.path, *(_leaf(row.values[name]) for name in names)] for row in differing]
    return Table(f"What differs: {title}", ["", *names], rows, arms=False)


def _leaf(value: Any) -> str:
    """A value of a config as YAML has it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


ARMS: dict[str, Cell] = {
    "arm": _of("name"),
    "perplexity": _perplexity,
    "validation loss": _of("figures.loss", "{:,.4f}"),
    "its standard error": _of("evaluation_error", "{:,.4f}"),
    "tokens": _of("figures.tokens", format_count),
    "time": _of("figures.seconds", format_duration),
    "step": _of("progress"),
    "status": _of("status"),
    "merges": _of("figures.merges", "{:,.0f}"),
    "seeds": lambda arm: f"{len(arm.seeds)} ({', '.join(str(seed.seed) for seed in arm.seeds)})",
    "method": _of("method"),
}
AT_EQUAL: dict[str, Cell] = {
    "arm": _of("arm"),
    "perplexity": _of("perplexity", "{:,.2f}"),
    "difference": _of("difference", signed),
    "relative": _of("ratio", percent),
    "validation loss": _of("loss", "{:,.4f}"),
    "tokens": _of("tokens", format_count),
}
BY_SEQUENCE: dict[str, Cell] = {
    "arm": _of("arm"),
    "loss less the baseline's": _of("difference", loss_difference),
    "its paired standard error": _of("error", "{:,.4f}"),
    "sequences": _of("sequences", "{:,}"),
}
MEMORY: dict[str, Cell] = {
    "arm": _of("arm.name"),
    "training state per rank": _of("arm.predicted.state", format_bytes),
    "weights": _held("weights", "remainder"),
    "gradients": _held("gradients"),
    "masters": _held("masters"),
    "moments": _held("moments"),
    "activations": _held("activations", "logits"),
    "in host memory": _held("host"),
    "peak GiB on the GPU": _on_gpu("arm.figures.memory_gib", gib),
    "predicted": _on_gpu("arm.predicted.memory", lambda count: gib(count / 2**30)),
    "perplexity": _of("answer.perplexity", "{:,.2f}"),
    "best within this memory": _of("answer.best_within"),
    "its perplexity": _of("answer.best_perplexity", "{:,.2f}"),
}
TARGET: dict[str, Cell] = {
    "arm": _of("arm"),
    "tokens": _spent("tokens", format_count),
    "of its tokens": _of("tokens_ratio", "× {:.2f}"),
    "time": _spent("seconds", format_duration),
    "of its time": _of("seconds_ratio", "× {:.2f}"),
    "FLOPs": _spent("flops", flops),
    "of its FLOPs": _of("flops_ratio", "× {:.2f}"),
    "seeds that reach it": lambda row: f"{row.seeds_that_reach_it} of {row.of}",
}
SPEED: dict[str, Cell] = {
    "arm": _of("name"),
    "tokens/s": _of("figures.tokens_per_s", "{:,.0f}"),
    "ms/step": _of("figures.step_ms", "{:,.1f}"),
    "trainable": _of("predicted.trainable", format_count),
    "parameters": _of("predicted.parameters", format_count),
    "bytes/step per rank": _of("predicted.bytes_per_step", format_bytes),
}
COST: dict[str, Cell] = {
    "arm": _of("name"),
    "FLOPs": _of("figures.flops", flops),
    "time": _of("figures.seconds", format_duration),
    "of it warm start": _warm,
    "all merges": _of("figures.merges_s", seconds_text),
    "one merge": _of("figures.merge_s", seconds_text),
    "checkpoint": _of("figures.checkpoint_bytes", format_bytes),
    "predicted": _of("predicted.checkpoint_bytes", format_bytes),
    "adapter alone, fp32": _in_fp32("predicted.adapter"),
    "model, fp32": _in_fp32("predicted.parameters"),
}
SEEDS: dict[str, Cell] = {
    "run": _of("seed.run"),
    "arm": _of("arm.name"),
    "seed": _of("seed.seed"),
    "status": _of("seed.status"),
    "step": lambda row: f"{row.seed.step}/{row.seed.of}",
    "time": _of("seed.seconds", format_duration),
    "validation loss": _of("seed.loss", "{:,.4f}"),
    "perplexity": _of("seed.perplexity", "{:,.2f}"),
    "tokens/s": _of("seed.tokens_per_s", "{:,.0f}"),
    "peak GiB on the GPU": _on_gpu("seed.memory_gib", gib),
}
UPDATES: dict[str, Cell] = {
    "arm": _of("arm"),
    "from step": _of("start"),
    "to step": _of("step"),
    "effective rank, cycle": _of("last.cycle_effective_rank", "{:,.2f}"),
    "stable rank, cycle": _of("last.cycle_stable_rank", "{:,.2f}"),
    "effective rank, all": _of("last.total_effective_rank", "{:,.2f}"),
    "stable rank, all": _of("last.total_stable_rank", "{:,.2f}"),
    "overlap": _of("last.overlap", "{:,.2f}"),
    "amplification": _of("last.amplification", "{:,.2f}"),
    "‖ΔW‖ / ‖W₀‖": _of("last.total_ratio", "{:,.2f}"),
    "lost to rounding": _of("rounding_loss", share),
}
SIMILARITY: dict[str, Cell] = {
    "pair": lambda pair: " / ".join(pair.of),
    "of": _of("what"),
    "layers": _of("layers"),
    "φ of all directions": _of("whole", "{:,.3f}"),
}
_WARM = "A warm start counts: its tokens, time and FLOPs are part of its arm's."
_FLOPS = (
    "FLOPs follow from the config: 2 a multiplication and addition of every matrix product, "
    "forward, backward, recomputation and merges."
)
NOTES = {
    "arms": "Mean ± sample standard deviation (n − 1) over the seeds of an arm; without ± there is "
    "one seed, or all are equal in these digits. Seeds: how many, and which.",
    "tokens": "At the smallest number of tokens at which every run has an evaluation, but for runs "
    f"that failed or diverged; each run's last evaluation at or before it. {_WARM}",
    "paired": "Last losses of finished runs beside those of the baseline's run of the same seed, "
    "on the same validation sequences; mean ± sample standard deviation over seeds. The error is "
    "the largest of a seed's: the standard error of the mean over sequences of the two losses' "
    "difference, which is how far another choice of sequences might move it. Runs of before it was "
    "stored, and those that read other sequences, have none.",
    "seconds": "At the smallest last elapsed time of these runs; the loss is interpolated linearly "
    "in time between evaluations. Time includes evaluating, merging and saving, and not what was "
    "lost to a stop or a rollback and done again. A run that went on with other ranks, settings or "
    "on another machine has no time to compare.",
    "memory": "Training state is what a rank holds, counted byte by byte from config, model and "
    "number of ranks: weights, gradients, masters, moments, and what one micro-batch leaves for "
    "the backward pass, logits among it, in the phase that takes most; buffers of DeepSpeed come "
    "on top. The peak on a GPU is what rank 0 had allocated. Perplexity is that at equal tokens.",
    "target": "Where the mean loss of an arm's seeds first comes down to the baseline's last one, "
    "interpolated linearly between evaluations; its perplexity is the exponential of that mean. "
    f"{_FLOPS}",
    "speed": "tokens/s and ms/step are medians of a run. Trainable: in the run's last phase. Bytes "
    "a step and what is called predicted are computed from config, model and number of ranks "
    "alone, as relora plan does.",
    "cost": f"{_WARM} {_FLOPS} One merge is the median of a run's. A checkpoint is the newest on "
    "disk; predicted: its tensors alone. An adapter is A and B of all layers, as export --format "
    "peft writes them; the model is without them.",
    "spectra": "Medians over layers, at the last measurement. cycle: s·B·A of one cycle; all: W + "
    "s·B·A minus W₀, the weights at the first of the steps. Overlap: with the cycle before. "
    "Amplification: how many times W₀ the update is in its own leading directions (LoRA, arXiv "
    "2106.09685, §7.3). ‖ΔW‖ is that of all updates. Lost to rounding: the largest share of a "
    "merge.",
    "similarity": "φ(i, j): how much of the first i left directions of one update lies in the "
    "first j of another; 1 if all, 0 if none (LoRA, arXiv 2106.09685, §7.2). Mean over layers.",
}
