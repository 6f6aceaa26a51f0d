"""The page of `relora plan`: what a run is, does, needs and takes, from its config alone."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from relora.config import Config
from relora.data.absent import absent_parts
from relora.data.shards import read_index, shard_directory
from relora.engine.config import STAGES
from relora.engine.options import refusal
from relora.engine.precision import NAMES, precision_of
from relora.files import exists
from relora.lean import Lean, make_lean
from relora.lora.choose import describe_left, projections
from relora.lora.inject import add_adapters
from relora.lora.layers import adapted_layers
from relora.model import build_meta_model
from relora.plan.advice import doubts, in_a_word, reach_of_updates, replicated_base
from relora.plan.estimate import (
    PARTS,
    break_even,
    bytes_per_step,
    flops_per_token,
    full_rank_twin,
    memory_by_part,
    merge_cost,
    peak_memory,
    speedup_ceiling,
    training_flops,
    uncounted,
)
from relora.plan.gpus import Pace, room, time_lines
from relora.plan.shape import count_by_group, shape_of
from relora.plan.timeline import curve, timeline
from relora.record.loaded import is_run_or_checkpoint, structure_of
from relora.record.saving import checkpoint_bytes
from relora.record.standing import standing
from relora.restart.restart import gather_blocks
from relora.structure import check_context, check_pretrained
from relora.words import format_bytes, format_count, format_table

WIDTH = 100  # columns of the page
LABEL = 13  # columns that labels take


@dataclass(frozen=True)
class Facts:
    """What the page is made from."""

    config: Config
    devices: int  # ranks
    pace: Pace  # what hours are told from
    model: Any  # on the meta device, with its adapters
    lean: Lean
    parameters: int  # of it in full rank
    shapes: dict[str, tuple[int, ...]]  # (out, in) of the adapted weights, by layer
    corpus: int | None  # training tokens; None before they are prepared


def page(config: Config, path: str, devices: int, pace: Pace) -> Iterator[str]:
    """The blocks of the page: verdict, method, timeline, parameters, memory, arithmetic, warnings.

    Args:
        path: of the config, as its user calls it.
        pace: what hours are told from.

    Raises:
        ConfigError: the config does not fit its model.
    """
    facts = _gather(config, devices, pace)
    for lines in (
        _header(facts, path),
        timeline(facts.config),
        curve(facts.config),
        _parameters(facts),
        _memory(facts),
        _arithmetic(facts),
        _budget(facts),
        _disk(facts),
        _merges(facts),
        _engines(facts),
        _warnings(facts),
    ):
        yield "\n".join(lines)


def _gather(config: Config, devices: int, pace: Pace) -> Facts:
    config = _with_its_model(config)
    model = build_meta_model(config.model)
    source = config.model.config or config.model.pretrained
    check_context(model.config, config.data.sequence_length, str(source))
    parameters = sum(p.numel() for p in model.parameters())
    lean = make_lean(model, config.model.lean, config.model.loss_chunk)
    if config.lora is not None:
        add_adapters(model, config.lora, seed=None)
    shapes = {n: tuple(layer.matrix(layer.weight).shape[-2:]) for n, layer in adapted_layers(model)}
    corpus = _corpus_tokens(config)
    return Facts(config, devices, pace, model, lean, parameters, shapes, corpus)


def _with_its_model(config: Config) -> Config:
    """The config, with the run's own copy of the model in place of one that has gone since.

    Raises:
        ConfigError: the weights to start from are not whole.
    """
    pretrained = config.model.pretrained
    if pretrained is not None and not exists(pretrained):
        return config.model_copy(update={"model": structure_of(config)})
    if pretrained is not None and not is_run_or_checkpoint(pretrained):
        check_pretrained(pretrained)
    return config


def _header(facts: Facts, path: str) -> list[str]:
    config = facts.config
    source = config.model.config or config.model.pretrained
    lines = [
        f"plan         {path}",
        _wrapped("verdict", in_a_word(config, facts.parameters, facts.devices)),
        f"run          {config.run_dir}, seed {config.seed}",
        f"model        {_size_of(facts.model.config)}, from {source}",
        f"lean         {facts.lean.describe()}",
    ]
    if (stands := standing(config)) is not None:
        lines.insert(3, _wrapped("run_dir", stands))
    lora, relora = config.lora, config.relora
    if lora is None:
        return [*lines, "method       full rank"]
    start = f"{config.warm_start.steps:,} steps of full rank, then " if config.warm_start else ""
    scale = f", s = {lora.scale:.4g} ({lora.scaling})" if lora.rank else ""
    lines.append(f"method       {config.method}: {start}{lora.size}{scale}")
    if relora:
        reset = relora.reset
        share = f" {reset.share:.0%}" if reset.mode in ("magnitude", "random") else ""
        lines.append(
            f"             a merge every {relora.cycle_steps:,} steps, reset {reset.mode}{share}, "
            f"rewarm {relora.rewarm_steps:,} steps"
        )
    return [*lines, _wrapped("rates", reach_of_updates(config, facts.shapes))]


def _size_of(structure: Any) -> str:
    """A model's type, depth and width; those of the decoder, if it has other parts."""
    text = structure.get_text_config(decoder=True)
    layers, width = (getattr(text, name, None) for name in ("num_hidden_layers", "hidden_size"))
    if layers is None or width is None:
        return str(structure.model_type)
    return f"{structure.model_type}, {layers} layers of width {width}"


