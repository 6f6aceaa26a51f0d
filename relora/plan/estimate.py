"""What a run will cost, from its config alone: arithmetic, traffic, memory. Needs no GPU, no data.

A product of matrices counts 2 FLOPs a multiplication and addition; all else (norms, softmax, the
optimizer) is left out. Products are those that torch counts in a step run without numbers:
attention counts every score, also those a causal mask throws away, and none that fused kernels
compute again.
"""

from __future__ import annotations

from typing import NamedTuple

from relora.config import Config
from relora.engine.options import reduced_share, zero_sizes
from relora.engine.precision import precision_of
from relora.lora.config import LoRAConfig
from relora.lora.quantised import quantised_bytes
from relora.plan.dryrun import Kept, dry_run
from relora.plan.muon_step import muon_step_bytes
from relora.plan.shape import shape_of

# At the peak of the loss, in bytes a logit: log-probabilities, their gradient, that of the logits,
# all fp32, when transformers' copies of the logits are gone again.
LOGIT_BYTES = 12
# Of a chunk: the logits, log-probabilities in fp32 and, of half precision, the logits in fp32.
CHUNKED_LOGIT_BYTES = {2: 10, 4: 8}

PARTS = (
    "weights",
    "remainder",
    "gradients",
    "masters",
    "moments",
    "activations",
    "logits",
    "buffers",
)


class Flops(NamedTuple):
    """Of one trained token."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Both together."""
        return self.forward + self.backward


class BreakEven(NamedTuple):
    """A run beside full rank over the same tokens. Until adapters are born they cost the same."""

    flops: float  # of the whole run, merges among them, as a share of full rank's
    step: float  # of a step with adapters, as a share of a full-rank one's
    # The run is through earlier than full rank if a step with adapters takes less than this share
    # of a full-rank one's time: 1 less what merges take, at the same FLOPs per second.
    time_limit: float


class MergeCost(NamedTuple):
    """Of a merge, on one rank."""

    bytes: float  # received
    flops_share: float  # of those of all steps of a cycle
    bytes_share: float  # likewise of those received; 0 where steps receive nothing


def full_rank_twin(config: Config) -> Config:
    """The same run in full rank."""
    return config.model_copy(update=dict.fromkeys(("lora", "relora", "warm_start")))


def flops_per_token(config: Config, adapters: bool) -> Flops:
    """FLOPs of a trained token in the full-rank phase or with adapters, as the layers compute
    them; with what gradient checkpointing runs again."""
    kept = dry_run(config, adapters and config.lora is not None)
    return Flops(kept.forward, kept.backward)


def uncounted(config: Config) -> list[str]:
    """What no figure here holds, in words."""
    phases = (False, True) if config.lora else (False,)
    return list(dict.fromkeys(what for on in phases for what in dry_run(config, on).uncounted))


def speedup_ceiling(config: Config) -> float:
    """How much faster than in full rank a step with adapters can be at best, by arithmetic.

    At best one product with W + s·B·A, formed once a micro-batch, serves the forward pass and one
    the gradient of the input; A and B then take 4r(m + n) a token, B alone 2r(m + n) or, where
    another layer of the same A has multiplied the input with it, 2rm; k blocks of W 2mn/k. A
    full-rank weight's own gradient takes 2mn.
    """
    lora = config.lora
    if lora is None:
        return 1.0
    # Fewer uses than one a token where it goes through few experts, two of a layer that is shared.
    layers = zip(shape_of(config).matrices, dry_run(config, False).uses, strict=True)
    adapted = [(m, uses) for m, uses in layers if m.adapted]
    full = flops_per_token(config, False).total
    saved = sum(uses * (2 * m.inputs * m.outputs - m.least_flops(lora)) for m, uses in adapted)
    return full / (full - saved)


def training_flops(config: Config, steps: int) -> float:
    """FLOPs of the first `steps` updates and the merges that follow them, over all ranks."""
    clock = config.clock
    birth = clock.total if clock.birth is None else clock.birth
    full = min(steps, birth)
    per_token = full * flops_per_token(config, False).total
    if steps > full:
        per_token += (steps - full) * flops_per_token(config, True).total
    return per_token * config.tokens_per_step + clock.merges_before(steps) * merge_flops(config)


def merge_flops(config: Config) -> float:
    """FLOPs of one merge: W += s·B·A on every adapted weight."""
    if config.lora is None:
        return 0.0
    return sum(m.merge_flops(config.lora) for m in shape_of(config).adapted())


def merge_cost(config: Config, world: int) -> MergeCost:
    """What a merge costs each of `world` ranks, beside the steps of the cycle that it ends.

    A rank merges its own part of W where it holds the remainder, or the shard, of that part alone.
    Under ZeRO 3 A and B are gathered in fp32; else the merged parts of W in bf16.
    """
    assert config.relora is not None
    assert config.lora is not None
    section, lora = config.deepspeed, config.lora
    cycle, share = config.relora.cycle_steps, (world - 1) / world
    adapted = shape_of(config).adapted()
    parts = section.zero_stage == 3 or _completes(config)
    flops = merge_flops(config) / (world if parts else 1)
    received = 0.0
    if section.zero_stage == 3:
        received = share * sum(4 * size for m in adapted for size, _ in m.entries(lora))
    elif parts:
        received = share * sum(_widths(config)[1] * m.numel for m in adapted)
    step = flops_per_token(config, True).total * config.tokens_per_step / world
    moved = bytes_per_step(config, world, True)
    return MergeCost(received, flops / (cycle * step), received / (cycle * moved) if moved else 0.0)


