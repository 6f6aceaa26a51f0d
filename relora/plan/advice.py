"""What a careful colleague would say about a config before it costs anything."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from relora.config import Config
from relora.plan.dryrun import dry_run
from relora.plan.estimate import (
    PARTS,
    bytes_per_step,
    flops_per_token,
    full_rank_twin,
    memory_by_part,
    peak_memory,
    uncounted,
    weight_bytes,
)
from relora.plan.shape import shape_of
from relora.words import format_bytes, format_count

# Compute-optimal training sees about 20 tokens a parameter (arXiv 2203.15556, table 3).
TOKENS_PER_PARAMETER = 20
# Share of full rank's products that adapters must save to save time: what else they do (casts, an
# optimizer of more tensors) took as much as 2 to 5 % of them, by `relora bench` on a CPU.
WORTH_SAVING = 0.05
MISMATCH = 3  # times too far or too short, of a step of adapters


def in_a_word(config: Config, parameters: int, devices: int) -> str:
    """What a run costs beside full rank, in one sentence or two, from the figures of the page.

    Args:
        parameters: of the model in full rank.
        devices: ranks.
    """
    size, adapters = format_count(parameters), config.lora is not None
    parts = memory_by_part(config, devices, adapters)
    peak = peak_memory(config, devices, adapters)
    largest = max(PARTS, key=lambda part: parts[part])
    most = f"most of it {largest} ({format_bytes(parts[largest])})"
    counted = " (as far as counted, see below)" if uncounted(config) else ""
    if config.lora is None:
        return (
            f"{size} in full rank: at its peak a rank holds {format_bytes(peak)}, {most}{counted}"
        )
    more = peak - peak_memory(full_rank_twin(config), devices)
    less = _saved(config)
    return (
        f"{size} at {config.lora.size}: a step with adapters multiplies {_share(less)} than "
        f"in full rank, and at its peak a rank holds {format_bytes(peak)}, "
        f"{format_bytes(abs(more))} {'more' if more > 0 else 'less'}, {most}{counted}. "
        f"{_where_time_is_saved(config, less)}"
    )


def replicated_base(config: Config, devices: int) -> Iterator[str]:
    """What ZeRO 2 would hold and receive, which leaves frozen weights whole, in place of ZeRO 3."""
    if config.lora is None or config.deepspeed.zero_stage != 3:
        return
    section = config.deepspeed.model_copy(update={"zero_stage": 2})
    other = config.model_copy(update={"deepspeed": section})
    more = weight_bytes(other, devices, True) - weight_bytes(config, devices, True)
    sent = bytes_per_step(other, devices, True)
    then = " once adapters are born" if config.warm_start else ""
    yield (
        f"with frozen weights whole on each rank, ZeRO 2, {format_bytes(sent)} for "
        f"{format_bytes(more)} more of weights{then}: deepspeed.zero_stage=2"
        f"{' on the command that goes on from there' if config.warm_start else ''}"
    )


def _where_time_is_saved(config: Config, less: float) -> str:
    """Whether products are saved that show in time; and where not, what would."""
    lora = config.lora
    assert lora is not None
    if less >= WORTH_SAVING:
        return "Where products take most of a step, that saves time"
    # Products with A and B grow with the rank, and what a weight's own gradient takes is saved.
    shape, uses = shape_of(config), dry_run(config, False).uses
    gradients = sum(
        2 * m.inputs * m.outputs * n
        for m, n in zip(shape.matrices, uses, strict=True)
        if m.adapted
    ) / flops_per_token(config, False).total  # fmt: skip
    ways = []
    if gradients > WORTH_SAVING and lora.rank is not None:
        rank = int(lora.rank * (gradients - WORTH_SAVING) / (gradients - less))
        ways += [f"from rank {rank} down"] if rank else []
    if lora.train == "both" and lora.rank is not None:
        only_b = lora.model_copy(update={"train": "b"})
        alone = _saved(config.model_copy(update={"lora": only_b}))
        ways += [f"with lora.train: b ({_share(alone)})"] if alone >= WORTH_SAVING else []
    way = f": {', or '.join(ways)}" if ways else "; in this model nothing does"
    return f"That is too little to save time, which takes {WORTH_SAVING:.0%}{way}"


def _saved(config: Config) -> float:
    """Share of full rank's FLOPs that a step with adapters does without."""
    full, adapted = (flops_per_token(config, adapters).total for adapters in (False, True))
    return 1 - adapted / full


def _share(less: float) -> str:
    return f"{abs(less):.1%} {'less' if less >= 0 else 'more'}"