def _parameters(facts: Facts) -> list[str]:
    config, shapes = facts.config, facts.shapes
    groups = count_by_group(facts.model)
    total = [sum(counts) for counts in zip(*groups.values(), strict=True)]
    rows = [["parameters", "trainable", "frozen", "together"]]
    for name, (trainable, frozen) in [*groups.items(), ("all", (total[0], total[1]))]:
        rows.append([f"  {name}", f"{trainable:,}", f"{frozen:,}", f"{trainable + frozen:,}"])
    lines = format_table(rows, "<>>>")
    if config.lora is not None:
        cycles = len(config.clock.merge_steps()) + 1
        full = max((min(shape) for shape in shapes.values()), default=0)
        rank = max((config.lora.for_layer(name).rank or full for name in shapes), default=0)
        lines += [
            f"  {total[0] / sum(total):.1%} is trained once adapters are born; their updates sum "
            f"to rank {min(full, cycles * rank)} of {full} at most",
        ]
        lines += [_indented(line) for line in describe_left(facts.model, config.lora)]
    return lines


def _memory(facts: Facts) -> list[str]:
    """Memory per device by part, with adapters beside full rank."""
    config, devices = facts.config, facts.devices
    columns = {"full rank": (full_rank_twin(config), False)}
    if config.lora is not None:
        columns = {"with adapters": (config, True), **columns}
    found = {name: memory_by_part(run, devices, on) for name, (run, on) in columns.items()}
    peaks = {name: peak_memory(run, devices, on) for name, (run, on) in columns.items()}
    rows = [["memory per rank", *columns]]
    for part in (*PARTS, "host"):
        if any(parts[part] for parts in found.values()):
            label = "in host memory" if part == "host" else part
            rows.append([f"  {label}", *(format_bytes(parts[part]) for parts in found.values())])
    rows.append(["  peak", *map(format_bytes, peaks.values())])
    lines = format_table(rows, "<" + ">" * len(columns))
    lines[-1] += "   the largest parts do not all meet"
    lines += room(config, devices, facts.pace.gpu)
    if config.warm_start:
        lines.append("  the warm start is full rank and needs its memory until adapters are born")
    start = format_bytes(4 * facts.parameters)
    lines.append(f"  at step 0 rank 0 has the weights in host memory too, in fp32: {start}")
    if devices == 1 and config.deepspeed.zero_stage in (1, 2):
        alone = config.deepspeed.model_copy(update={"zero_stage": 0, "offload_optimizer": False})
        least = peak_memory(config.model_copy(update={"deepspeed": alone}), 1)
        casts = precision_of(config.deepspeed.precision).is_deepspeeds
        if least < 0.98 * peak_memory(config, 1) and not casts:
            lines.append(
                f"  one rank has nothing to share: with ZeRO 0 it is {format_bytes(least)}"
            )
    return lines


def _arithmetic(facts: Facts) -> list[str]:
    """FLOPs, traffic, and time at a given throughput; all beside full rank."""
    config, devices = facts.config, facts.devices
    full, even = flops_per_token(config, False), break_even(config)
    whole = training_flops(config, config.total_steps)
    a_token = f"FLOPs        {format_count(full.total)} a token in full rank"
    a_run = f"             {whole:.3g} in the whole run"
    lines = [a_token, a_run]
    adapters = config.lora is not None
    if adapters:
        with_adapters = flops_per_token(config, True).total
        lines = [
            f"{a_token}, {format_count(with_adapters)} with adapters: {1 / even.step:.3g} times as "
            "fast",
            f"             at best {speedup_ceiling(config):.3g} times, the ceiling by arithmetic",
            f"{a_run}, {even.flops:.3g} of full rank's over the same tokens",
            "break-even   done before full rank if a step with adapters takes less than "
            f"{100 * even.time_limit:.4g} % of its time",
        ]
    lines += [_wrapped("not counted", what) for what in uncounted(config)]
    if devices > 1:
        traffic = f"traffic      {format_bytes(bytes_per_step(config, devices, False))} "
        traffic += "received per rank and step in full rank"
        if adapters:
            traffic += f", {format_bytes(bytes_per_step(config, devices, True))} with adapters"
        lines.append(traffic)
        lines += [_wrapped("", hint) for hint in replicated_base(config, devices)]
    return [*lines, *time_lines(config, devices, facts.pace)]


