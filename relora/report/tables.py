"""Every table of the report, once: text cells that Markdown and HTML are made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

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
from relora.report.questions import ratio
from relora.report.read import AT_WORK
from relora.report.records import (
    ArmReport,
    ArmSpectra,
    AtEqual,
    Difference,
    EqualRow,
    MemoryRow,
    Report,
    SeedReport,
    Similarity,
    TargetRow,
)
from relora.words import format_bytes, format_count, format_duration

T = TypeVar("T")
NO_FIGURE = ("not reached", "no evaluation yet", "no evaluation")
WARM = "A warm start counts: its tokens, time and FLOPs are part of its arm's."
FLOPS = (
    "FLOPs follow from the config: 2 a multiplication and addition of every matrix product, "
    "forward, backward, recomputation and merges."
)


class Table(NamedTuple):
    """Rows of text; the first column is an arm's name where `arms` says so."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""
    pictures: tuple[str, ...] = ()  # names of those that follow it
    arms: bool = True

    @property
    def text_columns(self) -> list[bool]:
        """Which columns hold words and not numbers."""
        return [
            n == 0 or any(cell[:1].isalpha() and cell not in NO_FIGURE for cell in column)
            for n, column in enumerate(zip(*self.rows, strict=True))
        ]


def tables(report: Report) -> dict[str, Table]:
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
    if any(len(arm.seeds) > 1 for arm in report.arms):
        found["seeds"] = _seeds(report)
    if report.spectra:
        found["spectra"] = _spectra(report.spectra)
    if report.similarity:
        found["similarity"] = _similarity(report.similarity)
    for key, title in (("config", "Config"), ("environment", "Versions, commits, machines")):
        if report.differences[key]:
            found[key] = _differences(report, title, report.differences[key])
    return found


def verdict_title(report: Report) -> str:
    """Where arms are compared, and what the baseline costs."""
    arm = _baseline(report)
    costs = {"FLOPs": pm(arm.figures.flops, flops), "": pm(arm.figures.seconds, format_duration)}
    costs["training state a rank"] = shown(arm.predicted.state, format_bytes)
    known = ", ".join(f"{cost} {what}".strip() for what, cost in costs.items() if cost != "–")
    at = shown(report.questions.tokens.at, format_count)
    return f"At {at} tokens, and beside {arm.name} ({known}):"


def verdicts(report: Report) -> dict[str, str]:
    """In one line an arm: what it gives, and what a token costs as a share of the baseline's."""
    rows = {row.arm: row for row in report.questions.tokens.rows}
    return {arm.name: _verdict(report, arm, rows.get(arm.name)) for arm in report.arms}


def _verdict(report: Report, arm: ArmReport, row: EqualRow | None) -> str:
    going = "" if arm.status == "finished" else f" ({arm.status}, {arm.progress})"
    if row is None:
        return f"{_no_evaluation(arm)}{going}"
    text = f"perplexity {pm(row.perplexity, number(2))}"
    if arm.name == report.baseline:
        return f"{text}, the baseline{going}"

    def a_token(of: ArmReport, key: str) -> float | None:
        return ratio(getattr(of.figures, key).mean, of.figures.tokens.mean)

    base = _baseline(report)
    costs = {
        "FLOPs": ratio(a_token(arm, "flops"), a_token(base, "flops")),
        "time": ratio(a_token(arm, "seconds"), a_token(base, "seconds")),
        "training state": ratio(arm.predicted.state, base.predicted.state),
    }
    if not (arm.timed and base.timed):
        del costs["time"]
    listed = ", ".join(f"{cost:.2f}\u00a0× {what}" for what, cost in costs.items() if cost)
    after = next(each for each in report.questions.target.rows if each.arm == arm.name)
    reaches = "not as good so far" if going else "never as good"
    if after.tokens_ratio is not None:
        reaches = f"as good after {after.tokens_ratio:.2f}\u00a0× tokens"
    text += f" ({shown(row.ratio, percent)})"
    return "; ".join(filter(None, [text, listed, reaches])) + going