def doubts(
    config: Config,
    parameters: int,
    shapes: dict[str, tuple[int, ...]],
    corpus: int | None,
    devices: int,
) -> list[str]:
    """One sentence about each doubtful setting.

    Args:
        parameters: of the model in full rank.
        shapes: (out, in) of the adapted weights, by layer.
        corpus: training tokens; None = not prepared yet.
        devices: ranks.
    """
    return [
        *_adapters(config, shapes),
        *_mismatch(config, shapes),
        *_restarts(config),
        *_budget(config, parameters, corpus),
        *_ranks(config, devices),
        *idle_settings(config, shapes),
    ]


def idle_settings(
    config: Config,
    shapes: dict[str, tuple[int, ...]],
    step: int = 0,
    validation: int | None = None,
) -> list[str]:
    """One sentence about each setting that does nothing in this run, and would in a longer one, in
    a larger model or on a larger corpus.

    Args:
        shapes: of the weights whose spectra are measured, by layer.
        step: at which the run begins or goes on.
        validation: sequences of the validation split; None = not prepared yet.
    """
    return [
        *_nobodys_rate(config),
        *_beyond_the_end(config),
        *_stops(config, step),
        *_too_large(config, shapes, validation),
    ]


def _nobodys_rate(config: Config) -> Iterator[str]:
    """Full rank's rate, which twins of this run train at, where nothing of this run does."""
    own = config.relora.lr if config.relora else config.lora and config.lora.lr
    rest = config.optimizer.lr_embeddings
    if own and rest is not None and config.warm_start is None:
        key = "relora.lr" if config.relora else "lora.lr"
        yield (
            f"optimizer.lr {config.optimizer.lr:g}: nothing of this run trains at it; adapters "
            f"have {key}, the rest optimizer.lr_embeddings"
        )


def _beyond_the_end(config: Config) -> Iterator[str]:
    train, spectra, total = config.train, config.spectra, config.total_steps
    intervals = {
        "train.log_every": (train.log_every, "the last step alone is logged"),
        "train.eval_every": (train.eval_every, "evaluated at the end alone"),
        "train.save_every": (train.save_every, "saved at the end alone"),
        "train.keep_every": (train.keep_every, "no checkpoint stays for that"),
        "spectra.every": (spectra and spectra.every, "measured at merges and the end alone"),
        "spectra.start": (spectra and spectra.start, "nothing is measured"),
    }
    for path, (value, effect) in intervals.items():
        if isinstance(value, int) and value > total:
            yield f"{path} {value}: beyond the run's {total} steps, so it does nothing: {effect}"
    if train.spike is not None and train.spike.window >= total:
        yield (
            f"train.spike.window {train.spike.window}: never full in {total} steps, so no jump of "
            "the loss is ever seen"
        )


def _stops(config: Config, step: int) -> Iterator[str]:
    stop, total = config.train.stop_after, config.total_steps
    if stop is not None and stop >= total:
        yield f"train.stop_after {stop}: does nothing, since the run ends after {total} steps"
    elif stop is not None and stop <= step:
        yield f"train.stop_after {stop}: does nothing, since the run is at step {step} already"


def _too_large(
    config: Config, shapes: dict[str, tuple[int, ...]], validation: int | None
) -> Iterator[str]:
    wanted = config.train.eval_sequences
    if wanted is not None and validation is not None and wanted > validation:
        yield f"train.eval_sequences {wanted}: the validation split has {validation}: all are read"
    largest = max(map(min, shapes.values()), default=None)
    if config.spectra and largest is not None and config.spectra.directions > largest:
        yield (
            f"spectra.directions {config.spectra.directions}: no measured weight has more than "
            f"{largest}"
        )


def _adapters(config: Config, shapes: dict[str, tuple[int, ...]]) -> Iterator[str]:
    if config.lora is None or config.lora.rank is None:
        return
    ranks = {name: config.lora.for_layer(name).rank or 0 for name in shapes}
    rank = min(ranks.values(), default=config.lora.rank)
    large = [name for name, (m, n) in shapes.items() if ranks[name] * (m + n) >= m * n]
    if large:
        yield (
            f"lora.rank {ranks[large[0]]}: A and B hold as many numbers as the weight itself in "
            f"{len(large)} of {len(shapes)} layers ({large[0]})"
        )
    cycles, full = len(config.clock.merge_steps()) + 1, max(map(min, shapes.values()), default=0)
    if cycles * rank > 2 * full:
        yield (
            f"lora.rank {rank}: {cycles} cycles add up to rank {cycles * rank}, and no adapted "
            f"weight goes beyond {full}: the rest stays unused; take fewer or a lower rank"
        )
    if config.model.config and not config.warm_start:
        yield (
            "no warm_start: from random weights, low rank from the first step on costs much "
            "(130M: perplexity 29.8, and 25.0 with it; arXiv 2307.05695)"
        )


