"""What one section of a config alone cannot know: settings that contradict each other, or would do
nothing together.

One rule for what does nothing: a setting that another setting makes idle, and a length that leaves
out a part of the method, are refused here. What is idle only because this run is too short for it,
or this model or corpus too small, is no mistake in a trial or in a run that goes on later: the run
and its plan say it (see `advice.idle_settings`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from relora.engine.extra import mistakes
from relora.engine.precision import precision_of
from relora.errors import ConfigError
from relora.structure import check_context, read_model_json

if TYPE_CHECKING:
    from relora.config import Config
    from relora.restart.config import ReLoRAConfig


def cross_checks(config: Config, read_model: bool) -> Iterator[str]:
    """Every problem of a config whose sections are each sound.

    Args:
        read_model: look into the model's file too, and ask DeepSpeed about what is its own.
    """
    yield from _check_method(config)
    yield from _check_lengths(config)
    yield from _check_saving(config)
    yield from _check_spectra(config)
    yield from _check_graphs(config)
    yield from _check_compile(config)
    yield from _check_muon(config)
    yield from _check_blocks(config)
    yield from _check_base(config)
    micro_batch_size = config.batch.micro_batch_size
    yield from mistakes(config.deepspeed, config.optimizer, micro_batch_size, ask=read_model)
    if read_model and config.model.config is not None:
        try:
            model = read_model_json(config.model.config)
        except ConfigError as error:
            yield str(error)
        else:
            yield from _check_model_json(config, model)


def _check_method(config: Config) -> Iterator[str]:
    if config.lora is None:
        for name in ("relora", "warm_start"):
            if getattr(config, name) is not None:
                yield f"{name}: would do nothing without lora; set lora, or {name}: null"
    relora = config.relora
    if relora:
        yield from _check_relora(config, relora)
    if config.lora and config.lora.decay == "merged" and not config.optimizer.weight_decay:
        yield "lora.decay: merged would do nothing with optimizer.weight_decay: 0"
    if config.schedule.base == "constant" and config.schedule.changed("min_lr_ratio"):
        yield "schedule.min_lr_ratio: would do nothing with base: constant; remove it"


def _check_relora(config: Config, relora: ReLoRAConfig) -> Iterator[str]:
    quantised = config.lora is not None and config.lora.base
    if not precision_of(config.deepspeed.precision).remainder_bytes and not quantised:
        for key in ("precision", "remainder"):
            if relora.changed(key):
                value = getattr(relora, key)
                yield (
                    f"relora.{key}: {value} would do nothing with deepspeed.precision: "
                    f"{config.deepspeed.precision}"
                )
    if relora.precision == "rounded" and relora.changed("remainder"):
        yield f"relora.remainder: {relora.remainder} would do nothing with precision: rounded"
    if relora.keep_adapters and config.lora:
        if config.lora.blocks:
            yield "relora.keep_adapters: blocks are no A and B; take false, or lora.rank"
        if config.lora.decay == "merged":
            yield (
                "relora.keep_adapters: with lora.decay: merged W shrinks between merges, and is no "
                "sum of adapters; take false, or decay: factors"
            )
    if relora.lr and config.lora and config.lora.lr:
        yield (
            f"lora.lr: {config.lora.lr:g} would do nothing beside relora.lr {relora.lr:g}: they "
            "are the same rate; remove one"
        )


def _check_graphs(config: Config) -> Iterator[str]:
    model, lora = config.model, config.lora
    precision = precision_of(config.deepspeed.precision)
    if model.half_residual:
        if not (model.lean and precision.autocast):
            yield "model.half_residual: would do nothing without model.lean and precision: bf16"
        elif precision.scales_loss:
            yield (
                f"model.half_residual: {config.deepspeed.precision} overflows where blocks add up; "
                "take precision: bf16, or half_residual: false"
            )
    if lora is None:
        return
    if lora.dropout and lora.graph == "effective":
        yield (
            "lora.graph: effective knows no dropout, which acts on the adapter's input alone; take "
            "graph: low_rank, or dropout: 0"
        )
    if lora.keep_effective is not None and (lora.dropout or lora.graph == "low_rank"):
        yield "lora.keep_effective: would do nothing with the low-rank graph; remove it"
    if lora.keep_effective and config.deepspeed.zero_stage == 3:
        yield (
            "lora.keep_effective: true would hold whole on each rank what ZeRO 3 partitions; take "
            "false, or zero_stage 2"
        )


def _check_blocks(config: Config) -> Iterator[str]:
    if config.lora is None or config.lora.blocks is None:
        return
    if config.train.compile:
        yield "lora.blocks: no compiled block knows them; take train.compile: null, or a rank"
    if config.relora and config.relora.reset.mode != "zero":
        yield (
            f"relora.reset.mode: {config.relora.reset.mode}: after a merge other entries of W "
            "train, of which the moments know nothing; take reset: {mode: zero} with lora.blocks"
        )


def _check_muon(config: Config) -> Iterator[str]:
    if config.optimizer.matrices == "adamw":
        if config.optimizer.momentum != type(config.optimizer).model_fields["momentum"].default:
            yield "optimizer.momentum: is that of muon and would do nothing; remove it"
        return
    relora = config.relora
    if relora and relora.reset.masks == "independent":
        yield (
            "relora.reset.masks: independent would do nothing with optimizer.matrices: muon, which "
            "keeps one moment; remove it"
        )


def _check_compile(config: Config) -> Iterator[str]:
    if config.train.compile is None:
        return
    if config.deepspeed.zero_stage == 3:
        yield (
            "train.compile: blocks: ZeRO 3 gathers weights within the blocks, by hooks that no "
            "compiler sees through; take null, or zero_stage 0, 1 or 2"
        )
    if config.lora and config.lora.keep_effective is False:
        yield (
            "lora.keep_effective: false would do nothing with train.compile: blocks, which keep "
            "W + s·B·A for each step; remove it"
        )


def _check_base(config: Config) -> Iterator[str]:
    lora, relora, section = config.lora, config.relora, config.deepspeed
    if lora is None:
        return
    if not lora.base:
        return
    if config.train.compile:
        yield (
            f"lora.base: {lora.base} with train.compile: blocks, which keep W + s·B·A in half "
            "precision for each step; take one of them"
        )
    if section.zero_stage == 3:
        yield (
            f"lora.base: {lora.base} quantises whole weights, where ZeRO 3 partitions them; take "
            "null, or zero_stage 0, 1 or 2"
        )
    for key in ("precision", "remainder"):
        if relora and relora.changed(key):
            yield (
                f"relora.{key}: {getattr(relora, key)} would do nothing with lora.base: "
                f"{lora.base}, whose exact values lie in host memory; remove it"
            )


def _check_spectra(config: Config) -> Iterator[str]:
    spectra = config.spectra
    if spectra is not None and spectra.start is not None and config.lora is not None:
        yield (
            f"spectra.start: {spectra.start} would do nothing with lora: updates are counted from "
            "the birth of the adapters; remove it"
        )


def _check_lengths(config: Config) -> Iterator[str]:
    clock = config.clock
    birth = clock.birth or 0
    if clock.warmup >= clock.total:
        yield f"schedule.warmup_steps: {clock.warmup} must be below the run's {clock.total} steps"
    if birth >= clock.total:
        yield f"warm_start.steps: {birth} must be below the run's {clock.total} steps"
    if clock.birth is None:
        return
    if clock.cycle is not None:
        longest = clock.total - birth - 1
        way_out = f"take at most {longest}" if longest > 0 else "raise train.steps"
        warm = f" with {birth} of warm start" if birth else ""
        if birth < clock.total <= birth + clock.cycle:
            yield (
                f"relora.cycle_steps: {clock.cycle} leaves no merge in a run of {clock.total} "
                f"steps{warm}; {way_out}, or relora: null for plain LoRA"
            )
        if clock.rewarm >= clock.cycle:
            yield (
                f"relora.rewarm_steps: {clock.rewarm} must be below cycle_steps {clock.cycle}, "
                "or the learning rate never arrives"
            )
    first = birth or clock.cycle
    if first is not None and first < clock.warmup < clock.total:
        yield (
            f"schedule.warmup_steps: {clock.warmup} must not outlast the first restart at step "
            f"{first}, or that restart would not restart the learning rate"
        )


def _check_saving(config: Config) -> Iterator[str]:
    every = config.train.keep_every
    if every == "cycle" and config.relora is None:
        yield "train.keep_every: cycle would do nothing without relora; give a number of steps"


def _check_model_json(config: Config, model: dict[str, Any]) -> Iterator[str]:
    try:
        check_context(model, config.data.sequence_length, str(config.model.config))
    except ConfigError as error:
        yield str(error)
    yield from _check_special_ids(str(config.model.config), model)
    vocab, wanted = model.get("vocab_size"), config.data.tokenizer.vocab_size
    if isinstance(vocab, int) and wanted is not None and wanted > vocab:
        yield (
            f"data.tokenizer.vocab_size: {wanted} does not fit the model's vocabulary of {vocab} "
            f"({config.model.config}); make them equal"
        )


def _check_special_ids(path: str, model: dict[str, Any]) -> Iterator[str]:
    """Tokens that a model's JSON gives a meaning; torch would take −1 for the last row."""
    size = model.get("vocab_size")
    if type(size) is not int:
        return
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        given = model.get(key)
        for number in given if isinstance(given, list) else [given]:
            if type(number) is int and not 0 <= number < size:
                yield (
                    f"model.config: {path}: {key}: {number} is not in the vocabulary; it must be "
                    f"0 … {size - 1}, or null"
                )