def _baseline(report: Report) -> ArmReport:
    return next(arm for arm in report.arms if arm.name == report.baseline)


def _build(
    title: str, rows: Iterable[T], columns: dict[str, Callable[[T], str]], **more: Any
) -> Table:
    """A table whose cells are functions of a row, by column."""
    cells = [[cell(row) for cell in columns.values()] for row in rows]
    return Table(title, list(columns), cells, **more)


def _figure(key: str, form: Format) -> Callable[[ArmReport], str]:
    """A figure of an arm as a cell."""
    return lambda arm: pm(getattr(arm.figures, key), form)


def _predicted(key: str, form: Format) -> Callable[[ArmReport], str]:
    """A prediction as a cell."""
    return lambda arm: shown(getattr(arm.predicted, key), form)


def _no_evaluation(arm: ArmReport) -> str:
    going = any(seed.status in AT_WORK for seed in arm.seeds)
    return "no evaluation yet" if going else "no evaluation"


def _arms(report: Report) -> Table:
    def of_evaluated(key: str, digits: int, missing: Callable[[ArmReport], str]) -> Any:
        form = _figure(key, number(digits))
        return lambda arm: form(arm) if arm.evaluated else missing(arm)

    return _build(
        "Arms",
        report.arms,
        {
            "arm": lambda arm: arm.name,
            "perplexity": of_evaluated("perplexity", 2, _no_evaluation),
            "validation loss": of_evaluated("loss", 4, lambda _: "–"),
            "tokens": _figure("tokens", format_count),
            "time": _figure("seconds", format_duration),
            "step": lambda arm: arm.progress,
            "status": lambda arm: arm.status,
            "merges": _figure("merges", number(0)),
            "seeds": lambda arm: ", ".join(str(seed.seed) for seed in arm.seeds),
            "method": lambda arm: arm.method,
        },
        note="Mean ± sample standard deviation (n − 1) over the seeds of an arm; without ± there "
        "is one seed, or all are equal.",
    )


def _tokens(report: Report) -> Table:
    note = (
        "At the smallest number of tokens at which every run has an evaluation, but for runs that "
        f"failed or diverged; each run's last evaluation at or before it. {WARM}"
    )
    at = shown(report.questions.tokens.at, format_count)
    title = f"At equal tokens: {at}"
    return _at_equal(report.questions.tokens, title, note, "curves_tokens")


def _seconds(report: Report) -> Table:
    note = (
        "At the smallest last elapsed time of these runs; the loss is interpolated linearly in "
        "time between evaluations. Time includes evaluating, merging and saving, and not what was "
        "lost to a stop or a rollback and done again. A run that went on with other ranks, "
        "settings or on another machine has no time to compare."
    )
    at = shown(report.questions.seconds.at, format_duration)
    title = f"At equal wall-clock: {at}"
    return _at_equal(report.questions.seconds, title, note, "curves_time")


def _at_equal(answer: AtEqual, title: str, note: str, picture: str) -> Table:
    columns: dict[str, Callable[[EqualRow], str]] = {
        "arm": lambda row: row.arm,
        "perplexity": lambda row: pm(row.perplexity, number(2)),
        "difference": lambda row: shown(row.difference, signed(2)),
        "relative": lambda row: shown(row.ratio, percent),
        "validation loss": lambda row: pm(row.loss, number(4)),
        "tokens": lambda row: pm(row.tokens, format_count),
    }
    return _build(title, answer.rows, columns, note=note, pictures=(picture,))