def break_even(config: Config) -> BreakEven:
    """What the run saves against full rank over the same tokens."""
    clock = config.clock
    full = flops_per_token(config, False).total * config.tokens_per_step
    if clock.birth is None:
        return BreakEven(1.0, 1.0, 1.0)
    merges = clock.merges_before(clock.total) * merge_flops(config)
    return BreakEven(
        training_flops(config, clock.total) / (clock.total * full),
        flops_per_token(config, True).total * config.tokens_per_step / full,
        1 - merges / ((clock.total - clock.birth) * full),
    )


def bytes_per_step(config: Config, world: int, adapters: bool) -> float:
    """Bytes each of `world` ranks receives in one optimizer step, by ring collectives.

    An all-reduce of n bytes brings 2n(world − 1)/world, a gather or scatter of them half of that.
    ZeRO 0–2 sum all gradients on all ranks: DeepSpeed's stages 1 and 2 all-reduce as well. Stages
    1–2 then gather what each rank updated. Stage 3 scatters gradients, and gathers all weights,
    frozen ones too, once a micro-batch, or twice where it lets go of them before the backward pass.
    Muon gathers its matrices; of stages 1–2 only the few that ranks share, which do not count here.
    """
    section = config.deepspeed
    width, frozen_width = _widths(config)
    sizes = shape_of(config).sizes(_lora(config, adapters))
    trained = width * sum(size for size, trainable in sizes if trainable)
    share = (world - 1) / world
    reduced = trained * reduced_share(section)
    if section.zero_stage == 0:
        return 2 * share * reduced
    if section.zero_stage < 3:
        return share * (2 * reduced + trained)
    bytes_of = [size * (width if trainable else frozen_width) for size, trainable in sizes]
    limit = zero_sizes(section, 0).kept_whole
    whole = [size <= limit for size, _ in sizes]
    kept = sum(b for b, w in zip(bytes_of, whole, strict=True) if w)
    gathers = 1 + _released(config)
    micro_batches = config.batch.global_batch_size // (config.batch.micro_batch_size * world)
    weights = kept + micro_batches * gathers * (sum(bytes_of) - kept)
    return share * (reduced + weights + 4 * shape_of(config).of_one_moment(config, adapters))


def memory_by_part(config: Config, world: int, adapters: bool | None = None) -> dict[str, float]:
    """Bytes on a rank's device by part, each at its largest, and on the host under `host`.

    `gradients` are those that wait for the optimizer; those not yet reduced are in `buffers`, with
    DeepSpeed's buckets, weights gathered by ZeRO 3, autocast's copies of weights and Muon's work.

    Args:
        adapters: the phase; None = the one with the higher peak.
    """
    if adapters is None:
        adapters = _larger_phase(config, world)
    parts = _held(config, world, adapters)
    kept = dry_run(config, adapters)
    parts["activations"] = kept.activations
    parts["logits"] = _logits(config, kept)
    parts["buffers"] = max(_beside(config, world, adapters).values())
    return parts


def weight_bytes(config: Config, world: int, adapters: bool) -> float:
    """Bytes of weights that stay on a rank's device from step to step."""
    return _held(config, world, adapters)["weights"]


def peak_memory(config: Config, world: int, adapters: bool | None = None) -> float:
    """Most bytes that a rank's device holds at once; its parts do not all peak together."""
    if adapters is None:
        adapters = _larger_phase(config, world)
    return max(_peaks(config, world, adapters).values())


def _lora(config: Config, adapters: bool) -> LoRAConfig | None:
    return config.lora if adapters else None


def _widths(config: Config) -> tuple[int, int]:
    """Bytes of an entry that trains, and of a frozen one, as the forward pass reads it."""
    precision = precision_of(config.deepspeed.precision)
    return precision.trained_bytes, precision.base_bytes


def _completes(config: Config) -> int:
    """Bytes of what completes an entry of a frozen weight to fp32, which one rank holds."""
    rounded = config.relora is not None and config.relora.precision == "rounded"
    return 0 if rounded else precision_of(config.deepspeed.precision).remainder_bytes


def _released(config: Config) -> float:
    """Share of the weights that ZeRO 3 lets go of between forward and backward pass.

    A weight stays if no more entries than the reuse distance lie between its two uses: those of the
    layers behind it, there and back.
    """
    sizes = [size for size, _ in shape_of(config).parameters]
    reach, behind, released = zero_sizes(config.deepspeed, 0).reuse_distance, 0, 0
    for size in reversed(sizes):
        if 2 * behind >= reach:
            released += size
        behind += size
    return released / behind


