"""How long a run takes: by a throughput that was measured, or as an estimate for a kind of GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from relora.config import Config
from relora.engine.precision import precision_of
from relora.plan.estimate import break_even, peak_memory, training_flops
from relora.words import format_bytes, format_count

GIB = 2**30


class GPU(NamedTuple):
    """A kind of GPU, as its maker describes it.

    Attributes:
        flops: dense products in bf16 a second, at best.
        memory: bytes.
    """

    name: str
    flops: float
    memory: float


GPUS = {
    "b200": GPU("B200", 2250e12, 179 * GIB),
    "h200": GPU("H200", 989e12, 140 * GIB),
    "h100": GPU("H100", 989e12, 80 * GIB),
    "a100": GPU("A100 80GB", 312e12, 80 * GIB),
    "a100-40": GPU("A100 40GB", 312e12, 40 * GIB),
    "l40s": GPU("L40S", 362e12, 45 * GIB),
    "a6000": GPU("RTX A6000", 154.8e12, 48 * GIB),
    "4090": GPU("RTX 4090", 165.2e12, 24 * GIB),
    "3090": GPU("RTX 3090", 71e12, 24 * GIB),
    "mi300x": GPU("MI300X", 1307e12, 192 * GIB),
}


class Pace(NamedTuple):
    """What a run's hours are told from.

    Attributes:
        tokens_per_s: measured, of all ranks together; then nothing else counts.
        gpu: a key of `GPUS`.
        mfu: share of its peak that training reaches, of all FLOPs of the model.
        price: of a GPU-hour, in any currency.
    """

    tokens_per_s: float | None = None
    gpu: str | None = None
    mfu: float = 0.4
    price: float | None = None


def time_lines(config: Config, devices: int, pace: Pace) -> Iterator[str]:
    """Lines of the plan's page: hours, GPU-hours, cost, and those of full rank at equal FLOPs."""
    flops = training_flops(config, config.total_steps)
    tokens = config.total_steps * config.tokens_per_step
    ideal = ""
    if pace.tokens_per_s is not None:
        hours = tokens / pace.tokens_per_s / 3600
        how = f"{devices} at {format_count(pace.tokens_per_s)} tokens/s together"
    elif pace.gpu is None:
        yield "time         give --gpu h100 for an estimate, or --tokens-per-s as measured"
        return
    elif precision_of(config.deepspeed.precision).product_bytes == 4:
        yield f"time         no estimate for deepspeed.precision: {config.deepspeed.precision}"
        return
    else:
        gpu = GPUS[pace.gpu]
        hours = flops / (devices * gpu.flops * pace.mfu) / 3600
        how = f"{devices} {gpu.name}: an estimate,"
        ideal = f"             for {pace.mfu:.0%} of {gpu.flops / 1e12:,.0f} TFLOPS; "
        ideal += "what is reached here says relora bench"
    yield f"time         {hours:,.3g} hours, {hours * devices:,.3g} GPU-hours on {how}"
    if ideal:
        yield ideal
    if pace.price is not None:
        cost = hours * devices * pace.price
        yield f"cost         {cost:,.4g} at {pace.price:g} a GPU-hour"
    if config.lora is not None:
        full = hours / break_even(config).flops
        yield f"             full rank at the same FLOPs per second: {full:,.3g} hours"


def room(config: Config, devices: int, gpu: str | None) -> Iterator[str]:
    """A line on whether the run's peak fits the memory of a kind of GPU."""
    if gpu is None:
        return
    peak, kind = peak_memory(config, devices), GPUS[gpu]
    share = peak / kind.memory
    if share <= 0.9:  # the rest is the driver's, NCCL's and the allocator's
        yield f"  {format_bytes(peak)} of {format_bytes(kind.memory)} on each {kind.name}: fits"
        return
    yield (
        f"  {format_bytes(peak)} of {format_bytes(kind.memory)} on each {kind.name}: does not fit "
        "with a tenth to spare;"
    )
    yield "  take a smaller batch.micro_batch_size, model.gradient_checkpointing, a higher"
    yield "  deepspeed.zero_stage or more GPUs"
