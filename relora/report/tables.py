"""Every table of the report, once: text cells that Markdown and HTML are made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from typing import Any, NamedTuple

from relora.report import cells
from relora.report.cells import number, percent, seconds_text, share, shown, signed, times
from relora.report.records import ArmReport, Report
from relora.report.verdict import no_evaluation
from relora.words import format_bytes, format_count, format_duration

Cell = Callable[[Any], str]  # of a row's record
NO_FIGURE = ("not reached", "no evaluation yet", "no evaluation")


class Table(NamedTuple):
    """Rows of text; the first column is an arm's name where `arms` says so."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    arms: bool = True
    note: str = ""
    pictures: tuple[str, ...] = ()  # names of those that follow it

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
    target = f"Until the baseline's perplexity: {shown(answers.target.perplexity, number(2))}"
    found = {
        "arms": _build("Arms", arms, ARMS),
        "tokens": _build(tokens, answers.tokens.rows, AT_EQUAL),
        "seconds": _build(seconds, answers.seconds.rows, AT_EQUAL),
        "memory": _memory(report),
        "target": _build(target, answers.target.rows, TARGET),
        "speed": _build("Speed", arms, SPEED),
        "cost": _build("Cost", arms, COST),
        "seeds": _seeds(report),
        "spectra": _build("What the updates are made of", report.spectra, SPECTRA),
        "similarity": _build("Subspace similarity", report.similarity, SIMILARITY, arms=False),
        "config": _differences(report, "config", "Config"),
        "environment": _differences(report, "environment", "Versions, commits, machines"),
    }
    return {
        key: table._replace(note=NOTES.get(key, ""), pictures=PICTURES.get(key, ()))
        for key, table in found.items()
        if table.rows
    }


def _build(
    title: str, rows: Iterable[Any], columns: Mapping[str, Cell], arms: bool = True
) -> Table:
    """A table whose cells are functions of a row, by column."""
    cells_of = [[cell(row) for cell in columns.values()] for row in rows]
    return Table(title, [*columns], cells_of, arms)


def _of(path: str, form: Callable[[Any], str] = str) -> Cell:
    """A figure of a row's record as a cell."""
    value = attrgetter(path)
    return lambda row: shown(value(row), form)


def _spent(key: str, form: cells.Format) -> Cell:
    """What was spent until the baseline's perplexity, by those that have it."""
    cell = _of(key, form)
    return lambda row: cell(row) if row.reached else "not reached"


def _perplexity(arm: ArmReport) -> str:
    form = number(2)
    return shown(arm.figures.perplexity, form) if arm.evaluated else no_evaluation(arm)


def _warm(arm: ArmReport) -> str:
    text = shown(arm.warm_start_seconds, format_duration)
    tokens = shown(arm.warm_start, format_count)
    return text if arm.warm_start.mean is None else f"{text} for {tokens} tokens"


def _memory(report: Report) -> Table:
    answer, arms = report.questions.memory, {arm.name: arm for arm in report.arms}
    answers = {row.arm: row for row in answer.rows}

    def parts(*keys: str) -> Cell:
        def cell(arm: ArmReport) -> str:
            held = arm.predicted.memory_by_part
            return "–" if held is None else format_bytes(sum(held[key] for key in keys))

        return cell

    def on_gpu(cell: Cell) -> Cell:
        """Elsewhere it would be a figure of the whole process, which says nothing."""
        return lambda arm: cell(arm) if arm.on_gpu else "–"

    columns: dict[str, Cell] = {
        "arm": _of("name"),
        "training state per rank": _of("predicted.state", format_bytes),
        "weights": parts("weights", "remainder"),
        "gradients": parts("gradients"),
        "masters": parts("masters"),
        "moments": parts("moments"),
        "activations": parts("activations", "logits"),
    }
    if any((arm.predicted.memory_by_part or {}).get("host") for arm in report.arms):
        columns["in host memory"] = parts("host")
    if any(arm.on_gpu for arm in report.arms):
        columns["peak GiB on the GPU"] = on_gpu(_of("figures.memory_gib", cells.gib))
        predicted = _of("predicted.memory", lambda count: cells.gib(count / 2**30))
        columns["predicted"] = on_gpu(predicted)
    columns |= {
        "perplexity": lambda arm: shown(answers[arm.name].perplexity, number(2)),
        "best within this memory": lambda arm: answers[arm.name].best_within or "–",
        "its perplexity": lambda arm: shown(answers[arm.name].best_perplexity, number(2)),
    }
    title = f"At equal {'peak memory of the GPU' if answer.measured else 'training state'}"
    rows = [arms[name] for name in answers]
    return _build(title, rows, columns)


def _seeds(report: Report) -> Table:
    several = any(len(arm.seeds) > 1 for arm in report.arms)
    gpu = any(arm.on_gpu for arm in report.arms)
    rows = []
    for arm, seed in ((a, s) for a in report.arms for s in a.seeds):
        row = [seed.run, arm.name, str(seed.seed), seed.status, f"{seed.step}/{seed.of}"]
        row += [shown(seed.seconds, format_duration), shown(seed.loss, number(4))]
        row += [shown(seed.perplexity, number(2)), shown(seed.tokens_per_s, number(0))]
        row += [shown(seed.memory_gib, cells.gib) if arm.on_gpu else "–"] if gpu else []
        rows.append(row)
    columns = ["run", "arm", "seed", "status", "step", "time", "validation loss", "perplexity"]
    columns += ["tokens/s", "peak GiB on the GPU"] if gpu else ["tokens/s"]
    return Table("Every run", columns, rows if several else [], arms=False)


