"""`relora plan`: a run on one page before anybody pays for it. Needs no GPU, no data, no memory."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relora.config import Config
from relora.errors import ConfigError
from relora.load import check_world, load_config

if TYPE_CHECKING:
    from torch import nn

WIDTH = 100  # columns of the page


def plan(
    config: Path,
    overrides: Sequence[str],
    devices: int,
    png: Path | None = None,
    tokens_per_s: float | None = None,
) -> int:
    """Print model, method, timeline, parameters, memory, arithmetic, batch geometry and warnings.

    Args:
        png: also draw the timeline there.
        tokens_per_s: of the whole job, over all devices; then hours are printed too.

    Raises:
        ConfigError: the config is wrong in itself, or does not fit its model or `devices` ranks;
            or there is no directory for the picture.
    """
    run = load_config(config, overrides)
    check_world(run, devices)
    if png is not None and (not png.parent.is_dir() or png.is_dir()):
        raise ConfigError(f"--png {png}: {png.parent} is no directory, or {png.name} is one")
    # Imported after the config is known to be sound, since torch takes seconds.
    from relora.lora.inject import add_adapters
    from relora.lora.layers import adapted_layers
    from relora.model import build_meta_model
    from relora.plan.timeline import curve, draw, timeline
    from relora.structure import check_context

    run = _with_its_model(run)
    model = build_meta_model(run.model)
    check_context(
        model.config, run.data.sequence_length, str(run.model.config or run.model.pretrained)
    )
    parameters = sum(p.numel() for p in model.parameters())
    shapes = {}
    if run.lora is not None:
        add_adapters(model, run.lora, seed=None)
        shapes = {name: tuple(layer.weight.shape) for name, layer in adapted_layers(model)}
    corpus = _corpus_tokens(run)
    for lines in (
        _header(run, model, str(config)),
        timeline(run),
        curve(run),
        _parameters(run, model, shapes),
        _memory(run, devices),
        _arithmetic(run, devices, tokens_per_s),
        _budget(run, parameters, devices, corpus),
        _disk(run, model, parameters),
        _merges(run, shapes),
        _engines(run),
        _warnings(run, parameters, shapes, corpus, devices),
    ):
        print("\n".join(lines), end="\n\n")
    if png is not None:
        draw(run, png)
        print(f"picture      {png}")
    print(f"next         relora prepare {shlex.join([str(config), *overrides])}")
    print(f"             relora launch --devices {devices} {shlex.join([str(config), *overrides])}")
    return 0


def _with_its_model(config: Config) -> Config:
    """The config, with the run's own copy of the model in place of one that has gone since.

    Raises:
        ConfigError: the weights to start from are not whole.
    """
    from relora.files import exists
    from relora.record.loaded import is_subject, structure_of
    from relora.structure import check_pretrained

    pretrained = config.model.pretrained
    if pretrained is not None and not exists(pretrained):
        return config.model_copy(update={"model": structure_of(config)})
    if pretrained is not None and not is_subject(pretrained):
        check_pretrained(pretrained)
    return config


def count_by_group(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(trainable, frozen) numbers of parameters by what they are, shared ones counted once."""
    from torch.nn import Embedding

    from relora.lora.layers import parameter_roles

    head = model.get_output_embeddings()  # type: ignore[operator]
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, Embedding)}
    names = ("projections", "experts", "adapters", "embeddings", "head", "norms, biases")
    groups, roles = dict.fromkeys(names, (0, 0)), parameter_roles(model)
    for name, parameter in model.named_parameters():
        if roles[name] in ("A", "B"):
            group = "adapters"
        elif id(parameter) in embeddings:
            group = "embeddings"
        elif head is not None and parameter is getattr(head, "weight", None):
            group = "head"
        elif parameter.dim() == 3 and "expert" in name:
            group = "experts"
        else:
            group = "norms, biases" if parameter.dim() == 1 else "projections"
        trainable, frozen = groups[group]
        if parameter.requires_grad:
            trainable += parameter.numel()
        else:
            frozen += parameter.numel()
        groups[group] = trainable, frozen
    return {group: counts for group, counts in groups.items() if any(counts)}


