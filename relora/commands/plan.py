"""`relora plan`: a run on one page before anybody pays for it. Needs no GPU, no data, no memory."""

from __future__ import annotations

import itertools
import shlex
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from relora.config import Config, check_world, load_config

if TYPE_CHECKING:
    from torch import nn

WIDTH = 100  # columns of the page
CURVE_WIDTH, CURVE_HEIGHT = 80, 8
MAX_CYCLES = 12  # more cycles than this are cut out of the middle of the timeline
# Compute-optimal training sees about 20 tokens a parameter (arXiv 2203.15556, table 3).
TOKENS_PER_PARAMETER = 20
BARS = " ▁▂▃▄▅▆▇█"


class Phase(NamedTuple):
    """Updates start + 1 … stop, between two events of the clock."""

    name: str
    start: int
    stop: int
    ends_in: str


def plan(config: Path, overrides: Sequence[str], devices: int) -> int:
    """Print model, method, timeline, parameters, tokens, batch geometry and warnings.

    Raises:
        ConfigError: the config is wrong in itself, or does not fit its model or `devices` ranks.
    """
    run = load_config(config, overrides)
    check_world(run, devices)
    # Imported after the config is known to be sound, since torch takes seconds.
    from relora.lora.inject import adapted_layers, add_adapters
    from relora.model import build_meta_model

    model = build_meta_model(run.model)
    parameters = sum(p.numel() for p in model.parameters())
    shapes = {}
    if run.lora is not None:
        add_adapters(model, run.lora)
        shapes = {name: tuple(layer.weight.shape) for name, layer in adapted_layers(model)}
    corpus = _corpus_tokens(run)
    for lines in (
        _header(run, model, str(config)),
        _timeline(run),
        _curve(run),
        _parameters(run, model, shapes),
        _budget(run, parameters, devices, corpus),
        _disk(run, model, parameters),
        _merges(run, shapes),
        _engines(run),
        _warnings(run, parameters, shapes, corpus),
    ):
        print("\n".join(lines), end="\n\n")
    print(f"next         relora prepare {shlex.join([str(config), *overrides])}")
    print(f"             relora launch --devices {devices} {shlex.join([str(config), *overrides])}")
    return 0