def _differences(report: Report, what: str, title: str) -> Table:
    names = [arm.name for arm in report.arms]
    differing = report.differences[what]
    rows = [[row.path, *(_leaf(row.values[name]) for name in names)] for row in differing]
    return Table(f"What differs: {title}", ["", *names], rows, arms=False)


def _leaf(value: Any) -> str:
    """A value of a config as YAML has it."""
    plain = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return plain[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


ARMS: dict[str, Cell] = {
    "arm": _of("name"),
    "perplexity": _perplexity,
    "validation loss": _of("figures.loss", number(4)),
    "tokens": _of("figures.tokens", format_count),
    "time": _of("figures.seconds", format_duration),
    "step": _of("progress"),
    "status": _of("status"),
    "merges": _of("figures.merges", number(0)),
    "seeds": lambda arm: ", ".join(str(seed.seed) for seed in arm.seeds),
    "method": _of("method"),
}
AT_EQUAL: dict[str, Cell] = {
    "arm": _of("arm"),
    "perplexity": _of("perplexity", number(2)),
    "difference": _of("difference", signed(2)),
    "relative": _of("ratio", percent),
    "validation loss": _of("loss", number(4)),
    "tokens": _of("tokens", format_count),
}
TARGET: dict[str, Cell] = {
    "arm": _of("arm"),
    "tokens": _spent("tokens", format_count),
    "of its tokens": _of("tokens_ratio", times),
    "time": _spent("seconds", format_duration),
    "of its time": _of("seconds_ratio", times),
    "FLOPs": _spent("flops", cells.flops),
    "of its FLOPs": _of("flops_ratio", times),
    "seeds that reach it": lambda row: f"{row.seeds_that_reach_it} of {row.of}",
}
SPEED: dict[str, Cell] = {
    "arm": _of("name"),
    "tokens/s": _of("figures.tokens_per_s", number(0)),
    "ms/step": _of("figures.step_ms", number(1)),
    "trainable": _of("predicted.trainable", format_count),
    "parameters": _of("predicted.parameters", format_count),
    "bytes/step per rank": _of("predicted.bytes_per_step", format_bytes),
}
COST: dict[str, Cell] = {
    "arm": _of("name"),
    "FLOPs": _of("figures.flops", cells.flops),
    "time": _of("figures.seconds", format_duration),
    "of it warm start": _warm,
    "all merges": _of("figures.merges_s", seconds_text),
    "one merge": _of("figures.merge_s", seconds_text),
    "checkpoint": _of("figures.checkpoint_bytes", format_bytes),
    "predicted": _of("predicted.checkpoint_bytes", format_bytes),
}
SPECTRA: dict[str, Cell] = {
    "arm": _of("arm"),
    "from step": _of("start"),
    "to step": _of("step"),
    "effective rank, cycle": _of("last.cycle_effective_rank", number(2)),
    "stable rank, cycle": _of("last.cycle_stable_rank", number(2)),
    "effective rank, all": _of("last.total_effective_rank", number(2)),
    "stable rank, all": _of("last.total_stable_rank", number(2)),
    "overlap": _of("last.overlap", number(2)),
    "amplification": _of("last.amplification", number(2)),
    "‖ΔW‖ / ‖W₀‖": _of("last.total_ratio", number(2)),
    "lost to rounding": _of("rounding_loss", share),
}
SIMILARITY: dict[str, Cell] = {
    "pair": lambda pair: " / ".join(pair.of),
    "of": _of("what"),
    "layers": _of("layers"),
    "φ of all directions": _of("whole", number(3)),
}
PICTURES = {
    "tokens": ("curves_tokens",),
    "seconds": ("curves_time",),
    "memory": ("memory",),
    "cost": ("training_loss",),
    "spectra": ("spectra", "ranks", "layers"),
    "similarity": ("similarity",),
}
_WARM = "A warm start counts: its tokens, time and FLOPs are part of its arm's."
_FLOPS = (
    "FLOPs follow from the config: 2 a multiplication and addition of every matrix product, "
    "forward, backward, recomputation and merges."
)
NOTES = {
    "arms": "Mean ± sample standard deviation (n − 1) over the seeds of an arm; without ± there is "
    "one seed, or all are equal.",
    "tokens": "At the smallest number of tokens at which every run has an evaluation, but for runs "
    f"that failed or diverged; each run's last evaluation at or before it. {_WARM}",
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
    "disk; predicted: its tensors alone.",
    "spectra": "Medians over layers, at the last measurement. cycle: s·B·A of one cycle; all: W + "
    "s·B·A minus W₀, the weights at the first of the steps. Overlap: with the cycle before. "
    "Amplification: how many times W₀ the update is in its own leading directions (LoRA, arXiv "
    "2106.09685, §7.3). ‖ΔW‖ is that of all updates. Lost to rounding: the largest share of a "
    "merge.",
    "similarity": "φ(i, j): how much of the first i left directions of one update lies in the "
    "first j of another; 1 if all, 0 if none (LoRA, arXiv 2106.09685, §7.2). Mean over layers.",
}