def _memory(report: Report) -> Table:
    answer, arms = report.questions.memory, {arm.name: arm for arm in report.arms}

    def parts(*keys: str) -> Callable[[MemoryRow], str]:
        def cell(row: MemoryRow) -> str:
            held = arms[row.arm].predicted.memory_by_part
            return "–" if held is None else format_bytes(sum(held[key] for key in keys))

        return cell

    def of_arm(cell: Callable[[ArmReport], str]) -> Callable[[MemoryRow], str]:
        return lambda row: cell(arms[row.arm])

    columns: dict[str, Callable[[MemoryRow], str]] = {
        "arm": lambda row: row.arm,
        "training state per rank": of_arm(_predicted("state", format_bytes)),
        "weights": parts("weights", "remainder"),
        "gradients": parts("gradients"),
        "masters": parts("masters"),
        "moments": parts("moments"),
        "activations": parts("activations", "logits"),
    }
    held = [arm.predicted.memory_by_part for arm in report.arms]
    if any(each and each["host"] for each in held):
        columns["in host memory"] = parts("host")
    if any(arm.on_gpu for arm in report.arms):
        columns["peak GiB on the GPU"] = of_arm(_on_gpu(_figure("memory_gib", gib)))
        columns["predicted"] = of_arm(_on_gpu(_predicted("memory", lambda n: gib(n / 2**30))))
    columns |= {
        "perplexity": lambda row: pm(row.perplexity, number(2)),
        "best within this memory": lambda row: row.best_within or "–",
        "its perplexity": lambda row: shown(row.best_perplexity, number(2)),
    }
    what = "peak memory of the GPU" if answer.measured else "training state"
    note = (
        "Training state is what a rank holds, counted byte by byte from config, model and number "
        "of ranks: weights, gradients, masters, moments, and what one micro-batch leaves for the "
        "backward pass, logits among it, in the phase that takes most; buffers of DeepSpeed come "
        "on top. The peak on a GPU is what rank 0 had allocated. Perplexity is that at equal "
        "tokens."
    )
    return _build(f"At equal {what}", answer.rows, columns, note=note, pictures=("memory",))


def _on_gpu(cell: Callable[[ArmReport], str]) -> Callable[[ArmReport], str]:
    """A cell that says something on a GPU alone: elsewhere it would be of the whole process."""
    return lambda arm: cell(arm) if arm.on_gpu else "–"


def _target(report: Report) -> Table:
    target = report.questions.target

    def spent(key: str, form: Format) -> Callable[[TargetRow], str]:
        return lambda row: shown(getattr(row, key), form) if row.reached else "not reached"

    def beside(key: str) -> Callable[[TargetRow], str]:
        return lambda row: shown(getattr(row, f"{key}_ratio"), times)

    return _build(
        f"Until the baseline's perplexity: {shown(target.perplexity, number(2))}",
        target.rows,
        {
            "arm": lambda row: row.arm,
            "tokens": spent("tokens", format_count),
            "of its tokens": beside("tokens"),
            "time": spent("seconds", format_duration),
            "of its time": beside("seconds"),
            "FLOPs": spent("flops", flops),
            "of its FLOPs": beside("flops"),
            "seeds that reach it": lambda row: f"{row.seeds_that_reach_it} of {row.of}",
        },
        note="Where the mean loss of an arm's seeds first comes down to the baseline's last one, "
        "interpolated linearly between evaluations; its perplexity is the exponential of that "
        f"mean. {FLOPS}",
    )


def _speed(report: Report) -> Table:
    return _build(
        "Speed",
        report.arms,
        {
            "arm": lambda arm: arm.name,
            "tokens/s": _figure("tokens_per_s", number(0)),
            "ms/step": _figure("step_ms", number(1)),
            "trainable": _predicted("trainable", format_count),
            "parameters": _predicted("parameters", format_count),
            "bytes/step per rank": _predicted("bytes_per_step", format_bytes),
        },
        note="tokens/s and ms/step are medians of a run. Trainable: in the run's last phase. Bytes "
        "a step and what is called predicted are computed from config, model and number of ranks "
        "alone, as relora plan does.",
    )