def _mismatch(config: Config, shapes: dict[str, tuple[int, ...]]) -> Iterator[str]:
    """Adapters' best rates in the screen (configs/experiments/screen.md) moved W by 0.6 to 1.2 of
    full rank's at its own best."""
    if not shapes or not _is_foreseen(config):
        return
    reach = _reach(config, shapes)
    if not 1 / MISMATCH <= reach <= MISMATCH:
        rate = config.adapters_lr
        yield (
            f"adapters' rate {rate:.1e}: right after a restart an update moves W by {reach:.3g} of "
            f"what full rank's does at {config.optimizer.lr:.1e}; {rate / reach:.1e} would match it"
        )


def _is_foreseen(config: Config) -> bool:
    """How far an update of A and B by Muon moves W, or one of blocks, is not known ahead."""
    lora = config.lora
    return lora is not None and lora.rank is not None and config.optimizer.matrices == "adamw"


def _reach(config: Config, shapes: dict[str, tuple[int, ...]]) -> float:
    """RMS of what the first update after a restart moves W by, over full rank's at its rate.

    Adam's first update of B is ± the rate in each entry, and A's entries have variance 1/(3·in).
    """
    assert config.lora is not None
    share = config.adapters_lr / config.optimizer.lr
    own = ((config.lora.for_layer(name), inputs) for name, (_, inputs) in shapes.items())
    return (
        share / median(3 * n / (lora.rank * lora.scale**2) for lora, n in own if lora.rank) ** 0.5
    )


def reach_of_updates(config: Config, shapes: dict[str, tuple[int, ...]]) -> str:
    """How far an update moves W beside one of full rank, each at its own rate, in words.

    Args:
        shapes: (out, in) of the adapted weights, by layer; one at least.
    """
    rate, base = config.adapters_lr, config.optimizer.lr
    told = f"adapters {rate:.1e}, full rank {base:.1e}"
    if not _is_foreseen(config):
        return told
    reach = _reach(config, shapes)
    words = (
        f"{told}: right after a restart an update moves W by "
        f"{reach:.3g} of what full rank's does; {rate / reach:.1e} would match it"
    )
    if config.optimizer.lr_embeddings != "adapters" or rate == base:
        return words
    return f"{words}; embeddings and head learn at the adapters' rate too, which full rank has not"


def _restarts(config: Config) -> Iterator[str]:
    relora, clock = config.relora, config.clock
    if relora is None or clock.birth is None:
        return
    if 5 * relora.rewarm_steps > relora.cycle_steps:
        share = relora.rewarm_steps / relora.cycle_steps
        yield f"relora.rewarm_steps {relora.rewarm_steps}: {share:.0%} of every cycle is warm-up"
    last = clock.total - clock.merge_steps()[-1]
    if 2 * last < relora.cycle_steps:
        yield f"the last cycle has only {last:,} of {relora.cycle_steps:,} steps"
    if relora.reset.mode == "none":
        yield "relora.reset.mode none: old moments steer the new A and B (diverged in the paper)"
    elif relora.rewarm_steps == 0 and config.optimizer.matrices == "adamw":
        yield "relora.rewarm_steps 0: full learning rate on moments just reset"
    if relora.reset.masks == "independent":
        yield "relora.reset.masks independent: updates of first moment / eps, far too large"
    if relora.lr is None and config.lora and config.lora.lr is None:
        yield f"relora.lr null: {config.optimizer.lr:.1e} as in full rank; the paper doubles it"
    if relora.precision == "rounded":
        yield "relora.precision rounded: bf16 weights drop most of a small update at each merge"


def _budget(config: Config, parameters: int, corpus: int | None) -> Iterator[str]:
    tokens = config.total_steps * config.tokens_per_step
    if config.model.config and tokens < TOKENS_PER_PARAMETER / 2 * parameters:
        yield (
            f"{tokens / parameters:.2g} tokens a parameter; about {TOKENS_PER_PARAMETER} are "
            "compute-optimal"
        )
    if corpus is not None and tokens > corpus:
        yield f"the corpus is read {tokens / corpus:.2g} times; beyond 4 times repetition costs"
    if config.schedule.warmup_steps == 0 and config.model.config:
        yield "schedule.warmup_steps 0: full learning rate on random weights"
    if config.train.eval_every is None:
        yield "train.eval_every null: one validation loss at the end, no curve"


def _ranks(config: Config, devices: int) -> Iterator[str]:
    batch = config.batch
    if devices > 1 and devices == batch.global_batch_size // batch.micro_batch_size:
        yield (
            f"batch: {devices} ranks share {batch.global_batch_size} sequences without "
            f"accumulation; with micro-batch {batch.micro_batch_size} any more would stay unused"
        )