def count_by_group(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(trainable, frozen) numbers of parameters by what they are, shared ones counted once."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    embeddings = {id(m.weight) for m in model.modules() if type(m).__name__ == "Embedding"}
    groups = dict.fromkeys(
        ("projections", "adapters", "embeddings", "head", "norms, biases"), (0, 0)
    )
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            group = "adapters"
        elif id(parameter) in embeddings:
            group = "embeddings"
        elif head is not None and parameter is head.weight:
            group = "head"
        else:
            group = "norms, biases" if parameter.dim() == 1 else "projections"
        trainable, frozen = groups[group]
        if parameter.requires_grad:
            trainable += parameter.numel()
        else:
            frozen += parameter.numel()
        groups[group] = trainable, frozen
    return {group: counts for group, counts in groups.items() if any(counts)}


def phases(config: Config) -> list[Phase]:
    """The run cut at every birth and merge."""
    clock = config.clock
    if clock.birth is None:
        return [Phase("full rank", 0, clock.total, "end")]
    cut = []
    if clock.birth > 0:
        cut.append(Phase("warm start", 0, clock.birth, "adapters are born"))
    starts = [clock.birth, *clock.merge_steps()]
    name = "cycle" if clock.cycle else "LoRA"
    for number, (start, stop) in enumerate(zip(starts, [*starts[1:], clock.total], strict=True), 1):
        ends_in = "end" if stop == clock.total else f"merge {number}"
        cut.append(Phase(f"{name} {number}" if clock.cycle else name, start, stop, ends_in))
    return cut


def _header(config: Config, model: nn.Module, path: str) -> list[str]:
    shape = model.config
    layers, width = shape.num_hidden_layers, shape.hidden_size  # type: ignore[union-attr]
    source = config.model.config or config.model.pretrained
    lines = [
        f"plan         {path}",
        f"run          {config.run_dir}, seed {config.seed}",
        f"model        {shape.model_type}, {layers} layers of width {width}, from {source}",  # type: ignore[union-attr]
    ]
    lora, relora = config.lora, config.relora
    if lora is None:
        return [*lines, "method       full rank"]
    start = f"{config.warm_start.steps:,} steps of full rank, then " if config.warm_start else ""
    scale = f"s = {lora.scale:.4g} ({lora.scaling})"
    lines.append(f"method       {config.method}: {start}rank {lora.rank}, {scale}")
    if relora:
        reset = relora.reset
        share = f" {reset.share:.0%}" if reset.mode in ("magnitude", "random") else ""
        lines.append(
            f"             a merge every {relora.cycle_steps:,} steps, reset {reset.mode}{share}, "
            f"rewarm {relora.rewarm_steps:,} steps"
        )
    return lines


def _timeline(config: Config) -> list[str]:
    from relora.runtime.metrics import format_count

    lines = ["timeline             steps                 tokens    peak LR   then"]
    cut = phases(config)
    left_out = len(cut) - MAX_CYCLES
    for number, phase in enumerate(cut):
        if left_out > 1 and MAX_CYCLES - 3 <= number < len(cut) - 3:
            if number == MAX_CYCLES - 3:
                lines.append(f"  … {left_out} more cycles …")
            continue
        peak = max(config.learning_rate(step) for step in range(phase.start, phase.stop))
        tokens = format_count(phase.stop * config.tokens_per_step)
        lines.append(
            f"  {phase.name:<12} {phase.start:>9,} – {phase.stop:<9,} {tokens:>12} {peak:>10.2e}   "
            f"{phase.ends_in}"
        )
    return lines


def _curve(config: Config) -> list[str]:
    """The learning rate as a bar chart; a column with a restart in it shows its lowest rate."""
    clock = config.clock
    columns = min(CURVE_WIDTH, clock.total)
    edges = [round(n * clock.total / columns) for n in range(columns + 1)]
    marks = dict.fromkeys(clock.merge_steps(), "▲") | ({clock.birth: "△"} if clock.birth else {})
    bars, under = [], ""
    for start, stop in itertools.pairwise(edges):
        rates = [config.learning_rate(step) for step in range(start, stop)]
        events = [marks[step] for step in range(start, stop) if step in marks]
        bars.append(min(rates) if events else max(rates))
        under += events[-1] if events else "─"
    # No column shows the highest rate if every peak shares one with a restart.
    peak = max(config.learning_rate(step) for step in range(clock.total))
    lines = [f"learning rate, {columns} columns of {clock.total / columns:,.4g} steps"]
    for row in reversed(range(CURVE_HEIGHT)):
        eighths = [max(0, min(8, round(8 * (r / peak * CURVE_HEIGHT - row)))) for r in bars]
        label = f"{peak:.1e}" if row == CURVE_HEIGHT - 1 else ""
        lines.append(f"{label:>11} │" + "".join(BARS[n] for n in eighths).rstrip())
    lines.append(f"{'0':>11} └{under}")
    if marks:
        lines.append(" " * 13 + ("△ adapters are born   " if clock.birth else "") + "▲ merge")
    return lines


def _parameters(config: Config, model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    lines = [f"parameters {'trainable':>20} {'frozen':>18} {'together':>18}"]
    groups = count_by_group(model)
    total = [sum(counts) for counts in zip(*groups.values(), strict=True)]
    for name, (trainable, frozen) in [*groups.items(), ("all", (total[0], total[1]))]:
        lines.append(f"  {name:<14} {trainable:>14,} {frozen:>18,} {trainable + frozen:>18,}")
    if config.lora is not None:
        rank, cycles = config.lora.rank, len(config.clock.merge_steps()) + 1
        full = min(min(shape) for shape in shapes.values())
        lines += [
            f"  {total[0] / sum(total):.1%} is trained once adapters are born; their updates sum "
            f"to rank {min(full, cycles * rank)} of {full} at most",
        ]
    return lines


def _budget(config: Config, parameters: int, devices: int, corpus: int | None) -> list[str]:
    from relora.runtime.metrics import format_count

    batch, per_step = config.batch, config.tokens_per_step
    tokens = config.total_steps * per_step
    accumulation = batch.global_batch_size // (batch.micro_batch_size * devices)
    lines = [
        f"tokens       {format_count(tokens)} = {config.total_steps:,} steps × "
        f"{format_count(per_step)}, {tokens / parameters:.3g} per parameter",
        f"batch        {batch.global_batch_size:,} sequences of {config.data.sequence_length:,} = "
        f"{devices} {'rank' if devices == 1 else 'ranks'} × micro-batch {batch.micro_batch_size} "
        f"× accumulation {accumulation}",
        f"engine       ZeRO {config.deepspeed.zero_stage}, {config.deepspeed.precision}",
    ]
    if corpus is None:
        return [*lines, "corpus       not prepared yet: relora prepare counts its tokens"]
    return [
        *lines,
        f"corpus       {format_count(corpus)} training tokens: {tokens / corpus:.3g} epochs",
    ]


def _merges(config: Config, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """What a merge sends and needs, from the shapes of the adapted weights."""
    if config.lora is None or config.relora is None:
        return ["merges       none"]
    from relora.restart.merge import gather_blocks
    from relora.runtime.metrics import format_bytes

    factors = [config.lora.rank * (m + n) for m, n in shapes.values()]
    largest = max(m * n for m, n in shapes.values())
    sent = "nothing but counts is sent: every rank has A and B"
    if config.deepspeed.zero_stage == 3:
        blocks = len(gather_blocks(factors, largest))
        sent = f"A and B are gathered, {format_bytes(4 * sum(factors))} in {blocks} collectives"
    return [
        f"merge        {sent}; base weights are never sent",
        f"             less than {format_bytes(4 * largest)} a rank beside what training holds",
    ]


def _engines(config: Config) -> list[str]:
    """Which ZeRO stages go with which precision; this run's combination in brackets."""
    from relora.runtime.config import PRECISIONS, STAGES, refusal

    chosen = config.deepspeed
    lines = [f"{'engines':<18}" + "".join(f"ZeRO {stage:<11}" for stage in STAGES).rstrip()]
    reasons: dict[str, None] = {}
    for precision in PRECISIONS:
        cells = []
        for stage in STAGES:
            refused = refusal(stage, precision, False)
            if refused:
                reasons[f"ZeRO {stage}, {precision}: {'; take '.join(refused)}"] = None
            offload = refusal(stage, precision, True) is None
            cell = "no" if refused else "yes, offload" if offload else "yes"
            here = (stage, precision) == (chosen.zero_stage, chosen.precision)
            cells.append(f"{f'[{cell}]' if here else cell:<16}")
        lines.append(f"  {precision:<16}" + "".join(cells).rstrip())
    wrap = textwrap.TextWrapper(WIDTH, initial_indent="  ", subsequent_indent="    ")
    return [*lines, *(wrap.fill(reason) for reason in reasons)]


def _disk(config: Config, model: nn.Module, parameters: int) -> list[str]:
    from relora.runtime.metrics import format_bytes
    from relora.runtime.saving import checkpoint_bytes

    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trainable
    size = format_bytes(checkpoint_bytes(trainable, frozen))
    if config.warm_start:
        size += f" ({format_bytes(checkpoint_bytes(parameters, 0))} in the warm start)"
    # DeepSpeed's own: weights in bf16, fp32 masters and two moments.
    return [
        f"checkpoint   {size}, {config.train.keep_checkpoints} are kept",
        f"             full rank in bf16 as DeepSpeed saves it: {format_bytes(14 * parameters)}",
    ]


def _warnings(
    config: Config, parameters: int, shapes: dict[str, tuple[int, ...]], corpus: int | None
) -> list[str]:
    found = [
        *_warn_adapters(config, shapes),
        *_warn_restarts(config),
        *_warn_budget(config, parameters, corpus),
    ]
    wrap = textwrap.TextWrapper(WIDTH, initial_indent="! ", subsequent_indent="  ")
    return [wrap.fill(line) for line in found] or ["no warnings"]


def _warn_adapters(config: Config, shapes: dict[str, tuple[int, ...]]) -> Iterator[str]:
    if config.lora is None:
        return
    rank = config.lora.rank
    large = [name for name, (m, n) in shapes.items() if rank * (m + n) >= m * n]
    if large:
        yield (
            f"lora.rank {rank}: A and B hold as many numbers as the weight itself in {len(large)} "
            f"of {len(shapes)} layers ({large[0]})"
        )
    if config.model.config and not config.warm_start:
        yield (
            "no warm_start: from random weights, low rank from the first step on costs much "
            "(130M: perplexity 29.8, and 25.0 with it; arXiv 2307.05695)"
        )


def _warn_restarts(config: Config) -> Iterator[str]:
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
    elif relora.rewarm_steps == 0:
        yield "relora.rewarm_steps 0: full learning rate on moments just reset"
    if relora.reset.masks == "independent":
        yield "relora.reset.masks independent: updates of first moment / eps, far too large"
    if relora.lr is None:
        yield f"relora.lr null: {config.optimizer.lr:.1e} as in full rank; the paper doubles it"
    if relora.precision == "rounded":
        yield "relora.precision rounded: bf16 weights drop most of a small update at each merge"


def _warn_budget(config: Config, parameters: int, corpus: int | None) -> Iterator[str]:
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
    if config.train.save_every is None and config.total_steps > 1000:
        yield "train.save_every null: a crash loses the whole run"
    if config.train.eval_every is None:
        yield "train.eval_every null: one validation loss at the end, no curve"


def _corpus_tokens(config: Config) -> int | None:
    """Training tokens of the prepared shards; None before they are."""
    from relora.data.shards import read_index, shard_directory

    directory = shard_directory(config.data)
    if not (directory / "index.json").is_file():
        return None
    return read_index(directory)["splits"]["train"]["tokens"]