def _cost(report: Report) -> Table:
    def warm(arm: ArmReport) -> str:
        text = pm(arm.warm_start_seconds, format_duration)
        if arm.warm_start.mean is not None:
            text += f" for {pm(arm.warm_start, format_count)} tokens"
        return text

    return _build(
        "Cost",
        report.arms,
        {
            "arm": lambda arm: arm.name,
            "FLOPs": _figure("flops", flops),
            "time": _figure("seconds", format_duration),
            "of it warm start": warm,
            "all merges": _figure("merges_s", seconds_text),
            "one merge": _figure("merge_s", seconds_text),
            "checkpoint": _figure("checkpoint_bytes", format_bytes),
            "predicted": _predicted("checkpoint_bytes", format_bytes),
        },
        note=f"{WARM} {FLOPS} One merge is the median of a run's. A checkpoint is the newest on "
        "disk; predicted: its tensors alone.",
        pictures=("training_loss",),
    )


def _seeds(report: Report) -> Table:
    columns: dict[str, Callable[[tuple[ArmReport, SeedReport]], str]] = {
        "run": lambda pair: pair[1].run,
        "arm": lambda pair: pair[0].name,
        "seed": lambda pair: str(pair[1].seed),
        "status": lambda pair: pair[1].status,
        "step": lambda pair: f"{pair[1].step}/{pair[1].of}",
        "time": lambda pair: shown(pair[1].seconds, format_duration),
        "validation loss": lambda pair: shown(pair[1].loss, number(4)),
        "perplexity": lambda pair: shown(pair[1].perplexity, number(2)),
        "tokens/s": lambda pair: shown(pair[1].tokens_per_s, number(0)),
    }
    if any(arm.on_gpu for arm in report.arms):
        columns["peak GiB on the GPU"] = lambda pair: (
            shown(pair[1].memory_gib, gib) if pair[0].on_gpu else "–"
        )
    rows = [(arm, seed) for arm in report.arms for seed in arm.seeds]
    return _build("Every run", rows, columns, arms=False)


def _spectra(arms: list[ArmSpectra]) -> Table:
    def last(key: str) -> Callable[[ArmSpectra], str]:
        return lambda arm: pm(getattr(arm.last, key), number(2))

    return _build(
        "What the updates are made of",
        arms,
        {
            "arm": lambda arm: arm.arm,
            "from step": lambda arm: str(arm.start),
            "to step": lambda arm: str(arm.step),
            "effective rank, cycle": last("cycle_effective_rank"),
            "stable rank, cycle": last("cycle_stable_rank"),
            "effective rank, all": last("total_effective_rank"),
            "stable rank, all": last("total_stable_rank"),
            "overlap": last("overlap"),
            "amplification": last("amplification"),
            "‖ΔW‖ / ‖W₀‖": last("total_ratio"),
            "lost to rounding": lambda arm: pm(arm.rounding_loss, share),
        },
        note="Medians over layers, at the last measurement. cycle: s·B·A of one cycle; all: W + "
        "s·B·A minus W₀, the weights at the first of the steps. Overlap: with the cycle before. "
        "Amplification: how many times W₀ the update is in its own leading directions (LoRA, arXiv "
        "2106.09685, §7.3). ‖ΔW‖ is that of all updates. Lost to rounding: the largest share of a "
        "merge.",
        pictures=("spectra", "ranks", "layers"),
    )


def _similarity(pairs: list[Similarity]) -> Table:
    columns: dict[str, Callable[[Similarity], str]] = {
        "pair": lambda pair: " / ".join(pair.of),
        "of": lambda pair: pair.what,
        "layers": lambda pair: str(pair.layers),
        "φ of all directions": lambda pair: shown(pair.whole, number(3)),
    }
    note = (
        "φ(i, j): how much of the first i left directions of one update lies in the first j of "
        "another; 1 if all, 0 if none (LoRA, arXiv 2106.09685, §7.2). Mean over layers."
    )
    return _build(
        "Subspace similarity", pairs, columns, note=note, pictures=("similarity",), arms=False
    )


def _differences(report: Report, title: str, rows: list[Difference]) -> Table:
    names = [arm.name for arm in report.arms]
    cells = [[row.path, *(_leaf(row.values[name]) for name in names)] for row in rows]
    return Table(f"What differs: {title}", ["", *names], cells, arms=False)


def _leaf(value: Any) -> str:
    """A value of a config as YAML has it."""
    plain = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return plain[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