def _budget(facts: Facts) -> list[str]:
    config, devices, corpus = facts.config, facts.devices, facts.corpus
    batch, per_step = config.batch, config.tokens_per_step
    tokens = config.total_steps * per_step
    accumulation = batch.global_batch_size // (batch.micro_batch_size * devices)
    lines = [
        f"tokens       {format_count(tokens)} = {config.total_steps:,} steps × "
        f"{format_count(per_step)}, {tokens / facts.parameters:.3g} per parameter",
        f"batch        {batch.global_batch_size:,} sequences of {config.data.sequence_length:,} = "
        f"{devices} {'rank' if devices == 1 else 'ranks'} × micro-batch {batch.micro_batch_size} "
        f"× accumulation {accumulation}",
        f"engine       ZeRO {config.deepspeed.zero_stage}, {config.deepspeed.precision}",
    ]
    if corpus is None:
        lines.append("corpus       not prepared yet: relora prepare counts its tokens")
        return [*lines, *(_wrapped("absent", what) for what in absent_parts(config.data))]
    epoch = -(-corpus // per_step)
    return [
        *lines,
        f"corpus       {format_count(corpus)} training tokens: {tokens / corpus:.3g} epochs; an "
        f"epoch is {epoch:,} steps",
    ]


def _merges(facts: Facts) -> list[str]:
    """What a merge sends and needs, from the shapes of the adapted weights."""
    config = facts.config
    if config.lora is None or config.relora is None:
        return ["merges       none"]

    factors = [sum(size for size, _ in m.entries(config.lora)) for m in shape_of(config).adapted()]
    largest = max((m.numel for m in shape_of(config).adapted()), default=0)
    cost = merge_cost(config, facts.devices)
    sent = "nothing but counts is sent: every rank has A, B and W"
    if config.deepspeed.zero_stage == 3:
        blocks = len(gather_blocks(factors, largest))
        sent = f"A and B are gathered, {format_bytes(4 * sum(factors))} in {blocks} collectives; "
        sent += "base weights are not sent"
    elif cost.bytes:
        sent = f"each rank merges its part of W and receives {format_bytes(cost.bytes)} of others'"
    of_bytes = f", {cost.bytes_share:.1e} of the bytes received" if cost.bytes_share else ""
    return [
        f"merge        {sent}",
        f"             less than {format_bytes(4 * largest)} a rank beside what training holds",
        f"             {cost.flops_share:.1e} of the FLOPs of the steps before it{of_bytes}",
    ]


def _engines(facts: Facts) -> list[str]:
    """Which ZeRO stages go with which precision; this run's combination in brackets."""
    chosen = facts.config.deepspeed
    rows = [["engines", *(f"ZeRO {stage}" for stage in STAGES)]]
    reasons: dict[str, None] = {}
    for precision in NAMES:
        cells = []
        for stage in STAGES:
            refused = refusal(stage, precision, False)
            if refused:
                reasons[f"ZeRO {stage}, {precision}: {'; take '.join(refused)}"] = None
            offload = refusal(stage, precision, True) is None
            cell = "no" if refused else "yes, offload" if offload else "yes"
            here = (stage, precision) == (chosen.zero_stage, chosen.precision)
            cells.append(f"[{cell}]" if here else cell)
        rows.append([f"  {precision}", *cells])
    return [*format_table(rows, "<" * len(rows[0])), *map(_indented, reasons)]


def _disk(facts: Facts) -> list[str]:
    config, model, parameters = facts.config, facts.model, facts.parameters
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trainable
    single = [shape_of(config).of_one_moment(config, adapters) for adapters in (False, True)]
    size = format_bytes(checkpoint_bytes(trainable, frozen, single[config.lora is not None]))
    if config.warm_start:
        size += f" ({format_bytes(checkpoint_bytes(parameters, 0, single[0]))} in the warm start)"
    # DeepSpeed's own: weights in bf16, fp32 masters and two moments.
    lines = [
        f"checkpoint   {size}, {config.train.keep_checkpoints} are kept",
        f"             full rank in bf16 as DeepSpeed saves it: {format_bytes(14 * parameters)}",
    ]
    if config.spectra:
        layers = [m for _, m in adapted_layers(model)] or [*projections(model).values()]
        start = 4 * sum(layer.weight.numel() for layer in layers)
        lines.append(f"spectra      {format_bytes(start)} for the weights they start from")
    return lines


def _warnings(facts: Facts) -> list[str]:
    found = doubts(facts.config, facts.parameters, facts.shapes, facts.corpus, facts.devices)
    wrap = textwrap.TextWrapper(WIDTH, initial_indent="! ", subsequent_indent="  ")
    return [wrap.fill(line) for line in found] or ["no warnings"]


def _wrapped(label: str, text: str) -> str:
    """A labelled line, over several of the page if it is long."""
    return textwrap.fill(f"{label:<{LABEL}}{text}", WIDTH, subsequent_indent=" " * LABEL)


def _indented(text: str) -> str:
    """A line below a table, over several if it is long."""
    return textwrap.fill(text, WIDTH, initial_indent="  ", subsequent_indent="    ")


def _corpus_tokens(config: Config) -> int | None:
    """Training tokens of the prepared shards; None before they are."""
    directory = shard_directory(config.data)
    if not (directory / "index.json").is_file():
        return None
    return read_index(directory)["splits"]["train"]["tokens"]