def _header(config: Config, model: nn.Module, path: str) -> list[str]:
    from relora.record.standing import standing

    source = config.model.config or config.model.pretrained
    lines = [
        f"plan         {path}",
        f"run          {config.run_dir}, seed {config.seed}",
        f"model        {_size_of(model.config)}, from {source}",
    ]
    stands = standing(config)
    if stands is not None:
        wrap = textwrap.TextWrapper(WIDTH, subsequent_indent=" " * 13)
        lines[2:2] = wrap.wrap(f"{'run_dir':<13}{stands}")
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


def _size_of(structure: Any) -> str:
    """A model's type, depth and width; those of the decoder, if it has other parts."""
    text = structure.get_text_config(decoder=True)
    layers, width = (getattr(text, name, None) for name in ("num_hidden_layers", "hidden_size"))
    if layers is None or width is None:
        return str(structure.model_type)
    return f"{structure.model_type}, {layers} layers of width {width}"


def _parameters(config: Config, model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    from relora.lora.choose import describe_left

    lines = [f"parameters {'trainable':>20} {'frozen':>18} {'together':>18}"]
    groups = count_by_group(model)
    total = [sum(counts) for counts in zip(*groups.values(), strict=True)]
    for name, (trainable, frozen) in [*groups.items(), ("all", (total[0], total[1]))]:
        lines.append(f"  {name:<14} {trainable:>14,} {frozen:>18,} {trainable + frozen:>18,}")
    if config.lora is not None:
        rank, cycles = config.lora.rank, len(config.clock.merge_steps()) + 1
        full = max((min(shape) for shape in shapes.values()), default=0)
        lines += [
            f"  {total[0] / sum(total):.1%} is trained once adapters are born; their updates sum "
            f"to rank {min(full, cycles * rank)} of {full} at most",
        ]
        wrap = textwrap.TextWrapper(WIDTH, initial_indent="  ", subsequent_indent="    ")
        lines += [wrap.fill(line) for line in describe_left(model, config.lora)]
    return lines


def _memory(config: Config, devices: int) -> list[str]:
    """Memory per device by part, with adapters beside full rank."""
    from relora.engine.precision import precision_of
    from relora.plan.estimate import PARTS, full_rank_twin, memory_by_part, peak_memory
    from relora.words import format_bytes

    columns = {"full rank": (full_rank_twin(config), False)}
    if config.lora is not None:
        columns = {"with adapters": (config, True), **columns}
    found = {name: memory_by_part(run, devices, on) for name, (run, on) in columns.items()}
    peaks = {name: peak_memory(run, devices, on) for name, (run, on) in columns.items()}
    lines = ["memory per rank" + "".join(f"{name:>16}" for name in columns)]
    for part in (*PARTS, "host"):
        if any(parts[part] for parts in found.values()):
            row = "".join(f"{format_bytes(found[name][part]):>16}" for name in columns)
            label = "in host memory" if part == "host" else part
            lines.append(f"  {label:<13}{row}")
    row = "".join(f"{format_bytes(peaks[name]):>16}" for name in columns)
    lines.append(f"  {'peak':<13}{row}   the largest parts do not all meet")
    if config.warm_start:
        lines.append("  the warm start is full rank and needs its memory until adapters are born")
    if devices == 1 and config.deepspeed.zero_stage in (1, 2):
        alone = config.deepspeed.model_copy(update={"zero_stage": 0, "offload_optimizer": False})
        least = peak_memory(config.model_copy(update={"deepspeed": alone}), 1)
        casts = precision_of(config.deepspeed.precision).is_deepspeeds
        if least < 0.98 * peak_memory(config, 1) and not casts:
            lines.append(
                f"  one rank has nothing to share: with ZeRO 0 it is {format_bytes(least)}"
            )
    return lines


def _arithmetic(config: Config, devices: int, tokens_per_s: float | None) -> list[str]:
    """FLOPs, traffic, and time at a given throughput; all beside full rank."""
    from relora.plan.estimate import (
        break_even,
        bytes_per_step,
        flops_per_token,
        speedup_ceiling,
        training_flops,
        uncounted,
    )
    from relora.words import format_bytes, format_count

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
    wrap = textwrap.TextWrapper(WIDTH, subsequent_indent=" " * 13)
    lines += [wrap.fill(f"{'not counted':<13}{what}") for what in uncounted(config)]
    if devices > 1:
        traffic = f"traffic      {format_bytes(bytes_per_step(config, devices, False))} "
        traffic += "received per rank and step in full rank"
        if adapters:
            traffic += f", {format_bytes(bytes_per_step(config, devices, True))} with adapters"
        lines.append(traffic)
    if tokens_per_s is None:
        return [*lines, "time         give --tokens-per-s for hours and GPU-hours"]
    hours = config.total_steps * config.tokens_per_step / tokens_per_s / 3600
    lines.append(
        f"time         {hours:,.3g} hours, {hours * devices:,.3g} GPU-hours on {devices} at "
        f"{format_count(tokens_per_s)} tokens/s together"
    )
    if adapters:
        lines.append(
            f"             full rank at the same FLOPs per second: {hours / even.flops:,.3g} hours"
        )
    return lines


def _budget(config: Config, parameters: int, devices: int, corpus: int | None) -> list[str]:
    from relora.words import format_count

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
    from relora.restart.restart import gather_blocks
    from relora.words import format_bytes

    factors = [config.lora.rank * (m + n) for m, n in shapes.values()]
    largest = max((m * n for m, n in shapes.values()), default=0)
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
    from relora.engine.config import STAGES
    from relora.engine.options import refusal
    from relora.engine.precision import NAMES

    chosen = config.deepspeed
    lines = [f"{'engines':<18}" + "".join(f"ZeRO {stage:<11}" for stage in STAGES).rstrip()]
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
            cells.append(f"{f'[{cell}]' if here else cell:<16}")
        lines.append(f"  {precision:<16}" + "".join(cells).rstrip())
    wrap = textwrap.TextWrapper(WIDTH, initial_indent="  ", subsequent_indent="    ")
    return [*lines, *(wrap.fill(reason) for reason in reasons)]


def _disk(config: Config, model: nn.Module, parameters: int) -> list[str]:
    from relora.lora.choose import linear_layers
    from relora.lora.layers import adapted_layers
    from relora.record.saving import checkpoint_bytes
    from relora.words import format_bytes

    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trainable
    size = format_bytes(checkpoint_bytes(trainable, frozen))
    if config.warm_start:
        size += f" ({format_bytes(checkpoint_bytes(parameters, 0))} in the warm start)"
    # DeepSpeed's own: weights in bf16, fp32 masters and two moments.
    lines = [
        f"checkpoint   {size}, {config.train.keep_checkpoints} are kept",
        f"             full rank in bf16 as DeepSpeed saves it: {format_bytes(14 * parameters)}",
    ]
    if config.spectra:
        layers = [m for _, m in adapted_layers(model)] or [*linear_layers(model).values()]
        start = 4 * sum(layer.weight.numel() for layer in layers)
        lines.append(f"spectra      {format_bytes(start)} for the weights they start from")
    return lines


def _warnings(
    config: Config,
    parameters: int,
    shapes: dict[str, tuple[int, ...]],
    corpus: int | None,
    devices: int,
) -> list[str]:
    from relora.plan.advice import doubts

    found = doubts(config, parameters, shapes, corpus, devices)
    wrap = textwrap.TextWrapper(WIDTH, initial_indent="! ", subsequent_indent="  ")
    return [wrap.fill(line) for line in found] or ["no warnings"]


def _corpus_tokens(config: Config) -> int | None:
    """Training tokens of the prepared shards; None before they are."""
    from relora.data.shards import read_index, shard_directory

    directory = shard_directory(config.data)
    if not (directory / "index.json").is_file():
        return None
    return read_index(directory)["splits"]["train"]["tokens"]