def _larger_phase(config: Config, world: int) -> bool:
    birth = config.clock.birth
    phases = [False] if birth is None else [True] if birth == 0 else [False, True]
    return max(phases, key=lambda adapters: max(_peaks(config, world, adapters).values()))


def _held(config: Config, world: int, adapters: bool) -> dict[str, float]:
    """Bytes that stay from step to step, and the gradients that wait for the optimizer."""
    section, relora = config.deepspeed, config.relora
    stage, width, frozen_width = section.zero_stage, *_widths(config)
    sizes = shape_of(config).sizes(_lora(config, adapters))
    trained = float(sum(size for size, trainable in sizes if trainable))
    frozen = float(sum(size for size, trainable in sizes if not trainable))
    ours = world if stage else 1  # ranks that share gradients and what the optimizer holds
    mine, single = trained / ours, shape_of(config).of_one_moment(config, adapters) / ours
    base = [size for size, adapted in shape_of(config).parameters if adapted and frozen]
    held, completes = float(frozen_width * sum(base)), _completes(config) * sum(base) / world
    quantised = config.lora.base if adapters and config.lora else None
    if quantised:
        held = float(sum(quantised_bytes(size, quantised) for size in base))
        completes = 4.0 * sum(base)  # exact values, whole on each rank
    weights = width * trained + held + frozen_width * (frozen - sum(base))
    if stage == 3:
        weights /= world
    on_device = relora is not None and relora.remainder == "device"
    parts = {
        "weights": weights,
        "remainder": completes if on_device else 0.0,
        "gradients": width * mine,
        "masters": 4 * mine if stage else 0.0,  # a second copy even of fp32 weights
        "moments": 8 * mine - 4 * single,
        "host": 0.0 if on_device else completes,
    }
    if section.offload_optimizer:
        parts["host"] += 8 * mine + parts["moments"]
        parts |= dict.fromkeys(("gradients", "masters", "moments"), 0.0)
    return {part: parts.get(part, 0.0) for part in (*PARTS, "host")}


def _beside(config: Config, world: int, adapters: bool) -> dict[str, float]:
    """What is in `buffers` at the loss, the backward pass's start, its end, and Muon's step."""
    section, width = config.deepspeed, _widths(config)[0]
    sizes = shape_of(config).sizes(_lora(config, adapters))
    trained = float(width * sum(size for size, trainable in sizes if trainable))
    zero = zero_sizes(section, sum(size for size, trainable in sizes if trainable))
    bucket = width * zero.bucket if section.zero_stage else 0.0
    flat = min(trained, width * zero.bucket)
    share = reduced_share(section)
    flat += share * flat if share < 1 else 0.0  # the same, rounded
    copies = dry_run(config, adapters).weight_copies
    micro_batches = config.batch.global_batch_size // (config.batch.micro_batch_size * world)
    carried = trained if micro_batches > 1 else 0.0
    step = muon_step_bytes(config, world, adapters)
    if section.zero_stage == 3:
        gathered = _gathered(config, sizes) if world > 1 else 0.0
        always = bucket + gathered + carried
        loss = always + copies
        return {"loss": loss, "backward": loss, "end": always, "step": bucket + step}
    if section.zero_stage == 0:
        return {"loss": carried + copies, "backward": carried + copies, "end": flat, "step": step}
    backward = carried if micro_batches > 1 else zero.buckets * bucket
    local = trained if micro_batches > 1 or section.zero_stage == 1 else 0.0
    end = zero.buckets * bucket + max(local, flat if world > 1 else 0.0)
    return {"loss": carried + copies, "backward": backward + copies, "end": end, "step": step}


def _logits(config: Config, kept: Kept) -> float:
    """Bytes of logits and what is made of them, at the peak of the loss."""
    width = precision_of(config.deepspeed.precision).product_bytes
    return float(kept.logits * (CHUNKED_LOGIT_BYTES[width] if kept.chunked else LOGIT_BYTES))


def _gathered(config: Config, sizes: list[tuple[int, bool]]) -> float:
    """Bytes of whole weights that ZeRO 3 holds at most."""
    width, frozen_width = _widths(config)
    total = sum(size for size, _ in sizes)
    whole = sum(size * (width if trainable else frozen_width) for size, trainable in sizes)
    ahead = zero_sizes(config.deepspeed, 0).prefetched / total
    return whole * min(1.0, 1 - _released(config) + ahead)


def _peaks(config: Config, world: int, adapters: bool) -> dict[str, float]:
    """Bytes on the device at each of those moments."""
    held, kept = _held(config, world, adapters), dry_run(config, adapters)
    waiting = held["gradients"]
    stays = sum(held[part] for part in ("weights", "remainder", "masters", "moments"))
    stage, beside = config.deepspeed.zero_stage, _beside(config, world, adapters)
    flat = waiting if stage == 3 else 0.0  # lies there all the time
    width = 0 if kept.chunked else precision_of(config.deepspeed.precision).product_bytes
    return {
        "loss": stays + flat + beside["loss"] + kept.activations + _logits(config, kept),
        "backward": stays + flat + beside["backward"] + kept.activations + width * kept.logits,
        "end": stays + waiting + beside["end"],
        "step": stays + waiting + beside["step"],
    }
